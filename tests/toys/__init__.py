"""A toy pipeline for tests: three stages that write small text files, and fixtures to run them."""

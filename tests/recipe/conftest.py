"""The toy pipeline's fixtures."""

from toys.fixtures import lmdistill, toys, write  # noqa: F401

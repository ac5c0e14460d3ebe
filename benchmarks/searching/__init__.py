"""The pieces of benchmarks/search.py."""

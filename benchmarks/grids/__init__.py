"""The parts of benchmarks/quantize.py."""

"""Parts of benchmarks/loss.py: the ways that are measured, the rivals, and how time and memory are taken."""

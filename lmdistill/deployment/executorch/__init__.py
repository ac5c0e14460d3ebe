"""Models as ExecuTorch programs (`.pte`) for the CPU: written, proven to hold the trained weights, and run."""

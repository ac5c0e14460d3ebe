"""Weights on the grids that ship: to codes and scales, back, straight through in training, and to a file's bytes."""

"""The grids: one decorated class a file."""

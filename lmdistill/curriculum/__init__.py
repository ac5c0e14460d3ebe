"""Curricula: how hard a row is, and in which order rows of rising difficulty are trained on."""

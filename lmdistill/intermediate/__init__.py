"""Losses on what a student computes on its way: hidden states, attention relations, single blocks."""

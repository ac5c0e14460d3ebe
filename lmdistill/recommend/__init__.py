"""Proposes a recipe for a data set: measured features, rules, and a small sweep."""

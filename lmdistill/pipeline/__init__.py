"""The pipeline: plan a recipe, check everything that can be known, run its stages, keep what they make."""

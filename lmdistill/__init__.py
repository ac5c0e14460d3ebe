"""lmdistill: a teacher LLM in, a student that runs fast on a laptop's CPU out, each artefact with its proof."""

__version__ = "0.1.0"

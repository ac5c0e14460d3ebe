"""Engines that score tokens; teachers brought in from GGUF."""

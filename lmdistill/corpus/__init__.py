"""Load, render, tokenise, deduplicate, split and pack text; the corpus' reader."""

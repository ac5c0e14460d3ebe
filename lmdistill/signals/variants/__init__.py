"""The variants of the teacher cache, one file each; `lmdistill/signals/variant.py` says what a variant is."""

# distributions whose version changes a variant's bytes
TOOLS: dict[str, tuple[str, ...]] = {"compact": ("pcodec",), "sampled": ("pcodec",)}

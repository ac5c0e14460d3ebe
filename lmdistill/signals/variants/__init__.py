"""The variants of the teacher cache, one file each; `lmdistill/signals/variant.py` says what a variant is."""

"""How the compact variant makes coded rows small: a model of ids, one of gap codes, and entropy-coded streams."""

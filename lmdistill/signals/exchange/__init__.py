"""Teacher caches from other caches: converted, merged, and imported from other programs' data."""

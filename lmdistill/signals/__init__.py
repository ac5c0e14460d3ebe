"""The teacher cache: a teacher's top-K log-probs of every token, on disk, proven to belong to these tokens."""

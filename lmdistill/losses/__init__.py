"""Losses on cached teacher signals, fused with the head."""

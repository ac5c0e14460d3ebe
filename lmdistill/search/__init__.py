"""Which student? Candidates, their space, what they cost on the device they will run on, and the search."""

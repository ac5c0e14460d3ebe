"""What ships: GGUF files, proof that they compute what the checkpoint computes, and the runtime they run in."""

"""Data as plain tensors: read from disk, downloaded or made, and augmented in mini-batches."""

"""Data as plain tensors: what is read from disk, downloaded or made, and how mini-batches are
augmented.
"""

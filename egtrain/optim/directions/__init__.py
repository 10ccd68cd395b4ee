"""The choices of ζ: one small file each."""

"""Batch-size sweeps: what is run (`plan`), running it (`execution`), what came of it (`results`)
and its `picture`.
"""

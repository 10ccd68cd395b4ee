"""What a run writes down: metrics, TensorBoard events, and what it ran on."""

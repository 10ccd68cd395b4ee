"""A run's configuration: its schema, its files and their YAML. Nothing here imports torch."""

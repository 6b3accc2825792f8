"""The training loop, its state on disk, its processes, its record."""

"""The training loop: what it starts from, a step, what it leaves on disk."""

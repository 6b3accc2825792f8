"""A run's folder: what the run in it is, how it was computed, who works there."""

"""What is done to a student once it is built, and before a run wraps it: one transform a file, its section beside it."""

"""What a student has learned, and from what: evaluations of one shape."""

"""The student: built, checked against the cache, written out."""

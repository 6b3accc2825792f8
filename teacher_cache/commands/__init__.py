"""One file a command of `teacher-cache`; none imports another."""

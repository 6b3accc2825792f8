"""One file a command of `student-train`; none imports another."""

"""One term a file, their schedule, their sum."""

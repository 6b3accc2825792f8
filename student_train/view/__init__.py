"""Pictures and pages of students: beside their teacher, before and after training, run beside run."""

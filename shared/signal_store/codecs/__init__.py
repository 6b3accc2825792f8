"""From the teacher's numbers to stored codes and back."""

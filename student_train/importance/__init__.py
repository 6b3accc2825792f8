"""How much each token of a teacher's soft targets counts."""

"""How much each token of a teacher's soft targets counts (REQUIREMENTS 12-19)."""

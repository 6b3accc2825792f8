"""What a student has learned: validation, fidelity to its teacher."""

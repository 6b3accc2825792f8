"""The teacher: loaded, identified, run over batches, and what is read out of it."""

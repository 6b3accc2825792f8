"""doctor: what of this machine, and of a model, will be in the way."""

"""One file per signal: from a forward pass to the rows of its arrays, in the unit's token order."""

"""From the cache to micro-batches: order, windows, packed rows, batches, loader."""

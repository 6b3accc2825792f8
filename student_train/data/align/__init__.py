"""Which tokens the student reads, and where those of the cache stand among them."""

"""taps: where the taps of a model lie."""

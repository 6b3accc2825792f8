"""What both halves read out of a causal LM while it runs: block outputs, attention rows, FFN activations, the output head."""

"""The one module that a run wraps: student and terms in a single forward pass, in one process or many, in one precision."""

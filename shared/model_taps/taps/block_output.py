"""What a block gives out: the residual stream behind it. `hidden_states[layer]` of `output_hidden_states=True` is the same, but for
the last block's, which transformers normalises."""

from model_taps.block_parts import Block, Resolved


def find(block: Block) -> Resolved:
    """Of every block."""
    return block.residual("output")

"""What a block takes in: the residual stream before it."""

from model_taps.block_parts import Block, Resolved


def find(block: Block) -> Resolved:
    """Of every block."""
    return block.residual("input")

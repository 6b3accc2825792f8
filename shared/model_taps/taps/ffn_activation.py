"""What the FFN's down projection reads."""

from model_taps.block_parts import DOWN, Absent, Block, Resolved


def find(block: Block) -> Resolved | Absent:
    """Of the FFN that every token passes."""
    owner = block.dense_ffn()
    return owner if isinstance(owner, Absent) else owner.linear(DOWN, "input")

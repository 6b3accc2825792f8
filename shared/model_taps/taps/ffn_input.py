"""What the FFN takes in, normalised."""

from model_taps.block_parts import FFN, GATE, Absent, Block, Resolved


def find(block: Block) -> Resolved | Absent:
    """Of its module, or of its first layer where it has none."""
    ffn = block.child(FFN)
    return block.linear(GATE, "input") if ffn is None else ffn.at("input")

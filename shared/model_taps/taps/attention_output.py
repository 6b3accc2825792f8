"""What attention gives out, before the residual is added."""

from dataclasses import replace

from model_taps.block_parts import ATTENTION, Absent, Block, Resolved


def find(block: Block) -> Resolved | Absent:
    """Linear attention counts."""
    attention = block.child(ATTENTION)
    if attention is None:
        return Absent(f"no attention module among {', '.join(name for name, _ in block.module.named_children())}")
    linear = "linear" in attention.path.rsplit(".", 1)[-1]
    return replace(attention.at("output"), note="linear attention" if linear else "")

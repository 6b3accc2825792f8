"""The FFN before its nonlinearity: what its gate gives out, or its first layer where it has no gate."""

from dataclasses import replace

from model_taps.block_parts import GATE, Absent, Block, Resolved


def find(block: Block) -> Resolved | Absent:
    """Of gate and up projection in one matrix, the gate's half."""
    owner = block.dense_ffn()
    found = owner if isinstance(owner, Absent) else owner.linear(GATE, "output")
    if isinstance(found, Resolved) and found.path.endswith("gate_up_proj"):
        return replace(found, note="gate half", read=lambda state: state.chunk(2, dim=-1)[0])
    return found

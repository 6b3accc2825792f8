"""The card of the demo's teacher: how it was made, and its loss curve."""

import json
from pathlib import Path

CARD = """# Demo teacher

A Qwen3-architecture causal language model of {params:,} parameters with its own byte-level BPE of {vocab:,}, trained from
scratch on Python's standard library. It exists so that the demo has a teacher that knows something, without a download.

| | |
|---|---|
| command | `{command}` |
| data | standard library of Python {python}, {train_tokens:,} training tokens ({epochs:.1f} epochs), tests included |
| split | by SHA-256 of the module's family (`tools/stdlib_corpus.py`, salt `{salt}`, share {share:.4f}); tests go with what they test |
| validation | {val_tokens:,} tokens of held-out modules, no tests |
| validation loss | **{best:.4f} nats/token** at step {steps:,} |
| embedding | held to rank {rank} of {width} after the first {free_steps:,} steps, as a factorised embedding would be |
| seed | {seed} |
| context | {context} tokens |
| optimizer | AdamW (0.9, 0.95), weight decay 0.1 on matrices, learning rate {lr} |
| schedule | cycles (steps : of them linear decay to zero) {cycles}, each with {warmup} steps of warm-up |
| batch | {batch_tokens:,} tokens |
| training time | {minutes:.0f} minutes on {machine} |
| stored as | bfloat16 safetensors |

## Loss curve (validation, nats/token; all points in `curve.json`)

| step | train | validation |
|---|---|---|
{rows}

The text is Python's standard library, under the PSF licence; the weights are released with this project under Apache-2.0.
"""


def write_card(out: Path, curve: list[dict[str, float]], facts: dict[str, object]) -> None:
    """`README.md` and `curve.json` beside the weights."""
    shown = curve[:: max(1, len(curve) // 24)]
    shown += [curve[-1]] if shown[-1] is not curve[-1] else []
    rows = "\n".join(f"| {int(c['step']):,} | {c['train']:.3f} | {c['validation']:.4f} |" for c in shown)
    (out / "curve.json").write_text(json.dumps(curve, indent=0) + "\n")
    (out / "README.md").write_text(CARD.format(rows=rows, **facts))

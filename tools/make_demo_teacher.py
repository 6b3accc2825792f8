"""Train the demo teacher: a small Qwen3 causal LM on Python's standard library, on CPU, and write its card.

Policy: everything is a function of the command line and of the interpreter's standard library. The schedule is
warm-up, constant, linear decay; every `--eval-every` steps the held-out modules are scored, and the card keeps the curve.
Training can be killed and started again: it goes on from `--work`.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stdlib_corpus import SPLIT_SALT, VALIDATION_SHARE, modules

END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Runs of blanks stay whole (indentation is one token); digits stay single.
PRE_TOKEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


LOW_RANK_FACTOR = 1 / 3


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning-rate factor by optimizer step: linear warm-up, constant, linear decay to zero over the last `decay_steps`; then, for
    `low_rank_steps`, linear decay from LOW_RANK_FACTOR."""

    steps: int
    warmup_steps: int
    decay_steps: int
    low_rank_steps: int

    def factor(self, step: int) -> float:
        """The factor for the step after `step` finished ones."""
        if step >= self.steps:
            return LOW_RANK_FACTOR * (self.steps + self.low_rank_steps - step) / self.low_rank_steps
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries, from the training modules only; no token for the unknown is needed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m.text for m in modules() if m.split == "train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str, *, tests: bool) -> np.ndarray:
    """All modules of a split as one uint16 array, each closed by the end-of-text token."""
    texts = [m.text for m in modules() if m.split == split and (tests or not m.is_test)]
    eos = tokenizer.eos_token_id
    parts = [[*encoding.ids, eos] for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in parts])


def training_batches(stream: np.ndarray, context: int, rows: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """Rows of `context + 1` tokens; every epoch cuts the stream at another offset and shuffles anew, as a function of the seed."""
    step = 0
    for epoch in range(10**9):
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(context))
        starts = rng.permutation(np.arange(offset, len(stream) - context - 1, context))
        for i in range(0, len(starts) - rows + 1, rows):
            if step >= start:
                picked = np.stack([stream[s : s + context + 1] for s in starts[i : i + rows]]).astype(np.int64)
                yield torch.from_numpy(picked)
            step += 1


def next_token_loss(model: Qwen3ForCausalLM, rows_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of every token of the rows but the first."""
    hidden_BTD = model.model(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD).flatten(0, 1)
    return F.cross_entropy(logits_NV.float(), rows_BT[:, 1:].flatten())


def leading_projector(weight_VD: torch.Tensor, rank: int) -> torch.Tensor:
    """[D, D]: onto the `rank` leading right singular directions of the (tied) embedding, as if it were factorised (ALBERT)."""
    directions = torch.linalg.svd(weight_VD.detach().double(), full_matrices=False).Vh[:rank]
    projector: torch.Tensor = (directions.T @ directions).float()
    return projector


@torch.no_grad()
def validation_loss(model: Qwen3ForCausalLM, stream: np.ndarray, context: int, rows: int) -> float:
    """Nats per token over the whole stream, in rows of `context`."""
    model.eval()
    total, count = 0.0, 0
    starts = np.arange(0, len(stream) - 1, context)
    full = [s for s in starts if s + context + 1 <= len(stream)]
    for i in range(0, len(full), rows):
        batch = torch.from_numpy(np.stack([stream[s : s + context + 1] for s in full[i : i + rows]]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total += float(next_token_loss(model, batch)) * batch[:, 1:].numel()
        count += batch[:, 1:].numel()
    model.train()
    return total / count


def build_model(vocab_size: int, context: int, eos: int, seed: int) -> Qwen3ForCausalLM:
    """Qwen3, 6 layers of width 256, tied embeddings: 5.6M parameters, 11.3 MB in bf16."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            eos_token_id=eos,
            pad_token_id=eos,
            bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def build_optimizer(model: Qwen3ForCausalLM, lr: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay. (Muon was tried: `tools/bench/LOG.md` says why not.)"""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


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
| embedding | held to rank {rank} of {width} in the last {low_rank} steps, as a factorised embedding would be |
| seed | {seed} |
| context | {context} tokens |
| optimizer | AdamW (0.9, 0.95), weight decay 0.1 on matrices, learning rate {lr}, warm-up {warmup}, linear decay over {decay} steps, then again from a third |
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_teacher")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint folder; a killed run goes on from here")
    parser.add_argument("--steps", type=int, default=1650)
    parser.add_argument("--decay-steps", type=int, default=450)
    parser.add_argument("--embedding-rank", type=int, default=128)
    parser.add_argument("--low-rank-steps", type=int, default=250, help="last steps, with the embedding held to its rank")
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--eval-every", type=int, default=200)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer_dir = args.work / "tokenizer"
    if not tokenizer_dir.exists():
        train_tokenizer(args.vocab_size).save_pretrained(tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    train = token_stream(tokenizer, "train", tests=True)
    held_out = token_stream(tokenizer, "validation", tests=False)

    model = build_model(args.vocab_size, args.context, tokenizer.eos_token_id, args.seed)
    optimizer = build_optimizer(model, args.lr)
    schedule = Schedule(args.steps, args.warmup_steps, args.decay_steps, args.low_rank_steps)
    total_steps = args.steps + args.low_rank_steps
    curve: list[dict[str, float]] = []
    start, seconds_before = 0, 0.0
    checkpoint = args.work / "state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, seconds_before = state["step"], state["curve"], state["seconds"]

    started = time.perf_counter()
    compiled_loss = torch.compile(next_token_loss)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    running = math.nan
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("demo teacher", total=total_steps, completed=start)
        batches = training_batches(train, args.context, args.rows, args.seed, start)
        for step, rows_BT in zip(range(start, total_steps), batches, strict=False):
            if step == max(start, args.steps):
                projector_DD = leading_projector(model.model.embed_tokens.weight, args.embedding_rank)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule.factor(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled_loss(model, rows_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step >= args.steps:
                with torch.no_grad():
                    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ projector_DD)
            value = float(loss.detach())
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            progress.update(bar, advance=1, description=f"demo teacher  loss {running:.3f}")
            done = step + 1
            if done % args.eval_every == 0 or done in (args.steps, total_steps):
                seconds = seconds_before + time.perf_counter() - started
                held = validation_loss(model, held_out, args.context, args.rows)
                curve.append({"step": done, "train": running, "validation": held, "seconds": seconds})
                print(json.dumps(curve[-1]), flush=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                torch.save({**state, "curve": curve, "seconds": seconds}, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)

    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    tokens_per_step = args.rows * args.context
    final = validation_loss(model.float(), held_out, args.context, args.rows)
    write_card(
        args.out,
        curve,
        {
            "params": sum(p.numel() for p in model.parameters()),
            "vocab": args.vocab_size,
            "python": platform.python_version(),
            "command": f"tools/make_demo_teacher --work WORK --steps {args.steps} --decay-steps {args.decay_steps} --low-rank-steps {args.low_rank_steps} --seed {args.seed}",
            "train_tokens": len(train),
            "epochs": total_steps * tokens_per_step / len(train),
            "salt": SPLIT_SALT,
            "share": VALIDATION_SHARE,
            "val_tokens": len(held_out),
            "best": final,
            "steps": total_steps,
            "seed": args.seed,
            "context": args.context,
            "lr": args.lr,
            "warmup": args.warmup_steps,
            "decay": args.decay_steps,
            "rank": args.embedding_rank,
            "width": model.config.hidden_size,
            "low_rank": args.low_rank_steps,
            "batch_tokens": tokens_per_step,
            "minutes": curve[-1]["seconds"] / 60,
            "machine": f"{torch.get_num_threads()} threads of an x86-64 CPU",
        },
    )


if __name__ == "__main__":
    main()

"""Train the demo teacher: a small Qwen3 causal LM on Python's standard library, on CPU, and write its card.

Policy: everything is a function of the command line and of the interpreter's standard library. The schedule runs in
cycles of warm-up, constant and linear decay to zero, each going on from the last one's weights (WSD-S, Wen et al. 2024,
arXiv:2410.05192); a cycle that no longer lowers the held-out loss is the last. Every `--eval-every` steps the held-out
modules are scored, and the card keeps the curve. Training can be killed and started again: it goes on from `--work`.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demo_teacher_card import write_card
from demo_teacher_schedule import Cycle, Schedule
from stdlib_corpus import SPLIT_SALT, VALIDATION_SHARE, modules

END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Runs of blanks stay whole (indentation is one token); digits stay single.
PRE_TOKEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_teacher")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint folder; a killed run goes on from here")
    parser.add_argument(
        "--cycles", type=Cycle.parse, nargs="+", default=[Cycle(1650, 450), Cycle(2600, 1200)], metavar="STEPS:DECAY"
    )
    parser.add_argument("--embedding-rank", type=int, default=128, help="of the tied embedding, after the first cycle")
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--eval-every", type=int, default=200)
    return parser.parse_args()


@dataclass(slots=True)
class Training:
    """What a checkpoint holds: the weights, the optimizer, and how far they have come."""

    model: Qwen3ForCausalLM
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve, self.seconds = state["step"], state["curve"], state["seconds"]

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save({**state, "curve": self.curve, "seconds": self.seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def train(training: Training, schedule: Schedule, stream: np.ndarray, held_out: np.ndarray, args: argparse.Namespace) -> None:
    """All the steps that are left; scores and saves every `--eval-every` steps and at every cycle's end."""
    model, optimizer = training.model, training.optimizer
    embedding_VD = model.model.embed_tokens.weight
    compiled_loss = torch.compile(next_token_loss)
    running, started, seconds_before = math.nan, time.perf_counter(), training.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("demo teacher", total=schedule.steps, completed=training.step)
        batches = training_batches(stream, args.context, args.rows, args.seed, training.step)
        projector_DD = None
        for step, rows_BT in zip(range(training.step, schedule.steps), batches, strict=False):
            if projector_DD is None and step >= schedule.ends[0]:
                projector_DD = leading_projector(embedding_VD, args.embedding_rank)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule.factor(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled_loss(model, rows_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if projector_DD is not None:
                with torch.no_grad():
                    embedding_VD.copy_(embedding_VD @ projector_DD)
            value = float(loss.detach())
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            progress.update(bar, advance=1, description=f"demo teacher  loss {running:.3f}")
            training.step = step + 1
            if training.step % args.eval_every == 0 or training.step in schedule.ends:
                training.seconds = seconds_before + time.perf_counter() - started
                held = validation_loss(model, held_out, args.context, args.rows)
                training.curve.append({"step": training.step, "train": running, "validation": held, "seconds": training.seconds})
                print(json.dumps(training.curve[-1]), flush=True)
                training.save(args.work / "state.pt")


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer_dir = args.work / "tokenizer"
    if not tokenizer_dir.exists():
        train_tokenizer(args.vocab_size).save_pretrained(tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    stream = token_stream(tokenizer, "train", tests=True)
    held_out = token_stream(tokenizer, "validation", tests=False)

    model = build_model(args.vocab_size, args.context, tokenizer.eos_token_id, args.seed)
    schedule = Schedule(tuple(args.cycles), args.warmup_steps)
    training = Training(model, build_optimizer(model, args.lr))
    if (args.work / "state.pt").exists():
        training.load(args.work / "state.pt")
    train(training, schedule, stream, held_out, args)

    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    cycles = " ".join(f"{c.steps}:{c.decay_steps}" for c in args.cycles)
    write_card(
        args.out,
        training.curve,
        {
            "params": sum(p.numel() for p in model.parameters()),
            "vocab": args.vocab_size,
            "python": platform.python_version(),
            "command": f"tools/make_demo_teacher --work WORK --cycles {cycles} --seed {args.seed}",
            "train_tokens": len(stream),
            "epochs": schedule.steps * args.rows * args.context / len(stream),
            "salt": SPLIT_SALT,
            "share": VALIDATION_SHARE,
            "val_tokens": len(held_out),
            "best": validation_loss(model.float(), held_out, args.context, args.rows),
            "steps": schedule.steps,
            "seed": args.seed,
            "context": args.context,
            "lr": args.lr,
            "warmup": args.warmup_steps,
            "cycles": cycles,
            "rank": args.embedding_rank,
            "width": model.config.hidden_size,
            "free_steps": schedule.ends[0],
            "batch_tokens": args.rows * args.context,
            "minutes": training.seconds / 60,
            "machine": f"{torch.get_num_threads()} threads of an x86-64 CPU",
        },
    )


if __name__ == "__main__":
    main()

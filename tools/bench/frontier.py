"""Bytes against fidelity on one teacher: our codec at every head and step, its named qualities, DistillKit's two settings, and
pure heads with true masses; on the same held-out tokens, in one run.

Bytes are as written (one chunk of every array, as fill compresses it; DistillKit's as zstd Parquet or raw, whichever is smaller).
Angles are between gradients of forward KL with respect to the output head of a student that knows how frequent tokens are: full
vocabulary against cached, over parts of 1,024 tokens; DistillKit's with its own losses. Beside them, what reverse water-filling
of the measured spectrum says the tail must take at the same error. Rows that are in the JSON already are not measured again.
"""

import argparse
import json
import math
import platform
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from frontier_report import TEMPERATURES, Results, Row, goals, plot, print_table
from model_taps.head import OutputHead, final_hidden, output_head
from model_taps.loading import load_model, load_tokenizer
from peers_distillkit import BUDGET, MISSING, RECOMMENDED, DistillKit, parquet_bytes
from run_kit.command_line import guarded, keep_freed_memory
from run_kit.progress import progress_bar
from signal_store.codecs.distribution import DistributionCodec
from signal_store.signals import QUALITIES, DistributionSignal
from teacher_cache.signals.tail.basis import TailFit, logit_chunks
from teacher_cache.signals.tail.choice import choose_codec, encode_rows, step_of_error, stored_bytes, tail_codes
from teacher_cache.signals.tail.fidelity import PART_TOKENS, fold, measure

ERRORS = (0.64, 0.32, 0.16, 0.08, 0.04, 0.02, 0.01, 0.005)
"""Half the squared error of the logits that the steps of the grid make."""
HEADS, PURE_HEADS = (8, 16, 32, 64), (16, 32, 64, 128)


@torch.inference_mode()
def states(teacher: str, corpus: Path, wanted: dict[str, int], context: int) -> dict[str, Tensor]:
    """By split, what the head reads at the first tokens of documents in a seeded order, [n, D] float32."""
    model, tokenizer = load_model(teacher, what="teacher", dtype=torch.float32), load_tokenizer(teacher)
    found = {}
    for split, tokens in wanted.items():
        texts = [json.loads(line)["text"] for line in (corpus / f"{split}.jsonl").open(encoding="utf-8")]
        random.Random(0).shuffle(texts)
        parts: list[Tensor] = []
        with progress_bar() as progress:
            bar = progress.add_task(f"teacher, {split}", total=tokens, unit="tokens")
            for text in texts:
                ids = tokenizer(text).input_ids[:context]
                if len(ids) >= 16 and sum(map(len, parts)) < tokens:
                    parts.append(final_hidden(model, torch.tensor([ids]), None)[0])
                    progress.advance(bar, len(ids))
        found[split] = torch.cat(parts)[:tokens].contiguous()
    head = output_head(model)
    found["weight"] = head.weight.detach().clone()
    return found


def ours(
    name: str, setting: str, codecs: list[DistributionCodec], signals: list[DistributionSignal], head: OutputHead, held_nD: Tensor
) -> list[Row]:
    """Of codecs with the same head."""
    codes = encode_rows(codecs[0], head, held_nD)
    rows = []
    for codec, signal, found in zip(codecs, signals, measure(codecs, head, held_nD), strict=True):
        parts = {array: stored_bytes(codes, codec, signal, (array,)) for array in ("scalars", "head_ids", "head_codes")}
        parts["tail_codes"] = stored_bytes(tail_codes(codec, held_nD), codec, signal, ("tail",)) if codec.rank else 0.0
        step = float(codec.tail_step.median()) if codec.rank else math.nan
        rows.append(
            Row(
                name,
                setting.format(step=step, rank=codec.rank, head=codec.head),
                sum(parts.values()),
                {f"{t:g}": a for t, a in zip(codec.temperatures, found.angle_degrees, strict=True)},
                {f"{t:g}": a for t, a in zip(codec.temperatures, found.angle_error, strict=False)},
                {f"{t:g}": a for t, a in zip(codec.temperatures, found.scaled_kl_nats, strict=True)},
                parts,
            )
        )
    return rows


@torch.no_grad()
def distillkit(peer: DistillKit, setting: dict[str, Any], name: str, head: OutputHead, held_nD: Tensor) -> list[Row]:
    """One of its settings, in both modes of the missing mass, with its own loss."""
    vocab = len(head.weight)
    codec = peer.codec(vocab, setting, normalize_t=name.endswith("normalize_t"))
    packed = [codec.compress(head.logits(chunk).log_softmax(1)) for chunk in logit_chunks(held_nD, head)]
    joined = {key: torch.cat([p[key] for p in packed]) for key in packed[0]}
    size = min(parquet_bytes(joined), sum(t.shape[1] * t.element_size() for t in joined.values()))
    ids, logprobs = codec.decompress_to_sparse(joined)
    signs = torch.randint(2, (vocab,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float()
    angles: dict[str, dict[str, list[float]]] = {mode: {f"{t:g}": [] for t in TEMPERATURES} for mode in MISSING}
    for part in torch.arange(len(held_nD)).tensor_split(max(1, round(len(held_nD) / PART_TOKENS))):
        for t in TEMPERATURES:
            unigram = sum((head.logits(c) / t).softmax(1).sum(0) for c in logit_chunks(held_nD[part], head)) / len(part)
            student = t * torch.as_tensor(unigram).log()
            true = torch.zeros(0)
            theirs = dict.fromkeys(MISSING, torch.zeros(0))
            for rows in part.split(64):
                hidden = held_nD[rows]
                p = (head.logits(hidden) / t).softmax(1)
                true = true + fold((unigram - p) * signs).T @ hidden if len(true) else fold((unigram - p) * signs).T @ hidden
                for mode in MISSING:
                    gradient = peer.gradient("forward_kl", student.repeat(len(rows), 1), ids[rows], logprobs[rows].float(), t, mode)
                    assert gradient is not None
                    folded = fold(gradient.float() * signs).T @ hidden
                    theirs[mode] = theirs[mode] + folded if len(theirs[mode]) else folded
            for mode in MISSING:
                angles[mode][f"{t:g}"].append(angle(true, theirs[mode]))
    return [
        Row(
            "DistillKit",
            f"{name}, {mode}",
            size,
            {t: float(np.mean(values)) for t, values in found.items()},
            {t: float(np.std(values, ddof=1) / math.sqrt(len(values))) for t, values in found.items() if len(values) > 1},
            {},
            {},
        )
        for mode, found in angles.items()
    ]


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors, by atan2, which keeps small angles."""
    u, v = a.flatten().double() / a.double().norm(), b.flatten().double() / b.double().norm()
    return float(torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())))


def rate_bound(energy: Tensor, squared_error: float) -> float:
    """Bytes a token that a Gaussian source of these variances takes at least at a squared error: reverse water-filling."""
    low, high = 0.0, float(energy.max())
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if float(energy.clamp(max=level).sum()) < squared_error else (low, level)
    return float((energy / max(level, 1e-30)).clamp(min=1).log2().sum()) / 2 / 8


def rates(fit: TailFit, held_nD: Tensor, signal: DistributionSignal) -> list[dict[str, float]]:
    """The tail alone, step by step: bytes as written, the codes' entropy, and the bound at the same error."""
    rows = []
    coordinates = (held_nD.double() - fit.mean) @ fit.whiten
    energy = coordinates.var(0)
    for error in ERRORS:
        codec = fit.codec_of_step(step_of_error(fit, error), signal, None)
        codes = tail_codes(codec, held_nD)
        decoded = codes.tail_codes.double() * codec.tail_step
        rest = torch.zeros(len(held_nD), len(fit.mean) - codec.rank, dtype=torch.float64)
        squared = float((torch.cat([decoded, rest], 1) - coordinates).square().sum(1).mean())
        entropy = sum(_entropy(column) for column in codes.tail_codes.numpy().T) / 8
        written = stored_bytes(codes, codec, signal, ("tail",))
        rows.append({"half_error": squared / 2, "written": written, "entropy": entropy, "bound": rate_bound(energy, squared)})
    return rows


def _entropy(codes: Any) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/real_model/model")
    parser.add_argument(
        "--corpus", type=Path, default=Path("runs/real_model/corpus"), help="folder of train.jsonl and validation.jsonl"
    )
    parser.add_argument("--distillkit", type=Path, help="checkout of DistillKit")
    parser.add_argument("--fit-tokens", type=int, default=9216)
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--name", default="frontier")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args()


def fill_in(results: Results, fit: TailFit, head: OutputHead, held_nD: Tensor, peer: DistillKit | None) -> None:
    """Measure what the results lack: the peer's settings, the named qualities, the grid of heads and steps, heads alone."""
    signal = DistributionSignal(temperatures=TEMPERATURES)
    if peer is not None:
        for name, setting in (("recommended", RECOMMENDED), ("budget", BUDGET), ("recommended, normalize_t", RECOMMENDED)):
            results.get(f"distillkit {name}", partial(distillkit, peer, setting, name, head, held_nD))
    for quality in QUALITIES:
        results.get(f"quality {quality} {QUALITIES[quality]}", partial(_quality, quality, fit, head, held_nD))
    for size in HEADS:
        own = signal.model_copy(update={"head": size})
        codecs = [fit.codec_of_step(step_of_error(fit, error), own, head.softcap) for error in ERRORS]
        label = "step {step:.3f}, rank {rank}"
        results.get(f"head {size}", partial(ours, f"head {size} + tail", label, codecs, [own] * len(codecs), head, held_nD))
    for size in PURE_HEADS:
        own = signal.model_copy(update={"head": size, "rank": 0})
        codec = fit.codec(0, 1.0, own, head.softcap)
        results.get(f"pure {size}", partial(ours, "head + true masses", "head {head}", [codec], [own], head, held_nD))


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / f"{args.name}-states.safetensors"
    if not kept.exists():
        save_file(states(args.teacher, args.corpus, {"train": args.fit_tokens, "validation": args.tokens}, args.context), kept)
    found = load_file(kept)
    head, held_nD = OutputHead(found["weight"], None, 1.0, None), found["validation"][: args.tokens]
    signal = DistributionSignal(temperatures=TEMPERATURES)
    fit = TailFit.of(found["train"], head, signal)
    results = Results.at(args.out / f"{args.name}-rows.json")
    fill_in(results, fit, head, held_nD, None if args.distillkit is None else DistillKit(args.distillkit))
    tail = rates(fit, held_nD, signal)
    energy = (fit.energy / fit.energy.sum()).cumsum(0)
    summary = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "teacher": Path(args.teacher).name,
        "vocab_size": len(head.weight),
        "width": len(fit.mean),
        "tokens": len(held_nD),
        "fit_tokens": len(found["train"]),
        "energy_of_directions": {str(r): float(energy[r - 1]) for r in (16, 64, 128, 256, 512) if r <= len(energy)},
        "goals": goals(results.all),
        "tail": tail,
        "rows": [asdict(row) for row in results.all],
    }
    print_table(results.all)
    print(json.dumps(summary["goals"], indent=1))
    (args.out / f"{args.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    size = f"{len(held_nD):,} held-out tokens, width {len(fit.mean)}, vocabulary {len(head.weight):,}"
    plot(results.all, tail, f"{args.name}: {size}", args.out / f"{args.name}.png")


def _quality(quality: str, fit: TailFit, head: OutputHead, held_nD: Tensor) -> list[Row]:
    """What calibration would choose, searched on the first half of the tokens, measured on all."""
    asked = DistributionSignal.model_validate({"quality": quality})
    choice = choose_codec(fit, head, asked, held_nD[: max(PART_TOKENS, len(held_nD) // 2)])
    own = asked.model_copy(update={"head": choice.codec.head})
    return ours("quality", f"{quality}, head {{head}}, step {{step:.3f}}", [choice.codec], [own], head, held_nD)


if __name__ == "__main__":
    guarded(main)

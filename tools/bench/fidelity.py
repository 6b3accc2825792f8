"""Bytes per token against fidelity: a cache as it stands, our codec at other settings, and DistillKit's, in one run.

Prints a table, and writes JSON and a plot (bytes per token against the angle of forward KL's gradient, one curve per method and
temperature). `--distillkit PATH` takes a checkout of it; without, its rows are left out.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fidelity_measure import (
    DIVERGENCES,
    HeldOut,
    TemperatureFidelity,
    angle,
    bytes_per_token,
    cached_logprobs,
    held_out,
    logit_gradient,
    measure,
)
from model_taps.head import final_hidden
from model_taps.loading import load_model
from peers_distillkit import BUDGET, MISSING, RECOMMENDED, DistillKit, parquet_bytes
from run_kit.command_line import guarded, keep_freed_memory
from signal_store.cache import Cache, open_cache
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from signal_store.codecs.zigzag import to_zigzag
from signal_store.io.shard_writer import encode_chunk
from signal_store.signals import DistributionSignal
from signal_store.signals.distribution import distribution_arrays
from teacher_cache.signals.tail.basis import TailFit

TEMPERATURES = (1.0, 2.0, 3.0, 4.0)
STEP_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)
HEADS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Row:
    """One method at one setting."""

    method: str
    setting: str
    bytes_per_token: float
    fidelity: dict[float, TemperatureFidelity]


@torch.no_grad()
def calibration_states(cache: Cache, tokens: int) -> torch.Tensor:
    """[n, D] float32: what the teacher's head reads on training tokens, from segments spread over the corpus."""
    teacher = load_model(cache.manifest.teacher.name, what="teacher", dtype=getattr(torch, cache.manifest.teacher.dtype))
    found: list[torch.Tensor] = []
    wanted = np.linspace(0, cache.first_segment(int(cache.units("train")[-1])) - 1, 400).round().astype(int)
    for index in np.random.default_rng(0).permutation(np.unique(wanted)):
        segment = cache[int(index)]
        found.append(final_hidden(teacher, torch.from_numpy(segment.input_ids.astype(np.int64))[None], None)[0].float())
        if sum(map(len, found)) >= tokens:
            break
    return torch.cat(found)


@torch.no_grad()
def encode(codec: DistributionCodec, held: HeldOut) -> DistributionCodes:
    """The held-out tokens' codes."""
    labels = held.labels.clamp(min=-1)
    parts = [codec.encode(held.hidden_teacher[rows], held.teacher_logits(rows), labels[rows])[0] for rows in held.chunks()]
    return DistributionCodes(
        torch.cat([p.head_ids for p in parts]),
        torch.cat([p.head_codes for p in parts]),
        torch.cat([p.tail_codes for p in parts]),
        torch.cat([p.scalars for p in parts]),
    )


def code_bytes(codes: DistributionCodes, signal: DistributionSignal, rank: int, vocab_size: int) -> float:
    """Stored bytes of a token, each array in one inner chunk as fill writes it."""
    total = 0
    names = {"scalars": codes.scalars, "head_ids": codes.head_ids, "head_codes": codes.head_codes, "tail_codes": codes.tail_codes}
    for spec in distribution_arrays(signal, rank, 65_536, vocab_size):
        rows = names[name := spec.path.split("/")[1]].numpy()
        rows = to_zigzag(rows) if name == "tail_codes" and spec.dtype == "uint8" else rows.astype(spec.dtype, copy=False)
        total += len(encode_chunk(rows, spec)[0])
    return total / len(codes)


def our_rows(cache: Cache, held: HeldOut) -> list[Row]:
    """The cache as it stands, the codec at other quantisation steps, and pure heads whose tail is one bucket."""
    signal = cache.manifest.signals.distribution
    assert signal is not None
    stored = bytes_per_token(cache)["distribution"]
    rows = [Row("this cache", "as stored", stored, measure(held, cached_logprobs(held, held.codec, held.codes), TEMPERATURES))]
    states = calibration_states(cache, 16 * held.hidden_teacher.shape[1])
    fit = TailFit.of(states, held.head_teacher, signal)
    step = float(held.codec.tail_step.median())
    for factor in STEP_FACTORS:
        codec = fit.codec_of_step(step * factor, signal, held.head_teacher.softcap)
        codes = encode(codec, held)
        found = measure(held, cached_logprobs(held, codec, codes), TEMPERATURES)
        rows.append(
            Row("head 16 + tail", f"step x{factor:g}, rank {codec.rank}", code_bytes(codes, signal, codec.rank, held.vocab), found)
        )
    for head in HEADS:
        pure = signal.model_copy(update={"head": head, "rank": 0})
        codec = fit.codec(0, 1.0, pure, held.head_teacher.softcap)
        codes = encode(codec, held)
        found = measure(held, cached_logprobs(held, codec, codes), TEMPERATURES)
        rows.append(Row("head + bucket", f"head {head}", code_bytes(codes, pure, 0, held.vocab), found))
    return rows


def distillkit_rows(held: HeldOut, peer: DistillKit) -> list[Row]:
    """Its two settings, with and without `normalize_t`, in both missing-mass modes; its own losses' gradients."""
    rows = []
    for name, setting in (("recommended", RECOMMENDED), ("budget", BUDGET)):
        for normalize_t in (False, True):
            codec = peer.codec(held.vocab, setting, normalize_t=normalize_t)
            packed = [codec.compress((held.teacher_logits(c)).log_softmax(1)) for c in held.chunks()]
            joined = {key: torch.cat([p[key] for p in packed]) for key in packed[0]}
            size = min(parquet_bytes(joined), sum(t.shape[1] * t.element_size() for t in joined.values()))
            sparse = [codec.decompress_to_sparse(p) for p in packed]
            for missing in MISSING:
                setting_name = f"{name}{', normalize_t' if normalize_t else ''}, {missing}"
                rows.append(Row("DistillKit", setting_name, size, _peer_fidelity(held, peer, sparse, missing)))
    return rows


@torch.no_grad()
def _peer_fidelity(held: HeldOut, peer: DistillKit, sparse: list[Any], missing: str) -> dict[float, TemperatureFidelity]:
    found = {}
    width = held.hidden_student.shape[1]
    for temperature in TEMPERATURES:
        full = {d: torch.zeros(held.vocab, width) for d in DIVERGENCES}
        theirs: dict[str, torch.Tensor | None] = {d: torch.zeros(held.vocab, width) for d in DIVERGENCES}
        for rows, (ids, logprobs) in zip(held.chunks(), sparse, strict=True):
            logits = held.student_logits(rows)
            logp = (held.teacher_logits(rows) / temperature).log_softmax(1)
            logq = (logits / temperature).log_softmax(1)
            for divergence in DIVERGENCES:
                full[divergence] += logit_gradient(divergence, logp, logq).T @ held.hidden_student[rows]
                gradient = peer.gradient(divergence, logits, ids, logprobs.float(), temperature, missing)
                sofar = theirs[divergence]
                if gradient is None or sofar is None:
                    theirs[divergence] = None
                else:
                    sofar += gradient.float().T @ held.hidden_student[rows]
        angles = {d: float("nan") if (g := theirs[d]) is None else angle(full[d], g) for d in DIVERGENCES}
        found[temperature] = TemperatureFidelity(float("nan"), float("nan"), float("nan"), angles, {}, len(held))
    return found


def print_table(rows: list[Row]) -> None:
    table = Table(title="angle in degrees between cached and full-vocabulary gradient: forward KL / reverse KL / JSD")
    for column in ("method", "setting", "bytes/token", *(f"T={t:g}" for t in TEMPERATURES), "KL at T=1"):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right")
    for row in rows:
        cells = [" / ".join(_short(row.fidelity[t].angle_degrees[d]) for d in DIVERGENCES) for t in TEMPERATURES]
        table.add_row(row.method, row.setting, f"{row.bytes_per_token:.1f}", *cells, _short(row.fidelity[1.0].mean_kl_nats))
    Console(width=150).print(table)


def _short(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2g}"


def goals(rows: list[Row]) -> dict[str, Any]:
    """The cache against DistillKit's recommended setting at its best: bytes, and the angle of forward KL by temperature."""
    ours = rows[0]
    peers = [row for row in rows if row.method == "DistillKit" and row.setting.startswith("recommended")]
    if not peers:
        return {}
    best = {t: min(row.fidelity[t].angle_degrees["forward_kl"] for row in peers) for t in TEMPERATURES}
    ratios = {f"{t:g}": best[t] / ours.fidelity[t].angle_degrees["forward_kl"] for t in TEMPERATURES}
    return {"bytes_ratio": min(row.bytes_per_token for row in peers) / ours.bytes_per_token, "angle_ratio": ratios}


def plot(rows: list[Row], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TEMPERATURES), figsize=(16, 4.6), sharey=True)
    for axis, temperature in zip(axes, TEMPERATURES, strict=True):
        methods: dict[str, list[Row]] = {}
        for row in rows:
            name = row.method if row.method != "DistillKit" else f"DistillKit, {row.setting.rsplit(', ', 1)[1]}"
            methods.setdefault(name, []).append(row)
        for name, own in methods.items():
            own = sorted(own, key=lambda row: row.bytes_per_token)
            x = [row.bytes_per_token for row in own]
            y = [row.fidelity[temperature].angle_degrees["forward_kl"] for row in own]
            alone = name == "this cache"
            axis.plot(
                x, y, marker="*" if alone else "o", markersize=14 if alone else 5, linestyle="none" if alone else "-", label=name
            )
        axis.set(title=f"T = {temperature:g}", xlabel="bytes per token", xscale="log", yscale="log")
        axis.set_xticks([50, 100, 200, 300], ["50", "100", "200", "300"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("angle to the full gradient, degrees")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    parser.add_argument("--student", required=True, help="folder of a student whose gradient is compared")
    parser.add_argument("--distillkit", type=Path, help="checkout of DistillKit")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    keep_freed_memory()
    cache = open_cache(args.cache)
    held = held_out(cache, cache.manifest.teacher.name, args.student, args.tokens)
    rows = our_rows(cache, held)
    if args.distillkit is not None:
        rows += distillkit_rows(held, DistillKit(args.distillkit))
    print_table(rows)
    summary = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens": len(held),
        "bytes_per_array": {k: v for k, v in bytes_per_token(cache, depth=2).items() if k.startswith("distribution/")},
        "goals": goals(rows),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(summary["goals"]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fidelity.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(rows, args.out / "fidelity.png")


if __name__ == "__main__":
    guarded(main)

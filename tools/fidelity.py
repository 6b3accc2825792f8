"""How faithful a cache is: cached against the teacher's full distribution, on the cache's own validation tokens.

Mean KL(teacher ‖ cached) in nats; and the angle and the ratio of norms between the cached and the full-vocabulary gradient of
forward KL with respect to a student's output head, summed over all tokens. Loads the teacher.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_taps.head import final_hidden, output_head
from model_taps.loading import load_model
from signal_store.cache import Cache
from student_train.batch import Cursor
from student_train.distiller import Codecs
from student_train.losses.config import Losses
from student_train.losses.objective import Objective
from student_train.stream.collate import collate
from student_train.stream.reader import Needs, load_window
from student_train.stream.rows import pack_rows

CHUNK = 512


@dataclass(frozen=True, slots=True)
class TemperatureFidelity:
    """At one temperature, over `tokens` tokens."""

    mean_kl_nats: float
    angle_degrees: float
    norm_ratio: float
    tokens: int


@torch.inference_mode()
def measure(
    cache: Cache, teacher_folder: Path, student_folder: Path, temperatures: tuple[float, ...], min_tokens: int
) -> dict[float, TemperatureFidelity]:
    """Fidelity by temperature, on at least `min_tokens` tokens of the validation split, one segment a row."""
    teacher = load_model(str(teacher_folder), what="teacher", dtype=getattr(torch, cache.manifest.teacher.dtype))
    student = load_model(str(student_folder), what="student", dtype=torch.float32)
    needs = Needs(distribution=True, hidden=(), attention=())
    losses = Losses.model_validate({"tla": {}})
    codec = Codecs.of(cache, Objective(losses, (), ()), torch.device("cpu")).distribution
    assert codec is not None
    units = load_window(cache, [int(u) for u in cache.units("validation")], needs)
    rows, tokens = [], 0
    for row in pack_rows(units, cache.manifest.plan.context, packed=False):
        rows.append(row)
        tokens += int(row[0][0].segments["length"][row[0][1]])
        if tokens >= min_tokens:
            break
    width = cache.manifest.plan.context
    batch = collate(rows, width, needs, packed=False, cursor=Cursor())
    assert batch.distribution is not None
    hidden = {
        name: final_hidden(m, batch.input_ids, None).flatten(0, 1)[batch.flat]
        for name, m in (("teacher", teacher), ("student", student))
    }
    vocab = codec.vocab_size
    head = output_head(teacher).float()
    found = {}
    for temperature in temperatures:
        full, cached = (torch.zeros(vocab, hidden["student"].shape[1], dtype=torch.float64) for _ in range(2))
        kl = 0.0
        for start in range(0, len(batch.flat), CHUNK):
            part = slice(start, start + CHUNK)
            logp = (head.logits(hidden["teacher"][part])[:, :vocab] / temperature).log_softmax(1)
            logits_s = output_head(student).logits(hidden["student"][part])[:, :vocab] / temperature
            logc = codec.logprobs(batch.distribution[part], temperature, logits_s)[:, :vocab]
            kl += float((logp.exp() * (logp - logc)).sum())
            q = logits_s.softmax(1)
            full += ((q - logp.exp()).T @ hidden["student"][part]).double()
            cached += ((q - logc.exp()).T @ hidden["student"][part]).double()
        found[temperature] = TemperatureFidelity(
            kl / len(batch.flat), _angle(full, cached), float(cached.norm() / full.norm()), len(batch.flat)
        )
    return found


def _angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two tensors, by atan2, which keeps small angles."""
    u, v = a.flatten() / a.norm(), b.flatten() / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())))


def bytes_per_token(cache: Cache) -> dict[str, float]:
    """Stored bytes per token by signal (top folder of the hierarchy), and `total` of everything in the cache's folder."""
    tokens = sum(source.num_tokens for source in cache.manifest.sources)
    sizes: dict[str, int] = {}
    for part in cache.parts:
        for key in part.objects.list(""):
            top = key.split("/")[0]
            sizes[top] = sizes.get(top, 0) + (part.objects.size(key) or 0)
    per_token = {name: size / tokens for name, size in sorted(sizes.items())}
    return {**per_token, "total": float(np.sum(list(per_token.values())))}


def teacher_validation_loss(cache: Cache) -> float:
    """The teacher's own nats per token on the validation split, from the cached log-probabilities of the labels."""
    total, count = 0.0, 0
    for unit in cache.units("validation"):
        first = int(unit) * cache.manifest.plan.unit_tokens
        mask = cache.read("tokens/loss_mask", first, first + cache.manifest.plan.unit_tokens) == 1
        logp = cache.read("distribution/scalars", first, first + cache.manifest.plan.unit_tokens)[:, 1]
        total -= float(logp[mask].astype(np.float64).sum())
        count += int(mask.sum())
    return total / count

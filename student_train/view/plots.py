"""Plots of students beside their teacher. Each takes the matplotlib Axes to draw on, or makes one, and returns it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from model_taps.blocks import num_layers
from model_taps.head import final_hidden
from model_taps.slices import State, tap_states
from signal_store.errors import MismatchError
from signal_store.manifest import Split
from signal_store.signals import Tap
from signal_view import CacheView, SegmentView
from signal_view.plots import axes_of, label_tokens, shown
from signal_view.segment_rows import labels_of, place_among
from student_train.losses.cka import debiased_cka
from student_train.losses.features import MIN_TOKENS
from student_train.view.students import student_logprobs

SEGMENTS = 16


def plot_against_teacher(
    segment: SegmentView, students: Mapping[str, PreTrainedModel], first: int | None = None, tokens: int = 40, axes: Any = None
) -> Any:
    """−log p of each token that follows, in nats, by the teacher and by each student, along `tokens` of a segment. Drawn on Axes
    that have the teacher already, the students are added."""
    begin = place_among(segment, segment.context_only if first is None else first)
    rows = slice(begin, min(len(segment), begin + tokens))
    labels = labels_of(segment)[rows]
    places = np.arange(len(labels))[labels >= 0]
    if axes is None or not axes.containers:
        axes = axes_of(axes, (1.5 + 0.27 * len(labels), 3.6))
        teacher = -segment.scalars().label_logprob.sel(token=np.arange(rows.start, rows.stop)).values
        mean = f", mean {np.nanmean(teacher[places]):.2f}" if len(places) else ""
        axes.bar(places, teacher[places], color="0.8", label=f"teacher{mean}")
    for name, student in students.items():
        found = student_logprobs(student, segment)[rows]
        nats = -found[places, torch.from_numpy(labels[places])].numpy()
        mean = f", mean {nats.mean():.2f}" if len(places) else ""
        axes.plot(places, nats, marker=".", lw=1.2, label=f"{shown(name, 60)}{mean}")
    pieces = [*segment.tokens, segment.next_piece or ""][rows.start + 1 : rows.stop + 1]
    label_tokens(axes, pieces)
    axes.set(ylabel="−log p, nats", title="the tokens that follow, by teacher and student", xlim=(-0.7, len(pieces) - 0.3))
    axes.legend(framealpha=0.85, fontsize=8)
    return axes


def plot_cka(
    student: PreTrainedModel, cache: CacheView, tap: Tap = "block_output", segments: int = SEGMENTS, axes: Any = None
) -> Any:
    """Debiased linear CKA of every cached layer of the teacher (rows) with every layer of the student (columns), mean over the
    first segments, of the validation split where there is one."""
    layers, matrix = layerwise_cka(student, cache, tap, segments)
    axes = axes_of(axes, (2 + 0.5 * matrix.shape[1], 1.6 + 0.4 * len(layers)))
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(matrix.shape):
        value = matrix[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(matrix.shape[1]), range(1, matrix.shape[1] + 1))
    axes.set_yticks(range(len(layers)), layers)
    axes.set(xlabel="block of the student", ylabel="block of the teacher", title=f"CKA of {tap}")
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    return axes


@torch.no_grad()
def layerwise_cka(student: PreTrainedModel, cache: CacheView, tap: Tap, segments: int) -> tuple[list[int], NDArray[np.float64]]:
    """(teacher's layers, matrix [teacher's layers, student's layers])."""
    layers = sorted(h.layer for h in cache.manifest.calibration.hidden if h.tap == tap)
    if not layers:
        held = sorted({h.tap for h in cache.manifest.calibration.hidden})
        raise MismatchError(f"the cache holds no {tap}", expected=f"one of {held}", found=tap, where=cache.uri)
    own: list[State] = [(tap, layer) for layer in range(1, num_layers(student) + 1)]
    split: Split = "validation" if len(cache.units("validation")) else "train"
    total, seen = np.zeros((len(layers), len(own))), 0
    device = next(student.parameters()).device
    student.eval()
    for unit in cache.units(split):
        for number in range(cache.first_segment(int(unit)), cache.first_segment(int(unit) + 1)):
            segment = cache[number]
            teacher = {layer: segment.hidden(tap, layer) for layer in layers}
            places = torch.tensor(teacher[layers[0]].token.values)
            if len(places) < MIN_TOKENS:
                continue
            ids = torch.from_numpy(segment.input_ids.astype("int64"))[None].to(device)
            with tap_states(student, tuple(own)) as states:
                final_hidden(student, ids, None)
            inside = torch.ones(1, len(places), dtype=torch.bool)
            mine = [states[state].flatten(0, -2)[places.to(device)].float().cpu()[None] for state in own]
            for row, layer in enumerate(layers):
                other = torch.tensor(teacher[layer].values)[None]
                total[row] += [float(debiased_cka(m, other, inside).sum()) for m in mine]
            seen += 1
            if seen == segments:
                return layers, total / seen
    if not seen:
        raise MismatchError(f"no segment has {MIN_TOKENS} sampled states", expected="one at least", where=cache.uri)
    return layers, total / seen

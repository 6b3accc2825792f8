"""Objectives that recipes can name. This file does not import torch: recipes name it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from student_train.losses.aliases import preset_name


@dataclass(frozen=True, slots=True)
class Preset:
    """`losses` as a recipe would write them. `every_kind`: a recipe that empties a kind of knowledge must say so (`without`)."""

    losses: Mapping[str, Mapping[str, Any]]
    every_kind: bool = False


PRESETS: Mapping[str, Preset] = {
    "cross_entropy": Preset({"cross_entropy": {}}),
    "forward_kl": Preset({"forward_kl": {"temperature": 1.0}}),
    "logits_hidden_attention": Preset(
        {
            "forward_kl": {"temperature": 3.0, "weight": {"start": 1.0, "end": 0.3}},
            "lhsm": {"weight": 0.8},
            "apc": {"weight": {"start": 0.0, "end": 0.5, "begin": 0.2}},
            "asr": {"weight": 1e-3},
        }
    ),
    "every_kind": Preset(
        {
            "forward_kl": {"temperature": 1.0},
            "importance": {},
            "attention_direction": {},
            "normalised_direction": {},
            "activation_mmd": {},
            "input_reconstruction": {},
            "residual_cka": {},
            "attention_statistics": {},
            "smoothness": {},
            "attention_evolution": {},
            "replay": {},
            "gate": {},
            "evidence": {},
            "coverage": {},
        },
        every_kind=True,
    ),
}
"""`forward_kl`: forward KL at temperature 1 alone; `logits_hidden_attention`: softened forward KL whose weight falls, squared
distances of hidden states, attention at keywords whose weight rises, and sparse activations; `every_kind`: terms of all five kinds
of knowledge, the temporal ones weighed by a gate."""


def find_preset(name: str | None) -> Preset | None:
    """The preset of this name or alias; None for None. ValueError where there is no such."""
    if name is None:
        return None
    found = PRESETS.get(preset_name(name))
    if found is None:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {name}")
    return found

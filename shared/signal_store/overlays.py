"""A cache and its overlays: whether they belong together, and the manifest that they have as one."""

from collections.abc import Sequence

from signal_store.errors import MismatchError
from signal_store.manifest import Manifest
from signal_store.sealed_part import SealedPart
from signal_store.signals import Signals


def refuse_other_plan(base: SealedPart, part: SealedPart) -> None:
    """MismatchError where a part stands on another text, tokenizer or teacher than its base, or on fewer units."""
    mine, other = base.manifest, part.manifest
    pairs = {
        "plan": (mine.plan.text_digest, other.plan.text_digest),
        "tokenizer": (mine.tokenizer.digest, other.tokenizer.digest),
        "teacher": (mine.teacher.weights_digest, other.teacher.weights_digest),
        "units": (base.seal.num_units, part.seal.num_units),
    }
    differ = [name for name, (a, b) in pairs.items() if a != b]
    if differ == ["units"]:
        raise MismatchError(
            "the base has grown since the overlay was built",
            expected=f"{part.seal.num_units} units",
            found=base.seal.num_units,
            where=base.uri,
            remedy="Open both as they were: open_cache([base, overlay], generation=0).",
        )
    if differ:
        raise MismatchError(
            f"these caches do not belong together ({', '.join(differ)} differ)",
            expected={name: pairs[name][0] for name in differ},
            found={name: pairs[name][1] for name in differ},
            where=part.uri,
            remedy="Build the overlay with `base:` naming this cache, and the same teacher.",
        )


def refuse_twice(parts: Sequence[SealedPart]) -> None:
    """MismatchError where two parts hold the same signal."""
    held: dict[str, str] = {}
    for part in parts:
        for name, signal in part.manifest.signals:
            if signal is not None and name in held:
                raise MismatchError(f"two caches hold the signal {name}", expected=held[name], found=part.uri, remedy="Open one.")
            if signal is not None:
                held[name] = part.uri


def joined_manifest(parts: Sequence[SealedPart]) -> Manifest:
    """The base's manifest with the signals of all parts."""
    base = parts[0].manifest
    if len(parts) == 1:
        return base
    calibrations = [part.manifest.calibration for part in parts]
    held = {name: signal for part in parts for name, signal in part.manifest.signals if signal is not None}
    owner = {name: part.manifest.calibration for part in parts for name, signal in part.manifest.signals if signal is not None}
    first = owner.get("distribution", base.calibration)
    calibration = base.calibration.model_copy(
        update={
            "tail_rank": first.tail_rank,
            "coverage": first.coverage,
            "hidden": tuple(h for c in calibrations for h in c.hidden),
            "attention": tuple(a for c in calibrations for a in c.attention),
            "stats": owner["stats"].stats if "stats" in owner else None,
            "replay_layers": tuple(n for c in calibrations for n in c.replay_layers),
            "evidence_layers": tuple(n for c in calibrations for n in c.evidence_layers),
        }
    )
    signals = Signals.model_construct(**{name: held.get(name) for name in Signals.model_fields})
    arrays = tuple(array for part in parts for array in part.manifest.arrays)
    return base.model_copy(update={"signals": signals, "calibration": calibration, "arrays": arrays})

"""Students to look at, by the folder of their run: as they began, and as they ended."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_taps.head import final_hidden, output_head
from signal_store.cache import Cache
from signal_store.errors import NotFoundError
from signal_store.segment import Segment
from student_train.recipe import RunRecipe, StudentSection
from student_train.student import build_student

ABOUT = "run.json"


def about_run(run: Path) -> dict[str, Any]:
    """What a run says of itself; NotFoundError where there is none."""
    path = run / ABOUT
    if not path.is_file():
        raise NotFoundError("no run here", expected=ABOUT, where=run)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def recipe_of(run: Path) -> RunRecipe:
    """The recipe that a run began with."""
    return RunRecipe.model_validate(about_run(run)["recipe"])


def before_and_after(run: Path, cache: Cache) -> Mapping[str, PreTrainedModel]:
    """The student as the run made it, and as it exported it: "before" and "after"."""
    finished = run / "student"
    if not finished.is_dir():
        raise NotFoundError("the run has not exported its student", expected="a finished run", where=finished)
    before, _ = build_student(recipe_of(run).student, cache)
    after, _ = build_student(StudentSection(checkpoint=str(finished)), cache)
    return {"before": before.eval(), "after": after.eval()}


@torch.no_grad()
def student_logprobs(student: PreTrainedModel, segment: Segment) -> Tensor:
    """float32 [n, V], nats, T = 1, over the cache's vocabulary: row t predicts token t + 1."""
    student.eval()
    device = next(student.parameters()).device
    ids = torch.from_numpy(segment.input_ids.astype("int64"))[None].to(device)
    logits = output_head(student).logits(final_hidden(student, ids, None)[0])
    found: Tensor = logits[:, : segment.cache.manifest.tokenizer.vocab_size].log_softmax(1).cpu()
    return found

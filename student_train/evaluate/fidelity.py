"""How a student speaks, and how faithful it is to its teacher (Stanton et al. 2021): measured on held-out rows at temperature 1.

Agreement: share of rows whose most likely token is the teacher's. Overlap: share of the teacher's OVERLAP most likely tokens that
are among the student's. KL(teacher ‖ student) and the entropies in nats. Calibration error: |confidence - accuracy| in BINS bins
of the student's confidence, weighted by rows (expected calibration error, Guo et al. 2017), against the text's own next token.
Sums travel between ranks; `summary` makes them numbers. Legend: N rows, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from model_taps.head import OutputHead
from signal_store.codecs.distribution import DistributionCodec, DistributionCodes
from student_train.evaluate.evaluation import NATS, SHARE, Quantity

OVERLAP = 10
BINS = 15
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
TEACHER_SUMS = ("rows", "agree", "overlap", "kl", "teacher_entropy", "student_entropy")


def zero_sums(device: torch.device) -> dict[str, Tensor]:
    """The sums of no rows, float64: what a filler batch adds."""
    found = {name: torch.zeros((), dtype=torch.float64, device=device) for name in TEACHER_SUMS}
    return found | {
        f"bin_{name}": torch.zeros(BINS, dtype=torch.float64, device=device) for name in ("rows", "confidence", "right")
    }


@torch.no_grad()
def measure_rows(
    hidden_ND: Tensor, head: OutputHead, labels_N: Tensor, codes: DistributionCodes | None, codec: DistributionCodec | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Measure rows against their labels and, where it is cached, against the teacher's distribution. Never holds [N, V].

    Args:
        hidden_ND: what the output head reads.
        labels_N: int64, negative where none is stored.
        codes: of the same rows, with the `codec` that decodes them; None where the cache or the reader has none.
    Returns:
        (-log q(label) of each row, float32 [N] in nats, 0 where no label is stored; sums over rows, as of `zero_sums`).
    Source: Stanton et al. 2021; expected calibration error, Guo et al. 2017, eq. 5.
    """
    sums = zero_sums(hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _measured(hidden_ND, head, labels_N, codes, codec, sums), sums


def _measured(
    hidden_ND: Tensor,
    head: OutputHead,
    labels_N: Tensor,
    codes: DistributionCodes | None,
    codec: DistributionCodec | None,
    sums: dict[str, Tensor],
) -> Tensor:
    losses = [hidden_ND.new_zeros(0, dtype=torch.float32)]
    step = max(1, CHUNK_BYTES.get(hidden_ND.device.type, 2**28) // (4 * len(head.weight)))
    for first in range(0, len(hidden_ND), step):
        rows = slice(first, first + step)
        log_q_CV = head.logits(hidden_ND[rows]).log_softmax(1)
        labels_C = labels_N[rows]
        known_C = labels_C >= 0
        losses.append(-log_q_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0] * known_C)
        log_confidence_C, guess_C = log_q_CV.max(1)
        confidence_C = log_confidence_C.exp().double()[known_C]
        bin_C = (confidence_C * BINS).long().clamp(max=BINS - 1)
        right_C = (guess_C == labels_C).double()[known_C]
        for name, value_C in (("rows", torch.ones_like(right_C)), ("confidence", confidence_C), ("right", right_C)):
            sums[f"bin_{name}"].index_add_(0, bin_C, value_C)
        if codes is not None and codec is not None:
            _add_teacher(sums, log_q_CV, guess_C, codes[rows], codec)
    return torch.cat(losses)


def _add_teacher(
    sums: dict[str, Tensor], log_q_CV: Tensor, guess_C: Tensor, codes: DistributionCodes, codec: DistributionCodec
) -> None:
    log_q_CV = log_q_CV[:, : codec.vocab_size]
    log_p_CV = codec.logprobs(codes, 1.0, None if codec.rank else log_q_CV.clone())
    p_CV, k = log_p_CV.exp(), min(OVERLAP, codec.vocab_size)
    top_p_Ck, top_q_Ck = log_p_CV.topk(k, dim=1).indices, log_q_CV.topk(k, dim=1).indices
    shared_C = (top_p_Ck[:, :, None] == top_q_Ck[:, None]).any(2).double().mean(1)
    values = {
        "rows": torch.ones_like(shared_C),
        "agree": (top_p_Ck[:, 0] == guess_C).double(),
        "overlap": shared_C,
        "kl": (p_CV * (log_p_CV - log_q_CV)).sum(1).double(),
        "teacher_entropy": -(p_CV * log_p_CV).sum(1).double(),
        "student_entropy": -(log_q_CV.exp() * log_q_CV).sum(1).double(),
    }
    for name, value_C in values.items():
        sums[name] += value_C.sum()


def summary(sums: dict[str, Tensor]) -> dict[str, Quantity]:
    """Means of the sums, over all rows that they are of.

    Returns:
        `calibration_error`; and, where the cache holds the distribution, `agreement`, `overlap`, `kl`, `entropy_gap` (the student's
        entropy less the teacher's) and `teacher_entropy`.
    """
    host = {name: value.cpu() for name, value in sums.items()}
    rows = host["bin_rows"].clamp(min=1)
    gap = (host["bin_confidence"] / rows - host["bin_right"] / rows).abs()
    error = float((gap * host["bin_rows"]).sum() / host["bin_rows"].sum().clamp(min=1))
    found = {"calibration_error": Quantity(error, SHARE)}
    if not float(host["rows"]):
        return found
    mean = {name: float(host[name] / host["rows"]) for name in TEACHER_SUMS}
    return found | {
        "agreement": Quantity(mean["agree"], SHARE),
        "overlap": Quantity(mean["overlap"], SHARE),
        "kl": Quantity(mean["kl"], NATS),
        "entropy_gap": Quantity(mean["student_entropy"] - mean["teacher_entropy"], NATS),
        "teacher_entropy": Quantity(mean["teacher_entropy"], NATS),
    }

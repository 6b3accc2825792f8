"""The gate over the levels of temporal consistency: a small network says, token by token, how much each level counts.

weights = floor + (1 - n · floor) · softmax(MLP(features)) over the n levels that say something of the token (a level that is absent
costs nothing, and would draw all weight to itself); a level's token counts n · weight times, so that an undecided gate changes
nothing. The student sees the weights as constants. The network learns by losses of its own, Σ weight · L / (EMA(L) + ε) - λ ·
entropy, whose gradient no other parameter sees. Descending, it turns to the level that this kind of token follows best; entropy
and floor keep it from leaving the others. ε, of the first EMA, keeps L / EMA from being 0 / 0 where the teacher is the student.
Features and losses are of the token alone and the EMA is of the global means, so that micro-batches and ranks change nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from signal_store.cache import Cache
from signal_store.format.roles import TOKEN_TYPES
from signal_store.signals.distribution import SCALARS
from student_train.data.request import SignalRequest
from student_train.data.signals.distribution import DistributionPart, DistributionRequest
from student_train.data.signals.tags import TagsPart, TagsRequest
from student_train.losses.head_terms import OutputTerm
from student_train.losses.kinds import Kind
from student_train.losses.row_queries import segment_of_query, segment_of_token, stored_rows
from student_train.losses.schedule import WeightField, constant
from student_train.losses.temporal import TokenLosses
from student_train.losses.term import GateTerm, Reads, StudentOutputs, TermSection
from student_train.losses.trajectory import moved, places_of

FEATURES = (
    "teacher_entropy",
    "teacher_surprise",
    "teacher_confidence",
    "head_mass",
    "student_surprise",
    "divergence",
    "position",
    "length",
    "step",
    "repetition",
    "attention_entropy",
    "importance",
    *TOKEN_TYPES[1:],
)
"""Of a token: the teacher's entropy over log V, -log p of what follows, log p of its favourite, mass of its head at T = 1; the
student's -log q of what follows and its first divergence; place in the response as a share and the response's log length over 10;
the last state's step; whether the last four tokens stood in the segment before; the segment's mean attention entropy at keywords;
the importance and the type of the token that follows. All are 0 at a token that does not count, such as a prompt's keyword."""
KEPT = 0.9
"""Share of the moving average that a step leaves."""
EPSILON = 1e-3
"""Of the first mean loss."""
NGRAM = 4
LARGEST_NATS = 20
"""Most that a feature says of a row's loss."""
TINY = 1e-12


class GateSection(TermSection):
    """The weights of the temporal terms (smoothness, attention_evolution, replay), token by token, from features of the token,
    learned by itself; its loss is Σ w · L / EMA(L) - λ · entropy(w), mean over what they count."""

    weight: WeightField = constant(1.0)
    floor: float = Field(0.05, gt=0, lt=1 / 3)
    """Least weight of a term."""
    entropy_weight: float = Field(0.1, ge=0)
    """λ, per nat."""
    width: int = Field(32, ge=1)
    """Of the network's hidden layer."""
    largest: float = Field(10.0, gt=0)
    """Most that a token's L / EMA(L) counts for."""


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Of the pass over the output head, float [N] each: the student's `surprise` -log q of what follows, and its first
    `divergence`; None where none was formed."""

    surprise: Tensor | None
    divergence: Tensor | None

    @classmethod
    def of(cls, terms: Sequence[OutputTerm], losses_KN: Sequence[Tensor]) -> "RowLosses":
        """From the terms of a pass and what it gave."""
        pairs = list(zip(terms, losses_KN, strict=True))
        return cls(
            next((losses_N for term, losses_N in pairs if term.divergence is None), None),
            next((losses_N for term, losses_N in pairs if term.divergence is not None), None),
        )


@dataclass(frozen=True, slots=True)
class Fused:
    """`weighted` by level: its sum under the gate's weights, in the graph; `own`: what the gate itself learns from; `weight_sums`:
    (Σ weight, tokens) of each token type, float32 [levels, types, 2]."""

    weighted: dict[str, Tensor]
    own: Tensor
    weight_sums: Tensor


class Gate(nn.Module):
    """Of the levels that are on, by name; at least two."""

    mean_loss: Tensor
    first_loss: Tensor

    def __init__(self, section: GateSection, levels: Sequence[str], cache: Cache) -> None:
        super().__init__()
        self.section, self.levels = section, tuple(levels)
        self.log_vocab = math.log(cache.manifest.tokenizer.vocab_size)
        self.network = nn.Sequential(nn.Linear(len(FEATURES), section.width), nn.GELU(), nn.Linear(section.width, len(levels)))
        last = self.network[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # undecided at first
        nn.init.zeros_(last.bias)
        self.register_buffer("mean_loss", torch.zeros(len(levels)))
        self.register_buffer("first_loss", torch.zeros(len(levels)))
        tags = [TagsRequest()] if "tags/roles" in cache.capacity_rows else []
        self.reads = Reads(SignalRequest.of(DistributionRequest(), *tags))

    def weights(self, features_MF: Tensor, present_ML: Tensor) -> Tensor:
        """floor + (1 - n · floor) · softmax(MLP(features)) over a token's n present levels.

        Args:
            features_MF: float32 [M, FEATURES].
            present_ML: bool [M, levels], which levels say something of the token.
        Returns:
            float32 [M, levels]: 0 for a level that is not present, else at least the floor; they add up to 1 where any is.
        """
        floor = self.section.floor
        logits_ML = self.network(features_MF).masked_fill(~present_ML, torch.finfo(torch.float32).min)
        count_M1 = present_ML.sum(1, keepdim=True)
        found: Tensor = (floor + (1 - count_M1 * floor) * logits_ML.softmax(1)) * present_ML
        return found

    def fuse(self, losses: Mapping[str, TokenLosses], row_losses: RowLosses, outputs: StudentOutputs) -> Fused:
        """Weigh every level's tokens; what the network learns from comes beside it. `losses` by level."""
        with torch.autocast(outputs.final.device.type, enabled=False):
            table_SF = self.features(row_losses, outputs)
            types_S = table_SF[:, -len(TOKEN_TYPES) + 1 :]
            present_SL = torch.zeros(len(table_SF), len(self.levels), dtype=torch.bool, device=table_SF.device)
            for level, name in enumerate(self.levels):
                present_SL[losses[name].flat, level] = True
            own = 0 * sum((p.sum() for p in self.parameters()), table_SF.new_zeros(()))
            begun = float((self.mean_loss > 0).any())  # before, gradients are rounding alone, which Adam would make whole steps of
            weighted, sums = {}, []
            for level, name in enumerate(self.levels):
                found = losses[name]
                present_ML = present_SL[found.flat]
                weights_ML = self.weights(table_SF[found.flat], present_ML)
                mine_M = weights_ML[:, level]
                rest = 0 if found.rest is None else found.rest
                weighted[name] = (present_ML.sum(1) * mine_M.detach() * found.value).sum() + rest
                scale = self.mean_loss[level] + EPSILON * self.first_loss[level]
                relative_M = (found.value.detach() / scale).clamp(max=self.section.largest)
                relative_M = torch.where(scale > 0, relative_M, 1.0)  # nothing was seen yet, or there is nothing to learn
                entropy_M = -(weights_ML * weights_ML.clamp(min=TINY).log()).sum(1)
                own = own + begun * (mine_M * relative_M - self.section.entropy_weight * entropy_M).sum()
                types_M = torch.cat([1 - types_S[found.flat].sum(1, keepdim=True), types_S[found.flat]], 1)
                sums.append(torch.stack([types_M.T @ mine_M.detach(), types_M.sum(0)], 1))
            return Fused(weighted, own, torch.stack(sums))

    def forget(self) -> None:
        """What was seen of the losses: another cache's are others."""
        self.mean_loss.zero_()
        self.first_loss.zero_()

    @torch.no_grad()
    def observe(self, means: Mapping[str, float]) -> None:
        """After a step: the means over the global batch of the levels that had something in it."""
        for level, name in enumerate(self.levels):
            if name in means:
                begins = float(self.first_loss[level]) == 0
                self.first_loss[level] = means[name] if begins else self.first_loss[level]
                kept = 0.0 if begins else KEPT
                self.mean_loss[level] = kept * self.mean_loss[level] + (1 - kept) * means[name]

    def described(self, weight_sums: Tensor) -> dict[str, float]:
        """`gate/<level>/<token type>`: mean weight, of the types that were met, from `Fused.weight_sums`."""
        found: dict[str, float] = {}
        for level, by_type in zip(self.levels, weight_sums.tolist(), strict=True):
            found |= {f"gate/{level}/{t}": total / n for t, (total, n) in zip(TOKEN_TYPES, by_type, strict=True) if n}
        return found

    @torch.no_grad()
    def features(self, row_losses: RowLosses, outputs: StudentOutputs) -> Tensor:
        """float32 [B · S, features]; zero where a token does not count."""
        batch, codec = outputs.batch, outputs.codecs.distribution
        segment_N, place_N, follows_N = places_of(batch)
        distribution, tags = batch.part(DistributionPart), batch.part(TagsPart)
        nothing = torch.zeros(len(batch.flat), device=outputs.final.device)
        columns = dict.fromkeys(FEATURES, nothing)
        if distribution is not None and codec is not None:
            scalars = distribution.codes.scalars.float()
            columns["teacher_entropy"] = scalars[:, SCALARS.index("entropy")] / self.log_vocab
            columns["teacher_surprise"] = -scalars[:, SCALARS.index("label_logprob")].nan_to_num()
            columns["teacher_confidence"] = scalars[:, SCALARS.index("max_logprob")]
            columns["head_mass"] = scalars[:, codec.mass_column(1.0)].sigmoid()
        for column, losses_N in (("student_surprise", row_losses.surprise), ("divergence", row_losses.divergence)):
            if losses_N is not None:
                columns[column] = losses_N.float().clamp(max=LARGEST_NATS)
        counts = torch.tensor(batch.segment_rows, device=nothing.device)[segment_N]
        columns["position"] = place_N / counts
        columns["length"] = counts.float().log() / 10
        step_N = moved(outputs.final[batch.flat].float(), segment_N, len(batch.segment_rows), follows_N)
        columns["step"] = step_N.log1p()
        columns["repetition"] = repeated(batch.input_ids, segment_of_token(batch), batch.position_ids).flatten()[batch.flat].float()
        columns["attention_entropy"] = self._attention_entropy(outputs)[segment_N]
        if batch.importance is not None:
            columns["importance"] = batch.importance
        if tags is not None:
            for number, name in enumerate(TOKEN_TYPES[1:], start=1):
                columns[name] = (tags.types == number).float()
        table_SF = nothing.new_zeros(batch.input_ids.numel(), len(FEATURES))
        table_SF[batch.flat] = torch.stack([columns[name].float() for name in FEATURES], 1)
        return table_SF

    def _attention_entropy(self, outputs: StudentOutputs) -> Tensor:
        """[segments]: mean over captured keyword rows and heads, over log length; 0 where there are none."""
        segments = len(outputs.batch.segments)
        found = outputs.final.new_zeros(segments, dtype=torch.float32)
        rows = next((rows for (kind, _), rows in outputs.rows.items() if kind is stored_rows and len(rows)), None)
        if rows is None:
            return found
        query = outputs.queries[stored_rows]
        entropy_R = -torch.special.xlogy(rows.float(), rows.float()).sum(-1).mean(1) / (query.lengths.float() + 1).log()
        segment_R = segment_of_query(outputs.batch, query)
        counts = torch.bincount(segment_R, minlength=segments).clamp(min=1)
        return found.index_add(0, segment_R, entropy_R) / counts


def repeated(ids_BS: Tensor, segment_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """Whether a token and the three before it stood in its segment before.

    Args:
        ids_BS: int64 token ids.
        segment_BS: int64, the number of a token's segment.
        positions_BS: int64, counted from the segment's first token.
    Returns:
        bool [B, S]; by a hash of 64 bits.
    """
    key = segment_BS.clone()
    for back in range(NGRAM):
        key = key * 1_000_003 + ids_BS.roll(back, 1)  # wraps around: a hash
    flat = key.flatten()
    order = flat.argsort(stable=True)
    again = torch.zeros_like(flat, dtype=torch.bool)
    again[order[1:]] = flat[order[1:]] == flat[order[:-1]]
    return again.view(key.shape) & (positions_BS >= NGRAM - 1)


TERM = GateTerm(section=GateSection, kind=Kind.TEMPORAL)

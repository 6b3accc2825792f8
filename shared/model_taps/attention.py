"""Attention rows of chosen query tokens, beside any attention kernel.

A function registered with transformers calls the model's own kernel (SDPA, FlashAttention, eager) and recomputes
softmax(q_R Kᵀ · scale + mask) for the wanted rows only: O(rows × length) memory, never `output_attentions=True`. Rows obey
the given mask (None: causal within the row's segment), soft-capping, sinks and compressed keys. They are in the graph, so a
student trains on the fast kernel too. Legend: B rows of the batch, S positions, H query heads, R wanted rows, L longest row.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_taps.attention_interface import Kernel, kernel_function, own_kernel, put_around_kernel
from model_taps.blocks import decoder_blocks, unsupported
from model_taps.evaluating import evaluating
from model_taps.head import final_hidden

CHECKED_TOKENS = 12
MOST_ROW_ERROR = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Of a probability; half precision rounds it more."""


@dataclass(frozen=True, slots=True)
class RowQuery:
    """Which rows are wanted, int64 [R] each: `batch` row of the batch, `query` position in it, `first` position of the
    row's segment. A row spans keys first..query, so its length is query - first + 1."""

    batch: Tensor
    query: Tensor
    first: Tensor

    @property
    def lengths(self) -> Tensor:
        """int64 [R]."""
        return self.query - self.first + 1

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(slots=True)
class _Tap:
    """`modules` and `weights`: by layer, what fired, and the kernel's own probabilities where it gives any."""

    rows: Mapping[int, RowQuery]
    taken: dict[int, Tensor] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)


_open: list[_Tap] = []
"""Taps that are open, the innermost last. Of the process: a backward pass on a GPU runs blocks again in a thread of its own."""


def softmax_attention_layers(model: PreTrainedModel) -> list[int]:
    """Blocks (from 1) that have softmax attention of their own, by the config's layer types; linear ones are left out."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    count = len(decoder_blocks(model))
    return [i for i in range(1, count + 1) if kinds is None or "linear" not in kinds[i - 1]]


@contextlib.contextmanager
def tap_attention_rows(rows: Mapping[int, RowQuery]) -> Iterator[dict[int, Tensor]]:
    """Within the block, a forward pass fills the dict: for each layer (from 1) that rows are wanted of, probabilities [R, H, L],
    float32, zero beyond a row's length; column j is key first + j. Only models prepared by `enable_row_capture` fire, and of those
    the layers that `captured_layers` finds."""
    with _tapped(rows) as tap:
        yield tap.taken


@contextlib.contextmanager
def _tapped(rows: Mapping[int, RowQuery]) -> Iterator[_Tap]:
    tap = _Tap(rows)
    _open.append(tap)
    try:
        yield tap
    finally:
        _open.remove(tap)


@torch.no_grad()
def captured_layers(model: PreTrainedModel, vocab_size: int) -> tuple[int, ...]:
    """Blocks (from 1) whose attention rows can be had, of a model that is prepared for it here: those that fire in a short pass,
    from within the block that they are numbered by. InputError where the rows are not the family's own probabilities."""
    blocks = decoder_blocks(model)
    device = next(model.parameters()).device
    ids = torch.randint(vocab_size, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.arange(CHECKED_TOKENS, device=device)
    query = RowQuery(torch.zeros_like(places), places, torch.zeros_like(places))
    before = own_kernel(model)
    with evaluating(model):
        for kernel in ("eager", before):
            model.set_attn_implementation(kernel)
            enable_row_capture(model)
            with _tapped(dict.fromkeys(range(1, len(blocks) + 1), query)) as tap:
                final_hidden(model, ids, None)
            _refuse_other_rows(model, tap)
    inside = {layer: {id(module) for module in block.modules()} for layer, block in enumerate(blocks, start=1)}
    return tuple(sorted(layer for layer, module in tap.modules.items() if id(module) in inside[layer]))


def _refuse_other_rows(model: PreTrainedModel, tap: _Tap) -> None:
    for layer, weights_BHSK in tap.weights.items():
        rows_SHL = tap.taken[layer]
        if weights_BHSK.shape[-1] != rows_SHL.shape[-1]:
            continue  # compressed keys: folded back on the tokens, no probabilities of the kernel's
        difference = float((rows_SHL.transpose(0, 1) - weights_BHSK[0].float()).abs().max())
        if not difference <= MOST_ROW_ERROR.get(weights_BHSK.dtype, 2e-2):
            raise unsupported(model, f"attention rows of block {layer} are not what its kernel computes", f"{difference:.2g} apart")


def refuse_silent_rows(model: PreTrainedModel, taken: Collection[int], wanted: Collection[int]) -> None:
    """InputError naming the layers whose rows were wanted and never came."""
    if silent := sorted(set(wanted) - set(taken)):
        raise unsupported(model, f"attention rows of blocks {silent} never came", "attention that is not transformers' interface")


def enable_row_capture(model: PreTrainedModel) -> None:
    """Route the model's attention through the capturing function; idempotent, and free while no tap is open."""
    put_around_kernel(model, _capturing)


def _capturing(kernel: str) -> Kernel:
    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        tap = _open[-1] if _open else None
        number = getattr(module, "layer_idx", None)
        layer, first = 0 if number is None else int(number) + 1, False
        if tap is not None and layer in tap.rows:
            options = {**kwargs, "compress_rate": _compress_rate(module)}
            rows = attention_rows(query, key, attention_mask, tap.rows[layer], options)
            first = layer not in tap.taken
            tap.taken.setdefault(layer, rows)  # activation checkpointing comes by twice, and must do the same both times
            tap.modules.setdefault(layer, module)
        output = kernel_function(kernel, module)(module, query, key, value, attention_mask, **kwargs)
        if first and tap is not None and isinstance(output[1], Tensor):
            tap.weights[layer] = output[1].detach()
        return output

    return forward


def _compress_rate(module: nn.Module) -> int | None:
    """Tokens that one compressed key of this layer stands for, where the family says so."""
    rates = getattr(getattr(module, "config", None), "compress_rates", None) or {}
    rate = rates.get(getattr(module, "layer_type", None))
    return None if rate is None else int(rate)


def attention_rows(query_BHSd: Tensor, key_BGSd: Tensor, mask: Tensor | None, rows: RowQuery, options: dict[str, Any]) -> Tensor:
    """softmax(q·K · scaling + mask) of the wanted rows, [R, H, L] float32; see `tap_attention_rows`.

    `mask` is None (causal), bool [B, 1|H, S, K] (True: attend) or additive of that shape. `options` are the kernel's:
    scaling, softcap, sliding_window, s_aux (sinks, one logit per head that takes part in the softmax and is dropped). Keys beyond
    the S positions are compressed ones (DeepSeek-V4), each of `compress_rate` tokens: their mass is folded back, in equal shares,
    on those tokens. A row then sums to one less the sink's mass.
    """
    rows = RowQuery(
        *(part.to(query_BHSd.device) for part in (rows.batch, rows.query, rows.first))
    )  # blocks may lie on several GPUs
    positions = query_BHSd.shape[2]
    longest = int(rows.lengths.max()) if len(rows) else 0
    columns_L = torch.arange(longest, device=query_BHSd.device)
    keys_RL = (rows.first[:, None] + columns_L).clamp(max=positions - 1)
    allowed_RL = columns_L < rows.lengths[:, None]
    window = options.get("sliding_window")
    if mask is None and window is not None:
        allowed_RL = allowed_RL & (rows.query[:, None] - keys_RL < window)
    with torch.autocast(query_BHSd.device.type, enabled=False):
        scores_RHL = _scores(query_BHSd, key_BGSd, mask, rows, keys_RL, options)
    scores_RHL = scores_RHL.masked_fill(~allowed_RL[:, None], -torch.inf)
    parts = [scores_RHL]
    compressed = key_BGSd.shape[2] - positions
    if compressed:
        extra_RE = positions + torch.arange(compressed, device=keys_RL.device).expand(len(rows), -1)
        parts.append(_scores(query_BHSd, key_BGSd, mask, rows, extra_RE, options))
    sinks_H = options.get("s_aux")
    if sinks_H is not None:
        parts.append(sinks_H.float()[None, :, None].expand(len(rows), -1, 1))
    probabilities = torch.softmax(torch.cat(parts, -1), -1) if len(parts) > 1 else torch.softmax(scores_RHL, -1)
    found_RHL = probabilities[..., :longest]
    if compressed:
        rate = options.get("compress_rate") or -(-positions // compressed)
        found_RHL = found_RHL + _folded(probabilities[..., longest : longest + compressed], rate, rows, keys_RL, columns_L)
    return found_RHL


def _scores(
    query_BHSd: Tensor, key_BGSd: Tensor, mask: Tensor | None, rows: RowQuery, keys_RL: Tensor, options: dict[str, Any]
) -> Tensor:
    """Scaled, capped and masked scores [R, H, L] of the wanted rows with the keys of each."""
    scaling = options.get("scaling") or query_BHSd.shape[-1] ** -0.5
    heads = query_BHSd.shape[1]
    parts, order = [query_BHSd.new_zeros(0, heads, keys_RL.shape[1], dtype=torch.float32)], []
    for b in rows.batch.unique().tolist():  # all rows of one batch row share its keys: one product, nothing gathered before it
        mine = (rows.batch == b).nonzero()[:, 0]
        key_GKd = key_BGSd[b].float()
        query_Gnd = query_BHSd[b][:, rows.query[mine]].float().unflatten(0, (key_GKd.shape[0], -1)).flatten(1, 2)
        scores_rHK = (query_Gnd @ key_GKd.mT).unflatten(1, (-1, len(mine))).flatten(0, 1).transpose(0, 1)
        parts.append(scores_rHK.gather(2, keys_RL[mine][:, None].expand(-1, heads, -1)))
        order.append(mine)
    back = torch.cat(order).argsort() if order else rows.batch
    scores_RHL: Tensor = torch.cat(parts)[back] * scaling
    softcap = options.get("softcap")
    if softcap is not None:
        scores_RHL = softcap * torch.tanh(scores_RHL / softcap)
    if mask is not None:
        mask_RHL = mask[rows.batch[:, None], :, rows.query[:, None], keys_RL].transpose(1, 2)
        if mask.dtype == torch.bool:
            return scores_RHL.masked_fill(~mask_RHL, -torch.inf)
        scores_RHL = scores_RHL + mask_RHL.float()
    return scores_RHL


def _folded(mass_RHE: Tensor, rate: int, rows: RowQuery, keys_RL: Tensor, columns_L: Tensor) -> Tensor:
    """[R, H, L]: the mass of each compressed key, spread evenly over those of its tokens that the row has."""
    entry_RL = (keys_RL // rate).clamp(max=mass_RHE.shape[2] - 1)
    inside_RL = (columns_L < rows.lengths[:, None]) & (keys_RL // rate < mass_RHE.shape[2])
    members_RE = torch.zeros(mass_RHE.shape[0], mass_RHE.shape[2], device=mass_RHE.device).scatter_add_(
        1, entry_RL, inside_RL.float()
    )
    share_RHE = mass_RHE / members_RE.clamp(min=1)[:, None]
    spread = share_RHE.gather(2, entry_RL[:, None].expand(-1, mass_RHE.shape[1], -1))
    folded: Tensor = spread * inside_RL[:, None]
    return folded

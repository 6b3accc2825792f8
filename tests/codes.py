"""A small distribution codec and rows of it, drawn by seed."""

import torch

from signal_store.codecs.distribution import DistributionCodec, DistributionCodes

WIDTH, RANK, HEAD = 12, 5, 4


def made_codec(vocab: int, rank: int = RANK, head: int = HEAD, softcap: float | None = None) -> DistributionCodec:
    g = torch.Generator().manual_seed(vocab)
    return DistributionCodec(
        temperatures=(1.0, 2.0, 3.0), head=head, head_bits=8, tail_bits=8, head_range=8.0, softcap=softcap, mean=torch.zeros(WIDTH),
        encode_matrix=torch.randn(WIDTH, rank, generator=g), tail_step=torch.full((rank,), 0.05),
        tail_basis=torch.randn(vocab, rank, generator=g), tail_bias=torch.randn(vocab, generator=g),
    )  # fmt: skip


def made_codes(codec: DistributionCodec, rows: int, seed: int = 0) -> DistributionCodes:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, codec.vocab_size, generator=g)
    return codec.encode(torch.randn(rows, WIDTH, generator=g), logits, torch.full((rows,), -1))[0]

"""However a pass over the output head is cut into chunks and blocks, and whoever computes it, it is the same pass."""

import pytest
import torch

from model_taps.head import OutputHead
from student_train.losses import chunked
from student_train.losses.forward_kl import ForwardKl
from student_train.losses.head_terms import OutputTargets, OutputTerm
from student_train.losses.jsd import JensenShannon
from student_train.losses.output_head import IMPLEMENTATIONS, Impl, output_loss
from tests.codes import WIDTH, made_codec, made_codes


@pytest.mark.parametrize("impl", list(IMPLEMENTATIONS))
def test_chunks_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, impl: Impl) -> None:
    codec = made_codec(40)
    codes, hidden, weight = made_codes(codec, 9), torch.randn(9, WIDTH), torch.randn(40, WIDTH)
    targets = OutputTargets(torch.arange(9), codes, codec)
    terms = [OutputTerm(None, 1.0), OutputTerm(ForwardKl(), 1.0, 2.0), OutputTerm(JensenShannon(0.5), 0.5, 1.0)]
    head = OutputHead(weight, None, 1.0, None)
    whole = output_loss(hidden, head, targets, terms)
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 4 * 40 * 4)
    monkeypatch.setitem(chunked.BLOCK_BYTES, "cpu", 4 * 40 * 2)
    torch.testing.assert_close(output_loss(hidden, head, targets, terms, impl=impl), whole)

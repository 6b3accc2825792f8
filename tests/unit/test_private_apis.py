"""What other libraries do not promise, and this project uses: each is there, in the shape that is used, whichever version is installed.

One row a name. A row that fails says which module of ours breaks with this version, before a user finds out.
"""

import asyncio
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest

from tests.tiny import HAS_TORCH

pytestmark = pytest.mark.storage


def zarrs_loop() -> None:
    """`sync(coroutine)` runs it on zarr's own loop and returns its value."""
    from zarr.core.sync import sync

    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    assert sync(seven()) == 7


def xarrays_lazy_index() -> None:
    """An array behind `LazilyIndexedArray` is asked for outer indexers, through `explicit_indexing_adapter`."""
    xarray = pytest.importorskip("xarray")
    from signal_view.lazy_array import lazy_array

    def decode(start: int, stop: int) -> Any:
        return whole[start:stop]

    whole = np.arange(60).reshape(12, 5)
    lazy = xarray.DataArray(xarray.Variable(("row", "column"), lazy_array(whole.shape, whole.dtype, decode)))
    for key in ((3, slice(None)), (slice(2, 9, 3), 1), ([7, 1, 4], slice(1, 3)), (slice(None), [4, 0])):
        assert np.array_equal(lazy[key].values, whole[key])


def attention_functions() -> None:
    """The registries of attention functions and of masks can be read, as mappings, by their public classes."""
    from transformers import AttentionInterface, AttentionMaskInterface

    assert callable(AttentionInterface()["sdpa"])
    assert callable(AttentionMaskInterface()["sdpa"])
    AttentionInterface.register("of_a_test", attention_functions)
    assert AttentionInterface()["of_a_test"] is attention_functions


def attention_implementation() -> None:
    """`config._attn_implementation` names the kernel, and follows `set_attn_implementation`."""
    from tests.tiny import make_model

    model = make_model("llama", 64)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def eager_function_of_a_family() -> None:
    """A family's module has `eager_attention_forward`, which takes what the registered kernels take."""
    from transformers.models.llama import modeling_llama

    names = list(inspect.signature(modeling_llama.eager_attention_forward).parameters)
    assert names[:5] == ["module", "query", "key", "value", "attention_mask"]


def rendering_with_spans() -> None:
    """`render_jinja_template` returns texts, and the characters that `{% generation %}` encloses, from a list of conversations."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    answer: Any = render_jinja_template([chat], chat_template=template, return_assistant_tokens_mask=True)
    (text,), (spans,) = answer
    assert [text[start:stop] for start, stop in spans] == ["cde"]


def accelerators_can_be_made_anew() -> None:
    """`AcceleratorState._reset_state` lets a process have accelerators of two precisions, one after the other."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    assert AcceleratorState._shared_state == {}


def tensorboard_tracker() -> None:
    """`TensorBoardTracker` takes a name and a folder."""
    from accelerate.tracking import TensorBoardTracker

    assert {"run_name", "logging_dir"} <= set(inspect.signature(TensorBoardTracker.__init__).parameters)


def precision_of_products() -> None:
    """oneDNN's `fp32_precision` can be read, set to bf16 and put back."""
    import torch

    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def units_of_the_cpu() -> None:
    """torch says whether this CPU has AMX tiles and AVX512 products in bfloat16."""
    import torch

    assert torch.cpu._is_amx_tile_supported() in (True, False)
    assert torch.cpu._is_avx512_bf16_supported() in (True, False)


USES: list[tuple[str, str, bool, Callable[[], None]]] = [
    ("zarr", "signal_store.format.arrays, signal_store.cache", False, zarrs_loop),
    ("xarray", "signal_view.lazy_array", False, xarrays_lazy_index),
    ("transformers", "model_taps.attention", True, attention_functions),
    (
        "transformers",
        "model_taps.attention, run_kit.environment, teacher_cache.teacher.load, student_train.commands.run",
        True,
        attention_implementation,
    ),
    ("transformers", "model_taps.attention", True, eager_function_of_a_family),
    ("transformers", "teacher_cache.corpus.chat", False, rendering_with_spans),
    ("accelerate", "student_train.train.parallel", True, accelerators_can_be_made_anew),
    ("accelerate", "student_train.train.metrics", True, tensorboard_tracker),
    ("torch", "signal_store.codecs.bf16_units", True, precision_of_products),
    ("torch", "signal_store.codecs.bf16_units", True, units_of_the_cpu),
]
"""Library, the modules of ours that use it, whether torch is needed to see, the check."""


@pytest.mark.parametrize(("library", "users", "with_torch", "check"), USES, ids=[check.__name__ for *_, check in USES])
def test_it_is_as_it_is_used(library: str, users: str, with_torch: bool, check: Callable[[], None]) -> None:
    if with_torch and not HAS_TORCH:
        pytest.skip("torch is not installed")
    try:
        check()
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        pytest.fail(f"{library} {version(library)}: {check.__doc__} No longer so ({error!r}); used by {users}")

"""What other libraries do not promise, and this project uses: each is there, in the shape that is used, whichever version is installed;
and each is named in one file of ours, which CONTRIBUTING.md lists.

One row a use. A row that fails says which file breaks with this version, before a user finds out.
"""

import ast
import asyncio
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
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


def accelerators_can_be_made_anew() -> None:
    """`AcceleratorState._reset_state` lets a process have accelerators of two precisions, one after the other."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    assert AcceleratorState._shared_state == {}


def causal_lm_names() -> None:
    """`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` is by model type, and read without importing the models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"


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


def what_onednn_takes() -> None:
    """oneDNN's operators say whether it takes bfloat16 and float16."""
    import torch

    for ask in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        assert getattr(torch.ops.mkldnn, ask)() in (True, False)


@dataclass(frozen=True)
class Use:
    """`names` of `library`, as they stand in the source of `file`: a module, an attribute or a string."""

    library: str
    file: str
    names: tuple[str, ...]
    check: Callable[[], None]
    with_torch: bool = True


USES = [
    Use("zarr", "shared/signal_store/io/zarr_sync.py", ("zarr.core",), zarrs_loop, with_torch=False),
    Use("xarray", "shared/signal_view/lazy_array.py", ("xarray.core",), xarrays_lazy_index, with_torch=False),
    Use(
        "transformers",
        "shared/model_taps/attention_interface.py",
        ("AttentionInterface", "AttentionMaskInterface", "ALL_ATTENTION_FUNCTIONS"),
        attention_functions,
    ),
    Use("transformers", "shared/model_taps/attention_interface.py", ("_attn_implementation",), attention_implementation),
    Use("transformers", "shared/model_taps/attention_interface.py", ("eager_attention_forward",), eager_function_of_a_family),
    Use("transformers", "shared/model_taps/tiny_config.py", ("transformers.models",), causal_lm_names),
    Use(
        "accelerate", "student_train/train/accelerate_state.py", ("accelerate.state", "_reset_state"), accelerators_can_be_made_anew
    ),
    Use("torch", "shared/signal_store/codecs/bf16_units.py", ("mkldnn",), precision_of_products),
    Use(
        "torch",
        "shared/signal_store/codecs/bf16_units.py",
        ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        units_of_the_cpu,
    ),
    Use(
        "torch",
        "shared/signal_store/codecs/bf16_units.py",
        ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"),
        what_onednn_takes,
    ),
]
ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("teacher_cache", "student_train", "shared")
LIBRARIES = {"accelerate", "datasets", "numcodecs", "torch", "torchdata", "transformers", "xarray", "zarr"}
WITHIN = {"core", "internal", "models"}
"""Names of packages that libraries keep for themselves, though no underscore says so."""
PROMISED = {"_exit"}
"""Documented for all its underscore: of `os`."""


@pytest.mark.parametrize("use", USES, ids=[use.check.__name__ for use in USES])
def test_it_is_as_it_is_used(use: Use) -> None:
    if use.with_torch and not HAS_TORCH:
        pytest.skip("torch is not installed")
    try:
        use.check()
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        text = f"{use.library} {version(use.library)}: {use.check.__doc__} No longer so ({error!r}); {use.file} uses it"
        pytest.fail(text)


def named_in(source: str) -> Iterator[str]:
    """Modules and names that are imported, and attributes, those too that `getattr` is asked for."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute):
            yield node.attr
            if isinstance(node.value, ast.Name):
                yield f"{node.value.id}.{node.attr}"  # import zarr; zarr.core
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str))


def lies_in(found: str, name: str) -> bool:
    """Whether what was found is this name, or lies within this module."""
    return found == name or found.startswith(f"{name}.")


def defined_in(source: str) -> Iterator[str]:
    """Functions, classes, variables and attributes of `self` that a source makes itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id == "self" else []


def is_unpromised(name: str, ours: set[str]) -> bool:
    """Whether a library keeps this name for itself: by an underscore that is not ours, or by the package that it lies in."""
    parts = name.split(".")
    of_a_library = parts[0] in LIBRARIES and len(parts) > 1
    hidden = [p for p in parts if re.match(r"_[A-Za-z]", p) and p not in ours | PROMISED]
    return (bool(hidden) and (of_a_library or len(parts) == 1)) or (of_a_library and bool(WITHIN & set(parts)))


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    paths = [path for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def named(sources: dict[str, str]) -> set[tuple[str, str]]:
    return {(path, name) for path, source in sources.items() for name in named_in(source)}


@pytest.mark.parametrize("use", USES, ids=[use.check.__name__ for use in USES])
def test_one_file_names_it(use: Use, named: set[tuple[str, str]]) -> None:
    assert {path for path, found in named if any(lies_in(found, name) for name in use.names)} == {use.file}


def test_nothing_else_is_used_that_is_not_promised(sources: dict[str, str], named: set[tuple[str, str]]) -> None:
    ours = {name for source in sources.values() for name in defined_in(source)}
    known = {(use.file, name) for use in USES for name in use.names}
    unpromised = {(path, found) for path, found in named if is_unpromised(found, ours)}
    assert {(p, found) for p, found in unpromised if not any(p == file and lies_in(found, name) for file, name in known)} == set()


def test_other_uses_are_found() -> None:
    source = "from zarr.core.sync import sync\nimport torch\nmodel.config._attn_implementation = getattr(x, '_hidden')\ntorch._C\nself._own"
    found = {name for name in named_in(source) if is_unpromised(name, {"_own"})}
    assert found == {"zarr.core.sync", "_attn_implementation", "_hidden", "torch._C", "_C"}


def test_contributing_lists_the_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [use.file for use in USES if f"`{use.file}`" not in text] == []

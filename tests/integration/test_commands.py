"""The commands as users meet them: bad input is one line and exit 2; a kill at any moment changes nothing; help is light."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

import teacher_cache
from run_kit.command_line import guarded
from run_kit.recipe_file import load_recipe, validate
from signal_store.cache import Cache
from signal_store.errors import InputError
from signal_store.io.local import LocalObjects
from signal_store.ledger.documents import read_document
from student_train.recipe import RunRecipe
from student_train.train.metrics import METRICS, read_metrics
from teacher_cache.corpus.sources import SourceReader
from teacher_cache.recipe import CacheRecipe
from tests.processes import say_into
from tests.tiny import COMMON, CONTEXT, make_model, make_tokenizer

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def process(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own."""
    command = [sys.executable, "-m", f"{module}.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, check=False)


def cli(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in this process: its `main` with these arguments. Starting one afresh costs seconds."""
    main = importlib.import_module(f"{module}.cli").main
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), errors.getvalue())


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2 and one line that holds the words; progress bars and the libraries' own bars aside."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("["), done.stderr
    assert all(word in line for word in words), line


@pytest.fixture
def recipe(tmp_path: Path, recipe_for: Callable[..., Any]) -> dict[str, Any]:
    content: dict[str, Any] = recipe_for(tmp_path / "cache.zarr").model_dump(mode="json")
    return content


def write(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def run_recipe(tmp_path: Path, cache: Cache) -> dict[str, Any]:
    return {
        "cache": cache.uri,
        "out": str(tmp_path / "run"),
        "preset": "logits_hidden_attention",
        "losses": {"cross_entropy": {"weight": 0.5}},
        "student": {
            "config": {"model_type": "llama", **COMMON, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
        },
        "steps": 12,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "stream": {"sequence_length": CONTEXT, "global_batch_rows": 4, "micro_batch_rows": 2, "window_units": 2},
        "validation": {"every": 4},
        "checkpoint": {"every": 3},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("contxt=8", ["unknown key contxt", "perhaps context"]),
        ("sources.0.jsonl=/nowhere/x.jsonl", ["no such file", "/nowhere/x.jsonl"]),
        ("sources.0.jsonl=s3://bucket/x.jsonl", ["sources.0.jsonl.0: must be on this machine"]),
        ("sources.0.text=body", ["no such column", "body", "text"]),
        ("teacher.model=/nowhere/model", ["no such", "/nowhere/model"]),
        ("sources.0.jsonl=EMPTY", ["no text", "source train"]),
        ("context=65", ["longer than the teacher's", "64", "65"]),
        ("signals.hidden.depths=[0.5, 1.0]", ["signals.hidden.depths.1", "less than 1"]),
        ("signals.distribution.temperatures=[2.0]", ["hold 1"]),
        ("sources.0.pattern='*.txt'", ["pattern goes with folder"]),
        ("signals.hidden={depths: [0.1], layers: [1]}", ["depths and layers exclude each other"]),
        ("teacher.device=gpu", ["no such device", "cpu, or cuda", "gpu", "teacher.device"]),
        ("teacher.device=cuda:9", ["no such device here", "cuda:9", "teacher.device"]),
        ("teacher={model: MODEL, device_map: gpu}", ["no such device", "balanced", "teacher.device_map"]),
        ("teacher.attn_implementation=spda", ["no such attention implementation", "perhaps sdpa", "teacher.attn_implementation"]),
        ("signals.hidden.layers=[1, 9]", ["no such block", "1 to 4", "9", "signals.hidden.layers"]),
        ("signals.attention.layers=[9]", ["no such block", "1 to 4", "9", "signals.attention.layers"]),
        ("signals.stats={layers: [0]}", ["no such block", "1 to 4", "0", "signals.stats.layers"]),
        ("signals.attention.heads=[1, 4]", ["no such head", "0 to 3", "4", "signals.attention.heads"]),
        ("signals.attention.heads=5", ["more than the teacher has", "at most 4", "5", "signals.attention.heads"]),
        ("signals.distribution.rank=33", ["more than the teacher has", "at most 32", "33", "signals.distribution.rank"]),
        ("overlap=48", ["overlap must be below context"]),
        ("context=yes", ["context: true and false", "no value of this key"]),
        ("cache", ["not an override"]),
    ],
)
def test_bad_cache_recipes(tmp_path: Path, recipe: dict[str, Any], change: str, words: list[str]) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    change = change.replace("EMPTY", str(tmp_path / "empty.jsonl")).replace("MODEL", recipe["teacher"]["model"])
    refused(cli("teacher_cache", "build", write(tmp_path, recipe), change), *words)
    assert not list((tmp_path / "cache.zarr").glob("ledger/plan.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stps=8", ["unknown key stps", "perhaps steps"]),
        ("cache=/nowhere", ["no cache here"]),
        ("losses.forward_kl.temperature=7", ["cannot serve this temperature", "7"]),
        ("student.config=null", ["exactly one of checkpoint and config"]),
        ("student.config.vocab_size=9", ["vocabulary is smaller"]),
        ("student.config.hidden_sise=9", ["no such field", "expected hidden_size", "hidden_sise"]),
        ("student.config.hidden_size=nine", ["config is wrong", "expected int, got str"]),
        ("student.attn_implementation=eagre", ["no such attention implementation", "perhaps eager", "student.attn_implementation"]),
        ("student.config.dtype=bfloat16", ["weights are float32", "precision: bfloat16"]),
        ("student.config.num_key_value_heads=3", ["the student cannot run"]),
        ("student.config.model_type=bert", ["looks ahead", "bert"]),
        ("student.config.num_hidden_layers=0", ["a model without blocks", "num_hidden_layers of 1 or more", "found 0"]),
        ("student.config.intermediate_size=0", ["gives weights no size", "mlp"]),
        ("student.config.num_attention_heads=0", ["config is wrong", "zero"]),
        ("parallel.mode=sharded", ["one process cannot share", "torchrun", "parallel.mode", "replicated"]),
        ("student.lora={rank: 2}", ["lora needs a checkpoint"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1", "less than 1"]),
        ("stream.mix={weights: {trian: 1}}", ["trian"]),
        ("learning_rate=1", ["unknown key learning_rate (perhaps optimizer.learning_rate)"]),
        ("stream.global_batch_rows=99999999999999999999", ["stream.global_batch_rows: a number must be", "below 2**53"]),
        ("steps=true", ["steps: true and false", "no value of this key"]),
        ("student.config.rms_norm_eps=.nan", ["student.config.rms_norm_eps: a number must be finite"]),
        ("student.config.rope_scaling={1: 2}", ["student.config.rope_scaling.1: a key must be text"]),
        ("student.config.name=2024-01-01", ["student.config.name", "found date"]),
        ("student.config.name=&a [*a]", ["it holds itself"]),
        ("losses.foward_kl={}", ["unknown key losses.foward_kl (perhaps losses.forward_kl)"]),
        ("losses.forward_kl.weight=much", ["losses.forward_kl.weight", "expected a number"]),
        ("preset=flash", ["preset must be one of"]),
        ("losses.kl={}", ["unknown key", "kl"]),
        ("stream.sequence_length=8", ["longer than a row"]),
        ("out=s3://bucket/run", ["out: must be on this machine", "s3:"]),
    ],
)
def test_bad_run_recipes(tmp_path: Path, run_recipe: dict[str, Any], change: str, words: list[str]) -> None:
    if "bert" in change:
        run_recipe["student"]["config"].pop("num_key_value_heads", None)
    refused(cli("student_train", "run", write(tmp_path, run_recipe), change), *words)
    assert not (tmp_path / "run").exists()  # nothing claims the folder before it can begin


@pytest.mark.parametrize(
    "overrides", [["steps=8", "steps=9"], ["steps=8", "steps=8"], ["optimizer.learning_rate=0.1", "optimizer={warmup_steps: 3}"]]
)
def test_an_override_that_is_lost_to_a_later_one_is_refused(
    tmp_path: Path, run_recipe: dict[str, Any], overrides: list[str]
) -> None:
    path = write(tmp_path, run_recipe)
    refused(cli("student_train", "explain", path, *overrides), "lost to a later one", f"{overrides[0].partition('=')[0]} once")
    kept = load_recipe(path, ["steps=9", "optimizer={warmup_steps: 3}", "optimizer.learning_rate=0.1", "stream.seed=1"], RunRecipe)
    assert (kept.optimizer.warmup_steps, kept.optimizer.learning_rate) == (3, 0.1)


def test_a_trial_that_ends_in_its_warm_up_says_so(tmp_path: Path, run_recipe: dict[str, Any]) -> None:
    run_recipe |= {"preset": "forward_kl", "losses": {}, "validation": None, "steps": 1}
    done = cli("student_train", "run", write(tmp_path, run_recipe), "optimizer.warmup_steps=4")
    assert done.returncode == 0, done.stderr
    assert "the warm-up, 4 steps, is longer than the run, 1: the learning rate ends at 0.0025" in done.stderr
    assert read_metrics(tmp_path / "run" / METRICS)[0]["learning_rate"] == 0.0025
    again = cli("student_train", "run", write(tmp_path, run_recipe), "out=" + str(tmp_path / "warm"), "optimizer.warmup_steps=1")
    assert (again.returncode, "warm-up" in again.stderr) == (0, False)


def test_a_plan_is_made_where_the_teacher_will_not_run(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("teacher.device=cuda:9", "teacher.attn_implementation=flash_attention_2")
    assert cli("teacher_cache", "plan", write(tmp_path, recipe), *changes).returncode == 0
    monkeypatch.setattr(SourceReader, "rows", lambda _: pytest.fail("a text was read"))
    for change in ("signals.hidden.layers=[9]", "teacher.attn_implementation=spda"):
        refused(cli("teacher_cache", "plan", write(tmp_path, recipe), f"cache={tmp_path / 'other.zarr'}", change), "no such")


def test_one_seed_is_for_all(run_recipe: dict[str, Any]) -> None:
    one = validate({**run_recipe, "seed": 7}, RunRecipe, "here")
    assert (one.seed, one.student.seed, one.stream.seed) == (7, 7, 7)
    own = validate({**run_recipe, "seed": 7, "stream": {**run_recipe["stream"], "seed": 3}}, RunRecipe, "here")
    assert (own.seed, own.student.seed, own.stream.seed) == (7, 7, 3)
    assert validate(own.model_dump(mode="json"), RunRecipe, "here") == own


def test_weights_are_numbers_and_one_at_least_is_above_zero(run_recipe: dict[str, Any]) -> None:
    def weighed(weight: Any) -> RunRecipe:
        return validate({**run_recipe, "preset": None, "losses": {"forward_kl": {"weight": weight}}}, RunRecipe, "here")

    term = weighed("1e-3").objective.forward_kl
    assert term is not None and term.weight.start == term.weight.end == 1e-3
    for nothing in (0, "0.0", {"start": 0, "end": 0}):
        with pytest.raises(InputError, match="every term's weight is 0"):
            weighed(nothing)
    weighed({"start": 0, "end": 1})


def test_a_teacher_without_a_tokenizer_and_one_that_looks_ahead_are_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    bare = shutil.copytree(recipe["teacher"]["model"], tmp_path / "bare")
    for path in bare.glob("token*"):
        path.unlink()
    refused(cli("teacher_cache", "build", write(tmp_path, recipe), f"teacher.model={bare}"), "no tokenizer", str(bare))
    encoder = BertLMHeadModel(
        BertConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    encoder.save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    change = (f"teacher.model={tmp_path / 'encoder'}", "signals={distribution: {rank: 0}}")
    refused(cli("teacher_cache", "build", write(tmp_path, recipe), *change), "looks ahead", "bert")


def test_a_chat_that_nobody_answers_is_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    said = [{"role": "user", "content": "hello"}]
    chats = [[*said, {"role": role, "content": "hello to you"}] for role in ("assistant", "bot")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source = f"sources=[{{name: chats, jsonl: {tmp_path / 'chats.jsonl'}, messages: messages}}]"
    found = cli("teacher_cache", "plan", write(tmp_path, recipe), source)
    refused(found, "no answer of the assistant", "roles user, bot", "chats.jsonl:2")


def test_an_overlay_of_another_dtype_is_refused_before_it_is_filled(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert cli("teacher_cache", "build", write(tmp_path, recipe)).returncode == 0
    again = cli("teacher_cache", "build", write(tmp_path, recipe))
    assert (again.returncode, "nothing was computed" in again.stderr) == (0, True)
    teacher = {**recipe["teacher"], "dtype": "bfloat16"}
    overlay = {
        "cache": str(tmp_path / "o.zarr"),
        "base": recipe["cache"],
        "teacher": teacher,
        "signals": {"distribution": None, "stats": {}},
    }
    refused(cli("teacher_cache", "build", write(tmp_path, overlay)), "not its base's", "float32", "bfloat16")
    assert not (tmp_path / "o.zarr" / "ledger" / "calibration.json").exists()
    refused(cli("teacher_cache", "repair", write(tmp_path, recipe), f"cache={tmp_path / 'nowhere.zarr'}"), "no cache here")
    assert not (tmp_path / "nowhere.zarr").exists()


def test_a_run_is_where_its_folder_is_and_never_in_a_cache(tmp_path: Path, run_recipe: dict[str, Any], cache: Cache) -> None:
    run_recipe |= {"preset": "forward_kl", "losses": {}, "steps": 1, "validation": None}
    refused(cli("student_train", "run", write(tmp_path, run_recipe), f"out={cache.uri}/runs/a"), "nothing but itself")
    assert not (Path(cache.uri) / "runs").exists()
    assert cli("student_train", "run", write(tmp_path, run_recipe)).returncode == 0
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    shutil.rmtree(moved / "student")
    found = cli("student_train", "run", write(tmp_path, run_recipe), f"out={moved}", "--json")
    assert json.loads(found.stdout.splitlines()[-1])["student"] == str(moved / "student")
    assert (moved / "student" / "config.json").is_file()
    eos = json.loads((moved / "student" / "config.json").read_text())["eos_token_id"]
    assert eos == make_tokenizer().eos_token_id
    refused(
        cli("student_train", "generate", str(moved / "student"), cache.uri, "--out", str(moved / "run.json")),
        "something at this place",
    )
    refused(cli("student_train", "plan", write(tmp_path, run_recipe), "--write", str(tmp_path / "no" / "x.yaml")), "no folder")
    (moved / "run.json").write_text("")
    refused(cli("student_train", "run", write(tmp_path, run_recipe), f"out={moved}"), "not JSON", "run.json")


def test_home_is_where_the_tilde_is(
    tmp_path: Path, run_recipe: dict[str, Any], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = validate({**run_recipe, "out": "~/run", "student": {"checkpoint": "~/student"}}, RunRecipe, "here")
    assert (run.out, run.student.checkpoint) == (tmp_path / "run", str(tmp_path / "student"))
    teacher = {**recipe["teacher"], "model": "~/teacher", "tokenizer": "org/name"}
    cache = validate({**recipe, "teacher": teacher, "sources": [{"name": "a", "jsonl": "~/a.jsonl"}]}, CacheRecipe, "here")
    assert cache.sources[0].jsonl == (tmp_path / "a.jsonl",)
    assert (cache.teacher.model, cache.teacher.tokenizer) == (str(tmp_path / "teacher"), "org/name")


def test_what_the_cache_lacks_is_refused_at_start(
    tmp_path: Path, run_recipe: dict[str, Any], recipe_for: Callable[..., Any]
) -> None:
    from teacher_cache.commands.build import build

    poor = build(recipe_for(tmp_path / "poor.zarr", signals={"distribution": {"rank": 0, "head": 2}}))
    written = write(tmp_path, {**run_recipe, "cache": poor.uri})
    refused(cli("student_train", "explain", written), "lhsm needs a signal", "hidden")
    refused(cli("student_train", "explain", written, "preset=forward_kl", "losses.forward_kl.temperature=3"), "no tail", "0.")


def test_unsealed_caches_and_other_tokenizers_are_refused(tmp_path: Path, run_recipe: dict[str, Any], cache: Cache) -> None:
    copy = shutil.copytree(cache.uri, tmp_path / "copy.zarr")
    shutil.rmtree(copy / "ledger" / "seals")
    refused(cli("student_train", "run", write(tmp_path, {**run_recipe, "cache": str(copy)})), "not sealed", "teacher-cache build")
    other = make_tokenizer(bos=True)
    other.add_tokens(["<|more|>"])
    make_model("llama", len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    content = {**run_recipe, "student": {"checkpoint": str(tmp_path / "other")}}
    refused(cli("student_train", "run", write(tmp_path, content)), "forward_kl compares token by token", "strict")


def test_an_edited_recipe_or_a_swapped_teacher_is_refused(tmp_path: Path, recipe: dict[str, Any], teacher_folder: Path) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    recipe["teacher"]["model"] = str(teacher)
    written = write(tmp_path, recipe)
    assert cli("teacher_cache", "calibrate", written).returncode == 0
    refused(cli("teacher_cache", "build", written, "context=40"), "planned by another recipe", "context")
    refused(cli("teacher_cache", "build", written, "signals.distribution.rank=9"), "calibrated by another recipe")
    make_model("llama", 320, seed=3, scale=8.0).save_pretrained(teacher)
    refused(cli("teacher_cache", "build", written), "another teacher", "weights_digest")


@pytest.mark.parametrize("verb", teacher_cache.__all__)
def test_the_package_gives_its_verbs(verb: str) -> None:
    assert getattr(teacher_cache, verb) is getattr(importlib.import_module(f"teacher_cache.commands.{verb}"), verb)


def digests(root: Path) -> dict[str, Any]:
    """Every byte of the cache, but the `about` blocks of the ledger."""
    objects = LocalObjects(root)
    found: dict[str, Any] = {}
    for key in objects.list(""):
        if key.startswith("ledger/") and key.endswith(".json") and "tokenizer" not in key:
            found[key] = read_document(objects, key).body
        else:
            found[key] = objects.read(key)
    return found


def never() -> bool:
    return False


def _forked(module: str, arguments: list[str], log: Path) -> None:
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.argv = [module, *arguments]
        importlib.import_module(f"{module}.cli").main()


def _with_small_files(module: str, arguments: list[str], log: Path) -> None:
    """A command whose disk is full after 9,000 bytes of any file."""
    say_into(log)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    sys.argv = [module, *arguments]
    importlib.import_module(f"{module}.cli").main()


def kill_until_done(module: str, arguments: list[str], log: Path, moments: list[Callable[[], bool]]) -> int:
    """Run a command again and again, killing it as soon as each moment has come, until it finishes by itself. Returns the kills.

    It runs in a fork: the kernel kills it as it kills any process, but nothing has to be imported again.
    """
    for kills, come in enumerate([*moments, never]):
        child = multiprocessing.get_context("fork").Process(target=_forked, args=(module, arguments, log))
        child.start()
        while child.is_alive() and not come():
            time.sleep(0.002)
        child.kill()
        child.join()
        if child.exitcode == 0:
            return kills
        assert child.exitcode == -signal.SIGKILL, log.read_text()
    raise AssertionError("the command never finished by itself")


def test_a_killed_build_ends_in_the_same_bytes(tmp_path: Path, recipe: dict[str, Any], cache: Cache) -> None:
    undisturbed, disturbed = tmp_path / "whole.zarr", tmp_path / "cache.zarr"
    written = write(tmp_path, recipe)
    assert cli("teacher_cache", "build", written, f"cache={undisturbed}").returncode == 0
    moments = [
        lambda: any(disturbed.glob("ledger/staging/plan.*/0000001")),
        lambda: any(disturbed.glob("ledger/staging/0000000.*/tokens/input_ids/c/0")),
        (disturbed / "ledger/units/0000001.0.json").exists,
        lambda: any(disturbed.glob("ledger/staging/0000003.*/distribution/scalars")),
        lambda: any(disturbed.glob("ledger/staging/seal.*")),
        (disturbed / "zarr.json").exists,
    ]
    assert kill_until_done("teacher_cache", ["build", written], tmp_path / "log", moments) >= 3
    assert digests(disturbed) == digests(undisturbed)
    assert digests(undisturbed)["ledger/seals/000000.json"] == digests(Path(cache.uri))["ledger/seals/000000.json"]


def losses_of(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss", r.get("validation_loss"))) for r in records]


def test_a_killed_run_ends_in_the_same_losses(tmp_path: Path, run_recipe: dict[str, Any]) -> None:
    written = write(tmp_path, {**run_recipe, "steps": 30, "checkpoint": {"every": 5}})
    assert cli("student_train", "run", written, f"out={tmp_path / 'whole'}").returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    moments = [
        (checkpoints / "step-00000005").exists,
        lambda: any(checkpoints.glob(".step-00000015")),
        (tmp_path / "run" / "student").exists,
    ]
    assert kill_until_done("student_train", ["run", written], tmp_path / "log", moments) >= 2
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    states = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert states[0] == states[1]


def test_accumulation_does_not_change_the_step(tmp_path: Path, run_recipe: dict[str, Any]) -> None:
    exact = {**run_recipe, "precision": "float32"}  # whatever this machine computes in natively: sums are compared
    for name, rows in (("one", 4), ("four", 1)):
        recipe = {**exact, "out": str(tmp_path / name), "steps": 3, "stream": {**run_recipe["stream"], "micro_batch_rows": rows}}
        assert cli("student_train", "run", write(tmp_path, recipe)).returncode == 0
    for (step, a), (_, b) in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "four"), strict=True):
        assert abs(a - b) <= 1e-5 * abs(a), step


def test_the_result_is_a_plain_folder_and_learns(tmp_path: Path, run_recipe: dict[str, Any], texts: dict[str, Path]) -> None:
    written = write(tmp_path, {**run_recipe, "steps": 60, "validation": {"every": 20, "patience": 3}, "export": "best"})
    done = cli("student_train", "run", written, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    student = tmp_path / "run" / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    assert AutoTokenizer.from_pretrained(student)("def")["input_ids"]
    assert not any("projection" in name for name in model.state_dict())
    assert "tapped" not in (student / "config.json").read_text()
    validations = [loss for step, loss in losses_of(tmp_path / "run") if step % 20 == 0][1::2]
    assert result["validation_loss"] == min(validations) < validations[0]
    again = cli("student_train", "run", written, "--json")
    assert json.loads(again.stdout) == result


def test_explain_names_what_is_read(tmp_path: Path, run_recipe: dict[str, Any]) -> None:
    done = cli("student_train", "explain", write(tmp_path, run_recipe), "--json")
    found = {term["term"]: term for term in json.loads(done.stdout)["terms"]}
    assert set(found) == {"cross_entropy", "forward_kl", "lhsm", "apc", "asr"}
    assert found["lhsm"]["reads"] == [f"hidden/block_output/{layer}" for layer in (1, 2, 3)]
    assert found["apc"]["taps"] == ["attention rows of block 2"]
    assert cli("student_train", "explain", write(tmp_path, run_recipe)).returncode == 0


def test_explain_refuses_what_run_would(tmp_path: Path, run_recipe: dict[str, Any]) -> None:
    written = write(tmp_path, run_recipe)
    refused(cli("student_train", "explain", written, "stream.mix.weights={nobody: 1}"), "no such train source", "nobody")
    refused(cli("student_train", "explain", written, "stream.sequence_length=8"), "longer than a row")


def test_verbs_one_by_one_and_a_full_disk(tmp_path: Path, recipe: dict[str, Any]) -> None:
    written = write(tmp_path, recipe)
    planned = cli("teacher_cache", "plan", written, "--json")
    assert json.loads(planned.stdout)["units"] > 3
    assert cli("teacher_cache", "calibrate", written).returncode == 0
    refused(cli("teacher_cache", "seal", recipe["cache"]), "not filled", "missing: 0, 1, 2")
    log = tmp_path / "log"
    child = multiprocessing.get_context("fork").Process(target=_with_small_files, args=("teacher_cache", ["fill", written], log))
    child.start()
    child.join()
    assert child.exitcode is not None
    full = subprocess.CompletedProcess(["fill"], child.exitcode, "", log.read_text())
    refused(full, "disk is full", "Nothing committed is lost")
    assert cli("teacher_cache", "fill", written).returncode == 0
    assert cli("teacher_cache", "seal", recipe["cache"]).returncode == 0
    shown = cli("teacher_cache", "inspect", recipe["cache"], "--json")
    assert json.loads(shown.stdout)["units"] == json.loads(planned.stdout)["units"]
    assert not (Path(recipe["cache"]) / "ledger" / "staging").exists()


@pytest.mark.parametrize("module", ["teacher_cache", "student_train"])
def test_processes_exit_as_main_does(module: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("contxt: 8\nstps: 8\n")
    refused(process(module, {"teacher_cache": "build", "student_train": "run"}[module], str(path)), "unknown key")


@pytest.mark.parametrize("module", ["teacher_cache", "student_train"])
@pytest.mark.parametrize(("option", "said"), [("--help", "Usage"), ("--version", f"teacher-cache {version('teacher-cache')}\n")])
def test_help_and_version_are_light(module: str, option: str, said: str) -> None:
    script = f"import sys; sys.argv = ['x', '{option}']\nfrom {module}.cli import main\ntry:\n    main()\nfinally:\n    assert not {{'torch', 'zarr'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize("plant", ["torch on a CPU", "torch on a GPU", "Python"])
def test_out_of_memory_is_one_line_that_says_what_to_lower(plant: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        if plant == "torch on a CPU":
            torch.empty(2**50)
        raise (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
            if plant == "torch on a GPU"
            else MemoryError
        )

    with pytest.raises(SystemExit) as stopped:
        guarded(command)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[memory] out of memory")
    assert "batch_tokens" in line
    assert "micro_batch_rows" in line


def test_another_fault_is_not_taken_for_a_lack_of_memory() -> None:
    def command() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        guarded(command)

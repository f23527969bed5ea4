"""Shared fixtures and helpers: tiny random checkpoints of every family, and an offline, isolated environment."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))  # not in each test's own cache
os.environ["COLUMNS"] = "200"  # the width of rich's tables

import atexit
import contextlib
import io
import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT / "examples" / "stories260K"
TEXT = ROOT / "examples" / "text"
FEW_STORIES = Path(tempfile.mkdtemp(prefix="zebra-tests-")) / "few.txt"
FEW_STORIES.write_text("<|endoftext|>".join((TEXT / "tinystories_test.txt").read_text().split("<|endoftext|>")[:25]))
atexit.register(shutil.rmtree, FEW_STORIES.parent, ignore_errors=True)

torch.set_num_threads(1)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Larger than the default of 0.02, so that attention is far from uniform and a wrong mask shows.
    "initializer_range": 0.3,
}
FAMILIES = ("llama", "qwen3")
"""The families of the quick run; the full run tests every family of the table."""

MEMBERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 8, "layer_types": ["full_attention"] * 5},
    "cwm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 8, "layer_types": None},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [2]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    | {"mlp_only_layers": [2], "decoder_sparse_step": 1},
    "mellum": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], "sliding_window": 11},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 3.0}
    | {"final_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 11, "final_logit_softcapping": 4.0}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], "sliding_window": 11},
    "cohere2": {"logit_scale": 0.3},
    "olmo2": {},
    "olmo3": {},
    "granite_swa": {"attention_multiplier": 0.3, "logits_scaling": 3.0, "residual_multiplier": 0.5}
    | {"embedding_multiplier": 2.0, "layer_rope_theta": [1e4, 0, 5e3, 1e4, 1e4]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "zebra_study": {},
}
"""A tiny config for each row of the family table that has a route, some variants, and the study's model."""
EVERY_MEMBER = tuple(MEMBERS)
UNROUTED: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "arcee": {},
    "gemma": {"head_dim": 8},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "seed_oss": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
"""Families without a route to stripes, which can still use Self-Extend."""
FIXED = {"gemma3_text": "1,3", "mellum": "1,3", "cohere2": "3"}
"""Members whose layers cannot change their kind, with the indices of the global layers of the tiny config."""


def some(values: Collection[Any], *quick: Any) -> list[Any]:
    """Parametrize over all values (tuples for several parameters), of which the quick run takes only `quick`."""
    marks = [() if value in quick else (pytest.mark.full,) for value in values]
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=m) for v, m in zip(values, marks, strict=True)]


def fitting(member: str, layout: str) -> str:
    """The layout, or, for a member with fixed layers, its own global layers with the window of the layout."""
    return f"{FIXED[member]}:{layout.rpartition(':')[2]}" if member in FIXED else layout


def tiny_config(member: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    import zebra.study.model  # noqa: F401  # registers its family

    shape = SHAPE | (MEMBERS | UNROUTED).get(member, {}) | changes
    return AutoConfig.for_model(shape.pop("model_type", member), **shape)


def tiny_model(family: str, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set keys of a recipe's tree in place: `train__max_steps` is `max_steps` in the section `train`."""
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section][key] = value
        else:
            tree[section] = value
    return tree


def adapt_recipe(run: Path, **changes: Any) -> Any:
    """A recipe that adapts stories260K for six steps, with a save at every second step."""
    from zebra.train.recipe import AdaptRecipe

    tree: dict[str, Any] = {
        "run": str(run),
        "model": str(STORIES),
        "stripes": "GLLL:33",
        "data": {"files": [str(TEXT / "tinystories_test.txt")], "separator": "<|endoftext|>", "join": True},
        "train": {"length": 600, "max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
        "evaluate": {"files": [str(FEW_STORIES)], "separator": "<|endoftext|>", "join": True, "length": 600}
        | {"eval_steps": 3},
    }
    return AdaptRecipe.model_validate(changed(tree, changes))


class FinishedRun(NamedTuple):
    """A run's directory, and its results."""

    path: Path
    results: list[Any]


@pytest.fixture(scope="session")
def adapt_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An uninterrupted run of `adapt_recipe`, which tests must not change."""
    from zebra.train.adapt import adapt

    run = tmp_path_factory.mktemp("adapt") / "run"
    return FinishedRun(run, adapt(adapt_recipe(run)))


def copy_of(run: FinishedRun, path: Path) -> Path:
    """Copy a finished run that a test may change; its recipe names the new directory."""
    shutil.copytree(run.path, path)
    recipe = path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run.path), str(path)))
    return path


def kind_of(recipe: Path) -> type:
    """The class of one of the repository's recipes."""
    from zebra.study.recipe import StudyRecipe
    from zebra.train.recipe import AdaptRecipe, PretrainRecipe
    from zebra.train.tune_recipe import TuneRecipe

    tree = yaml.safe_load(recipe.read_text())
    if "cells" in tree:
        return StudyRecipe
    if isinstance(tree["model"], dict):
        return PretrainRecipe
    return TuneRecipe if "lit-" in recipe.name else AdaptRecipe


def losses(rows: list[Any]) -> list[float]:
    """The losses of a training, in order."""
    return [row.value for row in rows if row.metric == "loss"]


def checkpoint_activations(model: Any) -> Any:
    """Put the model into training mode with gradient checkpointing."""
    # The first name is that of transformers 5.17, the second that of earlier versions.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model.train()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token IDs of a tiny model (B, T)."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model(ids, **({"use_cache": False} | arguments)).logits


def in_parts(model: Any, ids: torch.Tensor, sizes: list[int], cache: Any = None, **arguments: Any) -> torch.Tensor:
    """The logits of tokens that are read into a KV cache in parts of these sizes.

    Args:
        cache: None creates a bounded cache.
        arguments: `attention_mask` and `position_ids` of all tokens.
    """
    from zebra.model.self_extend import bounded_cache

    cache, output, end = bounded_cache(model) if cache is None else cache, [], 0
    for size in sizes:
        start, end = end, min(end + size, ids.shape[1])
        if start < end:
            part = {name: x[:, 0 if name == "attention_mask" else start : end] for name, x in arguments.items()}
            output.append(logits(model, ids[:, start:end], past_key_values=cache, use_cache=True, **part))
    return torch.cat(output, dim=1)


def off(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value of `expected`."""
    assert output.shape == expected.shape
    return ((output.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints(family, **changes)`: a tiny random checkpoint on disk, created once for each combination."""
    folders: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            tiny_model(family, **changes).save_pretrained(folders[key])
        return folders[key]

    return make


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer of stories260K."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A copy of the checkpoint stories260K that a test may change."""
    return Path(shutil.copytree(STORIES, tmp_path / "stories260K"))


@pytest.fixture
def ending_stories(stories: Path) -> Path:
    """stories260K with a tokenizer that appends its end-of-text token to every text: <s> A </s>."""
    definition = json.loads((stories / "tokenizer.json").read_text())
    template = definition["post_processor"]
    template["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    template["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (stories / "tokenizer.json").write_text(json.dumps(definition))
    return stories


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of texts, some of them hidden."""
    folder = tmp_path / "text"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("bee")
    (folder / "a.txt").write_text("ay\n--\n ayay \n--\n\n")
    (folder / "deep" / "c.md").write_text("see")
    (folder / "deep" / "er" / "d.txt").write_text("dee")
    (folder / ".hidden").write_text("hidden")
    (folder / ".git" / "x.txt").write_text("hidden")
    return folder


Zebra = Callable[..., "subprocess.CompletedProcess[str]"]


def run_zebra(*arguments: object, cwd: Path | None = None, input: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, with the exit code and output of a separate one; state is restored.

    A UserWarning goes to stderr, as in a separate process; any other warning is an error, as in all tests.
    """
    from zebra.cli import main

    text = input.encode() if isinstance(input, str) else input
    stdin, stdout, stderr = (io.TextIOWrapper(io.BytesIO(part), "utf-8") for part in (text, b"", b""))
    with (
        mock.patch.object(sys, "argv", ["zebra", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", stdin),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        _logging_of_a_new_process(stderr),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, kind, file, line, *_: stderr.write(
            warnings.formatwarning(message, kind, file, line)
        )
        with pytest.raises(SystemExit) as end:
            main()
    assert isinstance(end.value.code, int)
    return subprocess.CompletedProcess(arguments, end.value.code, _written(stdout), _written(stderr))


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


@contextlib.contextmanager
def _logging_of_a_new_process(stderr: io.TextIOWrapper) -> Iterator[None]:
    """Redirect the libraries' log handlers to this stderr, and remove pytest's, so that logging's last resort works."""
    root, before = logging.getLogger(), {name: log.level for name, log in _loggers().items()}
    with mock.patch.object(root, "handlers", []):
        streams = {handler: handler.setStream(stderr) for log in _loggers().values() for handler in _handlers(log)}
        yield
    for log in _loggers().values():
        for handler in _handlers(log):
            handler.setStream(streams.get(handler) or sys.__stderr__)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def _loggers() -> dict[str, logging.Logger]:
    return {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}


def _handlers(log: logging.Logger) -> list[Any]:
    return [handler for handler in log.handlers if type(handler) is logging.StreamHandler]


@pytest.fixture(autouse=True, scope="session")
def _small_ceilings() -> Iterator[None]:
    """Measure the CPU's ceilings on small matrices, which saves seconds in each comparison."""
    from zebra import measure

    with pytest.MonkeyPatch.context() as patch:
        size = measure._size
        patch.setattr(measure, "_size", lambda device: 256 if device == "cpu" else size(device))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_sync() -> Iterator[None]:
    """Disable fsync in this process, which saves milliseconds for each of thousands of files."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


@pytest.fixture
def zebra() -> Zebra:
    """`zebra(*arguments, cwd=, input=)`: the command line in this process."""
    return run_zebra


@pytest.fixture
def zebra_process() -> Zebra:
    """`zebra_process(*arguments)`: the command line in a separate process, which takes seconds."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zebra", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            **options,
        )

    return run


def killed(hook: str, *arguments: object) -> None:
    """Run the command line in a separate process that is killed when `hook`, Python code, calls `die()`."""
    prelude = "import os, signal\ndef die(): os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}{hook}\nfrom zebra.cli import main\nmain()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL_AT_A_LOG = """
from zebra.train import trainer
shown = trainer._ShowProgress.on_log
def on_log(self, args, state, control, logs, **kwargs):
    shown(self, args, state, control, logs, **kwargs)
    if state.global_step == 3:
        die()
trainer._ShowProgress.on_log = on_log
"""
"""A hook for `killed`: the training dies after it has logged its third step."""


def set_fields(checkpoint: Path, **fields: object) -> Path:
    """Set fields of a checkpoint's config.json."""
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return checkpoint


def rejected(match: str) -> pytest.RaisesExc[Exception]:
    """Expect a `ZebraError` whose message matches."""
    from zebra import ZebraError

    return pytest.raises(ZebraError, match=match)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that a command failed with one line on stderr, exit code 2 and nothing on stdout."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("zebra: ")
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


def _new_cache(factory: pytest.TempPathFactory) -> Path:
    """A new cache folder, empty except for compiled kernels: all tests share those, as each takes seconds to build."""
    base = factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    kernels.mkdir(exist_ok=True, mode=0o700)
    folder = factory.mktemp("cache")
    (folder / "zebra").mkdir(mode=0o700)
    (folder / "zebra" / "kernels").symlink_to(kernels)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _cache_of_shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(_new_cache(tmp_path_factory))}):
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(_new_cache(tmp_path_factory)))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def generate_tokens(
    model: Any, tokenizer: Any, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
) -> list[list[int]]:
    """Generate after each of several prompts (B, T) and return only the new tokens; options are those of `Decoding`."""
    from zebra.decoding import Decoding
    from zebra.generation import generate_with

    output = generate_with(model, tokenizer, ids, Decoding(**options), attention_mask=attention_mask)
    return output.sequences[:, ids.shape[1] :].tolist()

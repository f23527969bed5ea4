"""Exports run by their engines: tiny random models of each family, and a real small one, as transformers computes them.

`make test-engines` makes one environment for each engine; where one is missing, its tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zebra
from zebra.engines import ENGINES, EXACT, FLAG, REFUSES
from zebra.exports.verify import NEW_TOKENS, TOLERANCE, TOP, compare, run_engine
from zebra.provenance import versions
from zebra.results import Result, read_results, write_results

pytestmark = [pytest.mark.engines, pytest.mark.timeout(7200)]

SIZES = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": 320, "head_dim": 32, "initializer_range": 0.2}
"""Heads of 32: vLLM's attention on a CPU has none smaller."""
PLAIN = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
EXPERTS = {"mlp_only_layers": [], "moe_intermediate_size": 32, "norm_topk_prob": True}
WITHOUT_WIDTH: dict[str, Any] = {"head_dim": None}


class Member(NamedTuple):
    """A tiny model: its family, what its config has, and its layout; `target` is the model_type that runs it."""

    target: str
    layout: str = "1,4:12"
    changes: dict[str, Any] = {}  # noqa: RUF012


MEMBERS = {
    "llama": Member("cwm"),
    "llama-biased": Member("smollm3"),
    "llama-llama3": Member(
        "cwm",
        changes={
            "model_type": "llama",
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "llama-yarn": Member(
        "cwm",
        changes={
            "model_type": "llama",
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            | {"original_max_position_embeddings": 32},
        },
    ),
    "ministral": Member("ministral"),
    "smollm3": Member("smollm3", changes={"no_rope_layers": [1, 1, 1, 0, 1]}),
    "qwen2": Member("qwen2", changes=WITHOUT_WIDTH),
    "qwen3": Member("qwen3", changes={"tie_word_embeddings": True}),
    "qwen2_moe": Member("qwen2_moe", changes=WITHOUT_WIDTH | {"mlp_only_layers": []}),
    "qwen3_moe": Member("mellum", changes=EXPERTS),
    "mellum": Member("mellum", "1,3:12", EXPERTS | {"rope_parameters": PLAIN}),
    "gemma2": Member("gemma2", "LG:12", {"query_pre_attn_scalar": 32}),
    "gemma3_text": Member("gemma3_text", "1,3:12", {"query_pre_attn_scalar": 32, "final_logit_softcapping": None}),
    "cohere2": Member("cohere2", "3:12"),
    "olmo2": Member("olmo3", "LG:12", WITHOUT_WIDTH),
    "granite_swa": Member("granite_swa", changes=WITHOUT_WIDTH | {"layer_rope_theta": [1e4, 0, 1e4, 1e4, 1e4]}),
    "gpt_oss": Member(
        "gpt_oss",
        "LG:12",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            | {"original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
        },
    ),
}
NAMES = {"gguf": "llama.cpp", "mlx": "MLX", "vllm": "vLLM"}
WRONG = {
    "qwen2_moe, without the flag": {},
    "cohere2, without the flag": {},
    "gpt_oss, without the flag": {},
    "granite_swa, with the flag": {"model_impl": "transformers"},
}
"""What vLLM computes wrongly: the arguments that our command does not have."""
RETRIEVAL = ROOT / "examples" / "retrieval-2.2M"


def python_of(engine: str) -> str:
    """The interpreter of an engine's environment."""
    return os.environ.get(f"ZEBRA_PYTHON_{engine.upper()}", str(ROOT / f".venv-{engine}" / "bin" / "python"))


def tokenizer() -> PreTrainedTokenizerFast:
    """Pairs over printable characters alone: llama.cpp withholds a token that ends within a character."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(33, 127)), "Ġ"]
    merges = [(a, b) for a in "abcdefghijklmnopqrst" for b in "etaoinshrdl"][: 320 - len(tokens)]
    vocabulary = {token: i for i, token in enumerate(tokens + ["".join(merge) for merge in merges])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_source(member: str, folder: Path) -> None:
    changes = SIZES | MEMBERS[member].changes
    if changes["head_dim"] is None:
        del changes["head_dim"]
    tiny_model(member, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def with_gpt2_split(folder: Path) -> Path:
    """The real model with a tokenizer that llama.cpp can split as: its own split has no name there."""
    shutil.copytree(RETRIEVAL, folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(state))
    return folder


class Case(NamedTuple):
    """What an engine runs: an export, its source and layout, the request, and the engine's answer."""

    source: Path
    layout: str
    request: dict[str, Any]


def cases(engine: str, folder: Path) -> dict[str, Case]:
    """Every member that the engine takes, and the real model; a GGUF file of eight bits and one of a GGUF file too."""
    result: dict[str, Case] = {}
    sources = {name: (folder / f"{name}-source", MEMBERS[name].layout) for name in MEMBERS if not refused(engine, name)}
    for name, (source, _) in sources.items():
        write_source(name, source)
    real = with_gpt2_split(folder / "retrieval") if engine == "gguf" else RETRIEVAL
    sources["retrieval-2.2M"] = (real, "LLLG:128")
    for name, (source, layout) in sources.items():
        result[name] = exported(engine, source, layout, folder / name, dtype="f32")
    if engine == "gguf":
        for dtype in ("f16", "q8_0"):
            result[f"retrieval-2.2M {dtype}"] = exported(engine, real, "LLLG:128", folder / dtype, dtype=dtype)
    if engine == "vllm":
        for name, arguments in WRONG.items():
            member = name.partition(",")[0]
            layout = "GL:12" if member == "gpt_oss" else MEMBERS[member].layout  # its own windows are those of LG
            case = exported(engine, sources[member][0], layout, folder / name.replace(", ", "-"), dtype="f32")
            result[name] = case._replace(request=case.request | {"arguments": arguments})
    return result


def exported(engine: str, source: Path, layout: str, target: Path, dtype: str) -> Case:
    target = target.with_name(f"{target.name}.gguf") if engine == "gguf" else target
    done = zebra.export(source, target, to=engine, stripes=layout, dtype=dtype if engine == "gguf" else None)
    window = int(layout.rpartition(":")[2])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 320, (size,), generator=generator).tolist() for size in (window - 4, 3 * window)]
    arguments = {"model_impl": "transformers"} if "--model-impl transformers" in done.command else {}
    request = {
        "model": str(target),
        "prompts": ids,
        "new_tokens": NEW_TOKENS,
        "top": TOP,
        "texts": ["a tale of 12 cats!"],
    }
    return Case(source, layout, request | {"arguments": arguments})


def refused(engine: str, member: str) -> bool:
    return ENGINES[MEMBERS[member].target][NAMES[engine]].verdict not in (EXACT, FLAG)


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[..., None]]:
    """Collect results; where ZEBRA_ENGINE_RESULTS names a file they take the place of earlier ones in it."""
    rows: list[Result] = []

    def one(engine: str, name: str, layout: str, metric: str, value: float, **columns: Any) -> None:
        by = {} if (answer := columns.pop("answer", None)) is None else {NAMES[engine]: answer["engine"]}
        rows.append(
            Result(
                run="engines",
                model=name,
                layout=layout,
                task=NAMES[engine],
                metric=metric,
                value=value,
                versions=versions() | by,
                **columns,
            )
        )

    yield one
    if file := os.environ.get("ZEBRA_ENGINE_RESULTS"):
        new = {(row.task, row.model) for row in rows}
        earlier = read_results(file) if Path(file).is_file() else []
        every = [row for row in earlier if (row.task, row.model) not in new] + rows
        order = [*MEMBERS, "retrieval-2.2M", "retrieval-2.2M f16", "retrieval-2.2M q8_0", *WRONG]
        write_results(file, sorted(every, key=lambda row: (order.index(row.model), [*NAMES.values()].index(row.task))))


Run = Callable[[str], tuple[dict[str, Case], dict[str, dict[str, Any]]]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(engine)`: all cases of an engine, and its answers, in one process of it."""
    done: dict[str, tuple[dict[str, Case], dict[str, dict[str, Any]]]] = {}

    def once(engine: str) -> tuple[dict[str, Case], dict[str, dict[str, Any]]]:
        if not Path(python_of(engine)).exists():
            pytest.skip(f"no environment with {engine} at {python_of(engine)}: `make test-engines` makes it")
        if engine not in done:
            all_cases = cases(engine, tmp_path_factory.mktemp(engine))
            answers = run_engine(engine, python_of(engine), [case.request for case in all_cases.values()])
            done[engine] = all_cases, dict(zip(all_cases, answers, strict=True))
        return done[engine]

    return once


ALL = [(engine, name) for engine in NAMES for name in (*MEMBERS, "retrieval-2.2M")]
ALL += [("gguf", f"retrieval-2.2M {dtype}") for dtype in ("f16", "q8_0")]


@pytest.mark.parametrize(("engine", "name"), ALL)
def test_an_export_computes_what_transformers_does(
    engine: str, name: str, run: Run, tmp_path: Path, record: Callable[..., None]
) -> None:
    if name in MEMBERS and refused(engine, name):
        write_source(name, tmp_path / "source")
        target = tmp_path / ("target.gguf" if engine == "gguf" else "target")
        with pytest.raises(zebra.ZebraError):
            zebra.export(tmp_path / "source", target, to=engine, stripes=MEMBERS[name].layout)
        record(engine, name, MEMBERS[name].layout, "refused", 1)
        return
    all_cases, answers = run(engine)
    case, answer = all_cases[name], answers[name]
    assert "error" not in answer, answer
    striped, full = (zebra.load(case.source, stripes=one, dtype="float32") for one in (case.layout, None))
    kind = name.rpartition(" ")[2].upper()
    tolerance = TOLERANCE.get(kind if kind in ("F16", "Q8_0") else "F32", 0.5)
    worst, behind, of_full = 0.0, 0.0, 0.0
    for prompt, tokens, logprobs in zip(case.request["prompts"], answer["tokens"], answer["logprobs"], strict=True):
        assert len(tokens) == len(logprobs) == NEW_TOKENS
        difference, below = compare(striped, prompt, tokens, logprobs)
        worst, behind = max(worst, difference), max(behind, below)
        if len(prompt) > 12 and name not in ("cohere2", "gemma3_text", "mellum"):  # their sources have windows
            of_full = compare(full, prompt, tokens, logprobs)[0]
    print(f"{answer['engine']}: {name}, {case.layout}: {worst:.1e}, greedy {behind:.1e} behind, full {of_full:.1e}")
    assert worst < tolerance
    assert behind < tolerance
    assert of_full > (2 if kind == "Q8_0" else 10) * worst or of_full == 0.0
    assert answer["texts"] == [zebra_tokens(case.source, text) for text in case.request["texts"]]
    values = {"logprob_difference": worst, "greedy_behind": behind} | (
        {"full_logprob_difference": of_full} if of_full else {}
    )
    for metric, value in values.items():
        counts = {"length": len(case.request["prompts"][-1]), "n": 2 * NEW_TOKENS * TOP, "seed": 0}
        record(engine, name, case.layout, metric, value, answer=answer, **counts)


@pytest.mark.parametrize("name", WRONG)
def test_vllm_is_wrong_in_silence_with_the_wrong_flag(name: str, run: Run, record: Callable[..., None]) -> None:
    """Where this passes no more, the table of engines has a flag too many."""
    all_cases, answers = run("vllm")
    case, answer = all_cases[name], answers[name]
    assert "error" not in answer, answer
    striped, prompt = zebra.load(case.source, stripes=case.layout, dtype="float32"), case.request["prompts"][-1]
    difference, _ = compare(striped, prompt, answer["tokens"][-1], answer["logprobs"][-1])
    record("vllm", name, case.layout, "logprob_difference", difference, answer=answer, length=len(prompt), seed=0)
    assert difference > 0.1


def zebra_tokens(source: Path, text: str) -> list[int]:
    from zebra.model.checkpoint import load_tokenizer

    return list(load_tokenizer(source)(text).input_ids)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_vllm_refuses_a_striped_qwen_without_the_flag(family: str, tmp_path: Path) -> None:
    """`max_window_layers: 0`, which convert writes; with 28 it would run every layer with full attention."""
    if not Path(python_of("vllm")).exists():
        pytest.skip("no environment with vllm")
    write_source(family, tmp_path / "source")
    zebra.convert(tmp_path / "source", tmp_path / "striped", "GL:12")
    request = {"model": str(tmp_path / "striped"), "prompts": [[5, 6]], "new_tokens": 1, "top": 1, "texts": []}
    (answer,) = run_engine("vllm", python_of("vllm"), [request | {"arguments": {}}])
    assert "Sliding window for some but all layers is not supported" in answer["error"]
    assert ENGINES[family]["vLLM"].verdict == FLAG


@pytest.mark.parametrize("family", [name for name, row in ENGINES.items() if row["MLX"].silent])
def test_mlx_ignores_the_stripes_of_a_converted_folder(family: str, tmp_path: Path) -> None:
    """`zebra convert` warns of it. Where this passes no more, the table of engines is too strict."""
    if not Path(python_of("mlx")).exists():
        pytest.skip("no environment with mlx")
    write_source(family, tmp_path / "source")
    zebra.convert(tmp_path / "source", tmp_path / "striped", "LG:12")
    prompt = torch.randint(3, 320, (36,), generator=torch.Generator().manual_seed(0)).tolist()
    request = {"model": str(tmp_path / "striped"), "prompts": [prompt], "new_tokens": NEW_TOKENS, "top": TOP}
    (answer,) = run_engine("mlx", python_of("mlx"), [request | {"texts": []}])
    rest = prompt, answer["tokens"][0], answer["logprobs"][0]
    full = zebra.load(tmp_path / "source", stripes="G:12", dtype="float32")
    assert compare(full, *rest)[0] < 1e-3
    assert compare(zebra.load(tmp_path / "striped", dtype="float32"), *rest)[0] > 0.1


def test_every_family_is_tried_or_refused() -> None:
    tried = {member.target for member in MEMBERS.values()}
    rest = {family for family in ENGINES if family not in tried}
    assert all(support.verdict == REFUSES or support.read for family in rest for support in ENGINES[family].values())

"""Benches: turns, medians, gate, memory of a fresh process, every subject, the page. No test looks at speed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, Zebra, refused
from transformers import DynamicCache

from zebra import kernels, measure
from zebra.errors import ZebraError
from zebra.model.cache import GrowingLayer, SelfExtendLayer, StripedCache
from zebra.model.self_extend import GroupedRotation, bounded_cache, set_self_extend
from zebra.plan import devices
from zebra.positions import SelfExtend
from zebra.provenance import git_commit
from zebra.report import terminal_tables, write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import visible_pairs
from zebra_bench import alone, attention, ceilings, generation, models, pairing, peers, self_extend
from zebra_bench.pairing import Variant, Work
from zebra_bench.subjects import FAST, SUBJECTS, Attention, Decode, Extended, Layer, Loss, Prefill, TrainStep

SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 8, "intermediate": 24}
TINY: dict[str, Any] = {
    "attention": Attention(length=100, window=20, heads=4, kv_heads=2, head_size=8, repeats=2),
    "layer": Layer(length=100, window=20, **SMALL, repeats=2),
    "train-step": TrainStep(length=60, stripes="GL:20", layers=3, words=50, **SMALL, repeats=2),
    "prefill": Prefill(length=60, stripes="GL:20", layers=3, words=50, **SMALL, repeats=2),
    "decode": Decode(length=60, stripes="GL:20", layers=3, words=50, **SMALL, repeats=2),
    "self-extend": Extended(length=60, self_extend="4:20", chunk=25, layers=3, words=50, **SMALL, repeats=2),
    "loss": Loss(length=60, hidden=16, words=50, repeats=2),
}

KNOWN = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from zebra_bench.pairing import Case, Variant, Work
from zebra_bench.subjects import Paired

@dataclass(frozen=True, kw_only=True)
class Known(Paired):
    name = "known"
    module = "known"
    mebibytes: int = 64
    error: float = 0.0
    log: str = ""

def case(sizes):
    def call():
        with Path(sizes.log).open("a") as log:
            log.write("called ")
        scratch = torch.ones(sizes.mebibytes << 20, dtype=torch.uint8)
        return [scratch[: 32 << 20].clone()]
    work = Work(prepare=lambda: call, suffix="_forward_backward", tokens=5, planned=lambda device: 0.25)
    return Case(task="known", variants=(Variant(name="ours", layout="", works=(work,), gate=lambda: sizes.error),))
"""


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A subject that holds a known number of bytes, for this process and for fresh ones."""
    (tmp_path / "known.py").write_text(KNOWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delitem(sys.modules, "known", raising=False)
    return importlib.import_module("known").Known


@pytest.fixture
def peaks(tmp_path: Path) -> str:
    """A file of ceilings: nothing is measured for them."""
    path = tmp_path / "peaks.json"
    path.write_text(json.dumps({"name": "two cores", "flops": {"float32": 2e11, "bfloat16": 9e11}, "bandwidth": 4e10}))
    return str(path)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than all the rest."""
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_variants_take_turns_and_the_first_turn_only_warms_up() -> None:
    said: list[str] = []

    def work(name: str, suffix: str) -> Work:
        def prepare() -> pairing.Call:
            said.append(f"prepare {name}{suffix}")
            return lambda: said.append(name + suffix) or []  # type: ignore[func-returns-value]

        return Work(prepare=prepare, suffix=suffix)

    variants = [Variant(name=n, layout="", works=(work(n, ""), work(n, "_both"))) for n in "ab"]
    taken = pairing.timings(variants, 3)
    assert said[:4] == ["prepare a", "prepare a_both", "prepare b", "prepare b_both"]
    assert said[4:] == ["a", "a_both", "b", "b_both"] * 4
    assert {key: len(times) for key, times in taken.items()} == dict.fromkeys(itertools.product("ab", ("", "_both")), 3)


def test_a_row_has_the_median_with_the_least_and_the_most(
    known: Any, peaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [9.0, 0.5, 0.1, 0.3, 0.2, 0.4]  # the first is the warm-up
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, taken) for taken in seconds))
    monkeypatch.setattr(measure.benchmark, "timer", lambda: next(clock))
    rows, _ = pairing.bench(known(log=str(tmp_path / "log"), memory=False, ceilings=peaks))
    found = {row.metric: row for row in rows}
    row = found["milliseconds_forward_backward"]
    assert (row.value, row.low, row.high) == pytest.approx((300, 100, 500))
    assert row.n == 5
    assert found["tokens_per_second_forward_backward"].value == pytest.approx(5 / 0.3)
    assert found["planned_milliseconds_forward_backward"].value == 250
    assert row.commit == git_commit()
    assert row.versions["torch"] == torch.__version__


def test_a_call_of_several_tokens_is_timed_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(measure.benchmark, "timer", lambda: float(next(clock)))
    variant = Variant(name="a", layout="", works=(Work(prepare=lambda: lambda: [], calls=4),))
    assert pairing.timings([variant], 2) == {("a", ""): [250, 250]}


def test_the_gate_refuses_before_anything_is_timed(known: Any, peaks: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for wrong in (0.5, float("nan")):
        with pytest.raises(ZebraError, match=r"ours is off by .* Nothing was measured"):
            pairing.bench(known(log=str(log), error=wrong, ceilings=peaks))
    assert not log.exists()


@pytest.mark.parametrize("part", ["out", "gradient"])
def test_a_wrong_kernel_yields_no_row(part: str, peaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is off by a hundredth, or gradients alone."""

    def wrong(request: kernels.Request) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = kernels.banded.KERNEL.run(request)
        return (out * 1.01 if part == "out" else out.detach() + 1.01 * (out - out.detach())), lse

    broken = tuple(replace(one, run=wrong) if one.name == "banded" else one for one in kernels.KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", broken)
    with pytest.raises(ZebraError, match=r"zebra, banded is off by 1\.0e-02"):
        pairing.bench(replace(TINY["attention"], memory=False, ceilings=peaks))


def test_no_gradient_that_is_not_a_number_passes() -> None:
    one, none = torch.ones(3), torch.full((3,), float("nan"))
    for found in ([one, none], [none, one], [one, none, one]):
        assert math.isnan(measure.relative_error(found, [one] * len(found)))


@pytest.mark.skipif(not alone._STATUS.is_file(), reason="this system does not tell a process's peak")
def test_a_fresh_process_sees_the_bytes_of_a_call_without_its_outputs(known: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = pairing.alone(known(log=str(log), mebibytes=96), "ours", "_forward_backward")
    assert found is not None
    assert found / 2**20 == pytest.approx(96, abs=4)
    assert log.read_text() == "called "


def test_a_fresh_process_that_fails_costs_its_own_row_alone(
    known: Any, peaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing.sys, "executable", "/bin/false")
    rows, left_out = pairing.bench(known(log=str(tmp_path / "log"), ceilings=peaks))
    assert left_out == ("measuring the memory of ours ended with code 1: no word: perhaps memory ran out",)
    metrics = {row.metric for row in rows}
    assert "milliseconds_forward_backward" in metrics
    assert "extra_bytes_forward_backward" not in metrics


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_subject_runs_and_its_rows_render(name: str, dtype: str, peaks: str, tmp_path: Path) -> None:
    sizes = replace(TINY[name], dtype=dtype, memory=False, ceilings=peaks)
    assert type(sizes) is SUBJECTS[name]
    rows, left_out = pairing.bench(sizes)
    times = [row for row in rows if row.metric.startswith("milliseconds")]
    assert times[0].model.startswith("zebra")
    assert len({row.model for row in times}) >= 2
    for row in times:
        assert row.n == 2
        assert row.low <= row.value <= row.high
        suffix = row.metric.removeprefix("milliseconds")
        beside = {r.metric: r.value for r in rows if (r.model, r.layout) == (row.model, row.layout)}
        assert beside["planned_milliseconds" + suffix] > 0
        assert row.length == sizes.length
        assert row.task.endswith(dtype)
    assert {row.metric for row in rows if row.task == "bench ceilings"} == {"flops_per_second", "bytes_per_second"}
    if name in ("attention", "layer"):
        assert any("compiler" in line for line in left_out)
    write_report(rows, tmp_path / "page.html")
    page = (tmp_path / "page.md").read_text()
    assert "Other results" not in page
    assert "planned ms" in page
    assert len(terminal_tables(rows)) == 2


@pytest.mark.skipif(not alone._STATUS.is_file(), reason="this system does not tell a process's peak")
def test_full_logits_take_the_memory_that_they_should() -> None:
    sizes = Loss(length=1024, words=8000, hidden=16)
    logits = 4 * 1024 * 8000
    full = pairing.alone(sizes, "full logits", "_forward_backward")
    assert full is not None
    assert 1.9 * logits < full < 5 * logits


def test_another_matmul_precision_is_in_the_names(peaks: str) -> None:
    try:
        rows, _ = pairing.bench(replace(TINY["loss"], memory=False, matmul_precision="medium", ceilings=peaks))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {row.model for row in rows if row.metric.startswith("milliseconds")} == {
        "zebra" + FAST,
        "full logits" + FAST,
    }


def test_executed_flops_are_those_of_the_tiles() -> None:
    """Of the formula all pairs, of the band those of its tiles, which grow as the length does."""

    def forward(name: str, length: int) -> int:
        sizes = Attention(length=length, window=64, heads=2, head_size=8)
        q, k, v, _ = attention.inputs(sizes, length)
        run = Work(prepare=lambda: lambda: [attention._by_kernel(name, 64, q, k, v)])
        return pairing.executed(Variant(name=name, layout="", works=(run,)), run)

    assert forward("reference", 512) == 4 * 8 * 2 * 512**2
    counts = [forward("banded", length) for length in (512, 1024, 2048)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    useful = 4 * 8 * 2 * visible_pairs(2048, 64)
    assert useful < counts[2] < 4 * useful


@pytest.mark.parametrize(("length", "window"), [(128, 1), (300, 7), (512, 128), (640, 129), (700, 300), (200, 900)])
def test_the_blocks_of_flex_cover_the_band_exactly(length: int, window: int) -> None:
    blocks = peers.band_blocks(length, window, "cpu")
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    band = (i - j >= 0) & (i - j < window)

    def pairs(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            chosen[row, indices[0, 0, row, :count].long()] = True
        return chosen.repeat_interleave(128, 0).repeat_interleave(128, 1)[:length, :length]

    partial, full = (
        pairs(blocks.kv_num_blocks, blocks.kv_indices),
        pairs(blocks.full_kv_num_blocks, blocks.full_kv_indices),
    )
    assert not (partial & full).any()
    assert torch.equal(full | (partial & band), band)


def test_eager_is_left_out_where_its_scores_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.os, "sysconf", lambda name: 4096 if "SIZE" in name else 16)
    case = attention.case(TINY["attention"])
    assert not any(variant.name == "eager" for variant in case.variants)
    assert any(line.startswith("eager: its scores") for line in case.left_out)


def test_what_another_raises_leaves_it_out() -> None:
    def fails() -> pairing.Call:
        raise ValueError("no such\nthing")

    works = (Work(prepare=fails),)
    case = pairing.Case(task="", variants=(Variant(name="theirs", layout="", works=works, may_fail=True),))
    assert pairing.tried(case) == pairing.Case(task="", variants=(), left_out=("theirs: no such",))
    with pytest.raises(ValueError, match="no such"):
        pairing.timings([Variant(name="ours", layout="", works=works)], 1)


SELF_EXTEND: Any = TINY["self-extend"]


def test_the_works_of_self_extend(peaks: str) -> None:
    def timed(work: str | None) -> set[tuple[str, str]]:
        rows, _ = pairing.bench(replace(SELF_EXTEND, work=work, memory=False, ceilings=peaks))
        return {(row.model, row.metric) for row in rows if row.metric.startswith("milliseconds")}

    both = {"zebra, Self-Extend", "zebra, plain"}
    layer = {*itertools.product(both, ("milliseconds_prefill_attention", "milliseconds_decode_attention"))}
    model = {*itertools.product(both, ("milliseconds_decode",))}
    assert timed("attention") == layer
    prefill = {*itertools.product({*both, "two score matrices"}, ("milliseconds_prefill_attention",))}
    assert timed("authors") == prefill
    assert timed("decode") == model
    assert timed(None) == layer | model


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_two_score_matrices_are_self_extend(heads: int) -> None:
    setting = SelfExtend.parse(SELF_EXTEND.self_extend)
    found = self_extend._prepare_two_matrices(SELF_EXTEND, setting, heads)()
    wanted = self_extend._prepare_attention(SELF_EXTEND, setting)()[0].transpose(1, 2)
    assert measure.relative_error(found, [wanted]) < 1e-5
    plain = self_extend._prepare_attention(SELF_EXTEND, None)()[0].transpose(1, 2)
    assert measure.relative_error(found, [plain]) > 1e-2


@pytest.mark.parametrize("setting", ["4:20", None])
@pytest.mark.parametrize("part", ["_layer_error", "_model_error"])
def test_the_gate_of_self_extend_sees_another_setting(
    part: str, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = None if setting is None else SelfExtend.parse(setting)
    small = replace(SELF_EXTEND, length=107)
    assert getattr(self_extend, part)(small, one) < 1e-5
    if one is not None:
        monkeypatch.setattr(
            GroupedRotation, "rotation_of_all_keys", lambda rotation, positions, total, dtype: positions.query_rotation
        )
        monkeypatch.setattr(
            self_extend, "set_self_extend", lambda model, setting: set_self_extend(model, replace(setting, group=3))
        )
        assert getattr(self_extend, part)(small, one) > measure.TOLERANCE["float32"]


def test_two_score_matrices_take_the_heads_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2 * SELF_EXTEND.length**2
    monkeypatch.setattr(self_extend, "too_large", lambda scores, device: "too much" if scores > limit else None)
    authors = replace(SELF_EXTEND, work="authors")
    assert [variant.name for variant in self_extend.case(authors).variants][2:] == [
        "two score matrices, 2 of 4 heads at a time"
    ]
    limit = 5
    case = self_extend.case(authors)
    assert case.left_out == ("two score matrices: too much",)
    assert len(case.variants) == 2


@pytest.mark.parametrize("setting", ["4:20", None])
def test_a_step_of_self_extends_decode_goes_on_from_a_filled_cache(
    setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(self_extend, "bounded_cache", lambda model: kept.append(bounded_cache(model)) or kept[0])
    call = self_extend._prepare_decode(SELF_EXTEND, None if setting is None else SelfExtend.parse(setting))
    assert call()[0].shape == (1, 1, 50)
    assert kept[0].get_seq_length() == SELF_EXTEND.length + 2 * self_extend.STEPS
    assert {type(layer) for layer in kept[0].layers} == {SelfExtendLayer if setting else GrowingLayer}


@pytest.mark.skipif(not alone._STATUS.is_file(), reason="this system does not tell a process's peak")
def test_chunks_are_the_peak_of_a_whole_process(peaks: str, tmp_path: Path) -> None:
    sizes = replace(SELF_EXTEND, work="chunks", ceilings=peaks)
    rows, _ = pairing.bench(sizes)
    found = {row.model: row.value for row in rows if row.metric == "peak_bytes_chunks"}
    assert found.keys() == {"zebra, Self-Extend", "zebra, plain"}
    assert min(found.values()) > 100 << 20  # torch alone
    more = pairing.alone(replace(sizes, words=200_000, head_size=128), "zebra, plain", "_chunks")
    assert more is not None
    assert more - found["zebra, plain"] > 0.9 * 4 * 200_000 * 512
    write_report(rows, tmp_path / "page.html")
    assert "prefill in chunks" in (tmp_path / "page.md").read_text()


def test_a_filled_cache_is_what_a_prefill_leaves() -> None:
    """As many tokens, and after a turn of decode `STEPS` more; ours holds no more than the window in local layers."""
    sizes = TINY["decode"]
    made = models.config(sizes, generation.Stripes.parse(sizes.stripes))
    for cache in (StripedCache(made), DynamicCache(config=made)):
        held = generation.filled(sizes, cache, 3)
        assert held.get_seq_length() == sizes.length
        assert [layer.keys.shape[-2] for layer in held.layers] == [60, 19, 60]
    kept: list[Any] = []
    call = generation._decode(
        sizes, generation.Stripes.parse(sizes.stripes), "zebra", lambda made: kept.append(StripedCache(made)) or kept[0]
    )
    assert call()[0].shape == (1, 1, 50)
    assert kept[0].get_seq_length() == sizes.length + 2 * generation.STEPS


def test_ceilings_go_to_the_plan_and_back(zebra: Zebra, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "machine.json"
    done = zebra("doctor", "--measure", "--size", 64, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    layer = [one for one in results if one["metric"] == "milliseconds_forward_backward"]
    assert [one["model"] for one in layer] == ["zebra", "sdpa, dense mask"]
    assert all(one["low"] <= one["value"] <= one["high"] for one in layer)
    device = devices.find(path)
    assert device.source == devices.MEASURED
    assert {one["model"]: one["value"] for one in results}["float32 products"] == device.flops["float32"] > 0
    done = zebra("plan", ROOT / "examples/stories260K", "--length", 512, "--dtype", "float32", "--device", path)
    assert done.returncode == 0, done.stderr
    again = measure.measure_ceilings("cpu", size=32, repeats=1)
    measure.write_ceilings(path, again)
    assert devices.find(path) == again
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_a_local_layer_that_differs_from_sdpa_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(request: kernels.Request) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = kernels.banded.KERNEL.run(request)
        return out * 1.01, lse

    monkeypatch.setattr(kernels, "KERNELS", (replace(kernels.banded.KERNEL, run=wrong),))
    with kernels.only("banded"), pytest.raises(ZebraError, match=r"differs from sdpa by 1\.0e-02"):
        measure.local_layer("cpu", "float32", size=64, repeats=1)


def test_options_of_measuring_need_measure(zebra: Zebra, tmp_path: Path) -> None:
    refused(zebra("doctor", "--size", 64), "belong to --measure")
    refused(zebra("doctor", "--measure", "--out", tmp_path), "--out is a file")


def test_of_two_measured_ceilings_the_larger_counts() -> None:
    one, two = (devices.Device("x", {"float32": f}, b, 7, devices.MEASURED) for f, b in ((1.0, 4.0), (2.0, 3.0)))
    assert ceilings.highest(one, two) == replace(one, flops={"float32": 2.0})
    fast, slow = ({"full_attention": {"float32": rate}, "sliding_attention": {"float32": 3.0}} for rate in (5.0, 4.0))
    for first, second in ((fast, slow), (slow, fast)):
        assert ceilings.highest(replace(one, attention=first), replace(two, attention=second)).attention == fast


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "length": ("attention", {"length": 0}, "--length is a whole number of at least 1; got 0"),
    "heads": ("attention", {"heads": 6, "kv_heads": 4}, "multiple of --kv-heads; got 6 and 4"),
    "head size": ("decode", {"head_size": 7}, "--head-size is even"),
    "dtype": ("loss", {"dtype": "int8"}, "--dtype is one of float32, bfloat16; got 'int8'"),
    "layout": ("train-step", {"stripes": "GX:9"}, "G .global. and L .local."),
    "layer": ("prefill", {"stripes": "9:5"}, "layer 9"),
    "setting": ("self-extend", {"self_extend": "auto:9"}, "GROUP:WINDOW"),
    "near alone": ("self-extend", {"length": 1024}, "beyond its window of 1,024 tokens; got --length 1,024"),
    "work": ("self-extend", {"work": "all"}, "attention, authors, decode, chunks; got 'all'"),
    "memory": ("self-extend", {"work": "chunks", "memory": False}, "memory alone; got --no-memory"),
    "repeats": ("loss", {"repeats": 0}, "--repeats"),
    "seed": ("loss", {"seed": -1}, "--seed"),
    "words": ("train-step", {"words": 3}, "at least 4 --words"),
    "one token": ("loss", {"length": 1}, "from 2 tokens"),
    "sinks": ("prefill", {"stripes": "GL:16+4"}, "no sinks; got GL:16.4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes_are_refused(case: str) -> None:
    name, sizes, words = BAD[case]
    with pytest.raises(ZebraError, match=words):
        SUBJECTS[name](**sizes)


def test_ceilings_without_the_dtype_are_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.json"
    half.write_text(json.dumps({"name": "x", "flops": {"bfloat16": 1e9}, "bandwidth": 1e9}))
    with pytest.raises(ZebraError, match="no ceiling for float32"):
        pairing.bench(replace(TINY["loss"], ceilings=str(half)))


@pytest.fixture
def speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/speed.py, with its files elsewhere."""
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speed", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "PAGE", tmp_path / "speed.md")
    return module


def _row(model: str, metric: str, value: float, run: str = "attention", dtype: str = "float32") -> Result:
    task = f"bench {run}: x, {dtype}"
    return Result(run=run, model=model, layout="L:512", task=task, metric=metric, value=value, length=16384, n=5)


def test_the_page_says_what_was_reached(speed: ModuleType) -> None:
    both = "milliseconds_forward_backward"
    rows = [
        _row("zebra, banded", both, 10.0),
        _row("zebra, other", both, 12.0),
        _row("sdpa, dense mask", both, 260.0),
        _row("zebra, banded", both, 10.0, dtype="bfloat16"),
        _row("sdpa, dense mask", both, 370.0, dtype="bfloat16"),
        _row("zebra, banded", "extra_bytes_forward_backward", 20.0),
        _row("sdpa, dense mask", "extra_bytes_forward_backward", 100.0),
        *(
            replace(_row("zebra, banded" + FAST, f"{kind}share_of_peak_forward_backward", share, "switch"), length=4096)
            for kind, share in (("", 0.5), ("useful_", 0.4))
        ),
        replace(
            _row("float32 products" + FAST, "flops_per_second", 2e11, "switch"), task="bench ceilings", length=None
        ),
        replace(_row("zebra, banded", both, 1.0), length=512),
    ]
    lines = [[cell.text for cell in line] for line in speed.figures(rows).blocks[1].body]
    assert [line[2:6] for line in lines[:4]] == [
        ["26.0 ×", "25.0 ×", "28.0 ×", "passed"],
        ["37.0 ×", "30.0 ×", "36.0 ×", "stretch"],
        ["50.0\N{NO-BREAK SPACE}%", "47.0\N{NO-BREAK SPACE}%", "60.0\N{NO-BREAK SPACE}%", "passed"],
        ["0.200", "0.160", "0.080", "missed"],
    ]
    assert lines[0][6] == "260.0 against 10.00 ms by banded; 21.7 × by other, 12.00 ms"
    said = "banded; of 200.0 GFLOP/s, which torch's products reach; 40.0\N{NO-BREAK SPACE}% counting visible pairs only"
    assert lines[2][6] == said
    assert [line[5] for line in lines[4:]] == ["not measured"] * 8


def test_the_page_holds_self_extend_against_plain(speed: ModuleType) -> None:
    def row(model: str, metric: str, value: float, run: str = "self-extend") -> Result:
        return _row(model, metric, value, run=run)

    prefill, token = "milliseconds_prefill_attention", "milliseconds_decode_attention"
    rows = [row("zebra, Self-Extend", prefill, 22.0), row("zebra, plain", prefill, 20.0)]
    rows += [row("zebra, plain", prefill, 5.0, "authors")]
    rows += [row("two score matrices, 1 of 2 heads at a time", prefill, 50.0, "authors")]
    rows += [row("zebra, Self-Extend", token, 26.0), row("zebra, plain", token, 20.0)]
    rows += [
        row("zebra, Self-Extend", "peak_bytes_chunks", 11 << 20),
        row("zebra, plain", "peak_bytes_chunks", 10 << 20),
    ]
    lines = [[cell.text for cell in line] for line in speed.figures(rows).blocks[1].body]
    lines = [line for line in lines if line[5] != "not measured"]
    assert [line[2:6] for line in lines] == [
        ["1.100", "1.250", "1.150", "stretch"],
        ["1.300", "1.200", "1.050", "missed"],
        ["1.100", "1.150", "1.050", "passed"],
    ]
    assert lines[0][6] == "22.00 against 20.00 ms; two score matrices, 1 of 2 heads at a time 10.0 times"
    assert lines[2][6] == "11 of 10 MiB"


def test_a_part_replaces_its_own_rows_alone(
    speed: ModuleType, tmp_path: Path, peaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _row("zebra, banded", "milliseconds", 1.0)
    file = tmp_path / "cpu.jsonl"
    monkeypatch.setattr(speed, "_CPU", True)
    write_results(file, [other, _row("gone", "milliseconds", 1.0, run="loss")])
    monkeypatch.setitem(speed.PARTS, "loss", (replace(TINY["loss"], memory=False, ceilings=peaks),))
    speed.main(["loss"])
    rows = read_results(file)
    assert rows[0] == other
    named = {"float32 products", "copy"}
    assert {row.model for row in rows[1:]} - named == {"zebra", "full logits"}
    assert {row.run for row in rows[1:]} == {"loss"}
    page = (tmp_path / "speed.md").read_text()
    assert "| full logits" in page
    speed.main(["--page"])
    assert (tmp_path / "speed.md").read_text() == page
    with pytest.raises(ZebraError, match="parts are ceilings, attention"):
        speed.main(["attentoin"])


def test_the_pages_plan_is_planned_over_measured(speed: ModuleType) -> None:
    task = "bench train step: 9M parameters, float32"
    make = {"run": "plan", "layout": "GLLL:512", "task": task, "length": 2048, "model": "zebra"}
    rows = [
        Result(metric="milliseconds", value=200.0, **make),
        Result(metric="planned_milliseconds", value=150.0, **make),
    ]
    line = [cell.text for cell in speed.plan(rows).blocks[1].body[0]]
    assert line == ["9M parameters, float32, 2,048 tokens", "150.0", "200.0", "0.75"]

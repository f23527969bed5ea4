"""Benchmarks and `zebra doctor --measure`: alternation, medians, correctness gate, memory, page; never the speed."""

from __future__ import annotations

import functools
import importlib
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

import speed_kernels
from zebra import kernels, measure
from zebra.errors import ZebraError
from zebra.kernels import native
from zebra.model.cache import StripedCache
from zebra.model.cache_layers import GrowingLayer
from zebra.model.opaque_layers import SelfExtendLayer
from zebra.model.self_extend import GroupedRotation, bounded_cache, set_self_extend
from zebra.plan import devices
from zebra.positions import SelfExtend
from zebra.provenance import git_commit
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes, visible_pairs
from zebra_bench import attention, generation, models, peak_memory, peers, runner, self_extend
from zebra_bench.configs import (
    FAST,
    AttentionConfig,
    BenchmarkConfig,
    DecodeConfig,
    LossConfig,
    SelfExtendConfig,
    TrainStepConfig,
)
from zebra_bench.runner import Benchmark, Variant, Workload

HEADS: dict[str, Any] = {"heads": 4, "key_value_heads": 2, "head_dim": 8, "repeats": 2}
MODEL: dict[str, Any] = HEADS | {"length": 60, "layers": 3, "intermediate_size": 24, "vocab_size": 50}
TINY: dict[str, Any] = {
    "attention": AttentionConfig(length=100, window=20, **HEADS),
    "train-step": TrainStepConfig(stripes="GL:20", **MODEL),
    "decode": DecodeConfig(stripes="GL:20", **MODEL),
    "self-extend": SelfExtendConfig(self_extend="4:20", chunk=25, **MODEL),
    "loss": LossConfig(length=60, hidden_size=16, vocab_size=50, repeats=2),
}
SELF_EXTEND: SelfExtendConfig = TINY["self-extend"]

KNOWN = """
from dataclasses import dataclass
from pathlib import Path
import torch
from zebra_bench.configs import BenchmarkConfig
from zebra_bench.runner import Benchmark, Variant, Workload

@dataclass(frozen=True, kw_only=True)
class KnownConfig(BenchmarkConfig):
    module = "known"
    mebibytes: int = 64
    error: float = 0.0
    log: str = ""

def benchmark(config):
    def call():
        with Path(config.log).open("a") as log:
            log.write("called ")
        scratch = torch.ones(config.mebibytes << 20, dtype=torch.uint8)
        return [scratch[: 32 << 20].clone()]
    workload = Workload(prepare=lambda: call, suffix="_step", tokens=5, planned=lambda device: 0.25)
    ours = Variant(name="ours", layout="", workloads=(workload,), gate=lambda: config.error)
    return Benchmark(task="known", variants=(ours,))
"""

needs_peak = pytest.mark.skipif(not peak_memory._STATUS.is_file(), reason="this system does not report a peak")


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark that takes a known number of bytes, for this process and for fresh ones."""
    (tmp_path / "known.py").write_text(KNOWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "known", raising=False)
    return importlib.import_module("known").KnownConfig


@pytest.fixture
def ceilings(tmp_path: Path) -> str:
    """A file of known hardware ceilings, so that none are measured."""
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"name": "two cores", "flops": {"float32": 2e11, "bfloat16": 9e11}, "bandwidth": 4e10}))
    return str(path)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than everything else. No other test of the process reads what is remembered of it here."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native, "_loaded", functools.cache(native._loaded.__wrapped__))


# The protocol


def test_variants_take_turns_and_the_first_turn_only_warms_up() -> None:
    calls: list[str] = []

    def workload(name: str, suffix: str) -> Workload:
        def prepare() -> runner.Call:
            calls.append(f"prepare {name}{suffix}")
            return lambda: calls.append(name + suffix) or []  # type: ignore[func-returns-value]

        return Workload(prepare=prepare, suffix=suffix)

    variants = [Variant(name=n, layout="", workloads=(workload(n, ""), workload(n, "_both"))) for n in "ab"]
    times = runner.milliseconds(variants, 3)
    assert calls[:4] == ["prepare a", "prepare a_both", "prepare b", "prepare b_both"]
    assert calls[4:] == ["a", "a_both", "b", "b_both"] * 4
    assert {key: len(own) for key, own in times.items()} == dict.fromkeys(itertools.product("ab", ("", "_both")), 3)


def test_a_result_has_the_median_with_the_least_and_the_most(
    known: Any, ceilings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [9.0, 0.5, 0.1, 0.3, 0.2, 0.4]  # the first is the warm-up
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, elapsed) for elapsed in seconds))
    monkeypatch.setattr(measure.benchmark, "timer", lambda: next(clock))
    results, _ = runner.run_benchmark(known(log=str(tmp_path / "log"), memory=False, ceilings=ceilings))
    by_metric = {result.metric: result for result in results}
    time = by_metric["milliseconds_step"]
    assert (time.value, time.low, time.high) == pytest.approx((300, 100, 500))
    assert time.n == 5
    assert by_metric["tokens_per_second_step"].value == pytest.approx(5 / 0.3)
    assert by_metric["planned_milliseconds_step"].value == 250
    assert time.commit == git_commit()
    assert time.versions["torch"] == torch.__version__


def test_a_call_of_several_tokens_is_timed_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(measure.benchmark, "timer", lambda: float(next(clock)))
    variant = Variant(name="a", layout="", workloads=(Workload(prepare=lambda: lambda: [], calls=4),))
    assert runner.milliseconds([variant], 2) == {("a", ""): [250, 250]}


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_the_gate_raises_before_anything_is_timed(error: float, known: Any, ceilings: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ZebraError, match=r"ours is off by .* Nothing was measured"):
        runner.run_benchmark(known(log=str(log), error=error, ceilings=ceilings))
    assert not log.exists()


@pytest.mark.parametrize("part", ["out", "gradient"])
def test_a_wrong_kernel_yields_no_result(part: str, ceilings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is off by a hundredth, or gradients alone."""

    def wrong(request: kernels.Request) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = kernels.banded.KERNEL.run(request)
        return (out * 1.01 if part == "out" else out.detach() + 1.01 * (out - out.detach())), lse

    broken = tuple(replace(one, run=wrong) if one.name == "banded" else one for one in kernels.KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", broken)
    with pytest.raises(ZebraError, match=r"zebra, banded is off by 1\.0e-02"):
        runner.run_benchmark(replace(TINY["attention"], memory=False, ceilings=ceilings))


def test_no_gradient_that_is_not_a_number_passes() -> None:
    one, none = torch.ones(3), torch.full((3,), float("nan"))
    for results in ([one, none], [none, one], [one, none, one]):
        assert math.isnan(measure.relative_error(results, [one] * len(results)))


def test_an_alternative_that_raises_is_left_out() -> None:
    def fails() -> runner.Call:
        raise ValueError("no such\nthing")

    workloads = (Workload(prepare=fails),)
    broken = Benchmark(task="", variants=(Variant(name="theirs", layout="", workloads=workloads, may_fail=True),))
    assert runner.runnable(broken) == Benchmark(task="", variants=(), left_out=("theirs: no such",))
    with pytest.raises(ValueError, match="no such"):
        runner.milliseconds([Variant(name="ours", layout="", workloads=workloads)], 1)


def test_another_matmul_precision_is_in_the_names(ceilings: str) -> None:
    try:
        config = replace(TINY["loss"], memory=False, matmul_precision="medium", ceilings=ceilings)
        results, _ = runner.run_benchmark(config)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    timed = {result.model for result in results if result.metric.startswith("milliseconds")}
    assert timed == {"zebra" + FAST, "full logits" + FAST}


def test_ceilings_without_the_dtype_are_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.json"
    half.write_text(json.dumps({"name": "x", "flops": {"bfloat16": 1e9}, "bandwidth": 1e9}))
    with pytest.raises(ZebraError, match="no ceiling for float32"):
        runner.run_benchmark(replace(TINY["loss"], ceilings=str(half)))


def test_of_two_measured_ceilings_the_larger_counts() -> None:
    one, two = (devices.Device("x", {"float32": f}, b, 7, devices.MEASURED) for f, b in ((1.0, 4.0), (2.0, 3.0)))
    assert runner.highest(one, two) == replace(one, flops={"float32": 2.0})
    fast, slow = ({"full_attention": {"float32": rate}, "sliding_attention": {"float32": 3.0}} for rate in (5.0, 4.0))
    for first, second in ((fast, slow), (slow, fast)):
        assert runner.highest(replace(one, attention=first), replace(two, attention=second)).attention == fast


# Memory


@needs_peak
def test_extra_bytes_are_those_of_a_call_without_its_outputs() -> None:
    def call() -> list[torch.Tensor]:
        scratch = torch.ones(96 << 20, dtype=torch.uint8)
        return [scratch[: 32 << 20].clone()]

    extra = peak_memory.extra_bytes(Workload(prepare=lambda: call), "cpu")
    assert extra is not None
    assert extra / 2**20 == pytest.approx(96, abs=8)


@needs_peak
@pytest.mark.full
def test_a_fresh_process_sees_the_same(known: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    extra = runner.peak_bytes(known(log=str(log), mebibytes=96), "ours", "_step")
    assert extra is not None
    assert extra / 2**20 == pytest.approx(96, abs=4)
    assert log.read_text() == "called "


def test_a_fresh_process_that_fails_costs_its_own_result_alone(
    known: Any, ceilings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    results, left_out = runner.run_benchmark(known(log=str(tmp_path / "log"), ceilings=ceilings))
    assert left_out == ("measuring the memory of ours ended with code 1: no message: perhaps memory ran out",)
    metrics = {result.metric for result in results}
    assert "milliseconds_step" in metrics
    assert "extra_bytes_step" not in metrics


@needs_peak
@pytest.mark.full
def test_full_logits_take_the_memory_that_they_should() -> None:
    extra = runner.peak_bytes(
        LossConfig(length=1024, vocab_size=8000, hidden_size=16), "full logits", "_forward_backward"
    )
    assert extra is not None
    assert 1.9 * 4 * 1024 * 8000 < extra < 5 * 4 * 1024 * 8000


@needs_peak
@pytest.mark.full
def test_chunks_are_the_peak_of_a_whole_process(ceilings: str, tmp_path: Path) -> None:
    config = replace(SELF_EXTEND, workload="chunks", ceilings=ceilings)
    results, _ = runner.run_benchmark(config)
    peaks = {result.model: result.value for result in results if result.metric == "peak_bytes_chunks"}
    assert peaks.keys() == {"zebra, Self-Extend", "zebra, plain"}
    assert min(peaks.values()) > 100 << 20  # torch alone
    more = runner.peak_bytes(replace(config, vocab_size=200_000, head_dim=128), "zebra, plain", "_chunks")
    assert more is not None
    assert more - peaks["zebra, plain"] > 0.9 * 4 * 200_000 * 512
    write_report(results, tmp_path / "page.html")
    assert "chunks" in (tmp_path / "page.md").read_text()


# Each benchmark


_SLOW = [(name, "bfloat16") for name in TINY if name != "train-step"]  # whose bfloat16 is autocast


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=[pytest.mark.full] * (case in _SLOW), id="-".join(case))
        for case in itertools.product(TINY, ("float32", "bfloat16"))
    ],
)
def test_every_benchmark_runs_and_its_results_render(name: str, dtype: str, ceilings: str, tmp_path: Path) -> None:
    config = replace(TINY[name], dtype=dtype, memory=False, ceilings=ceilings)
    results, left_out = runner.run_benchmark(config)
    times = [result for result in results if result.metric.startswith("milliseconds")]
    assert times[0].model.startswith("zebra")
    assert len({time.model for time in times}) >= 2
    for time in times:
        assert time.n == 2
        assert time.low is not None
        assert time.high is not None
        assert time.low <= time.value <= time.high
        suffix = time.metric.removeprefix("milliseconds")
        same = {r.metric: r.value for r in results if (r.model, r.layout) == (time.model, time.layout)}
        assert same["planned_milliseconds" + suffix] > 0
        assert time.length == config.length
        assert time.task.endswith(dtype)
    assert {r.metric for r in results if r.task == "bench ceilings"} == {"flops_per_second", "bytes_per_second"}
    if name == "attention":
        assert any("compiler" in line for line in left_out)
    write_report(results, tmp_path / "page.html")
    page = (tmp_path / "page.md").read_text()
    assert "Other results" not in page
    assert "planned milliseconds" in page


def test_executed_flops_are_those_of_the_tiles() -> None:
    """The formula executes all pairs, the banded kernel those of its tiles, which grow linearly with the length."""

    def forward(kernel: str, length: int) -> int:
        config = AttentionConfig(length=length, window=64, heads=2, head_dim=8)
        q, k, v, _ = attention.inputs(config, length)
        return runner.executed_flops(Workload(prepare=lambda: lambda: [attention.attend_with(kernel, 64, q, k, v)]))

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

    partial = pairs(blocks.kv_num_blocks, blocks.kv_indices)
    full = pairs(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(full | (partial & band), band)


def test_eager_is_left_out_where_its_scores_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.os, "sysconf", lambda name: 4096 if "SIZE" in name else 16)
    benchmark = attention.benchmark(TINY["attention"])
    assert not any(variant.name == "eager" for variant in benchmark.variants)
    assert any(line.startswith("eager: its scores") for line in benchmark.left_out)


def test_a_filled_cache_is_what_a_prefill_leaves() -> None:
    """As many tokens, and after a turn of decode `STEPS` more; ours holds no more than the window in local layers."""
    config, stripes = TINY["decode"], Stripes.parse("GL:20")
    llama = models.llama_config(config, stripes)
    for cache in (StripedCache(llama), DynamicCache(config=llama)):
        filled = generation.filled(config, cache)
        assert filled.get_seq_length() == config.length
        assert [layer.keys.shape[-2] for layer in filled.layers] == [60, 19, 60]
    caches: list[Any] = []
    step = generation._decode(config, stripes, "zebra", lambda llama: caches.append(StripedCache(llama)) or caches[0])
    assert step()[0].shape == (1, 1, 50)
    assert caches[0].get_seq_length() == config.length + 2 * generation.STEPS


# Self-Extend


def test_the_workloads_of_self_extend() -> None:
    def timed(workload: str | None) -> set[tuple[str, str]]:
        benchmark = self_extend.benchmark(replace(SELF_EXTEND, workload=workload, memory=False))
        return {(variant.name, one.suffix) for variant in benchmark.variants for one in variant.workloads}

    both = {"zebra, Self-Extend", "zebra, plain"}
    layer = {*itertools.product(both, ("_prefill_attention", "_decode_attention"))}
    model = {*itertools.product(both, ("_decode",))}
    assert timed("attention") == layer
    assert timed("authors") == {*itertools.product({*both, "two score matrices"}, ("_prefill_attention",))}
    assert timed("decode") == model
    assert timed(None) == layer | model


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_two_score_matrices_are_self_extend(heads: int) -> None:
    setting = SelfExtend.parse(SELF_EXTEND.self_extend)
    out = self_extend._prepare_two_matrices(SELF_EXTEND, setting, heads)()
    expected = self_extend._prepare_attention(SELF_EXTEND, setting)()[0].transpose(1, 2)
    assert measure.relative_error(out, [expected]) < 1e-5
    plain = self_extend._prepare_attention(SELF_EXTEND, None)()[0].transpose(1, 2)
    assert measure.relative_error(out, [plain]) > 1e-2


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
            GroupedRotation, "rotation_of_all_keys", lambda rotation, positions: positions.query_rotation
        )
        monkeypatch.setattr(
            self_extend, "set_self_extend", lambda model, setting: set_self_extend(model, replace(setting, group=3))
        )
        assert getattr(self_extend, part)(small, one) > measure.TOLERANCE["float32"]


def test_two_score_matrices_take_the_heads_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2 * SELF_EXTEND.length**2
    monkeypatch.setattr(self_extend, "too_large", lambda scores, device: "too much" if scores > limit else None)
    authors = replace(SELF_EXTEND, workload="authors")
    names = [variant.name for variant in self_extend.benchmark(authors).variants]
    assert names[2:] == ["two score matrices, 2 of 4 heads at a time"]
    limit = 5
    benchmark = self_extend.benchmark(authors)
    assert benchmark.left_out == ("two score matrices: too much",)
    assert len(benchmark.variants) == 2


@pytest.mark.parametrize("setting", ["4:20", None])
def test_decoding_with_self_extend_continues_from_a_filled_cache(
    setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Any] = []
    monkeypatch.setattr(self_extend, "bounded_cache", lambda model: caches.append(bounded_cache(model)) or caches[0])
    step = self_extend._prepare_decode(SELF_EXTEND, None if setting is None else SelfExtend.parse(setting))
    assert step()[0].shape == (1, 1, 50)
    assert caches[0].get_seq_length() == SELF_EXTEND.length + 2 * self_extend.STEPS
    assert {type(layer) for layer in caches[0].layers} == {SelfExtendLayer if setting else GrowingLayer}


BAD: dict[str, tuple[type[BenchmarkConfig], dict[str, Any], str]] = {
    "length": (AttentionConfig, {"length": 0}, "length is a whole number of at least 1; got 0"),
    "heads": (AttentionConfig, {"heads": 6, "key_value_heads": 4}, "multiple of key_value_heads; got 6 and 4"),
    "head dimension": (DecodeConfig, {"head_dim": 7}, "head_dim is even"),
    "dtype": (LossConfig, {"dtype": "int8"}, "dtype is float32 or bfloat16; got 'int8'"),
    "layout": (TrainStepConfig, {"stripes": "GX:9"}, "G .global. and L .local."),
    "layer": (DecodeConfig, {"stripes": "9:5"}, "layer 9"),
    "sinks": (DecodeConfig, {"stripes": "GL:16+4"}, "no sinks; got GL:16.4"),
    "setting": (SelfExtendConfig, {"self_extend": "auto:9"}, "GROUP:WINDOW"),
    "within": (SelfExtendConfig, {"length": 1024}, "beyond its window of 1,024 tokens; got a length of 1024"),
    "workload": (SelfExtendConfig, {"workload": "all"}, "attention, authors, decode, chunks; got 'all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes_are_refused(case: str) -> None:
    config, sizes, words = BAD[case]
    with pytest.raises(ZebraError, match=words):
        config(**sizes)


# zebra doctor --measure


def test_ceilings_go_to_the_plan_and_back(zebra: Zebra, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "machine.json"
    done = zebra("doctor", "--measure", "--size", 64, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    layer = [one for one in results if one["metric"] == "milliseconds_forward_backward"]
    assert [one["model"] for one in layer] == ["zebra", "sdpa, dense mask"]
    assert all(one["low"] <= one["value"] <= one["high"] for one in layer)
    device = devices.find_device(path)
    assert device.source == devices.MEASURED
    assert {one["model"]: one["value"] for one in results}["float32 products"] == device.flops["float32"] > 0
    done = zebra("plan", ROOT / "examples/stories260K", "--length", 512, "--dtype", "float32", "--device", path)
    assert done.returncode == 0, done.stderr
    again = measure.measure_ceilings("cpu", size=32, repeats=1)
    measure.write_ceilings(path, again)
    assert devices.find_device(path) == again
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_a_measured_machine_is_shown_as_tables(zebra: Zebra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table = zebra("doctor", "--measure", "--size", 64).stdout
    for word in ("float32 products", "sdpa, dense mask", "least–most", "GFLOP/s"):
        assert word in table


def test_a_local_layer_that_differs_from_sdpa_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(request: kernels.Request) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = kernels.banded.KERNEL.run(request)
        return out * 1.01, lse

    monkeypatch.setattr(kernels, "KERNELS", (replace(kernels.banded.KERNEL, run=wrong),))
    with kernels.only("banded"), pytest.raises(ZebraError, match=r"differs from sdpa by 1\.0e-02"):
        measure.local_layer("cpu", "float32", size=64, repeats=1)


def test_options_of_measuring_need_measure(zebra: Zebra, tmp_path: Path) -> None:
    refused(zebra("doctor", "--size", 64), "require --measure")
    refused(zebra("doctor", "--measure", "--out", tmp_path), "is a folder, a device or a pipe. Name a file")


# The page


@pytest.fixture
def speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/speed.py, with its files elsewhere."""
    module = importlib.import_module("speed")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    monkeypatch.setattr(module, "KIND", "cpu")
    return module


def _result(model: str, metric: str, value: float, run: str = "attention", dtype: str = "float32") -> Result:
    task = f"bench {run}: x, {dtype}"
    return Result(run=run, model=model, layout="L:512", task=task, metric=metric, value=value, length=16384, n=5)


def test_the_page_says_which_goals_were_reached(speed: ModuleType) -> None:
    both, peak = "milliseconds_forward_backward", "share_of_peak_forward_backward"
    results = [
        _result("zebra, banded", both, 10.0),
        _result("zebra, other", both, 12.0),
        _result("sdpa, dense mask", both, 260.0),
        _result("zebra, banded", both, 10.0, dtype="bfloat16"),
        _result("sdpa, dense mask", both, 370.0, dtype="bfloat16"),
        _result("zebra, banded", "extra_bytes_forward_backward", 20.0),
        _result("sdpa, dense mask", "extra_bytes_forward_backward", 100.0),
        *(
            replace(_result("zebra, banded" + FAST, metric, share, "switch"), length=4096)
            for metric, share in ((peak, 0.5), ("useful_" + peak, 0.4))
        ),
        replace(
            _result("float32 products" + FAST, "flops_per_second", 2e11, "switch"), task="bench ceilings", length=None
        ),
        replace(_result("zebra, banded", both, 1.0), length=512),
    ]
    lines = [[cell.text for cell in line] for line in speed_kernels.goals(results).blocks[1].body]
    assert [line[2:6] for line in lines[:4]] == [
        ["26.0 ×", "25.0 ×", "28.0 ×", "passed"],
        ["37.0 ×", "30.0 ×", "36.0 ×", "stretch"],
        ["50.0\N{NO-BREAK SPACE}%", "47.0\N{NO-BREAK SPACE}%", "60.0\N{NO-BREAK SPACE}%", "passed"],
        ["0.200", "0.160", "0.080", "missed"],
    ]
    assert lines[0][6] == "260.0 against 10.00 ms by banded; 21.7 × by other, 12.00 ms"
    assert lines[2][6] == (
        "banded; of 200.0 GFLOP/s, which torch's products reach; 40.0\N{NO-BREAK SPACE}% counting visible pairs only"
    )
    assert [line[5] for line in lines[4:]] == ["not measured"] * 8


def test_the_page_compares_self_extend_with_plain(speed: ModuleType) -> None:
    def result(model: str, metric: str, value: float, run: str = "self-extend") -> Result:
        return _result(model, metric, value, run=run)

    prefill, token = "milliseconds_prefill_attention", "milliseconds_decode_attention"
    results = [result("zebra, Self-Extend", prefill, 22.0), result("zebra, plain", prefill, 20.0)]
    results += [result("zebra, plain", prefill, 5.0, "authors")]
    results += [result("two score matrices, 1 of 2 heads at a time", prefill, 50.0, "authors")]
    results += [result("zebra, Self-Extend", token, 26.0), result("zebra, plain", token, 20.0)]
    results += [result("zebra, Self-Extend", "peak_bytes_chunks", 11 << 20)]
    results += [result("zebra, plain", "peak_bytes_chunks", 10 << 20)]
    lines = [[cell.text for cell in line] for line in speed_kernels.goals(results).blocks[1].body]
    lines = [line for line in lines if line[5] != "not measured"]
    assert [line[2:6] for line in lines] == [
        ["1.100", "1.250", "1.150", "stretch"],
        ["1.300", "1.200", "1.050", "missed"],
        ["1.100", "1.150", "1.050", "passed"],
    ]
    assert lines[0][6] == "22.00 against 20.00 ms; two score matrices, 1 of 2 heads at a time: 10.0 ×"
    assert lines[2][6] == "11 of 10 MiB"


def test_a_part_replaces_its_own_results_alone(
    speed: ModuleType, tmp_path: Path, ceilings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _result("zebra, banded", "milliseconds", 1.0)
    file = tmp_path / "cpu.jsonl"
    write_results(file, [other, _result("gone", "milliseconds", 1.0, run="loss")])
    monkeypatch.setitem(speed.PARTS, "loss", (replace(TINY["loss"], memory=False, ceilings=ceilings),))
    speed.main(["loss"])
    results = read_results(file)
    assert results[0] == other
    assert {one.model for one in results[1:]} == {"zebra", "full logits", "float32 products", "copy"}
    assert {one.run for one in results[1:]} == {"loss"}
    page = (tmp_path / "speed.md").read_text()
    assert "| full logits" in page
    speed.main(["--page"])
    assert (tmp_path / "speed.md").read_text() == page
    with pytest.raises(ZebraError, match="parts are ceilings, attention"):
        speed.main(["attentoin"])


def test_a_part_with_other_sizes_is_shown_and_not_published(
    speed: ModuleType,
    tmp_path: Path,
    ceilings: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(speed.PARTS, "loss", (replace(TINY["loss"], ceilings=ceilings),))
    speed.main(["loss", "vocab_size=40", "memory=false"])
    assert "vocabulary 40" in capsys.readouterr().out
    assert speed.with_settings(AttentionConfig(), ["heads=2"]).kv_heads == 2
    assert [file.name for file in tmp_path.iterdir()] == ["ceilings.json"]
    for arguments, words in ((["loss", "words=4"], "the sizes are"), (["loss", "length=x"], "whole number; got 'x'")):
        with pytest.raises(ZebraError, match=words):
            speed.main(arguments)
    with pytest.raises(ZebraError, match="belong to one part"):
        speed.main(["loss", "decode", "length=4"])


def test_the_pages_plan_is_planned_over_measured(speed: ModuleType) -> None:
    task = "bench train step: 9M parameters, float32"
    common = {"run": "plan", "layout": "GLLL:512", "task": task, "length": 2048, "model": "zebra"}
    results = [
        Result(metric="milliseconds", value=200.0, **common),
        Result(metric="planned_milliseconds", value=150.0, **common),
    ]
    line = [cell.text for cell in speed_kernels.plan(results).blocks[1].body[0]]
    assert line == ["9M parameters, float32, 2,048 tokens", "150.0", "200.0", "0.75"]


def test_the_published_page_is_that_of_its_results(speed: ModuleType, tmp_path: Path) -> None:
    speed.write_page(ROOT / "benchmarks" / "results", tmp_path / "speed.md", tmp_path)
    assert (tmp_path / "speed.md").read_text() == (ROOT / "docs" / "results" / "speed.md").read_text()
    for picture in tmp_path.glob("*.svg"):
        assert picture.read_text() == (ROOT / "docs" / "images" / picture.name).read_text()

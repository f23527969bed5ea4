"""`zebra compare`: methods side by side, paired, resumed, within a budget, and the advice that follows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FEW_STORIES, ROOT, STORIES, FinishedRun, Zebra

from zebra.compare.measurements import Measurements, Unit, measure_cost, measure_window, schedule
from zebra.compare.methods import Method, choose_methods, standard_methods
from zebra.compare.results import comparison_results
from zebra.compare.run import compare, default_stripes, planned_run
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder
from zebra.errors import ZebraError
from zebra.evaluate.perplexity import perplexity
from zebra.evaluate.target import EvalTarget
from zebra.model.checkpoint import read_config
from zebra.model.load import load
from zebra.plan.cost import pairs
from zebra.plan.memory import kv_bytes
from zebra.report.compared import Methods, answered
from zebra.report.method import method
from zebra.report.methods import method_summaries, method_tables
from zebra.report.page import Table
from zebra.results import Result, read_results

LENGTH = 600
RETRIEVAL = ROOT / "examples" / "retrieval-2.2M"
OPTIONS: dict[str, Any] = {
    "length": LENGTH,
    "methods": ["dynamic", "self-extend", "selected"],
    "stripes": "GL:33",
    "tasks": ["passkey"],
    "depths": [0.5],
    "separator": "<|endoftext|>",
    "windows": 3,
    "samples": 1,
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A whole comparison, which tests read and do not change."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    return FinishedRun(out, compare(str(STORIES), [str(FEW_STORIES)], out=out, **OPTIONS))


def one(results: list[Result], **columns: Any) -> Result:
    (result,) = [r for r in results if all(getattr(r, name) == value for name, value in columns.items())]
    return result


def test_perplexities_are_those_of_evaluate_on_the_same_windows(comparison: FinishedRun) -> None:
    """The windows are full ones, at the beginning of the documents that are long enough."""
    target = EvalTarget(STORIES, self_extend=f"auto:{LENGTH}")
    text = read_corpus([str(FEW_STORIES)], Encoder.of(target.tokenizer), separator="<|endoftext|>")
    windows = np.concatenate([document[:LENGTH] for document in text if len(document) >= LENGTH][:3])
    corpus = Corpus(windows, np.arange(0, 3 * LENGTH + 1, LENGTH))
    expected = {(s.position_from, s.position_to): s for s in perplexity(target.load(), corpus, length=LENGTH)}
    layout = next(r.layout for r in comparison.results if "self-extend" in r.layout)
    measured = [r for r in comparison.results if (r.metric, r.layout) == ("perplexity", layout)]
    assert len(measured) == len(expected) == 4
    for result in measured:
        score = expected[result.position_from or 0, result.position_to or 0]
        assert (result.value, result.low, result.high) == pytest.approx((score.perplexity, score.low, score.high))
        assert result.n == score.tokens


def test_a_paired_difference_is_the_log_of_the_ratio_of_perplexities(comparison: FinishedRun) -> None:
    for span in ((0, 256), (256, 512), (512, LENGTH), (0, LENGTH)):
        here = [r for r in comparison.results if (r.position_from, r.position_to) == span]
        perplexities = {r.layout: r.value for r in here if r.metric == "perplexity"}
        above = {r.layout: r for r in here if r.metric == "loss_above_best"}
        best = min(perplexities.values())
        assert len(perplexities) == len(above) == 4
        for layout, value in perplexities.items():
            assert above[layout].value == pytest.approx(math.log(value / best), abs=1e-12)
        assert min(r.value for r in above.values()) == 0


def test_the_interval_of_a_difference_is_that_of_pairs(comparison: FinishedRun) -> None:
    """A method that hardly differs from the best has a far narrower interval than its perplexity."""
    here = [r for r in comparison.results if (r.position_from, r.position_to) == (256, 512)]
    above = min((r for r in here if r.metric == "loss_above_best" and r.value > 0), key=lambda r: r.value)
    loss = one(here, metric="perplexity", layout=above.layout)
    assert None not in (above.low, above.high, loss.low, loss.high)
    assert above.high - above.low < 0.3 * math.log(loss.high / loss.low)  # type: ignore[operator]


def test_the_failure_of_a_method_is_a_result(comparison: FinishedRun) -> None:
    """Dynamic NTK works on whole texts only: it has a perplexity, but cannot use a cache."""
    failed = {r.task for r in comparison.results if r.task.startswith("compare-failed") and "dynamic" in r.layout}
    assert failed == {"compare-failed-cost", "compare-failed-passkey"}
    assert any(r.metric == "perplexity" and "dynamic" in r.layout for r in comparison.results)
    _, lines = method_tables(comparison.results)
    (line,) = [line for line in lines if line.startswith("rope=dynamic:1")]
    assert "(cost, passkey)" in line


def test_any_error_fails_only_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a bug of a model's own code, or a checkpoint whose tokens are others."""

    def broken(model: Any, *arguments: Any) -> Any:
        if getattr(model.config, "layer_types", None):
            raise IndexError("index out of range in self")
        return measure_window(model, *arguments)

    monkeypatch.setattr("zebra.compare.run.measure_window", broken)
    more = [Method.parse("stripes=GL:33"), Method.parse(f"checkpoint={RETRIEVAL}")]
    options = OPTIONS | {"methods": ["unchanged"], "additional": more}
    results = compare(str(STORIES), [str(FEW_STORIES)], out=tmp_path / "out", budget_minutes=0, **options)
    failed = {(r.layout.partition("@")[0], r.task): r.metric for r in results if r.task.startswith("compare-failed")}
    assert failed.pop(("stripes=GL:33", "compare-failed-window")) == "IndexError: index out of range in self"
    ((method, task), reason) = failed.popitem()
    assert (method, task, failed) == (f"checkpoint={RETRIEVAL}", "compare-failed-load", {})
    assert reason.startswith(f"the tokenizer must be that of {STORIES}; ")


def test_trained_checkpoints_are_compared_with_the_best_of_the_source() -> None:
    """They may be below it: an adaptation also learns the text."""
    losses = (("m", "full", 3.0), ("m", "GL:8", 2.5), ("runs/x/model", "full", 2.0))
    methods: list[Any] = [
        {Unit("window", 0): {"sums": [loss], "counts": [1], "layout": layout, "model": model, "device": "cpu"}}
        for model, layout, loss in losses
    ]
    results = comparison_results(methods, task="p", bounds=[0, 2], trained=None, run="r", seed=0)
    assert [r.value for r in results if r.metric == "loss_above_best"] == [0.5, 0.0, -0.5]


def test_the_cost_is_measured_as_planned(comparison: FinishedRun) -> None:
    costs = [r for r in comparison.results if r.task == "compare-cost"]
    for layout in {r.layout for r in costs}:
        measured, planned = (one(costs, layout=layout, metric=m).value for m in ("kv_bytes", "kv_bytes_planned"))
        assert measured == planned
    assert all(r.value > 0 for r in costs)


def test_sinks_and_full_decoding_are_planned() -> None:
    """`config.json` does not have them: the plan used to assume a cache of the window, not of all tokens."""
    model = load(STORIES, stripes="GL:33+4", full_decode=True)
    measured = measure_cost(model, np.arange(100))["kv_bytes"]
    assert kv_bytes(planned_run(model, 100, "prefill")) == measured
    assert pairs(planned_run(model, 100, "decode")) == 5 * 101
    sinks = load(STORIES, stripes="GL:33+4")
    assert kv_bytes(planned_run(sinks, 100, "prefill")) == measure_cost(sinks, np.arange(100))["kv_bytes"] < measured


def test_stripes_have_sinks_unless_positions_are_alibi(checkpoints: Callable[..., Path]) -> None:
    for position_embedding, layout in (("rotary", "GL:64+4"), ("alibi", "GL:64")):
        config = read_config(checkpoints("zebra_study", position_embedding=position_embedding))
        assert str(default_stripes(config, 512)) == layout


def test_layers_are_selected_by_text_that_is_not_scored(comparison: FinishedRun) -> None:
    inputs = json.loads((comparison.path / "selection" / "inputs.json").read_text())
    assert inputs["window"] == "33+0"
    layouts = {r.layout for r in comparison.results if r.metric == "perplexity"}
    assert sum(layout.endswith(":33") for layout in layouts) == 1


@pytest.mark.full
def test_a_comparison_goes_on_where_it_ended(comparison: FinishedRun, tmp_path: Path) -> None:
    """Cut anywhere, even within a line, it measures what is missing and nothing else, with the same results."""
    out = Path(shutil.copytree(comparison.path, tmp_path / "out"))
    file = out / "measurements.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    again = compare(str(STORIES), [str(FEW_STORIES)], out=out, **OPTIONS)
    assert file.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert len(file.read_bytes().splitlines()) == len(lines)
    timed = ("prefill_seconds", "decode_seconds", "prefill_seconds_planned", "decode_seconds_planned")
    before, after = ([r for r in results if r.metric not in timed] for results in (comparison.results, again))
    assert sorted(map(str, before)) == sorted(map(str, after))
    with pytest.raises(ZebraError, match="length changed since"):
        compare(str(STORIES), [str(FEW_STORIES)], out=out, **OPTIONS | {"length": 700})


def test_a_small_budget_measures_one_window_and_a_larger_one_adds(tmp_path: Path) -> None:
    options = OPTIONS | {"methods": ["self-extend"]}
    arguments: Any = (str(STORIES), [str(FEW_STORIES)])
    small = compare(*arguments, out=tmp_path / "out", budget_minutes=0, **options)
    assert one(small, metric="perplexity", layout="full", position_from=0, position_to=LENGTH).n == LENGTH - 1
    assert not [r for r in small if r.metric == "accuracy"]
    large = compare(*arguments, out=tmp_path / "out", **options)
    assert one(large, metric="perplexity", layout="full", position_from=0, position_to=LENGTH).n == 3 * (LENGTH - 1)
    assert read_results(tmp_path / "out" / "results.jsonl") == large
    assert (tmp_path / "out" / "report.html").exists()


def test_any_beginning_of_the_schedule_is_balanced() -> None:
    units = [*schedule(["passkey", "multikey"], [0.1, 0.5, 0.9], windows=6, samples=4)]
    assert len(units) == len(set(units)) == 6 + 4 * 6
    for end in range(len(units)):
        drawn = units[:end]
        by_cell = [sum((u.kind, u.depth) == cell for u in drawn) for cell in {(u.kind, u.depth) for u in units[2:]}]
        samples = [count for count, unit in zip(by_cell, by_cell, strict=True) if unit >= 0]
        assert max(samples) - min(samples) <= 6
    assert units[:3] == [Unit("window", 0), Unit("window", 1), Unit("passkey", 0, 0.5)]


def test_methods_that_extend_are_for_lengths_beyond_the_trained_one() -> None:
    assert [*standard_methods(512, 512, "GL:64")] == ["unchanged", "stripes", "selected"]
    beyond = standard_methods(512, 1500, "GL:64")
    assert beyond["yarn"].options == {"rope": "yarn:3"}
    assert beyond["stripes+self-extend"].options == {"stripes": "GL:64", "self_extend": "auto:1500"}
    assert [m.name for m in choose_methods(beyond, ["yarn"])] == ["unchanged", "yarn"]
    with pytest.raises(ZebraError, match="the methods at this length are unchanged, stripes, selected; got yarn"):
        choose_methods(standard_methods(512, 512, "GL:64"), ["yarn"])


@pytest.mark.parametrize(
    "text", ["", "rope", "rope=", "rope=yarn", "color=red", "rope=none rope=none", "window=x", "window=0"]
)
def test_a_method_of_another_form_is_rejected(text: str) -> None:
    with pytest.raises(ZebraError):
        Method.parse(text)
    assert Method.parse("rope=yarn:2 window=64").arguments(None) == {"rope": "yarn:2", "window": 64}


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"method": "x", "unit": ["window", 0, null]}\n[1]\n')
    with pytest.raises(ZebraError, match="line 2 is not a measurement"):
        Measurements(tmp_path / "m.jsonl")


def table_of(*methods: tuple[str, float, float, float, float]) -> list[Result]:
    """Results of methods: layout, perplexity beyond 8,192 tokens, share of answers, seconds, bytes."""
    best = min(far for _, far, *_ in methods)
    results = []
    for i, (layout, far, share, seconds, size) in enumerate(methods):
        columns: Any = {"run": "compare", "model": "m", "layout": layout, "length": 16384}
        rows = [("compare-trained", "tokens", 8192, {})] if i == 0 else []
        for start, end, value in ((4096, 8192, 32.0), (8192, 16384, far)):
            where = {"position_from": start, "position_to": end, "n": 1000}
            rows.append(("perplexity-disjoint", "perplexity", value, where))
            rows.append(("compare-paired", "loss_above_best", math.log(value / best) if end > 8192 else 0.0, where))
        rows.append(("retrieval-generate-passkey-in-text", "accuracy", share, {"depth": 0.5, "n": 4}))
        rows.append(("compare-cost", "prefill_seconds", seconds, {}))
        rows.append(("compare-cost", "kv_bytes", size, {}))
        results += [Result(task=t, metric=m, value=v, **columns | more) for t, m, v, more in rows]
    return results


def advice(*methods: tuple[str, float, float, float, float]) -> str:
    (line,) = method_summaries(table_of(*methods))
    return "".join(cell.text for cell in line)


def test_the_advice_prefers_quality_then_answers_then_time() -> None:
    plain = ("full", 128.0, 0.0, 30.0, 100.0)
    extended = ("full, self-extend 8:2048", 36.0, 1.0, 33.0, 104.0)
    text = advice(plain, ("full yarn:2", 36.1, 0.67, 30.0, 100.0), extended, ("GL:1024", 92.0, 0.2, 25.0, 55.0))
    assert text.startswith("full, self-extend 8:2048: perplexity 36.00 at positions 8,192 to 16,384 (128.0 unchanged)")
    assert "4 of 4 questions answered, at 1.10 times the prefill time." in text
    assert "GL:1024 holds 53\N{NO-BREAK SPACE}% of it at a perplexity of 92.00; adapt it first." in text
    assert advice(plain, ("a", 36.0, 1.0, 50.0, 1.0), ("b", 36.1, 1.0, 40.0, 1.0)).startswith("b: ")
    assert advice(plain, ("a", 60.0, 1.0, 50.0, 100.0)).startswith("No method reads this length as well")
    assert advice(plain, ("broken", math.nan, 1.0, 9.0, 1.0), extended).startswith("full, self-extend 8:2048: ")
    results = table_of(plain, extended, ("GL:1024", 92.0, 0.2, 25.0, 55.0))
    (line,) = method_summaries([replace(one, model="runs/x/model") if one.layout[0] == "G" else one for one in results])
    assert "must be smaller" not in "".join(cell.text for cell in line)  # it was trained


def test_each_checkpoint_has_its_own_advice() -> None:
    """A trained checkpoint is better by what it learned, too: it is no reason against a method of the source."""
    results = table_of(
        ("full", 128.0, 0.0, 30.0, 100.0),
        ("full, self-extend 8:2048", 36.0, 1.0, 33.0, 104.0),
        ("GL:1024", 30.0, 0.5, 25.0, 55.0),
    )
    trained = [replace(one, model="runs/x/model") if one.layout == "GL:1024" else one for one in results]
    (line,) = method_summaries(trained)
    text = "".join(cell.text for cell in line)
    assert text.startswith("m full, self-extend 8:2048: perplexity 36.00")
    assert "prefill time. x (trained) GL:1024: perplexity 30.00" in text
    assert "must be smaller" not in text


def test_the_advice_of_few_measurements_says_so() -> None:
    few = "Only 0 windows, 4 questions were measured; a larger budget adds more."
    assert advice(("full", 36.0, 0.5, 30.0, 100.0)).endswith(few)
    many = [replace(one, n=10**6) for one in table_of(("full", 36.0, 0.5, 30.0, 100.0))]
    (line,) = method_summaries(many)
    assert "Only" not in "".join(cell.text for cell in line)


def test_answers_of_a_few_samples_are_counted_and_not_a_percentage() -> None:
    *rest, one, _, _ = table_of(("full", 36.0, 0.5, 30.0, 100.0))
    assert answered([replace(one, n=1, value=1.0)]) == "1 of 1"
    assert answered([one, replace(one, depth=0.9)]) == "4 of 8"
    assert answered([replace(one, n=20)]) == "50\N{NO-BREAK SPACE}%"
    uneven = [replace(one, n=30, value=1.0), replace(one, n=10, value=0.0, depth=0.9)]  # a budget ended between them
    assert answered(uneven) == "75\N{NO-BREAK SPACE}%"
    compared = Methods([*rest, *uneven])
    assert compared.share(compared.baseline) == 0.75


def test_intervals_of_a_comparison_are_over_windows() -> None:
    compared = [replace(one, low=one.value, high=one.value) for one in table_of(("full", 36.0, 0.5, 30.0, 100.0))]
    evaluated = [replace(one, run="other") for one in compared if one.metric == "perplexity"]

    def intervals(results: list[Result]) -> str:
        (table,) = (block for block in method(results).blocks if isinstance(block, Table))
        return next(line[1].text for line in table.body if line[0].text == "intervals")

    windows = "of methods side by side: 95 %, bootstrap over windows"
    assert "documents" not in intervals(compared)
    assert windows in intervals(compared)
    assert {windows, "95 %, bootstrap over documents"} <= {*intervals([*compared, *evaluated]).split("; ")}


def test_the_positions_shown_begin_with_the_last_that_were_trained() -> None:
    shown = Methods(table_of(("full", 128.0, 0.0, 30.0, 100.0), ("b", 36.0, 1.0, 30.0, 100.0)))
    assert shown.spans == [(4096, 8192), (8192, 16384)]


def test_the_command_prints_tables_and_the_advice(comparison: FinishedRun, tmp_path: Path, zebra: Zebra) -> None:
    out = shutil.copytree(comparison.path, tmp_path / "out")
    options = ["--methods", "dynamic,self-extend,selected", "--stripes", "GL:33", "--task", "passkey", "--depth", "0.5"]
    more = ["--separator", "<|endoftext|>", "--windows", 3, "--samples", 1, "-o", out]
    more += ["--with", f"self_extend=auto:{LENGTH}"]
    done = zebra("compare", STORIES, FEW_STORIES, "--length", LENGTH, *options, *more)
    assert done.returncode == 0, done.stderr
    assert "×1.00" in done.stdout
    assert f"self_extend=auto:{LENGTH} is the same as self-extend" in " ".join(done.stderr.split())
    assert f"page {out / 'report.html'}" in done.stdout
    assert len((out / "measurements.jsonl").read_text().splitlines()) == len(
        (comparison.path / "measurements.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--with", "colour=red"), "a method must be OPTION=VALUE"),
        (("--with", "checkpoint=typo/dir/x"), "there is no checkpoint at typo/dir/x"),
        (("--methods", "nope"), "the methods at this length are"),
        (("--task", "nope"), "the task must be one of"),
        (("--windows", 0), "--windows"),
        (("--length", 10**7), "at least 10,000,000 tokens"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str, tmp_path: Path, zebra: Zebra) -> None:
    out = tmp_path / "out"
    done = zebra("compare", STORIES, FEW_STORIES, "--length", LENGTH, *arguments, "-o", out)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
    assert not out.exists()

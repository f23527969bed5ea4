"""benchmarks/speed_smollm2.py on a model of 2 tiny layers. No test looks at speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import speed_goals
import speed_page
import speed_smollm2
from speed_smollm2 import Part
from speed_waterfalls import lines, waterfalls
from zebra.errors import ZebraError
from zebra.plan.devices import Device
from zebra.results import read_results
from zebra_bench import smollm2, waterfall
from zebra_bench.smollm2 import Case

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 97, "max_position_embeddings": 256,
}  # fmt: skip
DEVICE = Device("x", {"bfloat16": 2e9, "float32": 1e9}, 1e9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    smollm2.write_random(folder, **TINY)
    return folder


def parts_of(case: Case, folder: Path) -> dict[str, float]:
    model = smollm2.load(case, folder)
    call = smollm2.prepare(case, model)
    call()
    seconds, parts = waterfall.waterfall(model, call)
    assert sum(parts.values()) == pytest.approx(seconds)
    return parts


@pytest.mark.parametrize(
    ("phase", "way", "absent"),
    [("prefill", "GL:4", set()), ("decode", "GL:4", set()), ("prefill", "Self-Extend", {"local"})],
)
def test_every_part_of_a_forward_has_time_and_only_where_there_is_work(
    tiny: Path, phase: str, way: str, absent: set[str]
) -> None:
    parts = parts_of(Case(phase, 300, way, "bfloat16"), tiny)
    none = {name for name, seconds in parts.items() if not seconds}
    assert none - {"merging"} == absent | {"optimizer"}
    assert parts["merging"] if way == "Self-Extend" else True


@pytest.mark.parametrize("phase", ["step", "lora-step"])
def test_the_backward_counts_to_the_parts_of_its_forward(tiny: Path, phase: str) -> None:
    step = parts_of(Case(phase, 300, "GL:4", "float32"), tiny)
    assert all(step[name] > 0 for name in ("projections", "global", "local", "MLP", "norms", "head", "optimizer"))
    case = Case("step", 300, "GL:4", "float32")
    model = smollm2.load(case, tiny)
    ids = smollm2.tokens(model, 300)
    events: dict[bool, int] = {}
    for backward in (False, True):
        with waterfall.labelled(model), torch.profiler.profile() as profiler:
            loss = model(ids, use_cache=False).logits.sum()
            if backward:
                loss.backward()
        of_parts = list(waterfall.attributed(list(profiler.events())))
        events[backward] = sum(part == "MLP" for part, _ in of_parts)
    products = 2 * 3  # in each of two layers
    assert events[False] >= products
    assert events[True] >= 3 * products


def test_the_floors_are_flops_at_the_peak_and_bytes_at_the_bandwidth(tiny: Path) -> None:
    run = Case("prefill", 1000, "GL:4", "bfloat16").plan(tiny)
    floors = waterfall.floors(run, DEVICE)
    h, i, kv, n = 32, 48, 16, 1000
    assert floors["MLP"] == pytest.approx(2 * n * 2 * 3 * h * i / 2e9)
    assert floors["projections"] == pytest.approx(2 * n * 2 * 2 * h * (h + kv) / 2e9)
    assert floors["global"] == pytest.approx(4 * 16 * 2 * n * (n + 1) / 2 / 2e9)
    assert floors["norms"] == pytest.approx(2 * n * 5 * 2 * h / 1e9)
    assert floors["optimizer"] == floors["framework"] == 0
    token = waterfall.floors(Case("decode", 1000, "full", "bfloat16").plan(tiny), DEVICE)
    assert token["MLP"] == pytest.approx(2 * 2 * 3 * h * i / 1e9, rel=0.1)
    step = waterfall.floors(Case("step", 1000, "full", "float32").plan(tiny), DEVICE, trained=10)
    assert step["optimizer"] == pytest.approx(280 / 1e9)


def test_the_parts_have_names_of_their_own() -> None:
    names = [part.name for part in speed_smollm2.PARTS]
    assert len(names) == len(set(names))
    assert set(speed_page.SHOWN) <= set(names)
    assert {run for goal in speed_goals.GOALS for run in goal.run.split("+")} <= set(names)


def test_a_part_is_measured_once_and_shown(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed_smollm2, "measure_ceilings", lambda *args, **kwargs: DEVICE)
    monkeypatch.setattr(
        speed_smollm2,
        "PARTS",
        (Part("prefill", 300, "float32", ("full", "GL:4"), ("sdpa",)), Part("decode", 40, "float32", ("full",))),
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    out = tmp_path / "rows.jsonl"
    command = ["--checkpoint", str(tiny), "--out", str(out), "--turns", "2"]
    speed_smollm2.main(command)
    text = out.read_text()
    results = read_results(out)
    assert {(one.run, one.model, one.layout) for one in results if one.metric == "milliseconds"} == {
        ("peers-prefill-300-float32", "zebra", "full"),
        ("peers-prefill-300-float32", "zebra", "GL:4"),
        ("peers-prefill-300-float32", "transformers, sdpa", "full"),
        ("decode-40-float32", "zebra", "full"),
    }
    assert [one.n for one in results if one.metric == "milliseconds"] == [2] * 4
    assert "MLP: three products" in capsys.readouterr().out
    speed_smollm2.main(command)
    assert out.read_text() == text
    with pytest.raises(ZebraError, match="parts are peers-prefill-300-float32"):
        speed_smollm2.main(["prefil", *command])


def test_logits_that_differ_stop_the_part(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("prefill", 40, "full", "float32")
    model, prepare = smollm2.load(case, tiny), smollm2.prepare
    calls: list[Any] = []

    def wrong(one: Case, of: Any) -> Any:
        calls.append(one)
        return lambda: prepare(one, of)() * (1 + 0.01 * len(calls))

    speed_smollm2.check(case, model, tiny)
    monkeypatch.setattr(speed_smollm2, "prepare", wrong)
    with pytest.raises(ZebraError, match="logits are off by"):
        speed_smollm2.check(case, model, tiny)


def test_the_tables_show_each_part_over_its_floor() -> None:
    def row(metric: str, value: float) -> Any:
        return replace(_ROW, metric=metric, value=value)

    rows = [replace(row("milliseconds", 30.0), n=3), row("share_of_peak", 0.5), row("milliseconds, MLP", 20.0)]
    rows += [row("floor_milliseconds, MLP", 10.0), row("milliseconds, framework", 10.0)]
    (section,) = waterfalls(rows)
    (table,) = [block for block in section.blocks if not isinstance(block, str)]
    body = [[cell.text for cell in line] for line in table.body]  # type: ignore[union-attr]
    assert body == [
        ["time, median", "30.00", "3.00"],
        ["turns", "3", ""],
        ["share of the peak", "50\N{NO-BREAK SPACE}%", ""],
        ["MLP: three products", "20.00", "2.00"],
        ["framework", "10.00", "–"],
    ]
    assert any("20.00" in line for line in lines(rows))


_ROW: Any = speed_smollm2.Result(
    run="prefill-300-float32", model="zebra", layout="full", task="bench SmolLM2-135M: prefill, float32", metric="",
    value=0.0, length=300,
)  # fmt: skip


def test_a_missed_goal_names_the_parts_above_their_floors() -> None:
    values = {"milliseconds": 9000.0, "share_of_peak": 0.5, "milliseconds, norms": 3000.0, "milliseconds, MLP": 5000.0}
    values |= {"floor_milliseconds, MLP": 4500.0}
    rows = [replace(_ROW, run="prefill-8192-bfloat16", metric=m, value=v, length=8192) for m, v in values.items()]
    table, tried, absent = speed_goals.goals(rows).blocks
    (line,) = [[cell.text for cell in line] for line in table.body]  # type: ignore[union-attr]
    assert line[1:4] == ["≥ 70\N{NO-BREAK SPACE}%", "50\N{NO-BREAK SPACE}%", "missed"]
    assert line[4].startswith("norms 3.00 s; MLP 0.50 s")
    assert "oneDNN" in str(tried)
    assert "GL:1024" in str(absent)
    peers = [replace(row, run="peers-" + row.run) for row in rows if row.metric == "milliseconds"]
    how, beside = speed_goals.totals(peers).blocks
    assert [[cell.text for cell in line] for line in beside.body] == [["prefill, float32, 8,192 tokens", "9.00 s"]]  # type: ignore[union-attr]
    assert "in turns" in str(how).lower()

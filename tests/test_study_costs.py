"""What a study's cells cost: the plan against counters of masks, parameters and caches, and the measured rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import ATTENTIONS, CELLS, LENGTH, SOME_CELLS, config, drawn, tokens

from zebra import ZebraError
from zebra.model.families import attention_pairs, layout
from zebra.plan import comparison, cost, decoder, families, memory
from zebra.plan.cost import Run
from zebra.plan.devices import DEVICES, Device
from zebra.stripes import GLOBAL, LOCAL
from zebra.study import layout as layouts
from zebra.study import model as study
from zebra.study.grid import step_of
from zebra.study.layout import SummaryStripes, summary_pairs
from zebra.study.summary import SummaryAttention
from zebra.train.dry_run import dry_run
from zebra.train.pretrain import config_of
from zebra.train.recipe import PretrainRecipe
from zebra.train.step_memory import saved_storages
from zebra_bench import study as bench


def planned(attention: str, positions: str = "rotary", **changes: Any) -> Run:
    shape = decoder.decoder_from_config(config(attention, positions).to_dict(), name=attention)
    return Run(decoder=shape, stripes=shape.stripes, **{"length": LENGTH, "dtype": "float32"} | changes)


# The plan


@pytest.mark.parametrize(("attention", "positions"), CELLS)
def test_parameters_and_layout_are_the_models(attention: str, positions: str) -> None:
    for changes in ({}, {"tie_word_embeddings": False}):
        study_config = config(attention, positions, **changes)
        sizes = decoder.decoder_from_config(study_config.to_dict(), name="cell")
        with torch.device("meta"):
            assert sizes.num_parameters == study.StudyForCausalLM(study_config).num_parameters()
        assert (sizes.rope is None) == (positions != "rotary")
        assert str(sizes.stripes or "full") == layout(study_config)
    assert "zebra_study" in families.FAMILIES


@pytest.mark.parametrize(("length", "window", "block"), [*itertools.product((1, 7, 29), (1, 6, 40), (1, 3, 8))])
def test_pairs_of_summaries_are_those_of_the_definition(length: int, window: int, block: int) -> None:
    ends = range(block - 1, length, block)
    seen = [min(i + 1, window) + sum(i - end >= window for end in ends) for i in range(length)]
    assert summary_pairs(length, window, block) == sum(seen)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_planned_pairs_are_the_models(attention: str) -> None:
    run, study_config = planned(attention, batch=2), config(attention, "rotary")
    assert cost.pairs(run) == 2 * attention_pairs(study_config, LENGTH)
    new = cost.pairs(replace(run, phase="decode"))
    assert new == 2 * (attention_pairs(study_config, LENGTH + 1) - attention_pairs(study_config, LENGTH))
    assert cost.forward_flops(run)["attention"] == 4 * 32 * cost.pairs(run)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_key_value_bytes_are_the_caches(attention: str) -> None:
    model = drawn(attention, "alibi").float()
    cache = model(tokens(), use_cache=True).past_key_values
    shown = sum(states.numel() * 4 for layer in cache.layers for states in (layer.keys, layer.values))
    assert memory.kv_bytes(planned(attention, "alibi", batch=2)) == shown


def test_a_summary_layer_takes_a_local_layers_rate() -> None:
    rates = {GLOBAL: {"float32": 1e9}, LOCAL: {"float32": 1e8}}
    device = Device("x", {"float32": 1e12}, 1e30, attention=rates)
    run = planned("summary")
    assert device.seconds(run)["attention"] == pytest.approx(cost.flops(run)["attention"] / 1e8)


def test_a_plan_names_the_summary_layers_and_counts_them() -> None:
    table = comparison.compare(planned("summary"), DEVICES["rtx-3090"], budget=10**9)
    full, summary = table["layouts"]
    assert (summary["layout"], summary["global_layers"]) == ("SSS:6/3", 0)
    assert summary["kv_bytes"] == full["kv_bytes"]
    assert summary["pairs"] == 3 * summary_pairs(LENGTH, 6, 3) < full["pairs"]
    assert [row["kind"] for row in table["complexity"]] == ["global", "local", "summary"]
    step = replace(planned("summary"), phase="decode")
    assert cost.bytes_moved(step)["attention"] > cost.bytes_moved(replace(step, stripes=None))["attention"]


@pytest.mark.parametrize(
    ("keys", "length", "precision"),
    [
        (6, 213, "float32"),
        (2, 110, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in itertools.product((2, 6), (9, 64, 110, 213), ("float32", "bfloat16"))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_activations_of_summary_layers_are_what_autograd_keeps(
    length: int, keys: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At lengths within the window and of one, two and three passes over the queries."""
    assert layouts.QUERIES == 1024
    monkeypatch.setattr(layouts, "QUERIES", 100)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": keys, "max_position_embeddings": 4096}

    def saved_bytes(attention: str, layers: int) -> int:
        kinds = {"attention_kinds": [attention] * layers, "num_hidden_layers": layers, "window": 7, "summary_block": 4}
        model = study.StudyForCausalLM(config("global", "rotary", **sizes | kinds)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"), saved_storages(model) as saved:
            model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
        return sum(saved.values())

    more = [saved_bytes("summary", layers) - saved_bytes("local", layers) for layers in (1, 2)]
    widths = {"heads": 6, "query_width": 48, "kv_width": 8 * keys, "half": precision == "bfloat16"}
    extra = SummaryStripes(7, "G", block=4, summaries=(0,)).extra_saved_bytes("summary", length, **widths)
    assert extra == pytest.approx(more[1] - more[0], rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plan_of_training_is_the_dry_runs(checkpointing: bool) -> None:
    one = recipe("summary", length=64, activation_checkpointing=checkpointing)
    expected = dry_run(one).memory
    parts = memory.memory(step_of(one))
    assert parts.keys() == expected.keys()
    for part in expected:
        assert parts[part] == pytest.approx(expected[part], rel=0.01), part


# What was measured


@pytest.fixture
def peaks(tmp_path: Path) -> str:
    file = tmp_path / "peaks.json"
    file.write_text(json.dumps({"name": "x", "flops": {"float32": 1e11, "bfloat16": 2e11}, "bandwidth": 1e10}))
    return str(file)


def recipe(attention: str, positions: str = "rotary", seed: int = 0, **changes: Any) -> PretrainRecipe:
    model = {"model_type": "zebra_study", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"attention_kinds": study.attention_kinds(attention, 2, 2), "position_embedding": positions}
    model |= {"sliding_window": 8, "summary_block": 4}
    train: dict[str, Any] = {
        "length": 64,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "seed": seed,
    }
    return PretrainRecipe(
        run=f"runs/try/cells/{attention}-{positions}-{seed}",
        model=model,
        tokenizer={"vocab_size": 300},
        data={"files": ["none.txt"]},
        train=train | changes,
    )


def test_each_cell_is_measured_once_whatever_its_seeds(peaks: str) -> None:
    recipes = [recipe(kind, seed=seed) for kind in ("global", "summary") for seed in (0, 1)]
    recipes += [recipe("local", length=128), recipe("grouped", optimizer="muon", bf16=True)]
    results, left_out = bench.costs(recipes, run="try", repeats=1, memory=False, ceilings=peaks)
    assert left_out == ()
    assert {result.run for result in results} == {"try"}
    timed = [result for result in results if result.metric == "milliseconds"]
    assert len(timed) == len({(result.layout, result.length, result.task) for result in timed}) == 4
    for one in (recipes[0], recipes[2]):
        study_config = config_of(one)
        values = {
            result.metric: result.value for result in results if result.layout == layout_of(one) and result.length == 64
        }
        assert values["parameters"] == study.StudyForCausalLM(study_config).num_parameters()
        assert values["attention_flops"] == 14 * 32 * 2 * attention_pairs(study_config, 64)
        assert values["planned_bytes"] == sum(dry_run(one).memory.values())
        assert values["tokens_per_second"] == pytest.approx(128 * 1000 / values["milliseconds"])
        assert values["planned_milliseconds"] > 0


def layout_of(one: PretrainRecipe) -> str:
    return bench._layout(one)


def test_a_kernel_that_errs_leaves_no_row(peaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SummaryAttention", lambda block: SummaryAttention(block + 1))
    with pytest.raises(ZebraError, match="Nothing was measured"):
        bench.costs([recipe("global"), recipe("summary")], repeats=1, memory=False, ceilings=peaks)


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_every_cell_passes_its_gate(attention: str, positions: str) -> None:
    assert bench._error(recipe(attention, positions), None) < 1e-5


@pytest.mark.full
def test_memory_is_that_of_a_fresh_process(peaks: str) -> None:
    results, _ = bench.costs([recipe("summary", length=2048)], repeats=1, ceilings=peaks)
    values = {result.metric: result.value for result in results}
    assert values["planned_bytes"] / 3 < values["extra_bytes"] < 20 * values["planned_bytes"]

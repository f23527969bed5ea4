"""The planner against brute force, transformers, autograd and the live cache."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, Zebra, adapt_recipe, refused, tiny_config, tiny_model
from test_dry_run import PUBLISHED
from torch.utils.flop_counter import FlopCounterMode

import zebra
from zebra import SelfExtend, Stripes, ZebraError
from zebra.masks import causal, within
from zebra.model import loss
from zebra.model.cache import StripedCache
from zebra.model.families import model_class, stripes_of, with_stripes
from zebra.model.load import convert
from zebra.model.routes import ROUTES
from zebra.plan import cluster, comparison, cost, decoder, devices, families, fit, memory
from zebra.plan.cost import Run
from zebra.plan.parallel import Parallel, busiest, device_memory
from zebra.plan.shapes import SHAPES, shape
from zebra.stripes import GLOBAL, LOCAL, visible_pairs
from zebra.train import dry_run, step_memory

LLAMA = decoder.read_decoder("llama-2-7b")
COUNTED = (
    "llama llama-biased mistral ministral cwm smollm3 qwen2 qwen3 qwen3_moe mellum gemma2 gemma3_text cohere2 olmo2 "
    "qwen2_moe olmo3 granite_swa gpt_oss"
)
DEVICE = devices.DEVICES["h100-sxm"]


def planned_run(model: str = "llama-2-7b", stripes: str | None = "GLLL:512", **changes: Any) -> Run:
    settings: dict[str, Any] = {"length": 16384} | changes
    return Run(decoder=decoder.read_decoder(model), stripes=Stripes.parse(stripes) if stripes else None, **settings)


def tiny(family: str, **changes: Any) -> tuple[Any, decoder.Decoder]:
    config = tiny_config(family, **changes)
    return config, decoder.decoder_from_config(config.to_dict(), name=family)


# Pairs


@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("layout", [None, "L:1", "GL:3", "GLL:5", "1:20"])
def test_pairs_are_the_masks(n: int, layout: str | None) -> None:
    _, shape = tiny("llama")
    stripes = Stripes.parse(layout) if layout else None
    full = [(i, j) for i in range(2 * n) for j in range(2 * n) if causal(i, j)]

    def seen(kind: str, first: int, last: int) -> int:
        window = stripes.window if stripes and kind == LOCAL else 10**9
        return sum(first <= i < last and within(i, j, window) for i, j in full)

    kinds = shape.kinds(stripes)
    run = Run(decoder=shape, stripes=stripes, length=n, batch=3)
    assert cost.pairs(run) == 3 * sum(seen(kind, 0, n) for kind in kinds)
    assert cost.pairs(replace(run, phase="decode")) == 3 * sum(seen(kind, n, n + 1) for kind in kinds)
    if stripes:
        assert stripes.pairs(LOCAL, 2 * n) - stripes.pairs(LOCAL, n) == seen(LOCAL, n, 2 * n)


@pytest.mark.parametrize("n", [1, 5, 12])
@pytest.mark.parametrize("window", [1, 4, 12, 30])
def test_self_extend_is_one_causal_attention(n: int, window: int) -> None:
    cells = [(i, j) for i in range(n) for j in range(n) if causal(i, j)]
    near = sum(within(i, j, window) for i, j in cells)
    far = sum(i - j >= window for i, j in cells)
    assert (near, far) == (visible_pairs(n, window), visible_pairs(max(0, n - window)))
    assert near + far == visible_pairs(n) == n * (n + 1) // 2
    run = planned_run(stripes=None, length=n)
    assert cost.pairs(replace(run, self_extend=SelfExtend(8, window))) == cost.pairs(run) == 32 * (near + far)


# Sizes


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_models_have_the_published_parameters(name: str) -> None:
    assert decoder.read_decoder(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("member", COUNTED.split())
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_layout_are_those_of_transformers(member: str, tied: bool) -> None:
    config, sizes = tiny(member, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = model_class(config)(config)
    assert sizes.num_parameters == sum(p.numel() for p in model.parameters())
    assert sizes.stripes == stripes_of(config)
    assert sizes.family in families.FAMILIES


def test_every_family_that_runs_with_stripes_is_counted_exactly() -> None:
    served = {target for route in ROUTES for target in (route.family, route.target) if route.target}
    assert served - {"zebra_study"} <= {*families.FAMILIES}


def test_the_shared_expert_is_counted() -> None:
    """All tokens use it: a forward pass multiplies by its matrices and its gate."""
    _, sizes = tiny("qwen2_moe")
    without = replace(sizes, shared_expert_intermediate_size=0)
    matrices = sizes.expert_layers * (3 * 24 * sizes.hidden_size + sizes.hidden_size)
    runs = [Run(decoder=one, stripes=None, length=9) for one in (sizes, without)]
    assert sizes.num_parameters - without.num_parameters == matrices
    assert cost.flops(runs[0])["MLP"] - cost.flops(runs[1])["MLP"] == 2 * 9 * matrices
    assert cost.bytes_moved(runs[0])["MLP"] - cost.bytes_moved(runs[1])["MLP"] >= 2 * matrices


def test_a_layout_without_layer_types_is_that_of_transformers() -> None:
    """Older configs give a window and no list, and each family tiles its own; Qwen's window may be switched off."""
    fields = shape("qwen3-4b") | {"sliding_window": 64}
    assert decoder.decoder_from_config(fields | {"use_sliding_window": False}, name="q").stripes is None
    some = decoder.decoder_from_config(fields | {"use_sliding_window": True, "max_window_layers": 30}, name="q")
    assert some.kinds(some.stripes).count(LOCAL) == 6
    for family in ("qwen2", "qwen3", "qwen3_moe", "smollm3", "llama", "olmo2"):
        unused = {"model_type": family, "sliding_window": 64, "num_experts_per_tok": 1}
        assert decoder.decoder_from_config(shape("llama-2-7b") | unused, name=family).stripes is None
    third = shape("llama-2-7b") | {"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 3}
    assert str(decoder.decoder_from_config(third, name="g").stripes) == "LLG:64"
    for family in ("gemma2", "gemma3_text", "cohere2", "mistral", "cwm", "granite_swa", "gpt_oss"):
        config = tiny_config(family, num_hidden_layers=12, sliding_window=64, layer_types=None)
        fields = config.to_dict()
        fields.pop("layer_types", None)
        sizes = decoder.decoder_from_config(fields, name=family)
        assert sizes.kinds(sizes.stripes) == sizes.kinds(stripes_of(config))


# FLOPs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """Eager attention forms all N^2 scores where the mask has N (N + 1) / 2 pairs, and saves them for the backward,
    so that a step costs 3 forward passes where ours costs 7/2.
    """
    n = 64
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    _, shape = tiny(family)
    run = Run(decoder=shape, stripes=None, length=n, phase="train", dtype="float32")
    ids = torch.zeros(1, n, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    ours = cost.forward_flops(run)
    dense = ours["attention"] * 2 * n // (n + 1)
    linear = sum(ours.values()) - ours["attention"]
    # Older versions of transformers compute the rotary angles by a product.
    rotary = sum(
        sum(counts.values()) for name, counts in forward.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    assert forward.get_total_flops() - rotary == linear + dense
    assert forward.get_total_flops() - rotary + backward.get_total_flops() == 3 * (linear + dense)
    step = cost.flops(run)
    assert step["attention"] * 2 == 7 * ours["attention"]
    assert all(step[part] == 3 * ours[part] for part in ("projections", "MLP", "head"))


def test_checkpointing_adds_a_forward_and_low_rank_takes_gradients_away() -> None:
    full, again, low = (
        cost.flops(planned_run(phase="train", **more)) for more in ({}, {"checkpointing": True}, {"lora": 16})
    )
    forward = cost.forward_flops(planned_run(phase="train"))
    for part in ("projections", "attention", "MLP"):
        assert again[part] - full[part] == forward[part]
    assert low["MLP"] * 3 == full["MLP"] * 2
    assert low["projections"] < 0.7 * full["projections"]
    assert low["attention"] == full["attention"]


def test_a_frozen_head_needs_no_gradient_and_a_tied_one_is_trained() -> None:
    for model, products in (("llama-3.1-8b", 2), ("qwen3-4b", 3)):
        run = planned_run(model, phase="train", lora=16)
        assert cost.flops(run)["head"] == products * cost.forward_flops(run)["head"]


def test_decode_reads_only_the_experts_that_its_tokens_meet() -> None:
    _, shape = tiny("qwen3_moe", num_experts=64)
    one, many = (
        cost.bytes_moved(Run(decoder=shape, stripes=None, length=9, batch=batch, phase="decode"))["MLP"]
        for batch in (1, 32)
    )
    expert = shape.mlp_matrices * shape.hidden_size * shape.expert_intermediate_size
    assert many - one >= 2 * shape.expert_layers * (64 - 2) * expert
    assert one < 2 * shape.parameters_by_part()["MLP"] / 2


def test_decode_reads_weights_once_and_the_cache() -> None:
    run = planned_run(phase="decode", length=131072)
    d = run.decoder
    parts = d.parameters_by_part()
    moved = sum(cost.bytes_moved(run).values())
    assert moved == pytest.approx(2 * (d.num_parameters - parts["embedding"]) + memory.kv_bytes(run), rel=1e-3)
    few = planned_run(phase="decode", length=10, stripes=None)
    assert sum(cost.bytes_moved(few).values()) == pytest.approx(2 * (d.num_parameters - parts["embedding"]), rel=2e-3)


# Memory


@pytest.mark.parametrize("parts", [(3,), (8, 1), (9,), (40, 1, 1), (200, 1)], ids=lambda p: "+".join(map(str, p)))
@pytest.mark.parametrize("layout", [None, "GLLL:9", "L:1", "1:30"])
@torch.no_grad()
def test_key_value_bytes_are_the_live_caches(
    layout: str | None, parts: tuple[int, ...], checkpoints: Callable[..., Path]
) -> None:
    """Of what the cache shows. Its storage is a quarter more at most, or a token."""
    model: Any = zebra.load(checkpoints("llama"), stripes=layout) if layout else tiny_model("llama")
    cache = StripedCache(model.config)
    for n in parts:
        model(torch.zeros(2, n, dtype=torch.long), past_key_values=cache, use_cache=True)
    _, shape = tiny("llama")
    stripes = Stripes.parse(layout) if layout else None
    run = Run(decoder=shape, stripes=stripes, length=sum(parts), batch=2, dtype="float32", phase="decode")
    shown = sum(s.numel() * s.element_size() for layer in cache.layers for s in (layer.keys, layer.values))
    assert memory.kv_bytes(run) == shown
    for layer in cache.layers:
        live, token = layer.keys.shape[-2], 2 * shape.kv_width * 4
        assert layer.keys.untyped_storage().nbytes() <= (live + max(1, live // 4)) * token
    reserved = memory.memory(run)["keys and values"] + memory.memory(run)["room for new tokens"]
    assert memory.kv_bytes(run) <= cache.kv_bytes() <= reserved + 2 * len(cache.layers) * token


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, 3], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [GLOBAL, LOCAL])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_activations_are_what_autograd_keeps(
    family: str, precision: str, lora: int | None, kind: str, tmp_path: Path
) -> None:
    """The table of zebra.plan.memory, term by term, against the bytes that a dry run measures in the model's layer."""
    recipe = adapt_recipe(
        tmp_path, train__bf16=precision == "bfloat16", lora=lora and {"r": lora, "base_dtype": precision}
    )
    sizes = {"hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 4, "head_dim": 40}
    config, shape = tiny(family, **sizes)
    if kind == LOCAL:
        config = with_stripes(config, Stripes.parse("L:16"))
    grows, _ = step_memory._saved_by_a_layer(recipe, config, kind)
    ours = Run(decoder=shape, stripes=None, length=1, dtype=precision, phase="train", lora=lora)
    assert memory.saved_bytes_per_token(ours) == pytest.approx(grows, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, {"checkpointing": True}], ids=["full", "lora", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plan_of_training_is_the_dry_runs(changes: dict[str, Any], precision: str, tmp_path: Path) -> None:
    """Part by part on the real tiny checkpoint."""
    low = {"lora": {"r": changes["lora"], "base_dtype": precision}} if "lora" in changes else {}
    again = {"train__activation_checkpointing": changes.get("checkpointing", False)}
    expected = dry_run.dry_run(adapt_recipe(tmp_path, train__bf16=precision == "bfloat16", **again, **low)).memory
    run = planned_run(str(STORIES), "GLLL:33", length=600, phase="train", dtype=precision, **changes)
    planned = memory.memory(run)
    assert set(expected) <= set(planned)
    for part in expected:
        assert planned[part] == pytest.approx(expected[part], rel=0.01), part
    assert memory.CHUNK == loss.CHUNK


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpointed_layer_keeps_a_float32_input(half: bool) -> None:
    """Under autocast too: the embeddings are float32, and so is the residual stream."""
    totals = []
    for layers in (2, 3):
        model = tiny_model("llama", num_hidden_layers=layers).train()
        # Its name after transformers 5.17, and before.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=half), step_memory.saved_storages(model) as saved:
            model.model(torch.zeros(1, 50, dtype=torch.long), use_cache=False)
        totals.append(sum(saved.values()))
    assert totals[1] - totals[0] == 50 * 4 * 32


# Devices and what fits


def test_time_is_the_roofline_of_the_parts() -> None:
    slow = devices.Device("slow", {"bfloat16": 1e12}, 1e30)
    narrow = devices.Device("narrow", {"bfloat16": 1e30}, 1e9)
    run = planned_run()
    assert sum(slow.seconds(run).values()) == pytest.approx(sum(cost.flops(run).values()) / 1e12)
    assert sum(narrow.seconds(run).values()) == pytest.approx(sum(cost.bytes_moved(run).values()) / 1e9)
    with pytest.raises(ZebraError, match="no ceiling for float32"):
        slow.seconds(planned_run(dtype="float32"))


def test_ceilings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ceilings.json"
    tree = {"name": "this machine", "flops": {"float32": 2e11}, "bandwidth": 4e10}
    file.write_text(json.dumps(tree))
    device = devices.find_device(file)
    assert (device.source, device.flops["float32"], device.memory) == (devices.MEASURED, 2e11, None)
    bad: tuple[Any, ...] = (
        [],
        {"name": "x"},
        tree | {"flops": {}},
        tree | {"bandwidth": 0},
        tree | {"flops": {"int8": 1}},
        tree | {"attention": {"global": {"float32": 1e11}}},
        tree | {"attention": {GLOBAL: {"int8": 1e11}}},
        tree | {"attention": {LOCAL: {"float32": 0}}},
        tree | {"reading": {"keys": {"float32": 1e10}}},
        tree | {"reading": {"weights": {"float32": -1.0}}},
        tree | {"memory": -1},
        tree | {"link": {"inside": 1e9}},
        tree | {"link": {"inside": 1e9, "across": 0}},
        tree | {"link": {"inside": 1e9, "across": "fast"}},
    )
    for broken in bad:
        file.write_text(json.dumps(broken))
        with pytest.raises(ZebraError, match="ceilings"):
            devices.find_device(file)


def test_a_cluster_of_a_file(zebra: Zebra, tmp_path: Path) -> None:
    """The links that were asked for could not be added."""
    file = tmp_path / "ceilings.json"
    tree = {"name": "mine", "flops": {"float32": 5e13, "bfloat16": 8e14}, "bandwidth": 3e12, "memory": 80 * 10**9}
    line = ("plan", "llama-2-7b", "--length", 65536, "--phase", "train", "--cluster", "8", "--device", file)
    file.write_text(json.dumps(tree))
    refused(zebra(*line), 'Add both to its file, such as "link": {')
    file.write_text(json.dumps(tree | {"link": {"inside": 4e11, "across": 5e10}}))
    link = json.loads(zebra(*line, "--json").stdout)["device"]["link"]
    assert link == {"inside": 4e11, "across": 5e10, "node": 8}


def test_a_token_reads_weights_and_cache_at_rates_of_their_own(tmp_path: Path) -> None:
    run = planned_run(phase="decode", length=4096)
    file = tmp_path / "ceilings.json"
    reading = {"weights": {run.dtype: 1e9}, "cache": {run.dtype: 2e9}}
    file.write_text(json.dumps({"name": "x", "flops": {run.dtype: 1e30}, "bandwidth": 4e9, "reading": reading}))
    seconds, moved = devices.find_device(file).seconds(run), cost.bytes_moved(run)
    rates = {"projections": 1e9, "MLP": 1e9, "head": 1e9, "attention": 2e9, "elementwise": 4e9}
    assert seconds == pytest.approx({part: moved[part] / rate for part, rate in rates.items()})
    read = devices.find_device(file).seconds(replace(run, phase="prefill"))
    assert read["attention"] == pytest.approx(cost.bytes_moved(replace(run, phase="prefill"))["attention"] / 4e9)


def test_attention_takes_its_time_at_the_rate_of_each_kind_of_layer() -> None:
    run = planned_run(stripes="GLLL:512", phase="train", length=4096)
    plain = replace(DEVICE, bandwidth=1e30, attention={})
    rates = {GLOBAL: {run.dtype: DEVICE.flops[run.dtype] / 2}, LOCAL: {run.dtype: DEVICE.flops[run.dtype] / 5}}
    slow = replace(plain, attention=rates).seconds(run)
    pairs = cost.pairs_by_kind(run)
    share = pairs[GLOBAL] / sum(pairs.values())
    assert slow["attention"] == pytest.approx(plain.seconds(run)["attention"] * (2 * share + 5 * (1 - share)))
    assert {part: time for part, time in slow.items() if part != "attention"} == {
        part: time for part, time in plain.seconds(run).items() if part != "attention"
    }


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
@pytest.mark.parametrize("stripes", [None, "GLLL:512"])
@pytest.mark.parametrize("budget", ["400GiB", "1.5TiB"])
def test_what_fits_fits_and_one_more_does_not(phase: str, stripes: str | None, budget: str) -> None:
    run, most = planned_run(phase=phase, stripes=stripes), fit.parse_bytes(budget)
    for name, largest in (("length", fit.largest_length(run, most)), ("batch", fit.largest_batch(run, most))):
        assert largest > 0
        assert sum(memory.memory(replace(run, **{name: largest})).values()) <= most
        assert sum(memory.memory(replace(run, **{name: largest + 1})).values()) > most
    assert fit.largest_length(run, 10**9) == 0


def test_the_suggested_layout_is_the_first_that_meets_the_budgets() -> None:
    run = planned_run(phase="decode", length=131072)
    dense = replace(run, stripes=None)
    needs = sum(memory.memory(dense).values())
    assert fit.suggest_layout(run, budget=needs, device=DEVICE) == dense
    half = fit.suggest_layout(run, budget=needs // 2, device=DEVICE)
    assert half is not None
    assert half.stripes is not None
    every = [Stripes.grouped(stride=g, window=w) for g in range(2, 9) for w in fit.WINDOWS]
    fitting = [r for r in (replace(run, stripes=s) for s in every) if sum(memory.memory(r).values()) <= needs // 2]
    assert cost.pairs(half) == max(map(cost.pairs, fitting))
    assert fit.suggest_layout(run, budget=10**9, device=DEVICE) is None
    quick = fit.suggest_layout(run, seconds=sum(DEVICE.seconds(dense).values()) / 2, device=DEVICE)
    assert quick is not None
    assert cost.pairs(quick) < cost.pairs(dense)


def test_the_papers_table_has_its_numbers() -> None:
    """N = 16,384, w = 512, g = 4: attention 0.297 of dense and the cache 0.273, as section 1 of the paper implies."""
    rows = {
        row["kind"]: row
        for row in comparison.complexity(planned_run(self_extend=SelfExtend(8, 1024), phase="decode", length=16384))
    }
    assert rows["grouped"]["pairs_of_global"] == pytest.approx(1 / 4 + 3 / 4 * 2 * 512 / 16384, abs=0.001)
    assert rows["grouped"]["cached_of_global"] == pytest.approx(0.273, abs=0.001)
    assert rows["local"]["cached_tokens"] == 511
    assert rows["Self-Extend"]["pairs_of_global"] == 1


# The command


def test_the_command_prints_tables_json_and_a_picture(zebra: Zebra, tmp_path: Path) -> None:
    def plan(*arguments: object) -> str:
        done = zebra("plan", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    arguments = ("llama-2-7b", "--length", 16384, "--self-extend", "8:1024", "--memory", "80GiB")
    tree = json.loads(plan(*arguments, "--picture", tmp_path / "out.svg", "--json"))
    names = [column["layout"] for column in tree["layouts"]]
    assert names == ["full", "GLLL:512", "Self-Extend 8:1024", "GLLL:512 + Self-Extend 8:1024"]
    for column in tree["layouts"]:
        for part in ("flops", "bytes", "seconds", "memory"):
            assert column[part]["total"] == pytest.approx(sum(v for k, v in column[part].items() if k != "total"))
    assert tree["layouts"][0]["flops"]["attention"] == tree["layouts"][2]["flops"]["attention"]
    assert tree["layouts"][2]["largest_length"] == 25600
    assert tree["suggested_layout"] == "full"
    picture = (tmp_path / "out.svg").read_text()
    assert "Self-Extend 8:1024" in picture
    assert "Self-Extend 16:1024" in plan("llama-2-7b", "--length", 16384, "--self-extend", "auto:16384", "--json")
    assert "less at 1M" in picture
    printed = plan(*arguments)
    assert "6,738,415,616 parameters" in printed
    assert "16.00 GiB 0.73" in printed
    printed = plan(STORIES, "--length", 512, "--phase", "train", "--lora", 4, "--checkpointing")
    assert "LoRA of rank 4, activation checkpointing" in printed


def test_devices_that_share_a_training(zebra: Zebra) -> None:
    """The parts of one of eight devices, by hand for Llama-2-7B; a sequence costs all of them what it cost one."""

    def tree(*more: object) -> dict[str, Any]:
        done = zebra("plan", "llama-2-7b", "--length", 16384, "--phase", "train", "--json", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["layouts"][-1]

    one, of_eight = tree(), tree("--parallel", "shard=4,sequence=2")
    assert of_eight["flops"] == one["flops"]
    memory, received = of_eight["memory"], of_eight["received"]
    assert memory["weights"] == one["memory"]["weights"] // 8
    assert memory["activations"] == one["memory"]["activations"] // 2
    token = 2 * 4096 * 2  # a key and a value of 4,096 numbers in bfloat16
    fetched = {"global": 8 * 8192 * token, "local": 24 * 2 * 511 * token}  # the first device has chunks 0 and 3 of 4
    assert memory["keys and values fetched"] == fetched["global"] + fetched["local"] // 2
    assert memory["outputs joined"] == 32 * 8192 * 4096 * 2
    assert memory["gradients of keys and values"] == 5 * 8192 * token // 2
    assert received["keys and values, global layers"] == 8 * (8192 + 4096) * token  # and gradients of its chunk 0
    assert received["keys and values, local layers"] == 24 * 2 * 511 * token
    outside = 2 * 32000 * 4096 + 4096  # embeddings, head and last norm are gathered once for both passes
    assert received["weights"] == (2 * 6_738_415_616 - outside) * 4 * 7 // 8
    assert received["gradients"] == 4 * 6_738_415_616 * 7 // 8
    ring = tree("--parallel", "shard=4,sequence=2,ring")
    assert ring["memory"]["keys and values fetched"] == 2 * 8192 * token + fetched["local"] // 2
    assert ring["memory"]["gradients of keys and values"] == (4.5 + 2) * 8192 * token
    assert ring["received"]["keys and values, global layers"] == 8 * (2 * 8192 + 4096) * token
    copied = tree("--parallel", "data=2,sequence=2")
    assert copied["memory"]["weights"] == one["memory"]["weights"]
    assert copied["received"]["gradients, copies"] == 2 * 4 * 6_738_415_616 * 3 // 4
    printed = zebra("plan", "llama-2-7b", "--length", 16384, "--parallel", "shard=4,sequence=2").stdout
    assert "shared by 8 devices (data 1 x shard 4 x sequence 2)" in printed
    assert str(Parallel.parse("shard=4,sequence=2,ring")) == "shard=4,sequence=2,ring"
    assert "received, keys and values, local layers" in printed


# A cluster

TRAINING = Run(decoder=LLAMA, stripes=Stripes.parse("GLLL:4096"), length=65536, phase="train", checkpointing=True)


def test_shards_of_a_sequence_have_its_pairs() -> None:
    """What each device of a sequence computes adds up to the whole, and none has more than the busiest by name."""
    chunks = [replace(TRAINING, length=8192, past=chunk * 8192) for chunk in range(8)]
    of_devices = [cost.pairs(chunks[rank]) + cost.pairs(chunks[7 - rank]) for rank in range(4)]
    assert sum(of_devices) == cost.pairs(TRAINING)
    assert max(of_devices) == cost.pairs(busiest(TRAINING, 4))
    assert max(of_devices) < 1.01 * sum(of_devices) / 4
    assert busiest(TRAINING, 1) == TRAINING


def test_ways_to_share_are_all_there_and_the_quickest_that_fits_is_first() -> None:
    ways = cluster.predictions(TRAINING, DEVICE, 16)
    shared = {(*one.parallel.sizes.values(), one.parallel.ring) for one in ways}
    powers = (1, 2, 4, 8, 16)
    sizes = [sizes for sizes in itertools.product(powers, repeat=3) if math.prod(sizes) == 16]
    assert shared == {(*one, ring) for one in sizes for ring in (False, one[2] > 1)}
    assert [one.fits for one in ways] == sorted((one.fits for one in ways), reverse=True)
    fitting = [one for one in ways if one.fits]
    assert fitting
    assert len(fitting) < len(ways)
    assert all(one.tokens_per_second <= fitting[0].tokens_per_second for one in fitting)
    for one in ways:
        assert one.memory == device_memory(TRAINING, one.parallel)
        assert one.fits == (sum(one.memory.values()) <= 0.9 * 80e9)
        assert one.tokens == 65536 * one.parallel.data * one.parallel.shard
    assert all(one.limit.startswith("memory: ") for one in ways if not one.fits)


def test_the_seconds_of_a_step_by_hand() -> None:
    """Ceilings that bind one thing at a time: the last of two devices, the wire of one node and of more."""
    link = devices.Link(inside=1e9, across=1e8, node=4)
    endless = {"flops": {"bfloat16": 1e30, "float32": 1e30}, "bandwidth": 1e40, "memory": 10**15}
    wired = devices.Device("wired", **endless, source=devices.MEASURED, link=link)
    by_sizes = {one.parallel: one for count in (2, 8) for one in cluster.predictions(TRAINING, wired, count)}
    split, sharded = by_sizes[Parallel(sequence=2)], by_sizes[Parallel(shard=2)]
    exchanged = sum(count for part, count in split.received.items() if part.startswith("keys"))
    assert split.key_seconds == pytest.approx(exchanged / 0.8e9)
    assert sharded.key_seconds == 0
    assert sharded.seconds == pytest.approx((sharded.received["weights"] + sharded.received["gradients"]) / 0.8e9)
    several = by_sizes[Parallel(data=4, shard=2)]  # copies in two nodes
    inside = several.received["weights"] + several.received["gradients"]
    assert several.weight_seconds == pytest.approx(inside / 0.8e9 + several.received["gradients, copies"] / 0.8e8)
    slow = devices.Device("slow", {"bfloat16": 1e12, "float32": 1e12}, 1e40, 10**15, devices.MEASURED, link=link)
    (half,) = [one for one in cluster.predictions(TRAINING, slow, 2) if one.parallel == Parallel(sequence=2)]
    last = replace(TRAINING, length=32768, past=16384)
    assert half.compute_seconds == pytest.approx(sum(cost.flops(last).values()) / 1e12)


def test_a_step_has_no_more_tokens_than_teach() -> None:
    tokens = {one.tokens for one in cluster.predictions(replace(TRAINING, length=2**20), DEVICE, 64)}
    assert max(tokens) == 2**24
    (one,) = {one.tokens for one in cluster.predictions(replace(TRAINING, length=2**25), DEVICE, 64)}
    assert one == 2**25


def test_the_command_names_the_best_of_each_number_of_devices(zebra: Zebra) -> None:
    line = ("plan", "llama-2-7b", "--length", 65536, "--phase", "train", "--checkpointing", "--cluster", "8..32")
    tree = json.loads(zebra(*line, "--json").stdout)
    counts = [(one["layout"], one["devices"]) for one in tree["clusters"]]
    assert counts == [(layout, count) for count in (8, 16, 32) for layout in ("full", "GLLL:512")]
    printed = zebra(*line).stdout
    assert "450 GB/s in a node of 8, 50 GB/s beyond" in printed
    assert "assumed: links reach 80% of their data sheets" in printed
    best = [one["ways"][0] for one in tree["clusters"]]
    assert all(f"{one['data']}×{one['shard']}×{one['sequence']}" in printed for one in best)


def test_80_characters_hold_the_ways_of_a_cluster(zebra: Zebra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = ("plan", "llama-3.1-70b", "--length", 2**20, "--phase", "train", "--checkpointing", "--cluster", "64..1024")
    table = [one for one in zebra(*line).stdout.splitlines() if one.startswith("  ") and one.strip()]
    ways = [one.split() for one in table if one.strip()[0].isdigit()]
    assert [one[0] for one in ways] == ["64", "128", "256", "512", "1,024"] * 2
    assert all(len(one) <= 80 for one in table)
    assert len(table) == len(ways) + 2  # a head over each layout, and nothing torn


REFUSED = {
    "a cluster": (
        ["llama-2-7b", "--phase", "train", "--cluster", "9..16"],
        "a power of two of at most 1,048,576, or a range of these; got '9..16'",
    ),
    "a cluster that reads": (["llama-2-7b", "--cluster", "8"], "Add --phase train"),
    "a cluster of one sharing": (
        ["llama-2-7b", "--cluster", "8", "--parallel", "data=2"],
        "cannot be combined with --parallel",
    ),
    "devices": (["llama-2-7b", "--parallel", "shards=4"], "and ring at the end; got 'shards=4'"),
    "a ring of one device": (["llama-2-7b", "--parallel", "shard=4,ring"], "Add sequence=2"),
    "no devices": (["llama-2-7b", "--parallel", "shard=0"], "from 1 to 1,000,000; got 0"),
    "more devices than tokens": (
        ["llama-2-7b", "--parallel", "sequence=1000000"],
        "got 1,000,000 devices for 16,384 tokens. Lower sequence",
    ),
    "devices twice": (["llama-2-7b", "--parallel", "data=2,data=3"], "got 'data=2,data=3'"),
    "devices that decode": (
        ["llama-2-7b", "--parallel", "data=2", "--phase", "decode"],
        "do not support the phase decode",
    ),
    "devices in a budget": (["llama-2-7b", "--parallel", "data=2", "--memory", "9GB"], "only one device"),
    "no model": (["nowhere"], "no config.json at nowhere"),
    "a text": ([STORIES / "tokenizer_config.json"], "num_hidden_layers"),
    "a phase": (["llama-2-7b", "--phase", "serve"], "'serve' is not one of 'train', 'prefill', 'decode'"),
    "a dtype": (["llama-2-7b", "--dtype", "int4"], "got 'int4'"),
    "half in training": (["llama-2-7b", "--phase", "train", "--dtype", "float16"], "float32, bfloat16"),
    "no batch": (["llama-2-7b", "--batch", 0], "batch must be from 1 to"),
    "lora elsewhere": (["llama-2-7b", "--lora", 4], "require the phase train"),
    "a device": (["llama-2-7b", "--device", "abacus"], "no device 'abacus'"),
    "memory": (["llama-2-7b", "--memory", "plenty"], "got 'plenty'"),
    "memory without a unit": (["llama-2-7b", "--memory", "80"], "got '80'. Write 80GiB"),
    "a batch beyond all": (["llama-2-7b", "--batch", 10**400], "from 1 to 10^12"),
    "no time": (["llama-2-7b", "--seconds", 0], "positive number of seconds"),
    "a layer beyond": (["llama-2-7b", "--stripes", "40:9"], "layer 40"),
    "a window too long": (["llama-2-7b", "--self-extend", "8:4096"], "below the trained length"),
    "a near target": (["llama-2-7b", "--self-extend", "auto:4096"], "above the trained length"),
    "short reach": (["llama-2-7b", "--self-extend", "2:1024"], "to 7,168; got 16,384"),
    "no window": (["llama-2-7b", "--self-extend", "8"], "GROUP:WINDOW"),
    "trained": (["llama-2-7b", "--self-extend", "8:512", "--phase", "train"], "does not support the phase train"),
    "learned positions": (["gpt2-117m", "--self-extend", "auto:16384"], "its positions are learned, ALiBi"),
    "nothing global": (["llama-2-7b", "--stripes", "L:9", "--self-extend", "auto:16384"], "no global layer"),
    "a picture": (["llama-2-7b", "--picture", "out.png"], "out.svg"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str, zebra: Zebra) -> None:
    arguments, words = REFUSED[case]
    refused(zebra("plan", *arguments, "--length", 16384), words)


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "latent attention": ({"kv_lora_rank": 512}, "latent attention"),
    "another kind": ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
    "too few kinds": ({"layer_types": [GLOBAL]}, "32 layers"),
    "text": ({"hidden_size": "wide"}, "got 'wide'"),
    "no experts per token": ({"num_local_experts": 8}, "num_experts_per_tok"),
    "negative experts": ({"num_experts": -8}, "num_experts must be an integer"),
    "more than all experts": ({"num_experts": 2, "num_experts_per_tok": 8}, "at most 2 experts; got 8"),
    "odd groups": ({"num_key_value_heads": 5}, "divide the heads"),
    "odd width": ({"hidden_size": 4095}, "divide the heads"),
    "tied": ({"tie_word_embeddings": "false"}, "got 'false'"),
    "too large": ({"vocab_size": 10**400}, "from 1 to 10.12"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_config_that_cannot_be_estimated_is_refused(case: str) -> None:
    fields, words = BAD_FIELDS[case]
    with pytest.raises(ZebraError, match=words):
        decoder.decoder_from_config(shape("llama-2-7b") | fields, name="x")


NO_SELF_EXTEND: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "does not support the rope type dynamic",
    ),
    "longrope by its old name": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "the rope type longrope"),
    "longrope in global layers": (
        {"rope_parameters": {GLOBAL: {"rope_type": "longrope"}, LOCAL: {"rope_type": "default"}}},
        "type longrope",
    ),
    "ALiBi": ({"alibi": True}, "ALiBi"),
    "no rope in global layers": ({"model_type": "cohere2"}, "no global layer with a rotary embedding"),
    "all local": ({"model_type": "mistral", "sliding_window": 4096}, "no global layer with a rotary embedding"),
}


@pytest.mark.parametrize("case", NO_SELF_EXTEND)
def test_models_that_self_extend_cannot_load_are_refused(case: str) -> None:
    fields, words = NO_SELF_EXTEND[case]
    sizes = decoder.decoder_from_config(shape("llama-2-7b") | fields, name="x")
    assert comparison.compare(Run(decoder=sizes, stripes=sizes.stripes, length=9), DEVICE)
    with pytest.raises(ZebraError, match=words):
        Run(decoder=sizes, stripes=sizes.stripes, length=9, self_extend=SelfExtend(8, 1024))


@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}],
    ids=["default", "yarn", "linear"],
)
def test_ropes_that_can_be_rotated_again_are_estimated(rope: dict[str, Any]) -> None:
    read = decoder.decoder_from_config(shape("llama-2-7b") | {"rope_scaling": rope or None}, name="x")
    assert read.rope == rope.get("rope_type", rope.get("type", "default"))
    assert Run(decoder=read, stripes=None, length=9, self_extend=SelfExtend(8, 1024)).self_extend


def test_more_sinks_than_the_window_of_self_extend_are_not_planned(zebra: Zebra) -> None:
    refused(
        zebra("plan", STORIES, "--length", 2048, "--stripes", "GL:64+400", "--self-extend", "8:128"),
        "at most as many sinks",
    )


def test_a_checkpoint_is_planned_with_its_sinks_and_full_decoding(zebra: Zebra, tmp_path: Path) -> None:
    """config.json has no field for them; the plan used to count a cache of the window instead of all tokens."""
    path = tmp_path / "striped"
    convert(STORIES, path, "GLLL:64+4", full_decode=True)
    line = ("plan", path, "--length", 2048, "--phase", "decode", "--json")
    full, whole = json.loads(zebra(*line).stdout)["layouts"]
    assert whole["layout"] == "GLLL:64+4, full decode"
    assert whole["kv_bytes"] == full["kv_bytes"]
    _, window = json.loads(zebra(*line, "--no-full-decode").stdout)["layouts"]
    assert window["layout"] == "GLLL:64+4"
    assert window["kv_bytes"] == full["kv_bytes"] // (5 * 2048) * (2 * 2048 + 3 * (63 + 4))
    (path / "zebra.json").write_text("[]")
    refused(zebra(*line), "zebra.json cannot be read")


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    whole = shape("llama-2-7b")
    odd = [
        {"layer_types": 5},
        {"rope_parameters": [1]},
        {"mlp_only_layers": 3, "num_experts": 8},
        {"rope_scaling": "x"},
    ]
    odd += [{"num_experts": 8, "num_experts_per_tok": 1, "decoder_sparse_step": "2"}]
    for text in ("{", "[]", *(json.dumps(whole | fields) for fields in odd)):
        file.write_text(text)
        with pytest.raises(ZebraError, match="config"):
            decoder.read_decoder(tmp_path)


def test_another_family_is_estimated_as_a_llama_and_the_plan_says_so() -> None:
    odd = replace(LLAMA, family="unheard")
    assert odd.num_parameters == LLAMA.num_parameters
    plan = comparison.compare(Run(decoder=odd, stripes=None, length=9), DEVICE)
    assert "estimated as a Llama" in comparison.headline(plan)

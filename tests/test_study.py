"""The study's decoder: four kinds of attention × four position embeddings, each causal, exact and loadable."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import zebra
from zebra import kernels
from zebra.errors import ZebraError
from zebra.evaluate import perplexity, retrieval
from zebra.model import routes
from zebra.model.families import layout
from zebra.model.load import convert, load
from zebra.model.local import LocalAttention, layout_name
from zebra.model.override import get_override, set_override
from zebra.model.verify import verify
from zebra.study.model import ATTENTIONS, POSITIONS, StudyConfig, StudyForCausalLM, attention_kinds
from zebra.study.summary import SummaryAttention, naive_summary_attention

CELLS = list(itertools.product(ATTENTIONS, POSITIONS))
QUICK = [("summary", "alibi"), ("grouped", "rotary"), ("global", "absolute"), ("local", "none")]
"""Cells in which each kind of attention and each position embedding stands once."""
SOME_CELLS = [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.full) for cell in CELLS]
WINDOW, LENGTH = 6, 29


OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config(attention: str, positions: str, **changes: Any) -> StudyConfig:
    kinds = attention_kinds(attention, 3, 2)
    fields: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "summary_block": 3}
    fields |= {"attention_kinds": kinds, "position_embedding": positions, "bos_token_id": 1, "eos_token_id": 2}
    return StudyConfig(**fields | {"window": None if attention == "global" else WINDOW} | changes)


def drawn(attention: str, positions: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return StudyForCausalLM(config(attention, positions, **changes)).double().eval()


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(3))


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_a_later_token_changes_no_earlier_logit(attention: str, positions: str) -> None:
    model, ids = drawn(attention, positions), tokens(1)
    other = ids.clone()
    other[0, 20] = (other[0, 20] - 3 + 1) % 58 + 3
    one, two = model(ids).logits, model(other).logits
    close(two[:, :20], one[:, :20])
    assert not torch.allclose(two[:, 20:21], one[:, 20:21])


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_gradients_equal_the_naive_twin(attention: str, positions: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        loss = model(ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    ids = tokens(1, 17)
    naive = drawn(attention, positions)
    for layer in naive.model.layers:
        if get_override(layer.self_attn) is not None:
            set_override(layer.self_attn, SummaryAttention(naive.config.summary_block, naive_summary_attention))
    with kernels.only("reference"):
        expected = gradients(naive)
    close(gradients(drawn(attention, positions)), expected)


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_chunks_padding_and_packing_change_nothing(attention: str, positions: str) -> None:
    model, ids = drawn(attention, positions), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split([13, 1, 8, 1, 6], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache, parts = output.past_key_values, [*parts, output.logits]
        close(torch.cat(parts, dim=1), whole)
        short = ids[1:, 5:]
        padded, real = ids.clone(), torch.ones_like(ids)
        padded[1, :5], real[1, :5] = 0, 0
        places = (real.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=real, position_ids=places).logits
        close(logits[0], whole[0])
        close(logits[1, 5:], model(short).logits[0])
        joined = torch.cat([ids[:1], short], dim=1)
        places = torch.cat([torch.arange(LENGTH), torch.arange(LENGTH - 5)])[None]
        logits = model(joined, position_ids=places, use_cache=False).logits
        close(logits, torch.cat([whole[:1], model(short).logits], dim=1))


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_it_saves_loads_and_generates_as_any_host(attention: str, positions: str, tmp_path: Path) -> None:
    model = drawn(attention, positions).float()
    model.save_pretrained(tmp_path)
    loaded, ours, ids = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path), tokens()
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
        for one in (loaded, ours):
            close(one(ids).logits, model(ids).logits, 1e-4)
            assert torch.equal(one.generate(ids, **OPTIONS), expected)
    assert loaded.config.attention_kinds == model.config.attention_kinds
    assert loaded.config.window == model.config.window


@pytest.mark.parametrize("host", ["plain", "ours"])
@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_a_batch_padded_on_its_left_generates_what_each_row_does(
    attention: str, positions: str, host: str, tmp_path: Path
) -> None:
    drawn(attention, positions).float().save_pretrained(tmp_path)
    model = (AutoModelForCausalLM.from_pretrained if host == "plain" else load)(tmp_path)
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    alone = model.generate(ids[1:, 5:], **OPTIONS)[0, -5:]
    for inputs in ({"attention_mask": mask}, {}, {"attention_mask": mask, "use_cache": False}):
        assert torch.equal(model.generate(ids, **OPTIONS, **inputs)[1, -5:], alone)
    beams = model.generate(ids[1:, 5:], num_beams=3, **OPTIONS)[0, -5:]
    assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=3, **OPTIONS)[1, -5:], beams)
    if host == "plain":
        fixed = model.generate(ids, attention_mask=mask, cache_implementation="static", **OPTIONS)
        assert torch.equal(fixed[1, -5:], alone)


@pytest.mark.parametrize("positions", ["absolute", "rotary", "none"])
@pytest.mark.parametrize("attention", ["global", "local", "grouped"])
def test_the_hosts_own_attention_gives_the_same(attention: str, positions: str) -> None:
    ids, model = tokens(), drawn(attention, positions)
    expected = model(ids).logits
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        close(model(ids).logits, expected, 1e-4)


@pytest.mark.parametrize(("attention", "positions"), SOME_CELLS)
def test_training_sees_every_parameter(attention: str, positions: str) -> None:
    model = drawn(attention, positions).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = tokens(1)
    loss = model(ids, labels=ids).loss
    close(loss.double(), nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]), 1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rotary_without_summaries_becomes_a_stock_class(tmp_path: Path) -> None:
    source = tmp_path / "study"
    drawn("grouped", "rotary").float().save_pretrained(source)
    target = convert(source, tmp_path / "stock", "GL:6")
    assert load(target).config.model_type == "cwm"
    checks = verify(target, source)
    assert {check.name for check in checks} >= {"short", "long, plain", "long, zebra", "cached", "padded left"}
    assert all(check.passed for check in checks)
    other = tmp_path / "alibi"
    drawn("global", "alibi").float().save_pretrained(other)
    assert load(other, stripes="GL:6").config.attention_kinds == ["global", "local", "global"]
    with pytest.raises(ZebraError, match=r'plain transformers cannot run .*attn_implementation="zebra"'):
        verify(convert(other, tmp_path / "striped", "GL:6"), other)
    drawn("summary", "rotary").float().save_pretrained(tmp_path / "summary")
    with pytest.raises(ZebraError, match="this model was trained with summary layers, SSS:6/3"):
        convert(tmp_path / "summary", tmp_path / "never", "GL:6")


def test_learned_positions_end_where_their_table_does(tmp_path: Path) -> None:
    drawn("global", "absolute", vocab_size=512).float().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path)
    for reads_too_much in (
        lambda: perplexity.evaluate_perplexity(tmp_path, ["no.txt"], lengths=[64, 65]),
        lambda: retrieval.evaluate_retrieval(tmp_path, tasks=["passkey"], lengths=[65], beyond=True),
        lambda: zebra.generate(tmp_path, "a", max_new_tokens=64, on_text=pytest.fail),
    ):
        with pytest.raises(ZebraError, match="64 learned positions; got 65 tokens"):
            reads_too_much()


@pytest.mark.parametrize(("name", "layers", "width", "heads"), [(117e6, 12, 768, 12), (345e6, 24, 1024, 16)])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_sizes_are_those_of_their_names(name: float, layers: int, width: int, heads: int, positions: str) -> None:
    with torch.device("meta"):
        model = StudyForCausalLM(
            StudyConfig(
                vocab_size=40960,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                position_embedding=positions,
                max_position_embeddings=1024,
            )
        )
    assert abs(model.num_parameters() / name - 1) < 0.02


def test_layouts_are_named() -> None:
    assert layout(config("global", "none")) == "full"
    assert layout(config("grouped", "alibi")) == "GL:6"
    assert layout(config("summary", "rotary")) == "SSS:6/3"
    assert layout_name(config("grouped", "alibi"), LocalAttention()) == "GL:6 alibi"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_kinds": ["global"]}, "`num_hidden_layers` (3) must be equal"),
        ({"attention_kinds": ["global", "wide", "local"]}, "global, local, summary; got wide"),
        ({"position_embedding": "learned"}, "absolute, alibi, rotary, none; got 'learned'"),
        ({"window": None}, "window from 1 to the 64 positions; got None"),
        ({"window": 65}, "window from 1 to the 64 positions; got 65"),
        ({"summary_block": 0}, "summary_block must be from 1 to 64; got 0"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads (5)"),
    ],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StrictDataclassError) as error:
        config("summary", "rotary", **changes)
    assert says in str(error.value)


def test_what_the_host_cannot_compute_is_refused() -> None:
    for attention, positions in (("global", "alibi"), ("summary", "rotary")):
        without_zebra = config(attention, positions)
        without_zebra._attn_implementation = "sdpa"
        with pytest.raises(ValueError, match='attn_implementation="zebra"'):
            StudyForCausalLM(without_zebra)
    with pytest.raises(ValueError, match="64 learned positions; got position 64"):
        drawn("global", "absolute")(tokens(1, 65))
    with pytest.raises(ValueError, match="got 'full'"):
        attention_kinds("full", 4)
    with pytest.raises(ValueError, match="from 1 to 4 layers; got 5"):
        attention_kinds("grouped", 4, 5)


@pytest.mark.parametrize("positions", ["absolute", "alibi", "none"])
def test_no_rope_is_changed_where_there_is_none(positions: str, tmp_path: Path) -> None:
    drawn("global", positions).float().save_pretrained(tmp_path)
    with pytest.raises(
        ZebraError, match=f"the rope of this zebra_study cannot be changed to yarn:4: its positions are {positions}"
    ):
        load(tmp_path, rope="yarn:4")


def test_sinks_are_refused_under_alibi(tmp_path: Path) -> None:
    drawn("grouped", "alibi").float().save_pretrained(tmp_path)
    with pytest.raises(ZebraError, match=r"sinks are not supported with ALiBi, .* got 2 sinks"):
        load(tmp_path, stripes="GL:6+2")
    assert load(tmp_path, stripes="GL:4").config.window == 4


@pytest.mark.parametrize(("attention", "positions"), [("global", "alibi"), ("summary", "rotary"), ("global", "none")])
def test_self_extend_is_refused_where_nothing_rotates(attention: str, positions: str, tmp_path: Path) -> None:
    drawn(attention, positions).float().save_pretrained(tmp_path)
    with pytest.raises(ZebraError):
        zebra.load(tmp_path, self_extend="4:8")


def test_its_routes_are_registered_and_in_no_table() -> None:
    assert [one.target for one in routes.routes_of("zebra_study")] == ["cwm", "zebra_study"]
    assert not [one for one in routes.ROUTES if one.family == "zebra_study"]


def test_the_command_line_plans_a_checkpoint_without_torch(zebra_process: Callable[..., Any], tmp_path: Path) -> None:
    drawn("summary", "alibi").float().save_pretrained(tmp_path)
    plan = zebra_process("plan", tmp_path, "--length", 64, "--json")
    assert plan.returncode == 0, plan.stderr
    plan = json.loads(plan.stdout)
    assert [one["layout"] for one in plan["layouts"]] == ["full", "SSS:6/3"]
    assert plan["complexity"][-1]["kind"] == "summary"


@pytest.mark.full
def test_python_asks_for_the_import(tmp_path: Path) -> None:
    drawn("summary", "alibi").float().save_pretrained(tmp_path)
    code = f"import zebra\ntry: zebra.load({str(tmp_path)!r})\nexcept zebra.ZebraError as error: print(error)\n"
    code += f"import zebra.study.model; print(zebra.load({str(tmp_path)!r}).config.model_type)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    first, second = run.stdout.splitlines()
    assert "cannot be read" in first, run.stdout + run.stderr
    assert "zebra_study" in first
    assert second == "zebra_study"

"""The forward pass from any layer on equals the whole one, to the last bit; the model comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FAMILIES, FIXED, STORIES, some, tiny_model, tokens
from transformers import AutoModelForCausalLM

import zebra
from zebra import ZebraError
from zebra.model.layerwise import Layerwise

MEMBERS = some(EVERY_MEMBER, *FAMILIES)
LAYERS = 5


IDS = tokens(2, 40)


@pytest.mark.parametrize("member", MEMBERS)
def test_from_any_layer_on_equals_the_whole_forward(member: str, checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints(member))
    layers, ids, base = Layerwise(model, window=7), IDS, "GLGGG"
    states = layers.states(ids, base)
    assert len(states) == LAYERS + 1
    for start in range(LAYERS):
        for kinds in (base, base[:start] + "L" * (LAYERS - start), base[:start] + "GLGLG"[start:]):
            whole = layers.states(ids, kinds)
            assert torch.equal(layers.resume(ids, kinds, start, states[start]), whole[-1])
            assert all(torch.equal(*pair) for pair in zip(whole[: start + 1], states, strict=False))
    assert not torch.equal(layers.states(ids, "LLLLL")[-1], states[-1])


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.values[0] not in FIXED])
def test_kinds_for_now_equal_a_loaded_layout(member: str, checkpoints: Callable[..., Path]) -> None:
    ids = IDS
    output = Layerwise(zebra.load(checkpoints(member)), window=7).states(ids, "GLLGL")[-1]
    with torch.no_grad():
        striped = zebra.load(checkpoints(member), stripes="0,3:7").get_decoder()(ids, use_cache=False)
    assert torch.equal(output, striped.last_hidden_state)
    output = Layerwise(zebra.load(checkpoints(member)), window=7, sinks=3).states(ids, "GLLGL")[-1]
    with torch.no_grad():
        striped = zebra.load(checkpoints(member), stripes="0,3:7+3").get_decoder()(ids, use_cache=False)
    assert torch.equal(output, striped.last_hidden_state)


def test_the_model_comes_back_as_it_was(checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zebra.load(checkpoints("llama"))
    ids, names = IDS, [name for name, _ in model.named_modules()]
    modules, before = list(model.modules()), model(ids).logits
    layers = Layerwise(model, window=7)
    states = layers.states(ids, "GGGGG")
    layers.resume(ids, "GGGLG", 3, states[3])
    with monkeypatch.context() as broken:
        broken.setattr(type(model.get_decoder().layers[4]), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layers.resume(ids, "GGGLG", 3, states[3])
        with pytest.raises(ZeroDivisionError):
            layers.states(ids, "GGGLG")
    assert [name for name, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)
    assert torch.equal(model(ids).logits, before)


def test_layers_before_the_start_are_not_run(checkpoints: Callable[..., Path]) -> None:
    model = zebra.load(checkpoints("llama"))
    ran: list[int] = []
    for i, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    layers = Layerwise(model, window=7)
    states = layers.states(IDS, "GGGGG")
    ran.clear()
    layers.resume(IDS, "GGGLG", 3, states[3])
    assert ran == [3, 4]


def test_what_cannot_be_toggled_is_refused() -> None:
    with pytest.raises(ZebraError, match="got sdpa"):
        Layerwise(AutoModelForCausalLM.from_pretrained(STORIES), window=7)
    with pytest.raises(ZebraError, match="got SelfExtendAttention"):
        Layerwise(zebra.load(STORIES, self_extend="4:64"), window=7)
    model: Any = tiny_model("gpt_neox")
    del model.get_decoder().layers
    with pytest.raises(ZebraError, match="list of 5 layers"):
        Layerwise(model, window=7)

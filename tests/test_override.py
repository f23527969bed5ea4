"""Attention overrides: who implements them, who calls them, and that a module is restored."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zebra.evaluate.search
import zebra.model
import zebra.model.verify
import zebra.study.model
from zebra.kernels import Mask, attend
from zebra.model.attention import zebra_attention
from zebra.model.local import LocalAttention
from zebra.model.override import (
    AttentionOverride,
    get_override,
    names_of_other_overrides,
    overrides_of,
    overriding_attention,
    set_override,
)
from zebra.model.self_extend.probe import ProbeAttention

PACKAGE = Path(zebra.model.__file__).parent.parent


def implementers() -> Iterator[type]:
    """Every class of the package with a method `attend`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(getattr(f, "name", None) == "attend" for f in node.body):
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                implementer = getattr(__import__(module, fromlist=[node.name]), node.name)
                if implementer is not AttentionOverride:
                    yield implementer


def test_each_implementer_has_the_protocols_signature() -> None:
    """mypy checks their types where they are set; this that none has been forgotten or takes other arguments."""
    expected = list(inspect.signature(AttentionOverride.attend).parameters.values())
    names = set()
    for implementer in implementers():
        names.add(implementer.__name__)
        parameters = list(inspect.signature(implementer.attend).parameters.values())  # type: ignore[attr-defined]
        positional = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
        assert len(positional) == len([p for p in expected if p.kind is p.POSITIONAL_ONLY]), implementer
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD, implementer
    assert names >= {
        "FormulaAttention",
        "LocalAttention",
        "ProbeAttention",
        "SelfExtendAttention",
        "SummaryAttention",
        "_KindOfEachLayer",
    }


def test_one_function_calls_the_override_of_a_module() -> None:
    callers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "get_override(" in path.read_text() and path.name != "override.py"
    }
    assert callers == {"model/attention.py", "model/sequence_parallel/attention.py"}  # the second one wraps it
    assert not [path for path in PACKAGE.rglob("*.py") if ".attention_override" in path.read_text()]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)


def test_the_attention_function_calls_the_override_with_all_it_was_given() -> None:
    class Recorder:
        calls: list[tuple[Any, ...]] = []  # noqa: RUF012

        def attend(
            self, module: nn.Module, positions: Any, q: Any, k: Any, v: Any, mask: Mask, /, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            self.calls.append((module, positions, mask.window, kwargs["scale"]))
            return attend(q, k, v, mask, **kwargs)

    module, (q, k, v) = nn.Module(), inputs()
    positions = torch.arange(9)[None]
    without, _ = zebra_attention(module, q, k, v, None, scaling=0.3, sliding_window=4, position_ids=positions)
    set_override(module, Recorder())
    output, _ = zebra_attention(module, q, k, v, None, scaling=0.3, sliding_window=4, position_ids=positions)
    assert torch.equal(output, without)
    assert Recorder.calls == [(module, positions, 4, 0.3)]


def test_modules_get_their_previous_override_back() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    local, probe = LocalAttention(2), ProbeAttention(nn.Identity(), {}, local=False)
    set_override(model[0], local)
    with overriding_attention(model.modules(), probe):
        assert list(overrides_of(model, ProbeAttention)) == [probe] * 3
        assert names_of_other_overrides(model, LocalAttention) == "ProbeAttention"
    assert [get_override(module) for module in model.modules()] == [None, local, None]
    assert names_of_other_overrides(model, LocalAttention) == ""
    set_override(model[0], None)
    assert list(overrides_of(model, LocalAttention)) == []

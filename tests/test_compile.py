"""torch.compile of the surrounding model breaks nothing: the same losses, gradients and tokens as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import zebra

# The compiler looks at .grad of every tensor after a break, and hides torch's warning only where it is not an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(3))
EAGER = {"backend": "eager"}
EVERY = [
    pytest.param(EAGER, id="eager"),
    pytest.param(EAGER | {"dynamic": True}, id="dynamic", marks=pytest.mark.full),
    pytest.param({"backend": "aot_eager"}, id="aot_eager", marks=pytest.mark.full),
]


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> Iterator[Any]:
    torch.compiler.reset()
    yield zebra.load(checkpoints("llama", num_hidden_layers=2), stripes="GL:9")
    torch.compiler.reset()


def step(model: Any, run: Any, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    actual = run(input_ids=ids, labels=ids, use_cache=False, **arguments)
    actual.loss.backward()
    return {"logits": actual.logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", EVERY)
def test_a_step_of_training_is_the_same(model: Any, how: dict[str, Any]) -> None:
    compiled = torch.compile(model, **how)
    equal(step(model, compiled, IDS), step(model, model, IDS), 1e-5)
    padding = torch.ones_like(IDS)
    padding[1, :6] = 0
    ids, masked = IDS[:, :33], {"attention_mask": padding[:, :33]}
    equal(step(model, compiled, ids, **masked), step(model, model, ids, **masked), 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("how", EVERY)
def test_packed_documents_stay_apart(model: Any, how: dict[str, Any]) -> None:
    compiled = torch.compile(model, **how)
    packed = {"position_ids": torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)}
    documents = step(model, compiled, IDS, **packed)
    equal(documents, step(model, model, IDS, **packed), 1e-5)
    assert not torch.allclose(documents["logits"], step(model, model, IDS)["logits"])


@pytest.mark.full
@pytest.mark.parametrize("how", EVERY)
def test_a_step_under_autocast_is_the_same(model: Any, how: dict[str, Any]) -> None:
    compiled = torch.compile(model, **how)
    with torch.autocast("cpu", torch.bfloat16):
        equal(step(model, compiled, IDS), step(model, model, IDS), 1e-5 if how["backend"] == "eager" else 2e-2)


@pytest.mark.full
@pytest.mark.parametrize("how", EVERY)
@torch.no_grad()
def test_decode_is_the_same(model: Any, how: dict[str, Any]) -> None:
    def tokens(run: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        ends = [0, 20, 27, 28, 29]
        parts = [IDS[:, a:b] for a, b in pairwise(ends)]
        return torch.cat([run(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in parts], dim=1)

    torch.testing.assert_close(tokens(torch.compile(model, **how)), tokens(model))

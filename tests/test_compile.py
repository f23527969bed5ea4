"""torch.compile and torch.export of a model: the losses, gradients and tokens of eager runs, in one graph on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FinishedRun, adapt_recipe, losses
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

import zebra
from zebra.errors import ZebraError
from zebra.kernels import Mask, attend, gradients, only
from zebra.model.compiled import compile_layers
from zebra.model.operator import attention
from zebra.train.adapt import adapt

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
        equal(step(model, compiled, IDS), step(model, model, IDS), 2e-2)


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


PADDING = torch.ones_like(IDS)
PADDING[1, :6] = 0
INPUTS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "a mask of ones": {"attention_mask": torch.ones_like(IDS)},
    "padding": {"attention_mask": PADDING},
    "packed documents": {"position_ids": torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)},
}


@pytest.mark.parametrize("family", ["llama", pytest.param("granite_swa", marks=pytest.mark.full)])
def test_a_step_is_one_graph_and_equals_the_eager_one(family: str, checkpoints: Callable[..., Path]) -> None:
    """Granite's learned sinks take the log-sum-exp, so that its gradient is in it."""
    torch.compiler.reset()
    changes = {} if family != "granite_swa" else {"layer_rope_theta": [1e4, 0]}
    model = zebra.load(checkpoints(family, num_hidden_layers=2, **changes), stripes="GL:9")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for arguments in INPUTS.values():
        equal(step(model, compiled, IDS, **arguments), step(model, model, IDS, **arguments), 3e-6)
    torch.compiler.reset()


def test_a_changed_config_is_an_error_of_eager_calls_alone(model: Any) -> None:
    """A graph contains the layers as they were built; checking the config would need one guard per layer."""
    expected = model(IDS, use_cache=False).logits
    model.config.layer_types = ["full_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types cannot be changed after loading"):
        model(IDS, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_program_equals_the_model_at_any_length(model: Any, tmp_path: Path) -> None:
    lengths = {"input_ids": {1: torch.export.Dim.AUTO}, "attention_mask": {1: torch.export.Dim.AUTO}, "use_cache": None}
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), arguments, dynamic_shapes=lengths)
        torch.export.save(exported, tmp_path / "striped.pt2")
        program = torch.export.load(tmp_path / "striped.pt2").module()
        nodes = [node.target for node in program.graph.nodes]
        assert nodes.count(torch.ops.zebra.attention.default) == 2
        for ids, mask in ((IDS, PADDING), (IDS.repeat(1, 2), torch.ones_like(IDS).repeat(1, 2))):
            actual = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
            expected = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_what_only_values_show_is_an_error_when_a_program_runs() -> None:
    """Packed documents behind cached tokens: no graph could know."""
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 7, 8)
    with pytest.raises(ZebraError, match="after 3 of them"):
        attention(q, k, k, None, torch.tensor([[0, 1, 0, 1]]), None, 1.0, None, False)


@pytest.mark.parametrize("with_lse", [True, False])
def test_the_operator_has_the_contract_of_torch(with_lse: bool) -> None:
    """Shapes and dtypes without values, no aliasing, a backward that can be traced."""
    torch.manual_seed(0)
    q = torch.randn(2, 20, 4, 8).transpose(1, 2).requires_grad_(with_lse)
    k, v = (torch.randn(2, 2, 25, 8, requires_grad=with_lse) for _ in range(2))
    torch.library.opcheck(attention, (q, k, v, None, torch.arange(5, 25)[None], 6, 0.3, 4.0, with_lse))


@pytest.mark.parametrize("kernel", ["banded", "native"])
@pytest.mark.parametrize("window", [None, 40])
def test_gradients_outside_of_autograd_equal_those_inside(kernel: str, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, 64, requires_grad=True) for heads, length in ((4, 256), (2, 400), (2, 400))
    )
    with only(kernel):
        try:
            out, lse = attend(q, k, v, Mask(window=window), scale=0.2)
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        assert lse is not None
        seeds = torch.randn_like(out), torch.randn_like(lse)
        expected = torch.autograd.grad((out, lse), (q, k, v), seeds)
        actual = gradients(q, k, v, Mask(window=window), out.detach(), lse.detach(), *seeds, scale=0.2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compiled_layers_are_the_eager_ones_and_share_their_code(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five layers of two kinds are two graphs; names stay as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    model = zebra.load(checkpoints("llama"), stripes="GLLLG:9")
    names = list(model.state_dict())
    expected = step(model, model, IDS)
    compile_layers(model)
    equal(step(model, model, IDS), expected, 3e-6)
    assert counters["stats"]["unique_graphs"] == 2
    assert list(model.state_dict()) == names
    with pytest.raises(ZebraError, match="Linear has none"):
        compile_layers(torch.nn.Linear(2, 2))
    torch.compiler.reset()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # torch's compiler is not free of warnings
def test_a_training_with_compiled_layers_has_the_losses_of_an_eager_one(adapt_run: FinishedRun, tmp_path: Path) -> None:
    """By torch's own compiler, with evaluations of another length in between."""
    torch.compiler.reset()
    results = adapt(adapt_recipe(tmp_path / "run", train__compile=True))
    assert losses(results) == pytest.approx(losses(adapt_run.results), rel=1e-4)
    torch.compiler.reset()

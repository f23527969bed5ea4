"""The loss without logits against the cross entropy of full logits, with and without torch's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from conftest import EVERY_MEMBER, tiny_model, tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from zebra import ZebraError
from zebra.data.packing import IGNORE
from zebra.evaluate.perplexity import sequence_losses
from zebra.model import loss as module
from zebra.model.loss import Head, head_of, read_states, summed_loss, token_losses, without_logits
from zebra.train import lora
from zebra.train.recipe import Lora

HAS_KERNEL = hasattr(functional, "linear_cross_entropy")
BOTH = [pytest.param(True, marks=pytest.mark.skipif(not HAS_KERNEL, reason="torch below 2.13")), False]


@pytest.fixture(params=BOTH, ids=["kernel", "fallback"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths: torch's fused kernel and the fallback. Taking the other one is an error."""
    monkeypatch.setattr(module, "_FUSED", request.param)
    if not request.param:
        monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    else:
        monkeypatch.setattr(module, "checkpoint", None)
    return bool(request.param)


def drawn(batch: int, length: int, hidden: int, vocabulary: int, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * length + hidden + vocabulary)
    states = torch.randn(batch, length, hidden, generator=generator)
    head = torch.randn(vocabulary, hidden, generator=generator)
    labels = torch.randint(0, vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = IGNORE
    return states, head, labels


def head_with(weight: Tensor, **kwargs: Any) -> Head:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.detach())
    return Head(module, **kwargs)


def full_logits(states: Tensor, head: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    logits = states.double() @ head.double().T
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction, ignore_index=-100
    )


SHAPES = [
    pytest.param((1, 2, 8, 5), id="one prediction"),
    pytest.param((2, 33, 16, 8), id="head smaller than hidden"),
    pytest.param((3, 21, 16, 97), id="head larger than hidden"),
    pytest.param((2, 601, 8, 50), id="several chunks"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_value_and_gradients_equal_full_logits(fused: bool, shape: Any, ignored: float) -> None:
    states, head, labels = drawn(*shape, ignored=ignored)
    labels[0, 1] = 1
    states.requires_grad_(), head.requires_grad_()
    expected = full_logits(states, head, labels)
    expected_gradients = torch.autograd.grad(expected, [states, head])
    whole = head_with(head)
    output = summed_loss(states, whole, labels)
    gradients = torch.autograd.grad(output, [states, *whole.module.parameters()])
    assert output.dtype == torch.float32
    assert output.shape == ()
    torch.testing.assert_close(output.double(), expected, rtol=2e-6, atol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("chunk", [1, 7, 8, 1024])
def test_the_chunk_does_not_show(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_FUSED", False)
    monkeypatch.setattr(module, "CHUNK", chunk)
    states, head, labels = drawn(2, 9, 8, 30)
    torch.testing.assert_close(summed_loss(states, head_with(head), labels).double(), full_logits(states, head, labels))
    losses = token_losses(states, head_with(head), labels)
    torch.testing.assert_close(losses[:, 1:].double().sum(), full_logits(states, head, labels), rtol=1e-6, atol=1e-5)


def test_bfloat16_instructions_round_no_bfloat16_values() -> None:
    """A contract with torch: float32 products by bfloat16 instructions are exact of such values, sums are float32."""
    states, head, labels = (x.bfloat16() if x.is_floating_point() else x for x in drawn(1, 1100, 64, 512))
    before = torch.backends.mkldnn.matmul.fp32_precision
    logits = states.double() @ head.double().T
    expected = functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
    torch.testing.assert_close(
        token_losses(states, head_with(head), labels)[0, 1:].double(), expected, rtol=1e-5, atol=0
    )
    with module.products_of_bfloat16():
        torch.testing.assert_close((states.float() @ head.float().T).double(), logits, rtol=1e-5, atol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_mixed_precision_rounds_only_operands(fused: bool) -> None:
    states, head, labels = drawn(1, 1100, 64, 512)
    states.requires_grad_()
    expected, before = full_logits(states, head, labels), torch.backends.mkldnn.matmul.fp32_precision
    output = summed_loss(states, head_with(head), labels, mixed_precision=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=0)
    one, other = (torch.autograd.grad(loss, states)[0] for loss in (output, expected))
    assert (one - other).norm() <= 1e-2 * other.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_fallback_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FUSED", False)
    monkeypatch.setattr(module, "CHUNK", 10)
    rows: list[int] = []
    linear = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, *a: rows.append(len(x)) or linear(x, *a))
    states, head, labels = drawn(1, 36, 8, 30)
    summed_loss(states.requires_grad_(), head_with(head), labels).backward()
    assert sorted(rows) == [5, 5] + [10] * 6  # each chunk once, and once again in the backward


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_states_give_a_float32_accurate_value(fused: bool, shape: Any) -> None:
    states, head, labels = drawn(*shape)
    states, head = states.bfloat16(), head.bfloat16()
    output = summed_loss(states, head_with(head), labels)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), full_logits(states, head, labels), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(
        token_losses(states, head_with(head), labels).nansum().double(),
        full_logits(states, head, labels),
        rtol=2e-6,
        atol=1e-5,
    )


def test_bfloat16_states_get_bfloat16_gradients(fused: bool) -> None:
    states, head, labels = drawn(2, 21, 16, 97)
    states, head = states.bfloat16().requires_grad_(), head.bfloat16().requires_grad_()
    whole = head_with(head)
    output = torch.autograd.grad(summed_loss(states, whole, labels), [states, *whole.module.parameters()])
    expected = torch.autograd.grad(full_logits(states, head, labels), [states, head])
    for one, other in zip(output, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other.double()).norm() <= 4e-3 * other.double().norm()


@pytest.mark.skipif(not HAS_KERNEL, reason="torch below 2.13")
@pytest.mark.parametrize("vocabulary", [32, 64, 200])
def test_autocast_does_not_reach_the_kernel(vocabulary: int) -> None:
    states, head, labels = drawn(2, 50, 64, vocabulary)
    with torch.autocast("cpu", torch.bfloat16):
        output = summed_loss(states, head_with(head), labels)
    torch.testing.assert_close(output.double(), full_logits(states, head, labels), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("function", [summed_loss, token_losses])
def test_autocast_does_not_reach_the_products(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FUSED", False)
    states, head, labels = drawn(2, 50, 64, 200)
    with torch.autocast("cpu", torch.bfloat16):
        output = function(states, head_with(head), labels).nansum()
    torch.testing.assert_close(output.double(), full_logits(states, head, labels), rtol=2e-6, atol=1e-5)


def test_only_ignored_labels_give_zero(fused: bool) -> None:
    states, head, _ = drawn(2, 9, 8, 30)
    states.requires_grad_()
    output = summed_loss(states, head_with(head), torch.full((2, 9), IGNORE))
    (gradient,) = torch.autograd.grad(output, states)
    assert output.item() == 0
    assert not gradient.any()


def test_the_last_state_and_the_first_label_do_not_count(fused: bool) -> None:
    states, head, labels = drawn(2, 9, 8, 30)
    before = summed_loss(states, head_with(head), labels)
    states[:, -1] = float("nan")
    labels[:, 0] = IGNORE
    assert torch.equal(summed_loss(states, head_with(head), labels), before)


def test_token_losses_say_where_nothing_is_predicted() -> None:
    states, head, labels = drawn(3, 21, 16, 97, ignored=0.3)
    output = token_losses(states, head_with(head), labels)
    assert output.shape == labels.shape
    assert output.dtype == torch.float32
    unpredicted = labels == IGNORE
    unpredicted[:, 0] = True
    assert torch.equal(output.isnan(), unpredicted)
    each = full_logits(states, head, labels, reduction="none").view(3, 20)
    predicted = ~unpredicted[:, 1:]
    torch.testing.assert_close(output[:, 1:][predicted].double(), each[predicted], rtol=2e-6, atol=1e-5)


def test_token_losses_keep_no_graph() -> None:
    states, head, labels = drawn(1, 5, 8, 30)
    assert not token_losses(states.requires_grad_(), head_with(head.requires_grad_()), labels).requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_scaled_and_capped_head_equals_the_formula(fused: bool, scale: float, softcap: float | None) -> None:
    if fused and softcap is not None:
        pytest.skip("torch's kernel has no softcap: the chunks serve it")
    states, weight, labels = drawn(2, 33, 16, 97, ignored=0.2)
    states.requires_grad_(), weight.requires_grad_()
    logits = states.double() @ weight.double().T * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected_gradients = torch.autograd.grad(expected, [states, weight])
    head = head_with(weight, scale=scale, softcap=softcap)
    output = summed_loss(states, head, labels)
    torch.testing.assert_close(output.double(), expected, rtol=2e-6, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(output, [states, *head.module.parameters()]), expected_gradients, strict=True
    ):
        assert (one - other).norm() <= 2e-6 * other.norm()
    torch.testing.assert_close(token_losses(states, head, labels).nansum().double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("member", EVERY_MEMBER)
def test_the_loss_and_its_gradients_equal_transformers(member: str) -> None:
    """Heads differ by family: Gemma caps its logits, Cohere scales them."""
    model = tiny_model(member)
    ids = tokens(2, 21, seed=1)
    expected = model(ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    hidden = model(ids, **without_logits()).hidden_states[-1]
    output = summed_loss(hidden, head_of(model), ids) / ids[:, 1:].numel()
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    total = sum(g.norm() for g in gradients if g is not None)
    for one, other in zip(
        torch.autograd.grad(output, list(model.parameters()), allow_unused=True), gradients, strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-5 * total
    each = token_losses(hidden, head_of(model), ids)[:, 1:]
    torch.testing.assert_close(each.mean(), expected, rtol=1e-6, atol=1e-6)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _adapted(model: Any) -> Any:
    pytest.importorskip("peft")
    wrapped = lora.wrap(model, Lora(r=2, target_modules=("lm_head",), modules_to_save=()), seed=0)
    nn.init.normal_(wrapped.get_output_embeddings().lora_B["default"].weight)
    return wrapped


def _hooked(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def _parametrized(model: Any) -> Any:
    parametrize.register_parametrization(model.lm_head, "weight", _Doubled())
    return model


def _with_bias(model: Any) -> Any:
    model.lm_head.bias = nn.Parameter(torch.randn(97))
    return model


def _replaced(model: Any) -> Any:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * forward(states)
    return model


@pytest.mark.parametrize("wrap", [_adapted, _hooked, _parametrized, _with_bias, _replaced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrapped_head_is_called_and_trained(wrap: Any, dtype: torch.dtype) -> None:
    """Whatever wraps the head is part of the loss, to float32's accuracy."""
    model = wrap(tiny_model("llama", tie_word_embeddings=False)).to(dtype)
    ids = tokens(2, 21, seed=1)
    hidden = model(ids, **without_logits()).hidden_states[-1].detach()
    logits = model.get_output_embeddings().float()(hidden.float())
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    trained = [one for one in model.get_output_embeddings().parameters() if one.requires_grad]
    gradients = torch.autograd.grad(expected, trained)
    model.get_output_embeddings().to(dtype)  # what was bfloat16 is no other number in float32
    output = summed_loss(hidden, head_of(model), ids)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(output, trained), gradients, strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()
    torch.testing.assert_close(token_losses(hidden, head_of(model), ids).nansum(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", EVERY_MEMBER)
def test_states_are_read_without_those_of_all_layers(member: str) -> None:
    model, ids = tiny_model(member).eval(), tokens(2, 21, seed=1)
    with torch.no_grad():
        expected = model(ids, **(without_logits() | {"logits_to_keep": 1}))
        outputs: list[Any] = []
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
        states, logits = read_states(model, ids, logits_to_keep=1)
    torch.testing.assert_close(states, expected.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    assert outputs[0].hidden_states is None
    assert outputs[0].past_key_values is None


def test_a_head_that_its_class_treats_otherwise_is_rejected() -> None:
    """A class may scale its logits by a field of its own; the perplexity would then be wrong."""
    model = tiny_model("llama").eval()
    ids = torch.randint(3, 97, (2, 21))
    losses = sequence_losses(model, ids)
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    model.forward = scaled
    with torch.no_grad(), pytest.raises(ZebraError, match="does more than scale and cap the logits of its head"):
        sequence_losses(model, ids)
    assert losses[:, 1:].all()


def test_logits_of_a_mixed_precision_training_are_rounded_logits() -> None:
    """accelerate computes in bfloat16 and returns float32: an evaluation during training is not rejected for that."""
    model = tiny_model("llama").eval()
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed_tokens" in name:
            parameter.data *= 30  # larger logits, so that their rounding passes the bound of float32
    model.to(torch.bfloat16)
    ids = torch.randint(3, 97, (2, 21))
    expected = sequence_losses(model, ids)
    model.forward = convert_outputs_to_fp32(model.forward)
    with torch.no_grad():
        torch.testing.assert_close(sequence_losses(model, ids), expected, rtol=0.02, atol=0.02, equal_nan=True)

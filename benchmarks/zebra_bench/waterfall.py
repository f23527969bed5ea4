"""Where the time of a forward pass, a training step or a token goes: seconds by part, beside the least they could take.

    projections   q, k, v and o                    norms       whole, casts included
    global        attention of global layers       rope        angles, and the rotation of queries and keys
    local         of the others                    copies      into the cache, and what is laid out anew
    MLP           its three products               rest        SiLU, residual sums, embeddings, sums of gradients
    merging       other work inside attention:     head        the head and, in training, the loss
                  Self-Extend's second rotations,  optimizer
                  merging near and far             framework   the time of the call less all of these

torch's profiler sees each operator with its own time. Hooks on the modules name the part that it works for, and so does
the attention function, which stands in transformers' registry. An operator of the backward has the part of the forward
operator with its sequence number. Of an operator only its own time counts, not that of those it calls; of attention's
forward all the time counts, as a kernel of ours in C++ is no operator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from zebra.model.attention import zebra_attention, zebra_mask
from zebra.plan.cost import BYTES, Run, bytes_moved, flops, pairs_by_kind
from zebra.plan.devices import Device
from zebra.stripes import GLOBAL

PARTS = (
    "projections", "global", "local", "MLP", "head", "merging", "norms", "rope", "copies", "rest", "optimizer",
    "framework",
)  # fmt: skip
"""In the order of the tables."""
_LABEL = "part: "
_ATTENTION = ("global", "local")
_NAME = "zebra, labelled"
"""The attention function in transformers' registry that opens a label."""
_BACKWARD = "autograd::engine::evaluate_function"
_KERNELS = ("_Native", "scaled_dot_product", "flash_attention", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
_COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_", "aten::slice_backward")
_MATMULS = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "aten::bmm", "aten::_to_copy")
_VIEWS = (
    "aten::view", "aten::_unsafe_view", "aten::transpose", "aten::t", "aten::slice", "aten::as_strided", "aten::expand",
    "aten::unsqueeze", "aten::squeeze", "aten::reshape", "aten::_reshape_alias", "aten::select", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::detach", "aten::alias", "aten::to", "aten::permute",
    "aten::resolve_neg", "aten::resolve_conj", "aten::result_type", "aten::narrow", "aten::chunk", "aten::split",
    "aten::unflatten", "aten::flatten", "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::unbind",
)  # fmt: skip
"""Operators that compute nothing: their time is the framework's."""


def waterfall(model: nn.Module, call: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of one call under the profiler, and of each part of it."""
    with labelled(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    parts = dict.fromkeys(PARTS, 0.0)
    for part, own in attributed(list(profiler.events() or ())):
        parts[part] += own / 1e6
    parts["framework"] = seconds - sum(parts[part] for part in PARTS if part != "framework")
    return seconds, parts


@contextmanager
def label(part: str) -> Iterator[None]:
    """Count the operators within this context, and their backward, to a part."""
    with record_function(_LABEL + part):
        yield


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Within this context the modules of a Llama name the part that they compute."""
    config: Any = model.config
    with ExitStack() as stack:
        for name, module in model.named_modules():
            part = _part_of_module(name.rpartition(".")[2], type(module).__name__)
            if part is not None:
                stack.enter_context(_hooked(module, part))
        before = config._attn_implementation
        if before == "zebra":
            stack.callback(setattr, config, "_attn_implementation", before)
            config._attn_implementation = _NAME
        yield


def _part_of_module(name: str, kind: str) -> str | None:
    if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
        return "projections"
    if kind.endswith("Norm"):
        return "norms"
    if kind.endswith("RotaryEmbedding"):
        return "rope"
    return {"self_attn": "attention", "mlp": "MLP", "lm_head": "head"}.get(name)


@contextmanager
def _hooked(module: nn.Module, part: str) -> Iterator[None]:
    open_labels: list[Any] = []

    def before(module: nn.Module, inputs: Any) -> None:
        open_labels.append(record_function(_LABEL + part))
        open_labels[-1].__enter__()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _labelled_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    with label("local" if window else "global"):
        return zebra_attention(module, *args, **kwargs)


AttentionInterface.register(_NAME, _labelled_attention)
AttentionMaskInterface.register(_NAME, zebra_mask)


def attributed(events: list[Any]) -> Iterator[tuple[str, float]]:
    """The part of each event, and its own microseconds."""
    labels: dict[int, str] = {}  # of forward operators by their sequence numbers
    for event in events:
        name = _label_above(event)
        if name is not None and event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            labels.setdefault(event.sequence_nr, name)
    for event in events:
        own, name = event.self_cpu_time_total, _label_above(event)
        backward = name is None
        if name is None and (node := _above(event, _BACKWARD)) is not None:
            name = labels.get(node.sequence_nr)
        if event.name.startswith(_LABEL):
            if name in _ATTENTION:
                yield name, own
            continue
        if event.name in _VIEWS:
            if name in _ATTENTION and not backward:
                yield name, own
            continue
        if event.name.startswith(_BACKWARD) or event.name.startswith("ProfilerStep"):
            continue
        yield _part(event.name, name), own


def _part(operator: str, name: str | None) -> str:
    """The part of an operator by its name and the label above it."""
    product = operator in _MATMULS
    if name in _ATTENTION:
        return name if any(kernel in operator for kernel in _KERNELS) else "merging"
    if name == "attention":
        return "copies" if operator in _COPIES else "rope"
    if name in ("projections", "MLP") and not product:
        return "copies" if operator in _COPIES else "rest"
    if name is None:
        return "copies" if operator in _COPIES else "rest"
    return name


def _label_above(event: Any) -> str | None:
    """The innermost label around an event, its own name included."""
    around = _above(event, _LABEL)
    return None if around is None else around.name.removeprefix(_LABEL)


def _above(event: Any, prefix: str) -> Any:
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return event


def floors(run: Run, device: Device, trained: int = 0) -> dict[str, float]:
    """The least seconds of each part: its FLOPs at the peak of products, or the bytes that it must move at least.

    Elementwise work counts as if each of its steps were one pass over memory: a norm reads and writes its states, a
    rotation its queries and keys. A training step passes three times, and AdamW reads four numbers of each of the
    `trained` parameters and writes three.
    """
    d, tokens, size, peak = run.decoder, run.tokens, BYTES[run.dtype], device.flops[run.dtype]
    computed, moved, visible = flops(run), bytes_moved(run), pairs_by_kind(run)
    total = sum(visible.values())
    share = {kind: count / total for kind, count in visible.items()}
    both = {"global": share[GLOBAL], "local": 1 - share[GLOBAL]}
    seconds = {
        part: max(computed[part] / peak, moved[part] / device.bandwidth) for part in ("projections", "MLP", "head")
    }
    if run.phase == "train":  # head and loss are in float32
        frozen = 2 / 3 if run.lora and d.tied else 1  # LoRA trains norms alone here: no gradient of the head's weight
        seconds["head"] = frozen * computed["head"] / device.flops.get("float32", peak)
    for part, of in both.items():
        seconds[part] = of * max(computed["attention"] / peak, moved["attention"] / device.bandwidth)
    passes = size * tokens * (3 if run.phase == "train" else 1) / device.bandwidth
    seconds["norms"] = passes * (2 * d.layers + 1) * 2 * d.hidden_size
    seconds["rope"] = passes * d.layers * 2 * (d.query_width + d.kv_width)
    seconds["rest"] = passes * d.layers * (3 * d.intermediate_size + 6 * d.hidden_size)
    seconds["copies"] = 0.0 if run.phase == "train" else passes * d.layers * 4 * d.kv_width
    seconds["optimizer"] = 28 * trained / device.bandwidth
    return {part: seconds.get(part, 0.0) for part in PARTS}

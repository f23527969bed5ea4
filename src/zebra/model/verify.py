"""The proof of a conversion, or of Self-Extend: what a model must still agree with, and how far it does.

Each check compares logits over random tokens, in float32 by default, as the largest difference relative to the largest
logit. The oracle for long inputs is, for stripes, the *source* model with a 4-D mask of its own in each layer; for
Self-Extend, the formula in each layer (`zebra.model.self_extend.formula`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zebra import masks
from zebra.errors import ZebraError
from zebra.model.checkpoint import read_config, read_local_attention
from zebra.model.families import model_class, stripes_of
from zebra.model.load import load, read_device, read_dtype
from zebra.model.local import local_attention_of
from zebra.model.rope import Rope, as_rope
from zebra.model.self_extend import bounded_cache, resolve_self_extend
from zebra.model.self_extend.formula import formula_logits
from zebra.positions import SelfExtend
from zebra.stripes import GLOBAL, LOCAL, Stripes

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_CHUNK = 7


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference of two models' logits over the largest logit, and what is allowed."""

    name: str
    compared: str
    difference: float
    tolerance: float
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the two agree. NaN does not."""
        return self.difference <= self.tolerance


def verify(
    target: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    rope: Rope | str | None = None,
    self_extend: SelfExtend | str | None = None,
    length: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> list[Check]:
    """Compare a converted checkpoint with its source and itself, or any under Self-Extend with the formula; or both.

    1. short: up to the window, plain transformers with the target equals it with the source.
    2. long: beyond the window, plain transformers and attention "zebra" equal the source with a mask in each layer;
       plain transformers without the sinks of zebra.json.
    3. cached: one token at a time with the bounded cache equals the whole text at once.
    4. chunked: a prefill in chunks equals the whole text at once.
    5. padded: a batch padded on the left, and on the right, gives each sequence what it gets alone.
    6. packed, under Self-Extend: two documents in one sequence get what each gets alone.
    7. decoded, with full decoding: tokens behind a prompt equal the source with a mask that is full from there on.

    Args:
        target, against: the converted checkpoint and its source, directories. Without a source Self-Extend alone is
            verified, and the target needs no stripes.
        rope: the change of rope that the conversion took; the source runs with it.
        self_extend: Self-Extend, or its notation, to be compared with its formula.
        length: tokens of the long checks; the window and half of it again, and some, where None.

    Raises:
        ZebraError: a checkpoint that cannot be loaded, a target without stripes, two different models, neither a source
            nor Self-Extend, a model that plain transformers cannot compute.
    """
    dtype, device = read_dtype(dtype), read_device(device)
    if self_extend is not None:
        checks = _self_extend_checks(target, self_extend, length, seed, dtype, device)
        if against is None:
            return checks
        return verify(target, against, rope=rope, length=length, seed=seed, dtype=dtype, device=device) + checks
    if against is None:
        raise ZebraError("a conversion is verified against its source. Name the source, or Self-Extend to verify that.")
    config, source_config = read_config(target), read_config(against)
    stripes = stripes_of(config)
    if stripes is None:
        raise ZebraError(
            f"{target} has no stripes to verify: its layout is full. Convert it first with `zebra convert`."
        )
    _check_same_model(target, against, config, source_config)
    source_stripes = stripes_of(source_config)
    short = min([s.window for s in (stripes, source_stripes) if s is not None])
    n = length or stripes.window + stripes.window // 2 + 2 * _CHUNK + 3
    if n <= stripes.window:
        raise ZebraError(
            f"a long check goes beyond the window of {stripes.window}; got length {n}. Give a larger length."
        )
    ids = torch.randint(0, config.vocab_size, (2, n), generator=torch.Generator().manual_seed(seed)).to(device)
    placement: dict[str, Any] = {"dtype": dtype, "device_map": device}

    local = read_local_attention(target)
    plain, whole = (stripes, n), (replace(stripes, sinks=local.sinks), n)
    decoded = [(whole[0], n - _one_by_one(n))] if local.full_decode else []
    source = _with_rope(source_config, rope, config)
    expected_short, oracle = _source_logits(against, source, ids, short, [plain, whole, *decoded], placement)
    plain_short, plain_long = _plain_logits(target, ids, short, placement)
    whole_logits, decoded_logits, own_checks = _zebra_checks(load(target, **placement), ids, dtype)
    masks_on = "mask oracle on the source"
    checks = [
        _check("short", "source, plain transformers", plain_short, expected_short, dtype),
        _check("long, plain", masks_on + ", no sinks" * bool(local.sinks), plain_long, oracle[plain], dtype),
        _check("long, zebra", masks_on, whole_logits, oracle[whole], dtype),
        *own_checks,
    ]
    if decoded_logits is not None:
        checks.append(_check("decoded", masks_on, decoded_logits, oracle[decoded[0]], dtype))
    return checks


def _check_same_model(target: Any, against: Any, config: PreTrainedConfig, source: PreTrainedConfig) -> None:
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(config, name) != getattr(source, name):
            raise ZebraError(
                f"{target} and {against} are different models: {name} is {getattr(config, name)} and "
                f"{getattr(source, name)}. Name the checkpoint that the target was converted from."
            )
    if getattr(config, "needs_zebra", False):
        raise ZebraError(
            f"plain transformers does not compute the attention of {target}, so there is nothing to hold it against. "
            "Verify a model with other positions."
        )


def _check(
    name: str, compared: str, logits: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Check:
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    return Check(name, compared, difference, tolerance, logits.shape[:-1].numel())


def _self_extend_checks(
    path: Any, self_extend: SelfExtend | str, length: int | None, seed: int, dtype: torch.dtype, device: str
) -> list[Check]:
    """The checks of Self-Extend. The plain short text is that of transformers; the rest shares one model."""
    config = read_config(path, routed=False)
    setting = resolve_self_extend(self_extend, config)
    n = length or setting.window + max(setting.window // 2, 4 * setting.group) + 2 * _CHUNK + 3
    if n <= setting.window:
        raise ZebraError(
            f"Self-Extend {setting} acts beyond {setting.window} tokens; got length {n}. Give a larger one."
        )
    ids = torch.randint(0, config.vocab_size, (2, n), generator=torch.Generator().manual_seed(seed)).to(device)
    placement: dict[str, Any] = {"dtype": dtype, "device_map": device}
    plain = _logits(_plain_model(path, placement | {"config": config}), ids[:, : setting.window])
    model = load(path, self_extend=setting, **placement)
    short = _logits(model, ids[:, : setting.window])
    whole, _, own_checks = _zebra_checks(model, ids, dtype)
    with formula_logits(model, setting) as formula:
        oracle = formula(ids, logits_to_keep=_sampled(n).to(device))
    cut = n // 3
    positions = torch.cat([torch.arange(cut), torch.arange(n - cut)])[None].to(device)
    packed = _logits(model, ids[:1], torch.cat([_sampled(cut), _sampled(n - cut) + cut]), position_ids=positions)
    apart = torch.cat([_logits(model, ids[:1, :cut]), _logits(model, ids[:1, cut:])], dim=1)
    return [
        _check(f"short, self-extend {setting}", "plain transformers", short, plain, dtype),
        _check("long", "dense formula", whole, oracle, dtype, _formula_tolerance(dtype, n)),
        *own_checks,
        _check("packed", "documents alone", packed, apart, dtype),
    ]


def _formula_tolerance(dtype: torch.dtype, n: int) -> float:
    """The formula rounds angles as transformers does, which takes their cosines in float32 in any dtype. The rounding
    of sums in float32 grows with the text.
    """
    if dtype == torch.float64:
        return 5e-6
    return min(1e-5 * max(1.0, n / 512), TOLERANCE[dtype]) if dtype == torch.float32 else TOLERANCE[dtype]


# Each function that loads a model releases it at its end: a checkpoint may fill the memory.


def _source_logits(
    path: Any,
    config: PreTrainedConfig,
    ids: Tensor,
    short: int,
    layouts: list[tuple[Stripes, int]],
    placement: dict[str, Any],
) -> tuple[Tensor, dict[tuple[Stripes, int], Tensor]]:
    """The logits of the short text, and of the long one under each layout with a prompt of so many tokens."""
    model = _plain_model(path, placement | {"config": config})
    short_logits, long_logits = _logits(model, ids[:, :short]), {}
    for stripes, prompt in dict.fromkeys(layouts):
        with _mask_in_each_layer(model, stripes, prompt):
            long_logits[stripes, prompt] = _logits(model, ids)
    return short_logits, long_logits


def _plain_logits(path: Any, ids: Tensor, short: int, placement: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The target's logits of the short and the long text in plain transformers, without anything of ours."""
    model = _plain_model(path, placement | {"config": AutoConfig.from_pretrained(path)})
    return _logits(model, ids[:, :short]), _logits(model, ids)


def _plain_model(path: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A checkpoint in plain transformers: by sdpa, unless its class has none, or a softcap, which sdpa leaves out."""
    config = kwargs["config"]
    eager = getattr(config, "attn_logit_softcapping", None) or not model_class(config)._supports_sdpa
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager" if eager else "sdpa", **kwargs)


def _with_rope(source: PreTrainedConfig, rope: Rope | str | None, target: PreTrainedConfig) -> PreTrainedConfig:
    config = as_rope(rope).apply(source)
    if config is not source and GLOBAL in target.rope_parameters and GLOBAL not in config.rope_parameters:
        raise ZebraError(
            f"{rope} changed the rope of the target's global layers alone, which the source's class "
            f"{source.model_type} cannot do, so there is nothing to compare it with. Verify the conversion without it."
        )
    return config


def _zebra_checks(model: PreTrainedModel, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, list[Check]]:
    """The logits of whole texts, those of decoded tokens under full decoding, and the checks of the model by itself."""
    n = ids.shape[1]
    shorter, steps = n * 2 // 3, _one_by_one(n)
    parts = [n - steps] + [1] * steps
    whole = _logits(model, ids)
    cached = _logits_in_parts(model, ids, parts)
    decoded = _logits_in_parts(model, ids, parts, n - steps) if local_attention_of(model).full_decode else None
    chunked = _logits_in_parts(model, ids, [max(_CHUNK, n // 11)] * n)
    left, right = (_padded_logits(model, ids, shorter, side) for side in ("left", "right"))
    alone = torch.cat([_logits(model, ids[:1])[0], _logits(model, ids[1:, :shorter])[0]])
    checks = [
        _check("cached", "uncached", cached, whole, dtype),
        _check("chunked", "whole", chunked, whole, dtype),
        _check("padded left", "sequences alone", left, alone, dtype),
        _check("padded right", "sequences alone", right, alone, dtype),
    ]
    return whole, decoded, checks


def _one_by_one(n: int) -> int:
    """Tokens of the long text that come one by one."""
    return min(n - 1, 64)


def _sampled(n: int) -> Tensor:
    """At most 512 positions, evenly spread: the logits of all could exceed the memory."""
    return torch.linspace(0, n - 1, min(n, 512)).round().long()


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, at: Tensor | None = None, **kwargs: Any) -> Tensor:
    at = _sampled(ids.shape[1]) if at is None else at
    return model(ids, use_cache=False, logits_to_keep=at.to(ids.device), **kwargs).logits


@torch.no_grad()
def _logits_in_parts(model: PreTrainedModel, ids: Tensor, sizes: list[int], prompt: int | None = None) -> Tensor:
    """The logits of the text, read into the bounded cache part by part; without a length all of it is the prompt."""
    cache, parts, start, at = bounded_cache(model), [], 0, _sampled(ids.shape[1])
    cache.set_prompt_length(prompt or ids.shape[1])
    for size in sizes:
        part = ids[:, start : start + size]
        if part.shape[1] == 0:
            break
        inside = at[(at >= start) & (at < start + size)] - start
        parts.append(model(part, past_key_values=cache, use_cache=True, logits_to_keep=inside.to(ids.device)).logits)
        start += size
    return torch.cat(parts, dim=1)


def _padded_logits(model: PreTrainedModel, ids: Tensor, shorter: int, side: str) -> Tensor:
    """The logits of the real tokens of a batch: one whole sequence, and one of `shorter` tokens, padded on a side."""
    n = ids.shape[1]
    start = n - shorter if side == "left" else 0
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1], mask[1] = 0, 0
    batch[1, start : start + shorter], mask[1, start : start + shorter] = ids[1, :shorter], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    sequences = [
        _logits(model, batch, at, attention_mask=mask, position_ids=positions)[entry]
        for entry, at in enumerate((_sampled(n), _sampled(shorter) + start))
    ]
    return torch.cat(sequences)


@contextmanager
def _mask_in_each_layer(model: PreTrainedModel, stripes: Stripes, prompt: int) -> Iterator[None]:
    """Run a model without stripes by the masks of a layout: hooks hand each layer's attention a 4-D mask of its own.

    Queries from `prompt` on see all before them.
    """
    layers = model.model.layers
    kinds = stripes.layer_types(len(layers))

    def mask_of(kind: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states = kwargs["hidden_states"]
            n = states.shape[1]
            j = torch.arange(n, device=states.device)
            visible = masks.causal(j[:, None], j[None, :])
            if kind == LOCAL:
                local = masks.within(j[:, None], j[None, :], stripes.window) | masks.sink(j[None, :], 0, stripes.sinks)
                visible &= local | (j[:, None] >= prompt)
            # Added to the scores: the eager attention of transformers takes no booleans.
            added = torch.zeros(n, n, dtype=states.dtype, device=states.device)
            added.masked_fill_(~visible, torch.finfo(states.dtype).min)
            return args, kwargs | {"attention_mask": added[None, None]}

        return hook

    hooks = [
        layer.self_attn.register_forward_pre_hook(mask_of(kind), with_kwargs=True)
        for layer, kind in zip(layers, kinds, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Verify a conversion, or Self-Extend: what a model's logits must agree with, and how closely they do.

Each check compares logits over random tokens, in float32 by default: the largest difference relative to the largest
logit. For long inputs the oracle of stripes is the *source* model with its own 4-D mask in each layer; that of
Self-Extend is the formula in each layer (`zebra.model.self_extend.formula`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zebra import masks
from zebra.errors import ZebraError, first_line
from zebra.model.checkpoint import read_config, read_local_attention
from zebra.model.families import model_class, stripes_of
from zebra.model.finite import check_finite
from zebra.model.gguf import as_directory
from zebra.model.load import load, read_device, read_dtype
from zebra.model.quantization import dtype_of_checks, quantization_of, set_dequantised_dtype
from zebra.model.rope import Rope, as_rope
from zebra.model.self_extend import bounded_cache, resolve_self_extend
from zebra.model.self_extend.formula import formula_logits
from zebra.positions import SelfExtend
from zebra.stripes import GLOBAL, LOCAL, Stripes

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_CHUNK = 7
_Comparison = tuple[str, str, Tensor, Tensor]
"""The name of a check, what it compares with, the logits and the expected logits."""


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
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
) -> list[Check]:
    """Compare a converted checkpoint with its source, or a checkpoint under Self-Extend with the formula, or both.

    1. short: up to the window, target and source agree in plain transformers.
    2. long: beyond the window, plain transformers and attention "zebra" equal the source with a mask in each layer; for
       plain transformers the mask has no sinks, as it does not read zebra.json.
    3. cached: decoding the last 64 tokens one by one with the bounded cache equals the whole text at once.
    4. chunked: a prefill in chunks equals the whole text at once.
    5. padded: each sequence of a batch that is padded on the left, or on the right, gets what it gets alone.
    6. packed, under Self-Extend: two documents in one sequence get what each gets alone.
    7. decoded, with full decoding: tokens after a prompt equal the source with a mask that is full from there on.

    Args:
        target, against: the converted checkpoint and its source. Without a source only Self-Extend is verified, and
            the target needs no stripes.
        rope: the change of the rope in the conversion; the source runs with it.
        self_extend: Self-Extend, or its notation, to compare with its formula.
        length: tokens of the long checks; where None, 1.5 windows of the stripes, or 1.1 of Self-Extend, and some more.
        seed: of the random tokens.
        dtype: of the weights; None is float32, or bfloat16 where they stay quantised.

    Returns:
        A `Check` for each comparison; a check that fails raises no error.

    Raises:
        ZebraError: a checkpoint that cannot be loaded, a target without stripes, two different models, neither a source
            nor Self-Extend, a length within the window, a model that plain transformers cannot run, or whose logits are
            not finite there.
    """
    if self_extend is None and against is None:
        raise ZebraError(
            "verifying a conversion requires its source. Pass it as against (--against), or verify only Self-Extend "
            "with self_extend (--self-extend)."
        )
    chosen = None if dtype is None else read_dtype(dtype)
    chosen = dtype_of_checks(target, read_config(target, routed=False), chosen)
    placement = {"dtype": chosen, "device_map": read_device(device)}
    own = [] if self_extend is None else _self_extend_checks(target, self_extend, length, seed, placement)
    return ([] if against is None else _conversion_checks(target, against, rope, length, seed, placement)) + own


def _conversion_checks(
    target: Any, against: Any, rope: Rope | str | None, length: int | None, seed: int, placement: dict[str, Any]
) -> list[Check]:
    config, source_config = read_config(target), as_rope(rope).apply(read_config(against))
    stripes, source_stripes = stripes_of(config), stripes_of(source_config)
    if stripes is None:
        raise ZebraError(
            f"{target} has no stripes to verify: its layout is full. Convert it first with `zebra convert`."
        )
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(config, name) != getattr(source_config, name):
            raise ZebraError(
                f"{target} and {against} are different models: {name} is {getattr(config, name)} and "
                f"{getattr(source_config, name)}. Name the checkpoint that the target was converted from."
            )
    if (
        as_rope(rope).kind != "none"
        and GLOBAL in config.rope_parameters
        and GLOBAL not in source_config.rope_parameters
    ):
        raise ZebraError(
            f"{rope} changed the rope of only the target's global layers, which the source's class "
            f"{source_config.model_type} does not support, so there is nothing to compare with. Verify a conversion "
            "without the rope."
        )
    local = read_local_attention(target)
    n = length or stripes.window + max(stripes.window // 2, local.sinks) + 2 * _CHUNK + 3
    if n <= stripes.window:
        raise ZebraError(f"the length must be larger than the window of {stripes.window}; got {n}. Raise the length.")
    ids = _random_tokens(config, n, seed, placement)
    short = ids[:, : min(each.window for each in (stripes, source_stripes) if each is not None)]
    plain, whole = (stripes, n), (replace(stripes, sinks=local.sinks), n)
    decoded = (whole[0], _steps(n)[0])

    # One model at a time, as a checkpoint may fill the memory.
    model = _plain_model(against, source_config, placement)
    expected_short, oracle = _finite_logits(model, short), {}
    for layout, prompt in {plain, whole, *[decoded] * local.full_decode}:
        with _mask_in_each_layer(model, layout, prompt):
            oracle[layout, prompt] = _logits(model, ids)
    del model
    model = _plain_model(target, AutoConfig.from_pretrained(as_directory(target), trust_remote_code=False), placement)
    plain_short, plain_logits = _finite_logits(model, short), _logits(model, ids)
    del model
    model = load(target, **placement)
    whole_logits, masks_on = _logits(model, ids), "mask oracle on the source"
    comparisons: list[_Comparison] = [
        ("short", "source, plain transformers", plain_short, expected_short),
        ("long, plain", masks_on + ", no sinks" * bool(local.sinks), plain_logits, oracle[plain]),
        ("long, zebra", masks_on, whole_logits, oracle[whole]),
        *_compared_with_itself(model, ids, whole_logits, stripes.window),
    ]
    if local.full_decode:
        decoded_logits = _logits_in_parts(model, ids, _steps(n), prompt=decoded[1])
        comparisons.append(("decoded", masks_on, decoded_logits, oracle[decoded]))
    return [_check(placement["dtype"], *comparison) for comparison in comparisons]


def _self_extend_checks(
    path: Any, self_extend: SelfExtend | str, length: int | None, seed: int, placement: dict[str, Any]
) -> list[Check]:
    config, dtype = read_config(path, routed=False), placement["dtype"]
    setting = resolve_self_extend(self_extend, config)
    near = far = setting.window
    stripes, sinks = stripes_of(config), read_local_attention(path).sinks
    if stripes is not None and sinks:  # beyond the window a layer sees them, and plain transformers does not
        near, far = min(near, stripes.window), max(far, stripes.window)
    n = length or far + max(far // 8, 4 * setting.group, sinks) + 2 * _CHUNK + 3
    if n <= far:
        raise ZebraError(
            f"the length must be larger than the window of Self-Extend {setting}, and than that of local layers with "
            f"sinks; got {n}. Use at least {far + 1:,}."
        )
    ids = _random_tokens(config, n, seed, placement)
    plain = _finite_logits(_plain_model(path, config, placement), ids[:, :near])
    model = load(path, self_extend=setting, **placement)
    short, whole = _logits(model, ids[:, :near]), _logits(model, ids)
    with formula_logits(model, setting) as formula:
        oracle = formula(ids[:1], logits_to_keep=_sampled(n).to(ids.device))  # as slow as it is simple
    # The formula rounds angles as transformers does, which takes their cosines in float32 in any dtype. The rounding
    # error of float32 sums grows with the text.
    of_formula = {torch.float64: 5e-6, torch.float32: min(1e-5 * max(1.0, n / 512), TOLERANCE[dtype])}
    cut = (n - far) // 2 + 1  # the second document is longer than the windows, if n allows
    positions = torch.cat([torch.arange(cut), torch.arange(n - cut)])[None].to(ids.device)
    packed = _logits(model, ids[:1], torch.cat([_sampled(cut), _sampled(n - cut) + cut]), position_ids=positions)
    apart = torch.cat([_logits(model, ids[:1, :cut]), _logits(model, ids[:1, cut:])], dim=1)
    return [
        _check(dtype, f"short, self-extend {setting}", "plain transformers", short, plain),
        _check(dtype, "long", "dense formula", whole[:1], oracle, of_formula.get(dtype)),
        *(_check(dtype, *comparison) for comparison in _compared_with_itself(model, ids, whole, far)),
        _check(dtype, "packed", "documents alone", packed, apart),
    ]


def _compared_with_itself(model: PreTrainedModel, ids: Tensor, whole: Tensor, window: int) -> list[_Comparison]:
    n = ids.shape[1]
    shorter = (n + window) // 2  # a padded sequence has far tokens too
    alone = torch.cat([_logits(model, ids[:1])[0], _logits(model, ids[1:, :shorter])[0]])
    return [
        ("cached", "uncached", _logits_in_parts(model, ids, _steps(n)), whole),
        ("chunked", "whole", _logits_in_parts(model, ids, max(_CHUNK, n // 11)), whole),
        ("padded left", "sequences alone", _padded_logits(model, ids, shorter, "left"), alone),
        ("padded right", "sequences alone", _padded_logits(model, ids, shorter, "right"), alone),
    ]


def _check(
    dtype: torch.dtype, name: str, compared: str, logits: Tensor, expected: Tensor, tolerance: float | None = None
) -> Check:
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return Check(name, compared, difference, tolerance or TOLERANCE[dtype], logits.shape[:-1].numel())


def _plain_model(path: Any, config: PreTrainedConfig, placement: dict[str, Any]) -> PreTrainedModel:
    """Load a checkpoint in plain transformers: eager if its class has no sdpa, or a softcap, which sdpa ignores."""
    eager = getattr(config, "attn_logit_softcapping", None) or not model_class(config)._supports_sdpa
    method = quantization_of(config)  # loading removes it from the config
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            as_directory(path),
            config=config,
            attn_implementation="eager" if eager else "sdpa",
            trust_remote_code=False,
            **placement,
        )
    except ValueError as error:
        raise ZebraError(
            f"plain transformers cannot run {path}, so there is nothing to compare it with: {first_line(error)}"
        ) from None
    if method is not None:
        set_dequantised_dtype(model, placement["dtype"])
    return model


def _random_tokens(config: PreTrainedConfig, n: int, seed: int, placement: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (2, n), generator=generator).to(placement["device_map"])


def _steps(n: int) -> list[int]:
    """The sizes of parts of n tokens: one part, then the last tokens, at most 64, one by one."""
    return [n - min(n - 1, 64)] + [1] * min(n - 1, 64)


def _sampled(n: int) -> Tensor:
    """At most 512 evenly spread positions: the logits of all might not fit in memory."""
    return torch.linspace(0, n - 1, min(n, 512)).round().long()


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, at: Tensor | None = None, **kwargs: Any) -> Tensor:
    at = _sampled(ids.shape[1]) if at is None else at
    return model(ids, use_cache=False, logits_to_keep=at.to(ids.device), **kwargs).logits


def _finite_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of plain transformers; where they are not finite, nothing can be compared."""
    logits = _logits(model, ids)
    check_finite(logits, model)
    return logits


@torch.no_grad()
def _logits_in_parts(model: PreTrainedModel, ids: Tensor, sizes: int | list[int], prompt: int | None = None) -> Tensor:
    """The logits of a text read into the bounded cache part by part; without `prompt` all of it is the prompt."""
    cache, parts, start, at = bounded_cache(model), [], 0, _sampled(ids.shape[1])
    cache.set_prompt_length(prompt or ids.shape[1])
    for part in ids.split(sizes, dim=1):
        end = start + part.shape[1]
        inside = at[(at >= start) & (at < end)] - start
        parts.append(model(part, past_key_values=cache, use_cache=True, logits_to_keep=inside.to(ids.device)).logits)
        start = end
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
    """Run a model without stripes with the masks of a layout: hooks give each layer's attention its own 4-D mask.

    Queries from `prompt` on see all earlier tokens.
    """
    layers = model.model.layers
    kinds = stripes.layer_types(len(layers))

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = kwargs["hidden_states"]
        n = states.shape[1]
        j = torch.arange(n, device=states.device)
        visible = masks.causal(j[:, None], j[None, :])
        if kinds[module.layer_idx] == LOCAL:
            local = masks.within(j[:, None], j[None, :], stripes.window) | masks.sink(j[None, :], 0, stripes.sinks)
            visible &= local | (j[:, None] >= prompt)
        # An additive mask: the eager attention of transformers takes no booleans.
        added = torch.zeros(n, n, dtype=states.dtype, device=states.device)
        added.masked_fill_(~visible, torch.finfo(states.dtype).min)
        return args, kwargs | {"attention_mask": added[None, None]}

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
        yield

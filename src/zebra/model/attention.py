"""Attention "zebra" for the decoders of transformers. Importing this module registers it; nothing else does.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="zebra")

The attention function and the mask function are registered under one name: the attention function alone would silently
lose the window and the padding. The mask function never builds an N x N tensor; it returns the 2-D mask, or None.

`torch.compile` and `torch.export` see attention on a CPU as one operator (`zebra.model.operator`). Overrides,
arguments that name packed documents, and other devices break the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from zebra.errors import ZebraError
from zebra.kernels import Mask, attend, autocast
from zebra.model.documents import PACKING_KWARGS, documents_of
from zebra.model.operator import attention
from zebra.model.override import get_override
from zebra.stripes import LOCAL

NAME = "zebra"

IGNORED_KWARGS = frozenset(
    {"is_causal", "num_items_in_batch", "output_hidden_states", "output_router_logits", "tokenizer", "use_cache"}
)
"""Arguments that models pass to every layer and attention need not read; `generate` passes its tokenizer. All others go
to the kernels, which decline what they do not know, so that no argument is silently ignored."""


def zebra_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    A layer with an override is computed by that (`zebra.model.override`): Self-Extend, sinks, full decoding.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, K, S, D), rotated; or an object with the keys, from one of zebra's cache layers.
        value: (B, K, S, D).
        attention_mask: what `zebra_mask` returned, (B, at most S) bool, or None.
        sliding_window: the layer's window, a query's own key included; None in a global layer. Where a model does not
            pass it but keeps it on the layer (Qwen 2 MoE), it is read there.
        s_aux: (H), a learned score in each head's softmax that has no value: the sinks of Granite SWA and gpt-oss.
        position_ids: (1 or B, T).
        kwargs: those that name packed documents, as positions do (`zebra.model.documents`); others go to the kernels.

    Returns:
        (B, T, H, D), and None in place of the attention weights, which the kernels never form.

    Raises:
        ValueError: a 4-D mask, which would replace the layout of every layer; a layer that is not causal, or whose
            config was changed since it was built; packed documents that contradict each other; `s_aux` of another
            number of heads.
        NotImplementedError: an argument that no kernel knows, attention dropout and weights among them.
    """
    _check_supported(module, attention_mask, kwargs)
    if attention_mask is not None and attention_mask.shape[1] < value.shape[2]:
        # A static cache passes its whole buffer; the mask ends where the real keys end.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    others = {
        name: value
        for name, value in (kwargs | {"dropout": dropout or None}).items()
        if name not in IGNORED_KWARGS and value is not None and value is not False
    }
    window = sliding_window or getattr(module, "sliding_window", None)
    if torch.compiler.is_compiling() and query.device.type == "cpu" and not others and get_override(module) is None:
        query, key, value = autocast(query, key, value)
        gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out, lse = attention(
            query, key, value, attention_mask, position_ids, window, scaling, softcap, gradient or s_aux is not None
        )
    else:
        others |= {"scale": scaling, "softcap": softcap, "with_lse": s_aux is not None}
        out, lse = _attend(module, query, key, value, attention_mask, position_ids, window, others)
    return out if s_aux is None or lse is None else _with_sink(out, lse, s_aux), None


def _check_supported(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f'attention "{NAME}" requires a 2-D attention_mask (batch, tokens) with 1 for real tokens; '
            f"got shape {tuple(attention_mask.shape)}, which would replace the layout of every layer. "
            'To use a custom mask, load with attn_implementation="sdpa".'
        )
    if not arguments.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f'attention "{NAME}" is causal; this layer is not. Load with attn_implementation="sdpa".')
    if arguments.get("output_attentions"):
        raise NotImplementedError(
            'output_attentions is not supported by attention "zebra", whose kernels do not return the weights. '
            'Load with attn_implementation="eager" to inspect them.'
        )


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """The output with learned sink scores s (H) in the softmax, out exp(lse) / (exp(lse) + exp(s)): (B, T, H, D)."""
    if sink.shape != lse.shape[1:2]:
        raise ValueError(f"s_aux must have one score for each of {lse.shape[1]} heads; got shape {tuple(sink.shape)}.")
    share = torch.sigmoid(lse - sink[:, None]).transpose(1, 2).unsqueeze(-1)
    return (out * share).to(out.dtype)


@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Run the layer's override, or `attend`: (B, T, H, D) and (B, H, T).

    arguments: those that name packed documents, and further ones of `attend`.
    """
    _check_layout(module, window)
    packing = {name: arguments.pop(name, None) for name in PACKING_KWARGS}
    batch, queries, past = query.shape[0], query.shape[2], value.shape[2] - query.shape[2]
    documents = documents_of(position_ids, attention_mask, (batch, queries), past=past, **packing)
    mask = Mask(window=window, keys=attention_mask, documents=documents)
    override = get_override(module)
    run = attend if override is None else functools.partial(override.attend, module, position_ids)
    out, lse = run(query, key, value, mask, **arguments)
    return out.transpose(1, 2), lse


def _check_layout(module: nn.Module, window: int | None) -> None:
    """Check that a layer's window is that of the model's config, from which the cache and others read the layout."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    beyond_layer_types = getattr(get_override(module), "beyond_layer_types", False)
    if kinds is None or beyond_layer_types or not getattr(config, "use_sliding_window", True):
        return
    index: Any = getattr(module, "layer_idx", 0)
    expected = getattr(config, "sliding_window", None) if kinds[index] == LOCAL else None
    if window != expected:
        names = {layer: f"a window of {layer}" if layer else "no window" for layer in (window, expected)}
        raise ValueError(
            f"config.sliding_window and layer_types cannot be changed after loading: layer {index} was built with "
            f"{names[window]}; the config now says {names[expected]}. Pass stripes or window to zebra.load."
        )


def zebra_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls once for each kind of layer.

    The keys of these layers are the tokens [kv_offset, kv_offset + kv_length) of the sequence. A static cache may count
    more keys than there are tokens so far; the mask that is returned then ends with the last token.

    Args:
        attention_mask: (B, tokens), or None.

    Returns:
        The 2-D mask of the keys of that kind, (B, at most kv_length), or None where all are real.

    Raises:
        ZebraError: a mask without the cached tokens. Not checked while tracing, when lengths may not be known.
    """
    real = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        if real >= kv_length:
            return None
        return torch.ones(batch_size, real, dtype=torch.bool, device=device)
    traced = torch.compiler.is_compiling()  # whether all keys are real is then known only at run time
    if not traced and (tokens := attention_mask.shape[1]) < kv_offset + real:
        raise ZebraError(
            f"attention_mask must have an entry for each token, including cached ones: {kv_offset + real} here; got "
            f"{tokens}. Pass the mask of the whole sequence, or none if all tokens are real."
        )
    attention_mask = attention_mask[:, kv_offset : kv_offset + min(kv_length, real)].expand(batch_size, -1)
    if attention_mask.shape[1] == kv_length and not traced and bool(attention_mask.all()):
        return None
    return attention_mask


AttentionInterface.register(NAME, zebra_attention)
AttentionMaskInterface.register(NAME, zebra_mask)

"""What a run holds: weights, cache, activations, gradients and AdamW's moments, in closed form.

What autograd keeps of one layer, for each token, in numbers (h hidden, i intermediate, H D queries, K D keys, r rank):

    float32, full          6 h + 2 HD + 2 KD + 4 i + H + 2
    float32, LoRA          5 h + 2 HD + 2 KD + 3 i + H + 2 + 4 r
    bfloat16, full         5 h + 2 HD + 2 KD + 4 i  in bfloat16,   4 h + H + 2  in float32
    bfloat16, LoRA         3 h + 3 HD + 2 KD + 3 i + 4 r           4 h + H + 2

The terms: each norm keeps its input and what it normed (2 h each, in float32) and 1/rms; q, k, v, the output and its
log-sum-exp H; gate, its activation, up and their product (4 i); what each trained map reads (under autocast q, k, v,
gate and up each cast their own copy: 5 h; a frozen map keeps none). Norms of queries and keys keep their input and what
they normed too. A plain MLP keeps 2 i and a LayerNorm has no product to keep. What layers of other kinds keep besides,
their layout says (`Stripes.extra_saved_bytes`).

All bytes; what an allocator wastes is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from zebra.plan.cost import BYTES, Run, low_rank, trained
from zebra.stripes import GLOBAL, LOCAL

CHUNK = 512
"""Tokens whose logits the loss holds at a time, `zebra.model.loss.CHUNK`."""


def cached_tokens(run: Run) -> int:
    """Tokens kept between steps, summed over layers and rows: w - 1 in a local layer, N in any other.

    A local layer has beside them room for its sinks; with full decoding it keeps N. Under Self-Extend a global layer
    keeps N, and the keys alone of the last W - 1 once more: `kv_bytes` counts them.
    """
    window, sinks = (run.stripes.window, run.stripes.sinks) if run.stripes else (1, 0)
    local = run.length if run.full_decode else min(run.length, window - 1) + sinks
    whole = run.decoder.layers - run.count(LOCAL)
    return run.batch * (whole * run.length + run.count(LOCAL) * local)


def kv_bytes(run: Run) -> int:
    """Bytes of keys and values that the cache holds after `length` tokens; none in training."""
    if run.phase == "train":
        return 0
    near = min(run.self_extend.window - 1, run.length) if run.self_extend else 0
    numbers = 2 * cached_tokens(run) + run.batch * run.count(GLOBAL) * near
    return numbers * run.decoder.kv_width * BYTES[run.dtype]


def saved_by_a_layer(run: Run) -> int:
    """Bytes for each token that autograd keeps of one layer, of either kind: the table above."""
    d, r = run.decoder, run.lora or 0
    h, hd, kd = d.hidden, d.query_width, d.kv_width
    i = d.intermediate
    if d.expert_layers:
        share = d.expert_layers / d.layers
        i = round(share * d.experts_per_token * d.expert_intermediate + (1 - share) * i)
    mlp = (4 if d.style.gated else 2) * i - (i if r else 0)
    norms = 2 if d.style.biases != "all" else 0  # a LayerNorm keeps its input alone
    own = bool(d.style.query_norm)
    if run.dtype == "float32":
        inputs = (1 if r else 2) * h
        numbers = (2 + norms) * h + inputs + 2 * (hd + kd) + mlp + 4 * r
        return 4 * (numbers + d.heads + 2 + own * (2 * (hd + kd) + d.heads + d.kv_heads))
    inputs = (3 if r else 3 + d.maps - 1) * h
    half = inputs + 2 * (hd + kd) + mlp + (hd + 4 * r if r else 0) + own * (hd + kd)
    return 2 * half + 4 * ((2 + norms) * h + d.heads + 2 + own * (hd + kd + d.heads + d.kv_heads))


def _extra_saved(run: Run) -> dict[str, int]:
    """Bytes beyond those of `saved_by_a_layer` that autograd keeps of one layer, for each kind of layer."""
    d, stripes = run.decoder, run.stripes
    sizes = {"heads": d.heads, "query_width": d.query_width, "kv_width": d.kv_width}
    half = run.dtype == "bfloat16"
    return {
        kind: run.batch * stripes.extra_saved_bytes(kind, run.length, half=half, **sizes) if stripes else 0
        for kind in {*d.kinds(stripes)}
    }


def memory(run: Run) -> dict[str, int]:
    """Bytes by part on one device."""
    return _training(run) if run.phase == "train" else _inference(run)


def _training(run: Run) -> dict[str, int]:
    d = run.decoder
    learns, half = trained(run), run.dtype == "bfloat16"
    layer, extra = run.tokens * saved_by_a_layer(run), _extra_saved(run)
    held = 4 * d.size if not run.lora else BYTES[run.dtype] * d.size + 4 * learns
    cast = 0
    if half:
        parts = d.parameters()
        cast = 2 * (low_rank(run) + (0 if run.lora else parts["projections"] + parts["MLP"]))
    found = {"weights": held, "gradients": 4 * learns, "AdamW": 8 * learns} | activation_memory(
        [layer + extra[kind] for kind in d.kinds(run.stripes)],
        layer_input=4 * run.tokens * d.hidden,  # the residual stream is float32
        weights_cast=cast,
        vocab_size=d.vocabulary,
        checkpointing=run.checkpointing,
    )
    return found | ({"head cast to float32": 4 * d.vocabulary * d.hidden} if half and run.lora and not d.tied else {})


def activation_memory(
    layers: Sequence[int], *, layer_input: int, weights_cast: int, vocab_size: int, checkpointing: bool
) -> dict[str, int]:
    """Bytes that autograd saves in one forward pass, by part.

    Args:
        layers: bytes saved by each layer.
        layer_input: bytes of the residual stream. Activation checkpointing saves it for each layer, and runs one layer
            at a time again.
        weights_cast: bytes of the bfloat16 copies that autocast makes of float32 weights.
    """
    if checkpointing:
        parts = {"layer inputs": len(layers) * layer_input, "one layer, run again": max(layers)}
    else:
        parts = {"activations": sum(layers)}
    if weights_cast:
        parts["weights cast to bfloat16"] = weights_cast
    return parts | {"a chunk of logits": 2 * 4 * CHUNK * vocab_size}


def _inference(run: Run) -> dict[str, int]:
    """Weights, the cache, and what one layer works on: the residual and the wider of attention and MLP."""
    d, size = run.decoder, BYTES[run.dtype]
    wide = max(d.intermediate, d.experts_per_token * d.expert_intermediate)
    rounds = 2 if run.self_extend else 1  # queries and keys once more, rotated for the far part
    working = 2 * d.hidden + max(rounds * (d.query_width + d.kv_width) + d.query_width + d.kv_width, d.maps * wide)
    return {
        "weights": size * d.size,
        "keys and values": kv_bytes(run),
        "one layer's work": size * run.tokens * working,
        "logits": 4 * run.batch * d.vocabulary,
    }

"""The memory of a run in bytes, by formulas: weights, KV cache, activations, gradients and AdamW's moments.

Values that autograd saves per token in one layer (h hidden, i intermediate, HD queries, KD keys, H heads, r rank):

    float32, full          6 h + 2 HD + 2 KD + 4 i + H + 2
    float32, LoRA          5 h + 2 HD + 2 KD + 3 i + H + 2 + 4 r
    bfloat16, full         5 h + 2 HD + 2 KD + 4 i  in bfloat16,   4 h + H + 2  in float32
    bfloat16, LoRA         3 h + 3 HD + 2 KD + 3 i + 4 r           4 h + H + 2

The terms: each norm saves its input, the normalised input (2 h, in float32) and 1/rms; attention saves q, k, v, the
output and its log-sum-exp (H); the MLP saves gate, its activation, up and their product (4 i); each trained linear map
saves its input (under autocast q, k, v, gate and up each cast a copy of their own: 5 h), a frozen one does not. Norms
of queries and keys also save their input and the normalised input. An MLP without a gate saves 2 i, and a LayerNorm
only its input. `Stripes.extra_saved_bytes` adds what layers of other kinds save. Fragmentation is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from zebra.plan.cost import BYTES, Run, lora_parameters, trained_parameters
from zebra.stripes import GLOBAL, LOCAL

CHUNK = 512
"""Tokens whose logits the loss holds at once, `zebra.model.loss.CHUNK`."""


def cached_tokens(run: Run) -> int:
    """Tokens in the cache, summed over layers and sequences: w - 1 in a local layer, N in any other.

    A local layer also keeps its sinks; with full decoding it keeps N. Under Self-Extend a global layer also keeps a
    second copy of the last W - 1 keys, which only `kv_bytes` counts.
    """
    local = run.length if run.full_decode else _local_tokens(run)
    whole = run.decoder.layers - run.count(LOCAL)
    return run.batch * (whole * run.length + run.count(LOCAL) * local)


def _local_tokens(run: Run) -> int:
    """Tokens of one sequence that a local layer keeps; 0 without stripes."""
    return 0 if run.stripes is None else min(run.length, run.stripes.window - 1) + run.stripes.sinks


def _near_tokens(run: Run) -> int:
    """Tokens whose keys a global layer keeps twice under Self-Extend; 0 without it."""
    return 0 if run.self_extend is None else min(run.length, run.self_extend.window - 1)


def kv_bytes(run: Run) -> int:
    """Bytes of the KV cache after `length` tokens; 0 in training."""
    if run.phase == "train":
        return 0
    numbers = 2 * cached_tokens(run) + run.batch * run.count(GLOBAL) * _near_tokens(run)
    return numbers * run.decoder.kv_width * BYTES[run.dtype]


def snapshot_bytes(run: Run) -> int:
    """Bytes of a snapshot that brings a longer cache back to `length` tokens: local layers and Self-Extend's near keys.

    0 where all of these hold the whole text.
    """
    local = 0 if run.full_decode else run.count(LOCAL)
    windows = []
    if run.stripes and local:
        windows.append(run.stripes.window)
    if run.self_extend:
        windows.append(run.self_extend.window)
    if all(window > run.length for window in windows):
        return 0
    numbers = 2 * local * _local_tokens(run) + run.count(GLOBAL) * _near_tokens(run)
    return run.batch * numbers * run.decoder.kv_width * BYTES[run.dtype]


def saved_bytes_per_token(run: Run) -> int:
    """Bytes that autograd saves per token in one global or local layer, by the table of this module."""
    d, r = run.decoder, run.lora or 0
    h, hd, kd = d.hidden_size, d.query_width, d.kv_width
    i = d.intermediate_size
    if d.expert_layers:
        share = d.expert_layers / d.layers
        i = round(share * d.active_expert_width + (1 - share) * i)
    mlp = (4 if d.traits.gated else 2) * i - (i if r else 0)
    norms = 2 if d.traits.biases != "all" else 0  # a LayerNorm saves its input alone
    query_norm = bool(d.traits.query_norm)
    if run.dtype == "float32":
        inputs = (1 if r else 2) * h
        numbers = (2 + norms) * h + inputs + 2 * (hd + kd) + mlp + 4 * r
        return 4 * (numbers + d.heads + 2 + query_norm * (2 * (hd + kd) + d.heads + d.kv_heads))
    inputs = (3 if r else 3 + d.mlp_matrices - 1) * h
    half = inputs + 2 * (hd + kd) + mlp + (hd + 4 * r if r else 0) + query_norm * (hd + kd)
    return 2 * half + 4 * ((2 + norms) * h + d.heads + 2 + query_norm * (hd + kd + d.heads + d.kv_heads))


def memory(run: Run) -> dict[str, int]:
    """Bytes by part on one device.

    Outside training: weights, the KV cache, one layer's tensors (the residual stream, and attention or MLP, whichever
    is larger) and the logits. In decode the first decoded token reserves room for a quarter more tokens in the cache.
    """
    if run.phase == "train":
        return _training(run)
    d, size = run.decoder, BYTES[run.dtype]
    mlp = d.mlp_matrices * max(d.intermediate_size, d.active_expert_width)
    copies = 3 if run.self_extend else 2  # of queries and keys: before and after rotation, and rotated for the far part
    working = 2 * d.hidden_size + max(copies * (d.query_width + d.kv_width), mlp)
    return {
        "weights": size * d.num_parameters + round(((d.linear_bytes or size) - size) * d.linear_parameters),
        "keys and values": kv_bytes(run),
        **({"room for new tokens": kv_bytes(run) // 4} if run.phase == "decode" else {}),
        "one layer's work": size * run.tokens * working,
        "logits": 4 * run.batch * d.vocab_size,
    }


def _training(run: Run) -> dict[str, int]:
    d, stripes = run.decoder, run.stripes
    trained, half = trained_parameters(run), run.dtype == "bfloat16"
    kinds, sizes = d.kinds(stripes), {"heads": d.heads, "query_width": d.query_width, "kv_width": d.kv_width}
    saved = dict.fromkeys(kinds, run.tokens * saved_bytes_per_token(run))
    if stripes:
        for kind in saved:
            saved[kind] += run.batch * stripes.extra_saved_bytes(kind, run.length, half=half, **sizes)
    weights = 4 * d.num_parameters if not run.lora else BYTES[run.dtype] * d.num_parameters + 4 * trained
    by_part = d.parameters_by_part()
    cast = lora_parameters(run) if run.lora else by_part["projections"] + by_part["MLP"]
    parts = {"weights": weights, "gradients": 4 * trained, "AdamW": 8 * trained} | activation_memory(
        [saved[kind] for kind in kinds],
        layer_input=4 * run.tokens * d.hidden_size,  # the residual stream is float32
        weights_cast=2 * cast if half else 0,
        vocab_size=d.vocab_size,
        checkpointing=run.checkpointing,
    )
    if half and run.lora and not d.tied:
        parts["head cast to float32"] = 4 * d.vocab_size * d.hidden_size
    return parts


def activation_memory(
    layers: Sequence[int], *, layer_input: int, weights_cast: int, vocab_size: int, checkpointing: bool
) -> dict[str, int]:
    """Bytes that autograd saves in one forward pass, by part.

    Args:
        layers: bytes saved by each layer.
        layer_input: bytes of the residual stream. Activation checkpointing saves it for each layer, and recomputes one
            layer at a time.
        weights_cast: bytes of the bfloat16 copies that autocast makes of float32 weights.
    """
    if checkpointing:
        parts = {"layer inputs": len(layers) * layer_input, "one layer, run again": max(layers)}
    else:
        parts = {"activations": sum(layers)}
    if weights_cast:
        parts["weights cast to bfloat16"] = weights_cast
    return parts | {"a chunk of logits": 2 * 4 * CHUNK * vocab_size}

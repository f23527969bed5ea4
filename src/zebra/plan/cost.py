"""What a run computes and moves: pairs, FLOPs and bytes by part, by formulas.

    pairs       sum over layers of the mask's visible pairs: N (N + 1) / 2 global, w (w + 1) / 2 + (N - w) w local
    linear      2 FLOPs for each weight and token
    attention   4 D FLOPs for each head and pair: 2 D for the score, 2 D for the value

A training step costs three forward passes in linear maps (two where LoRA freezes the weight) and 7/2 in attention,
whose backward pass computes the scores again. Activation checkpointing adds a forward pass of the layers.

Bytes are the least that must move: weights once per pass, the inputs and outputs of each linear map and of attention
(never the scores), and in decode the KV cache. Elementwise operations count as transformers runs them: two norms of
7 h, two sums of 3 h, rotation 10 (HD + KD), the activation 5 i (3 i without a gate), and two passes over the logits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from zebra.errors import ZebraError
from zebra.plan.decoder import LARGEST, Decoder
from zebra.positions import SelfExtend, check_rotatable_rope, no_global_layer
from zebra.stripes import GLOBAL, LOCAL, Stripes, visible_pairs

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PHASES = ("train", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run whose cost is estimated: one prefill, one decoded token per sequence, or one training step.

    Attributes:
        stripes: the layout; None for full attention.
        length: tokens of a sequence in training and prefill; in decode the tokens before the decoded one.
        batch: sequences in a batch.
        dtype: of weights and activations; in training bfloat16 is autocast over float32 weights, as in `zebra adapt`.
        lora: the rank for q, k, v and o. Embeddings and norms are trained in full; frozen weights are in `dtype`.
        self_extend: the setting of the global layers.
        full_decode: local layers keep all tokens, and decoded tokens see them.
        past: earlier tokens of the sequence, whose keys come from other devices; not used in decode.

    Raises:
        ZebraError: an unknown dtype or phase, a number below 1, a layout with a layer beyond the model, training
            options outside training, float16 or Self-Extend in training, Self-Extend that does not reach the length
            or does not suit the model.
    """

    decoder: Decoder
    stripes: Stripes | None
    length: int
    batch: int = 1
    dtype: str = "bfloat16"
    phase: str = "prefill"
    checkpointing: bool = False
    lora: int | None = None
    self_extend: SelfExtend | None = None
    full_decode: bool = False
    past: int = 0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ZebraError(f"a phase must be one of {', '.join(PHASES)}; got {self.phase!r}. Choose one of them.")
        training = self.phase == "train"
        allowed = ("float32", "bfloat16") if training else tuple(BYTES)
        if self.dtype not in allowed:
            names = ", ".join(allowed)
            raise ZebraError(f"the dtype in {self.phase} must be one of {names}; got {self.dtype!r}. Choose one.")
        for name, value in (("length", self.length), ("batch", self.batch), ("LoRA rank", self.lora)):
            if value is not None and not 1 <= value <= LARGEST:
                raise ZebraError(f"the {name} must be from 1 to 10^12; got {str(value)[:20]}. Change it.")
        if not training and (self.checkpointing or self.lora):
            raise ZebraError(f"checkpointing and LoRA require the phase train; got {self.phase}. Leave them out.")
        self.decoder.kinds(self.stripes)  # raises for a layer beyond the model
        if self.self_extend is not None:
            _check_self_extend(self, self.self_extend)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in one pass."""
        return self.batch * (1 if self.phase == "decode" else self.length)

    def count(self, kind: str) -> int:
        """The number of layers of a kind."""
        return self.decoder.kinds(self.stripes).count(kind)

    @property
    def others(self) -> int:
        """The number of layers of other kinds than global and local: they read the window and, separately, all keys."""
        return self.decoder.layers - self.count(GLOBAL) - self.count(LOCAL)


def _check_self_extend(run: Run, setting: SelfExtend) -> None:
    if run.phase == "train":
        raise ZebraError("Self-Extend does not support the phase train. Choose the phase prefill or decode.")
    trained, length = run.decoder.trained_length, run.length + (run.phase == "decode")
    check_rotatable_rope(run.decoder.family, run.decoder.rope)
    if not run.count(GLOBAL) or "G" not in run.decoder.traits.rotated:
        raise no_global_layer(run.decoder.family)
    setting.check(trained)
    setting.check_sinks(run.stripes.sinks if run.stripes else 0)
    if length > (reach := setting.reach(trained)):
        raise ZebraError(
            f"Self-Extend {setting} extends a model trained at {trained:,} tokens to {reach:,}; got {length:,}. "
            f"Raise the group, use auto:{length}, or lower the length."
        )


def pairs_by_kind(run: Run) -> dict[str, int]:
    """Visible (query, key) pairs by kind of layer, summed over layers and sequences, for one head.

    Self-Extend does not change them: the near band of W keys and the far causal part of N - W have N (N + 1) / 2 pairs.
    """
    past, new = (run.length, 1) if run.phase == "decode" else (run.past, run.length)
    counts = {GLOBAL: 0, LOCAL: 0} | Counter(run.decoder.kinds(run.stripes))

    def visible(kind: str) -> int:
        if run.stripes is None or (kind == LOCAL and run.full_decode and run.phase == "decode"):
            return visible_pairs(past + new) - visible_pairs(past)
        return run.stripes.pairs(kind, past + new) - run.stripes.pairs(kind, past)

    return {kind: run.batch * count * visible(kind) for kind, count in counts.items()}


def pairs(run: Run) -> int:
    """Visible (query, key) pairs, summed over layers and sequences, for one head."""
    return sum(pairs_by_kind(run).values())


def forward_flops(run: Run) -> dict[str, int]:
    """FLOPs of one forward pass by part. Outside training the head runs only on the last token of each sequence."""
    d, tokens = run.decoder, run.tokens
    heads = tokens if run.phase == "train" else run.batch
    dense = (d.layers - d.expert_layers) * d.mlp_matrices * d.hidden_size * d.intermediate_size
    gates = d.experts + (d.shared_expert_intermediate_size > 0)
    routed = d.hidden_size * (d.mlp_matrices * d.active_expert_width + gates)
    return {
        "projections": 2 * tokens * d.layers * d.hidden_size * 2 * (d.query_width + d.kv_width),
        "attention": 4 * d.head_dim * d.heads * pairs(run),
        "MLP": 2 * tokens * (dense + d.expert_layers * routed),
        "head": 2 * heads * d.hidden_size * d.vocab_size,
    }


def flops(run: Run) -> dict[str, int]:
    """FLOPs by part of a prefill, of one decoded token for each sequence, or of a training step of one batch."""
    forward = forward_flops(run)
    if run.phase != "train":
        return forward
    again, linear = int(run.checkpointing), 2 if run.lora else 3
    step = {
        "projections": (linear + again) * forward["projections"],
        "attention": (7 + 2 * again) * forward["attention"] // 2,
        "MLP": (linear + again) * forward["MLP"],
        "head": (3 if run.decoder.tied else linear) * forward["head"],
    }
    if run.lora:
        step["projections"] += (3 + again) * 2 * run.tokens * lora_parameters(run)
    return step


def lora_parameters(run: Run) -> int:
    """Parameters of the low-rank updates: r (in + out) for each of q, k, v and o, in all layers."""
    d = run.decoder
    return (run.lora or 0) * d.layers * (4 * d.hidden_size + 2 * d.query_width + 2 * d.kv_width)


def bytes_moved(run: Run) -> dict[str, int]:
    """The least bytes that must move, by part. In training each pass moves them again, and AdamW its states."""
    d, tokens, size = run.decoder, run.tokens, BYTES[run.dtype]
    passes = 3 + run.checkpointing if run.phase == "train" else 1
    # A quantised weight counts as a fraction of an unquantised one.
    share = (d.linear_bytes or size) / size
    weights = {part: count * share for part, count in d.parameters_by_part().items()}
    h, hd, kd, i = d.hidden_size, d.query_width, d.kv_width, d.intermediate_size
    active = d.expert_layers * d.active_expert_width + (d.layers - d.expert_layers) * i
    if d.expert_layers:  # few tokens use few experts
        used = min(1.0, tokens * d.experts_per_token / d.experts)
        routed = d.expert_layers * d.experts * d.mlp_matrices * h * d.expert_intermediate_size
        weights["MLP"] -= int((1 - used) * routed) * share
    # In prefill the near and the far part each read queries, keys and values; in decode each reads only its own keys.
    rounds = d.layers + (run.count(GLOBAL) if run.self_extend and run.phase == "prefill" else 0) + run.others
    head = tokens if run.phase == "train" else run.batch
    numbers = {
        "projections": weights["projections"] + d.layers * tokens * (2 * h + 2 * hd + 2 * kd),
        "attention": rounds * tokens * (2 * hd + 2 * kd) + 2 * kd * _cached_reads(run),
        "MLP": weights["MLP"] + tokens * (d.layers * 2 * h + 2 * (d.mlp_matrices - 1) * active),
        "head": d.vocab_size * h + head * (h + d.vocab_size),
        "elementwise": tokens * (d.layers * (20 * h + 10 * (hd + kd)) + (2 * d.mlp_matrices - 1) * active)
        + 2 * head * d.vocab_size,
    }
    moved = {part: int(passes * size * count) for part, count in numbers.items()}
    if run.phase == "train":
        moved["AdamW"] = 28 * trained_parameters(run)  # reads weight, gradient, moments; writes all but the gradient
    return moved


def _cached_reads(run: Run) -> int:
    """Cached tokens that a decode step reads, summed over layers and sequences."""
    if run.phase != "decode":
        return 0
    visible = pairs_by_kind(run)
    own = run.batch * (run.decoder.layers - run.others)  # the token's own key is not read from the cache
    return visible[GLOBAL] + visible[LOCAL] - own + run.batch * run.others * run.length


def trained_parameters(run: Run) -> int:
    """Parameters that are trained: all, or with LoRA the updates, the embeddings and the norms."""
    if not run.lora:
        return run.decoder.num_parameters
    parts = run.decoder.parameters_by_part()
    return lora_parameters(run) + parts["embedding"] + parts["norms"]

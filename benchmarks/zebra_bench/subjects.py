"""What can be measured: each subject's sizes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from zebra.errors import ZebraError
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

DTYPES = ("float32", "bfloat16")
RUN = "bench"
"""The results' run."""
FAST = ", fast float32"
"""Behind the names of what ran under torch's float32 matmul precision `medium`."""

WORKS = ("attention", "authors", "decode", "chunks")
"""What is measured of Self-Extend."""


def _size(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every subject can be told.

    Raises:
        ZebraError: a size below 1, another dtype, heads that no query group fits, a layout that is none.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    module: ClassVar[str]

    repeats: int = _size(5, "Timed turns; the median is taken.")
    seed: int = _size(0, "Seed of the random numbers.")
    device: str | None = _size(None, "Where to run; a GPU where there is one.")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is int and one.name != "seed" and value < 1:
                raise ZebraError(
                    f"--{one.name.replace('_', '-')} is a whole number of at least 1; got {value}. Raise it."
                )
        if not 0 <= self.seed < 2**63:
            raise ZebraError(f"--seed is a whole number from 0 to 2^63; got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class Paired(Sizes):
    """What every subject with variants can be told besides."""

    dtype: str = _size("float32", "float32 or bfloat16; of a training step, autocast over float32 weights.")
    batch: int = _size(1, "Rows at a time.")
    matmul_precision: str = _size("highest", "torch.set_float32_matmul_precision: highest or medium.")
    ceilings: str | None = _size(None, "A file of ceilings; measured first otherwise.")
    memory: bool = _size(True, "Peak memory too, from a fresh process for each variant.")

    def __post_init__(self) -> None:
        if hasattr(self, "kv_heads") and self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)  # type: ignore[attr-defined]
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ZebraError(f"--dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}. Choose one.")
        heads, kv_heads = getattr(self, "heads", 1), getattr(self, "kv_heads", 1)
        if heads % kv_heads:
            raise ZebraError(f"--heads is a multiple of --kv-heads; got {heads} and {kv_heads}.")
        if getattr(self, "head_size", 2) % 2:
            raise ZebraError(f"--head-size is even, as a rope turns pairs; got {getattr(self, 'head_size', 0)}.")
        if getattr(self, "words", 4) < 4 or (self.name == "loss" and getattr(self, "length", 2) < 2):
            raise ZebraError(
                "there are at least 4 --words, and a loss predicts from 2 tokens of --length on. Raise them."
            )
        if hasattr(self, "stripes"):
            stripes = Stripes.parse(self.stripes)
            stripes.layer_types(getattr(self, "layers", 1))
            if stripes.sinks:
                raise ZebraError(f"benches run the host's classes, which have no sinks; got {stripes}. Drop them.")


@dataclass(frozen=True, kw_only=True)
class Attention(Paired):
    """One layer's attention."""

    name = "attention"
    about = "One layer's attention, forward and forward + backward: our kernels against sdpa, eager, flex, flash-attn."
    module = "zebra_bench.attention"

    length: int = _size(16384, "Tokens.")
    window: int = _size(512, "Keys that a query sees, its own included.")
    heads: int = _size(12, "Query heads.")
    kv_heads: int = _size(None, "Key-value heads; as many as query heads otherwise.")
    head_size: int = _size(64, "Numbers of a head.")


@dataclass(frozen=True, kw_only=True)
class Layer(Paired):
    """One decoder layer."""

    name = "layer"
    about = 'One local decoder layer of the host under attention "zebra", sdpa, eager and flex.'
    module = "zebra_bench.layer"

    length: int = _size(8192, "Tokens.")
    window: int = _size(512, "Keys that a query sees, its own included.")
    heads: int = _size(8, "Query heads.")
    kv_heads: int = _size(None, "Key-value heads; as many as query heads otherwise.")
    head_size: int = _size(64, "Numbers of a head; heads times this is the hidden size.")
    intermediate: int = _size(1536, "Width of the MLP.")


@dataclass(frozen=True, kw_only=True)
class TrainStep(Paired):
    """A training step of a whole model."""

    name = "train-step"
    about = "A step of training a random model: forward, loss, backward, fused AdamW; ours against the host's default."
    module = "zebra_bench.training"

    length: int = _size(8192, "Tokens of a row.")
    stripes: str = _size("GLLL:512", "The layout.")
    layers: int = _size(8, "Layers.")
    heads: int = _size(6, "Query heads.")
    kv_heads: int = _size(None, "Key-value heads; as many as query heads otherwise.")
    head_size: int = _size(64, "Numbers of a head; heads times this is the hidden size.")
    intermediate: int = _size(1024, "Width of the MLP.")
    words: int = _size(16000, "Vocabulary; embedding and head are one.")


@dataclass(frozen=True, kw_only=True)
class _Generation(Paired):
    length: int = _size(8192, "Tokens of the text.")
    stripes: str = _size("GLLL:512", "The layout.")
    layers: int = _size(8, "Layers.")
    heads: int = _size(8, "Query heads.")
    kv_heads: int = _size(None, "Key-value heads; as many as query heads otherwise.")
    head_size: int = _size(64, "Numbers of a head; heads times this is the hidden size.")
    intermediate: int = _size(1536, "Width of the MLP.")
    words: int = _size(32000, "Vocabulary; embedding and head are one.")


@dataclass(frozen=True, kw_only=True)
class Prefill(_Generation):
    """A text read into a cache."""

    name = "prefill"
    about = "A text read into the cache: ours against the host's, striped and dense."
    module = "zebra_bench.generation"


@dataclass(frozen=True, kw_only=True)
class Decode(_Generation):
    """One token after a text."""

    name = "decode"
    about = "One token after a cached text: our cache and attention against the host's, striped and dense."
    module = "zebra_bench.generation"

    length: int = _size(32768, "Tokens in the cache.")


@dataclass(frozen=True, kw_only=True)
class Loss(Paired):
    """The head and the loss."""

    name = "loss"
    about = "Head and loss, forward + backward: ours against full logits."
    module = "zebra_bench.loss"

    length: int = _size(16384, "Tokens.")
    hidden: int = _size(512, "Hidden size.")
    words: int = _size(32000, "Vocabulary.")


@dataclass(frozen=True, kw_only=True)
class Extended(Paired):
    """Self-Extend beside none.

    Raises:
        ZebraError: a setting that is none, a text within its window, another work, memory alone without memory.
    """

    name = "self-extend"
    about = "Self-Extend against plain causal attention: a layer's prefill and decode, a model's decode, peak memory."
    module = "zebra_bench.self_extend"

    work: str | None = _size(
        None,
        "Only one of attention, decode, chunks (memory alone), and authors (a prefill their way too, minutes a turn).",
    )
    self_extend: str = _size("8:1024", "Group and window.")
    length: int = _size(16384, "Tokens of the text.")
    chunk: int = _size(2048, "Tokens at a time of the text read in chunks.")
    layers: int = _size(8, "Layers.")
    heads: int = _size(8, "Query heads.")
    kv_heads: int = _size(None, "Key-value heads; as many as query heads otherwise.")
    head_size: int = _size(64, "Numbers of a head; heads times this is the hidden size.")
    intermediate: int = _size(1536, "Width of the MLP.")
    words: int = _size(32000, "Vocabulary; embedding and head are one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        window = SelfExtend.parse(self.self_extend).window
        if self.length <= window:
            raise ZebraError(f"Self-Extend acts beyond its window of {window:,} tokens; got --length {self.length:,}.")
        if self.work not in (None, *WORKS):
            raise ZebraError(f"--work is one of {', '.join(WORKS)}; got {self.work!r}. Choose one, or leave it out.")
        if self.work == "chunks" and not self.memory:
            raise ZebraError("--work chunks measures memory alone; got --no-memory. Drop one of them.")


SUBJECTS: dict[str, type[Paired]] = {
    subject.name: subject for subject in (Attention, Layer, TrainStep, Prefill, Decode, Extended, Loss)
}

"""The sizes of each benchmark. Each class names the module whose `benchmark` function makes its variants."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from zebra.errors import ZebraError
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

RUN = "bench"
"""The run of the results."""
FAST = ", fast float32"
"""Follows the names of what ran under torch's float32 matmul precision `medium`."""
SMOLLM2_STRIPES = "7,13,14,15,16,17,18,19,20,21,22,23,24,25,26:1024"
SMOLLM2_STRIPES_WITH_SINKS = "6,7,8,17,18,20,23,24:1024+4"
"""What `zebra select` chose for SmolLM2-135M-Instruct (docs/results/smollm2.md)."""

SELF_EXTEND_WORKLOADS = ("attention", "authors", "decode", "chunks")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What every benchmark takes.

    Attributes:
        repeats: timed turns, whose median counts.
        device: a GPU where there is one if None.
        dtype: float32 or bfloat16; in a training step bfloat16 is autocast over float32 weights.
        matmul_precision: torch's float32 matmul precision, highest or medium.
        ceilings: a file of ceilings; measured if None.
        memory: measure peak memory too, each variant in a fresh process.

    Raises:
        ZebraError: a size below 1, another dtype.
    """

    module: ClassVar[str]

    repeats: int = 5
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    matmul_precision: str = "highest"
    batch_size: int = 1
    ceilings: str | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        sizes = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, value in sizes.items():
            if type(value) is int and name not in ("seed", "key_value_heads") and value < 1:
                raise ZebraError(f"{name} is a whole number of at least 1; got {value}. Raise it.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ZebraError(f"dtype is float32 or bfloat16; got {self.dtype!r}. Choose one.")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(BenchmarkConfig):
    """Attention heads.

    Attributes:
        key_value_heads: as many as heads if 0.

    Raises:
        ZebraError: heads that are no multiple of key-value heads, an odd head dimension.
    """

    heads: int = 8
    key_value_heads: int = 0
    head_dim: int = 64

    @property
    def kv_heads(self) -> int:
        """The number of key-value heads."""
        return self.key_value_heads or self.heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ZebraError(f"heads is a multiple of key_value_heads; got {self.heads} and {self.kv_heads}.")
        if self.head_dim % 2:
            raise ZebraError(f"head_dim is even, as a rope rotates pairs; got {self.head_dim}.")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadsConfig):
    """Attention of one local layer."""

    module = "zebra_bench.attention"

    length: int = 16384
    window: int = 512
    heads: int = 12


@dataclass(frozen=True, kw_only=True)
class ModelConfig(HeadsConfig):
    """A random Llama; its hidden size is heads * head_dim, and embedding and head share their weights."""

    length: int = 8192
    layers: int = 8
    intermediate_size: int = 1536
    vocab_size: int = 32000


@dataclass(frozen=True, kw_only=True)
class StripedConfig(ModelConfig):
    """A model in a layout.

    Raises:
        ZebraError: an invalid layout, or one with sinks, which the classes of transformers do not have.
    """

    stripes: str = "GLLL:512"

    def __post_init__(self) -> None:
        super().__post_init__()
        stripes = Stripes.parse(self.stripes)
        stripes.layer_types(self.layers)
        if stripes.sinks:
            raise ZebraError(f"benchmarks run the classes of transformers, which have no sinks; got {stripes}.")


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig(StripedConfig):
    """A training step: forward, loss, backward, fused AdamW."""

    module = "zebra_bench.train_step"

    heads: int = 6
    intermediate_size: int = 1024
    vocab_size: int = 16000


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(StripedConfig):
    """One token after a cached text of `length` tokens."""

    module = "zebra_bench.generation"

    length: int = 32768


@dataclass(frozen=True, kw_only=True)
class LossConfig(BenchmarkConfig):
    """The head and the loss."""

    module = "zebra_bench.loss"

    length: int = 16384
    hidden_size: int = 512
    vocab_size: int = 32000


@dataclass(frozen=True, kw_only=True)
class SelfExtendConfig(ModelConfig):
    """Self-Extend compared with plain causal attention.

    Attributes:
        workload: one of SELF_EXTEND_WORKLOADS, or all but the authors' (minutes a turn) if None.
        self_extend: group and window.
        chunk: tokens of each chunk of a text that is read in chunks.

    Raises:
        ZebraError: another workload, an invalid setting, a text within its window.
    """

    module = "zebra_bench.self_extend"

    workload: str | None = None
    self_extend: str = "8:1024"
    length: int = 16384
    chunk: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        window = SelfExtend.parse(self.self_extend).window
        if self.length <= window:
            raise ZebraError(f"Self-Extend acts beyond its window of {window:,} tokens; got a length of {self.length}.")
        if self.workload not in (None, *SELF_EXTEND_WORKLOADS):
            raise ZebraError(f"workload is one of {', '.join(SELF_EXTEND_WORKLOADS)}; got {self.workload!r}.")

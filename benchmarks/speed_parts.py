"""What benchmarks/speed_smollm2.py measures, the most important first."""

from __future__ import annotations

from dataclasses import dataclass

from zebra_bench.smollm2 import Case

TRAINED = ("full", "GL:1024", "GLLL:1024")
READ = (*TRAINED, "Self-Extend")


@dataclass(frozen=True)
class Part:
    """Cases that take turns, and the transformers' implementations and llama.cpp among them."""

    phase: str
    length: int
    dtype: str
    ways: tuple[str, ...]
    peers: tuple[str, ...] = ()
    memory: bool = False

    @property
    def name(self) -> str:
        """Of its results."""
        kind = "memory-" if self.memory else "peers-" if self.peers else ""
        return f"{kind}{self.phase}-{self.length}-{self.dtype}"

    @property
    def cases(self) -> list[Case]:
        """Ours, then those of transformers."""
        own = [Case(self.phase, self.length, way, self.dtype) for way in self.ways]
        others = [one for one in self.peers if one != LLAMA]
        return own + [Case(self.phase, self.length, "full", self.dtype, one) for one in others]


LLAMA = "llama.cpp"
_BF16, _F32 = "bfloat16", "float32"
PARTS = (
    Part("prefill", 8192, _BF16, READ),
    Part("decode", 8192, _BF16, READ),
    Part("decode", 32768, _BF16, READ),
    Part("prefill", 16384, _BF16, READ),
    Part("prefill", 8192, _BF16, ("full", "GL:1024"), ("sdpa", LLAMA)),
    Part("lora-step", 8192, _BF16, ("full", "GL:1024")),
    Part("prefill", 8192, _F32, READ),
    Part("decode", 8192, _BF16, ("full",), ("sdpa", LLAMA)),
    Part("prefill", 2048, _BF16, READ),
    Part("decode", 1024, _BF16, READ),
    Part("prefill", 2048, _BF16, ("full", "GL:1024"), ("sdpa", "eager", LLAMA)),
    Part("decode", 8192, _F32, READ),
    Part("decode", 32768, _F32, READ),
    Part("step", 8192, _BF16, ("full", "GL:1024"), ("sdpa",)),
    Part("step", 8192, _F32, TRAINED),
    Part("lora-step", 8192, _F32, ("full", "GL:1024")),
    Part("prefill", 16384, _BF16, ("GL:1024",), ("sdpa",)),
    Part("prefill", 2048, _F32, READ),
    Part("decode", 1024, _F32, READ),
    Part("prefill", 16384, _F32, READ),
    Part("prefill", 32768, _BF16, READ),
    Part("prefill", 32768, _F32, ("full", "GL:1024")),
    Part("prefill", 32768, _BF16, ("full", "GL:1024"), memory=True),
    Part("lora-step", 8192, _BF16, ("GL:1024",), memory=True),
    Part("step", 8192, _BF16, (), ("sdpa",), memory=True),
)
"""The most important first."""

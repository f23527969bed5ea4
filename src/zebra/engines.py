"""The table of other engines: how each runs checkpoints with stripes, by the stock `model_type` that has the stripes.

All entries were tested, with the versions in docs/results/engines.md.
"""

from __future__ import annotations

from typing import NamedTuple

TARGETS = ("gguf", "mlx", "vllm", "sglang")
"""The values of `zebra export --to`."""
EXACT, FLAG, REFUSES = "exact", "exact with a flag", "refuses"


class Support(NamedTuple):
    """How an engine runs a family with stripes.

    Attributes:
        verdict: `EXACT`, `FLAG` or `REFUSES`.
        reason: the reason of the verdict, or its condition.
        flag: the command-line option that makes the engine exact.
        silent: whether the engine computes wrong results without an error: without the flag, or, for MLX, on a folder
            of `zebra convert`.
    """

    verdict: str
    reason: str = ""
    flag: str = ""
    silent: bool = False


_BY_TRANSFORMERS = "--model-impl transformers"
_ONE_EXPERT = "as mellum; a dense layer is one expert"
_PERIOD = "the last layer of each period global (LG, LLLG)"
_NO_MLX = "no class has its tensors and windows by layer"
_FULL_IN_MLX = Support(REFUSES, _NO_MLX + "; full attention on a folder of `zebra convert`", silent=True)

ENGINES: dict[str, dict[str, Support]] = {
    "cwm": {
        "llama.cpp": Support(EXACT, "as granite_swa"),
        "MLX": Support(EXACT, "as llama"),
        "vLLM": Support(EXACT),
    },
    "smollm3": {
        "llama.cpp": Support(EXACT, "as granite_swa"),
        "MLX": Support(EXACT),
        "vLLM": Support(EXACT),
    },
    "ministral": {
        "llama.cpp": Support(EXACT, "as granite_swa"),
        "MLX": Support(EXACT, "as llama"),
        "vLLM": Support(EXACT),
    },
    "qwen2": {
        "llama.cpp": Support(EXACT, "as granite_swa"),
        "MLX": _FULL_IN_MLX,
        "vLLM": Support(FLAG, "refuses without it", _BY_TRANSFORMERS),
    },
    "qwen3": {
        "llama.cpp": Support(EXACT, _ONE_EXPERT),
        "MLX": _FULL_IN_MLX,
        "vLLM": Support(FLAG, "refuses without it", _BY_TRANSFORMERS),
    },
    "qwen2_moe": {
        "llama.cpp": Support(REFUSES, "no architecture has its gated shared expert and a window for some layers"),
        "MLX": Support(REFUSES, _NO_MLX),
        "vLLM": Support(FLAG, "full attention in every layer without it", _BY_TRANSFORMERS, silent=True),
    },
    "mellum": {
        "llama.cpp": Support(EXACT, "if both kinds of layers have the same RoPE base, and all have experts"),
        "MLX": Support(EXACT, "if all layers have experts"),
        "vLLM": Support(EXACT, "after `zebra export`; fails on a folder of `zebra convert`"),
    },
    "gemma2": {
        "llama.cpp": Support(EXACT, _PERIOD),
        "MLX": _FULL_IN_MLX,
        "vLLM": Support(EXACT),
    },
    "gemma3_text": {
        "llama.cpp": Support(EXACT, _PERIOD),
        "MLX": Support(EXACT, _PERIOD + "; no cap of the logits"),
        "vLLM": Support(EXACT),
    },
    "cohere2": {
        "llama.cpp": Support(EXACT, _PERIOD),
        "MLX": Support(EXACT, _PERIOD),
        "vLLM": Support(FLAG, "one key too many without it", _BY_TRANSFORMERS, silent=True),
    },
    "olmo3": {
        "llama.cpp": Support(EXACT, f"as olmo2, {_PERIOD}"),
        "MLX": Support(EXACT, "with a layer of each kind"),
        "vLLM": Support(EXACT),
    },
    "granite_swa": {
        "llama.cpp": Support(EXACT, "if all RoPEs have the same base"),
        "MLX": Support(REFUSES, _NO_MLX),
        "vLLM": Support(EXACT),
    },
    "gpt_oss": {
        "llama.cpp": Support(EXACT, _PERIOD),
        "MLX": Support(REFUSES, "it supports only 4-bit experts"),
        "vLLM": Support(FLAG, "wrong without it, also within the window", _BY_TRANSFORMERS, silent=True),
    },
}
"""Support by `model_type` and engine. For llama.cpp and MLX it is that of what `zebra export` writes."""


def warning(family: str) -> str | None:
    """A warning if an engine would run a family's stripes wrongly without an error, otherwise None.

    Args:
        family: the `model_type` of the converted checkpoint.
    """
    for engine, support in ENGINES.get(family, {}).items():
        if support.silent:
            text = f"{engine} would run this {family} wrongly, without an error"
            if support.flag:
                return f"{text}, unless started with {support.flag}. Use this flag."
            return f"{text}: with full attention in every layer. Use another engine."
    return None


def table() -> str:
    """The table in Markdown, as in docs/engines.md and docs/families.md. `python -m zebra.engines` prints it."""
    lines = ["| runs as | llama.cpp | MLX | vLLM |", "|---|---|---|---|"]
    for family, row in ENGINES.items():
        lines.append(f"| `{family}` | {' | '.join(_cell(row[name]) for name in ('llama.cpp', 'MLX', 'vLLM'))} |")
    return "\n".join(lines)


def _cell(support: Support) -> str:
    more = "; ".join(filter(None, (support.flag and f"`{support.flag}`", support.reason)))
    return f"**{support.verdict}**" + (f": {more}" if more else "")


if __name__ == "__main__":
    print(table())

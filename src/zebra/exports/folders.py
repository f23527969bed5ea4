"""Export a folder for MLX, vLLM or SGLang: the same weight files, another config.json, and a README."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from zebra.engines import ENGINES, FLAG
from zebra.errors import ZebraError, printable
from zebra.exports.limits import REMEDY, other_activation, other_local_rope, period_of, scaled_local_rope
from zebra.files import atomic_write
from zebra.model.families import stripes_of
from zebra.model.load import converted_folder
from zebra.model.local import LocalAttention
from zebra.stripes import GLOBAL, LOCAL

Fields = dict[str, Any]


class _MlxFamily(NamedTuple):
    """A model family in mlx-lm.

    Attributes:
        model_type: the module of mlx_lm.models that runs it.
        period: whether it reads a period whose last layer is global, instead of a list with each layer's kind.
        both: whether it needs at least one layer of each kind; otherwise one global layer is enough.
        unsupported: returns what it cannot run of a config, or None.
    """

    model_type: str
    period: bool = False
    both: bool = False
    unsupported: Callable[[PreTrainedConfig], str | None] = lambda config: None


def _gemma_faults(config: PreTrainedConfig) -> str | None:
    return "a softcap of its logits" if config.final_logit_softcapping else scaled_local_rope(config)


def _mellum_faults(config: PreTrainedConfig) -> str | None:
    if {*config.mlp_layer_types} != {"sparse"}:
        return "layers with and without experts"
    return "a linear rope" if "linear" in {rope["rope_type"] for rope in config.rope_parameters.values()} else None


def _experts_of_halves(config: PreTrainedConfig) -> str | None:
    return "experts that are not in 4 bits"


MLX: dict[str, _MlxFamily] = {
    "cwm": _MlxFamily("llama"),
    "ministral": _MlxFamily("llama"),
    "smollm3": _MlxFamily("smollm3"),
    "gemma3_text": _MlxFamily("gemma3_text", period=True, unsupported=_gemma_faults),
    "cohere2": _MlxFamily("cohere2", period=True),
    "olmo3": _MlxFamily("olmo3", both=True, unsupported=other_local_rope),
    "mellum": _MlxFamily("mellum", unsupported=_mellum_faults),
    "gpt_oss": _MlxFamily("gpt_oss", both=True, unsupported=_experts_of_halves),
}


def _mlx_fields(config: PreTrainedConfig, fields: Fields) -> Fields:
    """The fields of config.json for mlx-lm; a ZebraError if it cannot run this family, config or layout."""
    family = MLX.get(config.model_type)
    if family is None:
        raise ZebraError(
            f"mlx-lm has no class with the tensors of {config.model_type} and a window for some layers. {REMEDY}"
        )
    if fault := other_activation(config) or family.unsupported(config) or _unread_rope(config):
        raise ZebraError(
            f"this {config.model_type} has {fault}, which mlx-lm's {family.model_type} does not support. {REMEDY}"
        )
    kinds = tuple(config.layer_types)
    if not {GLOBAL, *([LOCAL] if family.both else [])} <= {*kinds}:
        raise ZebraError(
            f"mlx-lm's {family.model_type} needs a global layer{' and a local one' * family.both}; the layout is "
            f"{stripes_of(config)}. Choose another layout."
        )
    changed = {"model_type": family.model_type, "sliding_window": config.sliding_window}
    if family.model_type == "llama":
        changed |= {"architectures": ["LlamaForCausalLM"]}
    if family.model_type == "mellum":
        changed |= {"num_experts": config.num_experts}
    if family.period:
        changed |= {"sliding_window_pattern": period_of(kinds, f"mlx-lm's {family.model_type}")}
    return fields | changed


def _unread_rope(config: PreTrainedConfig) -> str | None:
    rope = config.rope_parameters
    rope = rope.get(GLOBAL, rope)
    unread = [name for name in ("attention_factor", "truncate") if rope.get(name) is not None]
    return f"a rope with {unread[0]}" if unread else None


def _sglang_fields(config: PreTrainedConfig, fields: Fields) -> Fields:
    """The fields for SGLang's Transformers backend, whose `sliding_window` does not count the query's own key."""
    if config.sliding_window == 1:
        raise ZebraError(f"SGLang does not support a window of 1. Choose a larger one. {REMEDY}")
    return fields | {"sliding_window": config.sliding_window - 1}


def _stock(config: PreTrainedConfig, fields: Fields) -> Fields:
    """The fields for vLLM, which fails if the number of multi-token-prediction layers is null: it becomes 0."""
    counted = "num_nextn_predict_layers"
    return fields | ({counted: 0} if counted in fields and fields[counted] is None else {})


_FIELDS: dict[str, Callable[[PreTrainedConfig, Fields], Fields]] = {
    "mlx": _mlx_fields,
    "vllm": _stock,
    "sglang": _sglang_fields,
}
_NOTES = {
    "mlx": "Its config.json is only for mlx-lm: transformers would run every layer with full attention.",
    "vllm": "It is a stock checkpoint, for transformers too.",
    "sglang": "Its config.json is only for SGLang: elsewhere the window is a key smaller. By its source, not run.",
}


def command_of(to: str, config: PreTrainedConfig, target: Path) -> str:
    """The shell command that runs an exported folder."""
    name = shlex.quote(str(target))
    if to == "mlx":
        return f"mlx_lm.generate --model {name} --prompt 'Once upon a time'"
    if to == "sglang":
        return f"python -m sglang.launch_server --model-path {name} --model-impl transformers"
    support = ENGINES[config.model_type]["vLLM"]
    return f"vllm serve {name}" + (f" {support.flag}" if support.verdict == FLAG else "")


def export_folder(
    source: str | os.PathLike[str], target: Path, config: PreTrainedConfig, local: LocalAttention, to: str
) -> str:
    """Write a folder for an engine, completely or not at all, and return the shell command that runs it.

    Raises:
        ZebraError: the engine has no class for this model, or would run it incorrectly.
    """
    command = command_of(to, config, target)
    _FIELDS[to](config, {})  # raises before any file is written
    with converted_folder(Path(source), target, config, local, engine=to) as aside:
        file = aside / "config.json"
        fields = _FIELDS[to](config, json.loads(file.read_text(encoding="utf-8")))
        atomic_write(file, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        readme = aside / "README.md"
        card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        card = _SECTION.sub("", card)  # the section of an earlier export, if that is the source
        atomic_write(readme, printable(f"{card}\n\n{_readme(to, config, command)}".lstrip()))
    return command


_SECTION = re.compile(r"\n*^## Stripes: .*\n\nWritten by `zebra export .*\n\n    .*\n", re.MULTILINE)


def _readme(to: str, config: PreTrainedConfig, command: str) -> str:
    layout = stripes_of(config)
    same = to == "mlx" and MLX[config.model_type].model_type == config.model_type
    note = "Its config.json also has what mlx-lm reads." if same else _NOTES[to]
    return f"## Stripes: {layout}\n\nWritten by `zebra export --to {to}`. {note}\n\n    {command}\n"

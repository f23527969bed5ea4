"""Checks without torch: of a checkpoint's path and config, a conversion's target, and the notation of stripes.

The command line runs them before it imports torch, and `zebra.load` and `zebra.convert` run the same ones.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError, missing_package
from zebra.files import check_new_directory
from zebra.gguf import config_fields, is_gguf, read_header
from zebra.hub import is_hub_name
from zebra.model.rope import Rope, as_rope
from zebra.model.routes import check_family
from zebra.stripes import GLOBAL, LOCAL, Stripes

DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_dtype(name: str) -> None:
    """Check the name of a floating-point dtype.

    Raises:
        ZebraError: any other name.
    """
    if name not in DTYPES:
        raise ZebraError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}. Choose one.")


def check_checkpoint(path: str | os.PathLike[str], subfolder: str = "") -> None:
    """Check that a path may be a checkpoint: a directory with a config.json, a GGUF file, or a model's name on the hub.

    Raises:
        ZebraError: no such directory, a peft adapter, no config.json, one that is not a JSON object, or such a
            generation_config.json; as `check_fields` and `check_gguf`.
    """
    if is_gguf(path):
        return check_gguf(Path(path))
    directory = Path(path)
    config = directory / subfolder / "config.json"
    if is_hub_name(path):
        return
    if not directory.exists():
        raise ZebraError(f"there is no checkpoint at {path}. Give the path of a directory that transformers saved.")
    if config.with_name("adapter_config.json").is_file():
        if config.is_file():
            raise _adapter_beside_base(path)
        raise _adapter_alone(Path(path), config.with_name("adapter_config.json"))
    if not config.is_file():
        files = sorted(file.name for file in directory.glob("*.gguf"))
        remedy = f"the GGUF file itself: {directory / files[0]}" if files else "a directory that transformers saved"
        raise ZebraError(f"{path} is not a checkpoint: it has no config.json. Give {remedy}.")
    check_fields(read_json_object(config, "Copy it from the source again."), str(path))
    if (generation := config.with_name("generation_config.json")).is_file():
        _check_generation(generation)


def _check_generation(file: Path) -> None:
    fields = read_json_object(file, "Copy it from the source again, or remove it.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = fields.get(name)
        if not all(isinstance(one, int) for one in (value if isinstance(value, list) else [value or 0])):
            raise ZebraError(f"{file}: {name} must be a token id or a list of token ids; got {value!r}. Fix it.")


def check_gguf(path: Path) -> None:
    """Check that a GGUF file can be read: its header describes a known model, and no tensor is cut off.

    Raises:
        ZebraError: as `read_header`, `config_fields` and `check_fields`; no package gguf; a tensor type that it does
            not know, or a truncated file.
    """
    header = read_header(path)
    check_fields(config_fields(header), str(path))
    check_gguf_package(path)
    from gguf import GGML_QUANT_SIZES

    size = path.stat().st_size
    for name, (shape, kind, start) in header.tensors.items():
        if kind not in GGML_QUANT_SIZES:
            raise ZebraError(
                f"{path}: {name} has type {kind}, which the installed package gguf does not support. Upgrade gguf."
            )
        elements, width = GGML_QUANT_SIZES[kind]
        if start + math.prod(shape) // elements * width > size:
            raise ZebraError(f"{path} is truncated: it has {size:,} bytes, and {name} ends beyond them. Copy it again.")


def check_gguf_package(path: str | os.PathLike[str]) -> None:
    """Check that the package gguf is installed, which reads and writes GGUF files.

    Raises:
        ZebraError: it is not.
    """
    if importlib.util.find_spec("gguf") is None:
        raise missing_package(str(path), "the package gguf", "gguf")


def _adapter_alone(path: Path, file: Path) -> ZebraError:
    base = str(read_json_object(file, "Copy it from the source again.").get("base_model_name_or_path"))
    moved, is_local = path.resolve().parent / "base", base.startswith((".", "/")) or base.count("/") != 1
    if is_local and not Path(base).is_dir():
        remedy = (
            f"which is now at {moved}. Write that" if (moved / "config.json").is_file() else "which is gone. Write its"
        )
        return ZebraError(
            f"{path} is a peft adapter of {base}, {remedy} path as base_model_name_or_path to {file}, and load the "
            "adapter with peft (AutoPeftModelForCausalLM)."
        )
    return ZebraError(
        f"{path} is a peft adapter of {base}, not a full checkpoint. Load it with peft (AutoPeftModelForCausalLM), or "
        "train it again with lora.merge: true."
    )


def _adapter_beside_base(path: str | os.PathLike[str]) -> ZebraError:
    """The error for a checkpoint that also has a peft adapter, which transformers would apply silently."""
    return ZebraError(
        f"{path} has both a full checkpoint and a peft adapter, so the model to load is ambiguous. Move "
        "adapter_config.json and adapter_model.safetensors to another directory, ADAPTER, to load the base model. To "
        f"merge both: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(path)!r}), ADAPTER)"
        ".merge_and_unload().save_pretrained(TARGET)."
    )


_POSITIVE = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "factor", "attention_factor"}
_POSITIVE |= {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}
_POSITIVE |= {"max_position_embeddings", "head_dim", "query_pre_attn_scalar", "rms_norm_eps", "layer_norm_eps"}
_POSITIVE |= {"attn_logit_softcapping", "final_logit_softcapping", "logits_scaling"}
_COUNTS = {"num_hidden_layers": 1000, "num_attention_heads": 10**5, "num_key_value_heads": 10**5}
_COUNTS |= {"hidden_size": 10**6, "intermediate_size": 10**7, "vocab_size": 10**8}
"""The largest counts that a machine could build in minutes today; the deepest published model has 1,000 layers."""


def check_fields(fields: Mapping[str, Any], name: str) -> None:
    """Check the values of a config whose errors would not show in the shape of any tensor.

    Args:
        name: of the checkpoint, for the error.

    Raises:
        ZebraError: a number that is not finite, or not above 0 where it divides, scales or counts; a count beyond any
            machine; a padding token without an embedding; weight files with other names than transformers' own; a
            quantization_config that is no object.
    """
    if not isinstance(settings := fields.get("quantization_config"), Mapping | None):
        raise ZebraError(f"{name}: quantization_config must be a JSON object; got {settings!r}. Fix its config.json.")
    for key, largest in _COUNTS.items():
        if isinstance(value := fields.get(key), int | float) and not 1 <= value <= largest:
            raise ZebraError(f"{name}: {key} must be from 1 to {largest:,}; got {value}. Fix its config.json.")
    pad, vocabulary = fields.get("pad_token_id"), fields.get("vocab_size")
    if isinstance(pad, int) and isinstance(vocabulary, int) and not -vocabulary <= pad < vocabulary:
        raise ZebraError(
            f"{name}: pad_token_id must be null or one of {vocabulary:,} tokens; got {pad}. Fix its config.json."
        )
    for key, value in fields.items():
        if isinstance(value, Mapping) and (key.startswith("rope_") or key in (GLOBAL, LOCAL)):
            check_fields(value, name)
        elif isinstance(value, int | float) and not (math.isfinite(value) and (key not in _POSITIVE or value > 0)):
            rule = "a finite number above 0" if key in _POSITIVE else "a finite number"
            raise ZebraError(f"{name}: {key} must be {rule}; got {value}. Fix its config.json.")
    if (file := fields.get("transformers_weights")) is not None:
        raise ZebraError(
            f"{name}: transformers_weights is not supported, as zebra reads only model.safetensors and its shards; got "
            f"{file!r}. Rename the files, and remove that field."
        )


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        remedy: the last sentence of an error message.

    Raises:
        ZebraError: the file cannot be read, is not JSON, or has a value that is no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZebraError(f"{file} cannot be read: {error}. {remedy}") from None
    if not isinstance(value, dict):
        raise ZebraError(f"{file} cannot be read: it is not a JSON object. {remedy}")
    return value


def check_conversion(
    source: str | os.PathLike[str],
    target: Path | None,
    stripes: Stripes | str | None,
    rope: Rope | str | None = None,
) -> None:
    """Check the arguments of `zebra.convert`, as far as possible without torch.

    Args:
        target: None where nothing is written.

    Raises:
        ZebraError: as `check_checkpoint`, `check_family`, `Stripes.parse` and `Rope.parse`; a target that exists;
            a conversion that would change nothing.
    """
    if not isinstance(stripes, Stripes | None):
        Stripes.parse(stripes)
    as_rope(rope)
    check_checkpoint(source)
    if stripes is None and as_rope(rope).kind == "none" and not is_gguf(source):
        raise ZebraError(
            f"a conversion must change the layout or the rope of {source}; got neither. Give stripes or a rope."
        )
    config = Path(source) / "config.json"
    if config.is_file():
        check_family(str(read_json_object(config, "Copy it from the source again.").get("model_type")))
    if target is not None:
        if target.exists() and Path(source).exists() and target.samefile(source):
            raise ZebraError(f"source and target must be different directories; both are {source}. Change the target.")
        check_new_directory(Path(os.path.abspath(target)))

"""A checkpoint's config, tokenizer and zebra.json: checked when they are read, written atomically."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from string import printable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from zebra.errors import ZebraError, first_line
from zebra.files import atomic_write, file_digest
from zebra.gguf import is_gguf
from zebra.hub import is_hub_name
from zebra.model.checkpoint_files import check_checkpoint, check_fields, read_json_object
from zebra.model.families import ignores_layer_types, route_of, stripes_of
from zebra.model.gguf import as_directory, gguf_config
from zebra.model.local import LocalAttention, layout_name
from zebra.model.rope import older_fields
from zebra.model.weights import WEIGHT_SUFFIXES, correct_by_weights, digest_of_weights
from zebra.provenance import git_commit, versions


def read_config(path: str | os.PathLike[str], *, routed: bool = True, **kwargs: Any) -> PreTrainedConfig:
    """Read and check the config of a checkpoint.

    The tensors on disk decide whether the head is tied, and the dtype where the config has none: a merged adapter of a
    tied model often has a head of its own.

    Args:
        routed: whether the family must have a route, as stripes need. If not, its own class runs the model.
        kwargs: keyword arguments of `from_pretrained`, fields of the config among them.

    Raises:
        ZebraError: no checkpoint there, a broken config.json, Python code of its own, a family without a route or
            without a causal language model, or a config whose layer_types its class ignores while its cache obeys them
            (`generate` would be silently wrong); as `check_checkpoint` and `check_fields`.
    """
    subfolder = kwargs.get("subfolder", "")
    check_checkpoint(path, subfolder)
    directory = Path(path) if is_gguf(path) else as_directory(path, **kwargs)
    if is_hub_name(path):
        check_checkpoint(directory, subfolder)
    from_directory = partial(AutoConfig.from_pretrained, directory, subfolder=subfolder, trust_remote_code=False)
    read: Callable[..., PreTrainedConfig] = partial(gguf_config, path) if is_gguf(path) else from_directory
    try:
        config = read()
        changes = {name: kwargs[name] for name in own_fields(config) if name in kwargs}
        if changes:
            config = read(**changes)
    except Exception as error:  # of classes that expect other fields: a ZeroDivisionError, a RecursionError, ...
        text = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        if _CODE in str(error):
            text = "its model is custom Python code, and zebra runs only model classes of transformers. Use another"
        raise ZebraError(f"the config of {path} cannot be read: {text}") from None
    check_fields(config.to_dict(), str(path))
    if routed:
        route_of(config)
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ZebraError(
            f"{path} is a {config.model_type}, for which transformers has no causal language model. Use another."
        )
    if getattr(config, "layer_types", None) is not None and ignores_layer_types(config):
        remedy = "Remove layer_types from its config.json, then run `zebra convert`."
        if (exported := _zebra_json(directory / subfolder)).get("engine") == "mlx":
            remedy = f"It was exported for MLX, which uses them. Use its source instead: {exported.get('source')}."
        raise ZebraError(
            f"{path} is a {config.model_type} with layer_types, which its model class ignores but its cache uses. "
            f"{remedy}"
        )
    if not is_gguf(path):
        correct_by_weights(config, directory / subfolder)
    return config


def own_fields(config: PreTrainedConfig) -> set[str]:
    """The fields of a config's class that are not fields of every config."""
    return {f.name for f in fields(type(config))} - {f.name for f in fields(PreTrainedConfig)}


_CODE = "trust_remote_code"
"""The option that transformers' error names for a checkpoint with code of its own."""


def load_tokenizer(
    path: str | os.PathLike[str], config: PreTrainedConfig | None = None, *, trust_remote_code: bool | None = None
) -> PreTrainedTokenizerBase:
    """Load and check the tokenizer of a checkpoint.

    Args:
        config: the model's, to check that it has an embedding for each token; None leaves that out.
        trust_remote_code: run a tokenizer that is Python code of the checkpoint's own; None where the caller has no
            such option.

    Raises:
        ZebraError: no tokenizer that can be read; one with code of its own that is not trusted; one that makes texts
            much longer; ids for which the model has no embedding.
    """
    directory = as_directory(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=bool(trust_remote_code)
        )
        largest = max(tokenizer.get_vocab().values(), default=-1)
        tokenizer.encode("x")  # fails where the vocabulary lacks even its unknown token
    except ImportError as error:  # several lines of advice follow what it needs
        needs = _tokenizer_fault(directory) or first_line(error).partition(". ")[0]
        raise ZebraError(f"the tokenizer of {path} cannot be read: {needs}. Install that package with pip.") from None
    except Exception as error:  # a broken tokenizer.json ends in a bare Exception of the tokenizers library
        if _CODE in str(error) and not trust_remote_code:
            remedy = "Review the code, then pass trust_remote_code (--trust-remote-code)"
            raise ZebraError(
                f"the tokenizer of {path} is custom Python code, which is not run by default. "
                f"{'Use another' if trust_remote_code is None else remedy}."
            ) from None
        raise ZebraError(
            f"the tokenizer of {path} cannot be read: {_tokenizer_fault(directory) or first_line(error)}"
        ) from None
    if largest < 0:
        raise ZebraError(f"the tokenizer of {path} has no tokens. Copy it from the source again.")
    _check_growth(tokenizer, path)
    if config is not None and largest >= config.vocab_size:
        if (fewer := _without_tokens_beyond(tokenizer, config.vocab_size)) is not None:
            return fewer
        raise ZebraError(
            f"the tokenizer of {path} has ids up to {largest}, but the model has {config.vocab_size} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    return tokenizer


def _without_tokens_beyond(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer without tokens for which the model has no embedding; None where it needs one of them.

    Gemma 3's has an image token that its text models lack, and padding tokens are often added without an embedding.
    """
    beyond = {token for token, i in tokenizer.get_vocab().items() if i >= embeddings}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    in_template = any(map(str(tokenizer.chat_template).count, beyond))
    if not tokenizer.is_fast or not beyond <= special - needed or in_template:
        return None

    def stripped(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: stripped(value) for name, value in part.items() if not names_one(value)}
        return [stripped(value) for value in part if not names_one(value)] if isinstance(part, list) else part

    def names_one(part: Any) -> bool:
        name = part.get("content") if isinstance(part, dict) else part
        return isinstance(name, str) and name in beyond

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in (Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"):
            file.write_text(json.dumps(stripped(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
        fewer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    fewer.name_or_path = tokenizer.name_or_path
    return fewer


_MOST_GROWTH = 64
"""Characters that a normalizer may make of one; Unicode's normal forms make at most 18."""


def _check_growth(tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike[str]) -> None:
    """Reject a normalizer that makes texts so much longer that a short one fills the memory."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    longest = 0 if normalizer is None else max(len(normalizer.normalize_str(letter)) for letter in printable)
    if longest > _MOST_GROWTH:
        raise ZebraError(
            f"a tokenizer must normalize one character to at most {_MOST_GROWTH}; that of {path} gives {longest:,}. "
            "Copy it from the source again."
        )


def _tokenizer_fault(directory: str | os.PathLike[str]) -> str | None:
    """What a directory or this machine lacks, in place of transformers' list of all ways to build a tokenizer."""
    names = [file.name for file in Path(directory).glob("*")]
    models = [name for name in names if name.endswith(".model")]
    if names and not any(name.startswith(("tokenizer", "vocab")) or name in models for name in names):
        return "there are no tokenizer files, such as tokenizer.json or tokenizer.model. Copy them from the source."
    if models and "tokenizer.json" not in names and importlib.util.find_spec("sentencepiece") is None:
        return f"{models[0]} requires the package sentencepiece, which is not installed"
    return None


def checkpoint_digests(path: str | os.PathLike[str]) -> dict[str, str]:
    """Digests that tell checkpoints apart: of each file except documentation, and the settings in zebra.json.

    Only samples of the weights are read.

    Raises:
        ZebraError: no weights.
    """
    directory = as_directory(path)
    digests = digest_of_weights(directory) | {"zebra.json": repr(read_local_attention(path))}
    for file in sorted((*directory.iterdir(), *directory.glob("additional_chat_templates/*"))):
        about = file.name.startswith(".") or file.suffix == ".md" or file.name == "zebra.json"
        if file.is_file() and not about and file.suffix not in WEIGHT_SUFFIXES:
            digests[str(file.relative_to(directory))] = file_digest(file)
    return digests


def write_config(config: PreTrainedConfig, directory: Path) -> None:
    """Write config.json with every field of its class, defaults too, which may differ in another version.

    The rope is also written in the fields of transformers 4.
    """
    whole = config.to_dict()
    values = config.to_diff_dict() | {name: whole[name] for name in own_fields(config) if name in whole}
    values |= older_fields(config)
    values.pop("_name_or_path", None)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    atomic_write(directory / "config.json", text)


def write_zebra_json(
    directory: Path, config: PreTrainedConfig, local: LocalAttention, *, source: Path | None, **more: Any
) -> None:
    """Write zebra.json: the layout, what config.json cannot express, the checkpoint's origin and the versions.

    Args:
        source: the checkpoint that this one was made from; None for a model from scratch.
        more: further fields.
    """
    origin = {
        "source": source and str(source),
        "source_config_sha256": source and file_digest(as_directory(source) / "config.json"),
    }
    _write_json(directory / "zebra.json", _layout_fields(config, local) | origin | more)


def update_zebra_json(directory: Path, config: PreTrainedConfig, local: LocalAttention) -> None:
    """Update the layout in a checkpoint's zebra.json; write a new one only where config.json cannot express it all."""
    before = _zebra_json(directory)
    if local or before:
        _write_json(directory / "zebra.json", before | _layout_fields(config, local))


def _zebra_json(directory: Path) -> dict[str, Any]:
    file = directory / "zebra.json"
    return read_json_object(file, _MEND) if file.is_file() else {}


def read_local_attention(path: str | os.PathLike[str], **kwargs: Any) -> LocalAttention:
    """Read the sinks and full decoding from a checkpoint's zebra.json; neither where it has none.

    Args:
        kwargs: keyword arguments of `from_pretrained`.

    Raises:
        ZebraError: a broken zebra.json; an export for SGLang, whose config.json has a window that is one key smaller.
    """
    if is_gguf(path):
        return LocalAttention()
    directory = as_directory(path, weights=False, **kwargs) / kwargs.get("subfolder", "")
    values = _zebra_json(directory)
    if values.get("engine") == "sglang":
        raise ZebraError(
            f"{path} was exported for SGLang, so the window in its config.json is one key smaller than in "
            f"{values.get('layout')}. Use its source instead: {values.get('source')}."
        )
    sinks, full_decode = values.get("sinks", 0), values.get("full_decode", False)
    is_count = isinstance(sinks, int) and not isinstance(sinks, bool) and 0 <= sinks < 2**31
    if not is_count or not isinstance(full_decode, bool):
        raise ZebraError(
            f"{directory / 'zebra.json'}: sinks must be an integer from 0 to 2^31 - 1 and full_decode must be true or "
            f"false; got {sinks!r} and {full_decode!r}. Fix them, or remove the file to load without them."
        )
    return LocalAttention(sinks, full_decode)


_MEND = "Fix it, or remove it to load without its settings."


def _layout_fields(config: PreTrainedConfig, local: LocalAttention) -> dict[str, Any]:
    stripes = stripes_of(config)
    return {
        "layout": layout_name(config, local),
        "window": stripes.window if stripes else None,
        "window_counts": "keys that a query sees, its own included: 0 <= i - j < window",
        "layer_types": getattr(config, "layer_types", None),
        "sinks": local.sinks,
        "full_decode": local.full_decode,
        "only_here": "sinks and full_decode: config.json has no fields for them; what reads it alone runs without",
        "versions": versions(),
        "commit": git_commit(),
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    atomic_write(file, json.dumps(values, indent=2) + "\n")

"""A GGUF file as a checkpoint: its config, its tokenizer, and its weights in a directory that transformers loads.

transformers reads the tensors and the tokenizer. Quantised tensors are dequantised once, into the user's cache, in the
dtype of the file: float32 or float16 where all matrices have it, else bfloat16. bfloat16 has half the size of float32
and its range, and rounds by 2⁻⁹, which is no more than the steps of 8 bits and far less than those of 4.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from zebra.errors import ZebraError, first_line
from zebra.files import atomic_directory, user_cache_dir
from zebra.gguf import ORIGINAL, ROPE_FACTORS, GgufHeader, config_fields, is_gguf, read_header
from zebra.hub import ARGUMENTS, hub_directory, is_hub_name
from zebra.model.checkpoint_files import check_checkpoint
from zebra.progress import console

_log = logging.getLogger(__name__)


def gguf_config(path: str | os.PathLike[str], **changes: Any) -> PreTrainedConfig:
    """Read the config of a GGUF file.

    Args:
        changes: fields that replace the file's.

    Raises:
        ZebraError: as `read_header` and `config_fields`.
    """
    header = read_header(path)
    fields = config_fields(header)
    config = AutoConfig.for_model(**(fields | {"dtype": _dtype(header)} | changes))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def _dtype(header: GgufHeader) -> str:
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}  # norms are always float32
    return {frozenset({0}): "float32", frozenset({1}): "float16"}.get(frozenset(kinds), "bfloat16")


_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _by_regex(number: str) -> dict[str, Any]:
    regex = {"Regex": _CL100K.replace("NUMBER", number)}
    return _sequence({"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}, _BYTES)


_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(_LLAMA3, _by_regex(r"\p{N}{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _by_regex(r"\p{N}")),
}
"""How text is split before merges, by `tokenizer.ggml.pre`. transformers knows some of these, by its version."""
WHOLE_PIECES = (*_LLAMA3, "tekken")
"""Pre-tokenizers where a piece of text that is a token becomes that token, even if merges would not lead to it."""
END_FIELDS = ("eos", "eot", "eom")
"""llama.cpp ends an answer at the token of any of these fields."""


def _read_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    try:
        with _alone(header.path) as alone:
            return AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name, trust_remote_code=False)
    except Exception as error:  # transformers does not check the metadata: an IndexError, an AttributeError, ...
        raise ZebraError(
            f"the tokenizer of {header.path} cannot be read: {first_line(error).rstrip('.')}. {ORIGINAL}"
        ) from None


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, header: GgufHeader, directory: Path) -> None:
    """Write the tokenizer of a GGUF file, with its chat template and what transformers does not read from it."""
    tokenizer.save_pretrained(directory)
    file, kind = directory / "tokenizer.json", header.metadata.get("tokenizer.ggml.model")
    state = json.loads(file.read_text(encoding="utf-8"))
    if kind == "gpt2":
        _mend_byte_level(state, header)
    elif kind == "llama" and header.architecture == "llama":
        _mend_sentencepiece(state, header)
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _mend_byte_level(state: dict[str, Any], header: GgufHeader) -> None:
    # transformers' GPT-2 tokenizer adds <|endoftext|>, for which the model may have no embedding.
    tokens, name = header.metadata["tokenizer.ggml.tokens"], str(header.metadata.get("tokenizer.ggml.pre"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < tokens]
    state["model"]["ignore_merges"] = name in WHOLE_PIECES
    if name in PRE_TOKENIZERS:
        state["pre_tokenizer"] = PRE_TOKENIZERS[name]
    elif state["pre_tokenizer"] == _GPT2:
        _log.warning(
            "%s has the pre-tokenizer %r, which neither zebra nor this transformers supports: some tokens will differ "
            "from the model's own. Copy the original tokenizer.json to the converted directory.",
            header.path,
            name,
        )


def _mend_sentencepiece(state: dict[str, Any], header: GgufHeader) -> None:
    """Put a space before every text, as sentencepiece does; transformers adds none to a text that begins with one."""
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    state["normalizer"], state["pre_tokenizer"] = {"type": "Sequence", "normalizers": steps}, None
    if not prefix:
        decoders = state["decoder"]["decoders"]
        state["decoder"]["decoders"] = [decoder for decoder in decoders if decoder["type"] != "Strip"]


def as_directory(path: str | os.PathLike[str], *, weights: bool = True, **hub_arguments: Any) -> Path:
    """The directory of a checkpoint, as transformers loads it.

    A GGUF file is written into the user's cache, atomically, once for its path, size, date and version of transformers.
    A model of the hub is in the hub's cache.

    Args:
        weights: whether to download the weights of a model of the hub, too.
        hub_arguments: keyword arguments of `from_pretrained`; `hub_directory` takes its own.

    Raises:
        ZebraError: as `check_checkpoint`, `gguf_config` and `hub_directory`; weights that do not fit the config.
    """
    if is_hub_name(path):
        located = {name: value for name, value in hub_arguments.items() if name in (*ARGUMENTS, "subfolder")}
        return hub_directory(str(path), weights=weights, **located)
    if not is_gguf(path):
        return Path(path)
    check_checkpoint(path)
    path, status = Path(os.path.abspath(path)), os.stat(path)
    identity = f"3 {transformers.__version__} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = user_cache_dir("gguf") / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        try:
            _write(path, target)
        except (OSError, ZebraError):
            if not target.is_dir():  # if it is, another process was faster
                raise
    return target


def _write(path: Path, target: Path) -> None:
    from gguf import GGMLQuantizationType

    header, config = read_header(path), gguf_config(path)
    counts = Counter(GGMLQuantizationType(tensor.kind).name for tensor in header.tensors.values())
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    for key in header.unread_keys():
        _log.warning(
            "%s: %s = %s is ignored; a model that needs it will be less accurate.", path, key, header.metadata[key]
        )
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = stock_class(config)
    weights = sum(math.prod(tensor.shape) for name, tensor in header.tensors.items() if name != ROPE_FACTORS)
    expected = model.num_parameters()
    if weights != expected:
        raise ZebraError(
            f"{path} has {weights:,} weights, but a {config.model_type} of its sizes has {expected:,}, so some tensors "
            f"are missing or not supported. {ORIGINAL}"
        )
    tokenizer = _read_tokenizer(header)  # before the weights, as they take longer
    dtype = str(config.dtype).removeprefix("torch.")
    console.print(f"{path.name}: tensors of {types}, written as {dtype} into {target}", soft_wrap=True, highlight=False)
    with _quiet(), _alone(path) as alone:
        try:
            loaded, info = stock_class.from_pretrained(
                alone.parent, gguf_file=alone.name, config=config, dtype=config.dtype, output_loading_info=True
            )
        except (ValueError, RuntimeError, KeyError, NotImplementedError, TypeError) as error:
            raise ZebraError(f"the weights of {path} cannot be read: {first_line(error)}. Copy it again.") from None
    if info["missing_keys"]:
        raise ZebraError(f"{path}: the weights lack {', '.join(sorted(info['missing_keys']))}. {ORIGINAL}")
    # A new model with the same tensors: transformers does not save one that it takes for quantised.
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    ends = [config.eos_token_id, *(header.metadata.get(f"tokenizer.ggml.{field}_token_id") for field in END_FIELDS)]
    ends = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    if ends and ends != [config.eos_token_id]:
        model.generation_config.eos_token_id = ends
    with atomic_directory(target) as aside:
        model.save_pretrained(aside)
        _write_tokenizer(tokenizer, header, aside)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A link to a file in a folder of its own, as transformers would also read adapters and code beside the file."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        yield link


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' advice on quantised models, and its progress bar where stderr is no terminal."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with nullcontext() if console.is_terminal else redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)

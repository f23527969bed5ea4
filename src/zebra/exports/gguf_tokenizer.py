"""Convert a transformers tokenizer to llama.cpp's metadata: `tokenizer.ggml.*` and the chat template.

Two kinds are supported: byte-level BPE with a pre-tokenizer that llama.cpp has a name for, and sentencepiece BPE with
byte fallback, whose scores are the ranks of the merges. llama.cpp's own converter supports some others.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from zebra.errors import ZebraError
from zebra.model.gguf import END_FIELDS, PRE_TOKENIZERS, WHOLE_PIECES

_log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LOWEST_SCORE = -1e6


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int], path: Any, remedy: str
) -> dict[str, Any]:
    """The metadata of a tokenizer. Logs a warning if llama.cpp has no field for some of the end tokens.

    Args:
        vocab_size: number of embeddings of the model; IDs without a token are written as unused.
        end_tokens: tokens that end an answer: first the end of text, then those of a turn and of a message.
        path, remedy: the checkpoint and the last sentence, for errors.

    Raises:
        ZebraError: a tokenizer of another kind, or with a pre-tokenizer or another step that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model", {})
    if model.get("type") != "BPE":
        raise ZebraError(f"an export requires a BPE tokenizer; that of {path} is not one. {remedy}")
    if fault := _fault(tokenizer, state):
        raise ZebraError(f"the tokenizer of {path} {fault}, which llama.cpp does not support. {remedy}")
    tokens, kinds = _tokens(tokenizer, state, vocab_size)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    metadata: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if model.get("byte_fallback"):
        metadata |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges)}
        metadata |= {"add_space_prefix": _prefixes_space(state)}
    else:
        metadata |= {
            "model": "gpt2",
            "pre": _split_name(state, path, remedy),
            "merges": merges,
            "add_space_prefix": False,
        }
    ids = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    if unwritten := end_tokens[len(END_FIELDS) :]:
        _log.warning("%s: llama.cpp has no field for the end tokens %s; it may generate past them.", path, unwritten)
    ids |= dict(zip(END_FIELDS, end_tokens or [tokenizer.eos_token_id], strict=False))
    metadata |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    metadata |= dict(zip(("add_bos_token", "add_eos_token"), map(bool, _around(tokenizer)), strict=True))
    result = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    if isinstance(template := tokenizer.chat_template, dict):
        template = template.get("default")
    return result | ({"tokenizer.chat_template": template} if template else {})


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), len(whole))
    return whole[:start], whole[start + len(text) :]


def _fault(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> str | None:
    """What the tokenizer does with a text and llama.cpp does not, or None."""
    model, steps = state["model"], _steps(state)
    before, after = _around(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        return "adds more to a text than bos_token and eos_token"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "marks parts of words"
    if model.get("byte_fallback"):
        spaces = ({"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
        split = {"type": "Split", "pattern": {"String": " "}}  # no effect: the spaces were replaced before
        other = [
            each
            for each in steps
            if each not in spaces and each["type"] != "Metaspace" and not split.items() <= each.items()
        ]
    else:
        normalizer = state.get("normalizer") or {"type": "NFC"}  # most texts are in NFC already
        other = [each for each in normalizer.get("normalizers", [normalizer]) if each["type"] != "NFC"]
    return f"applies {other[0]['type']} to a text" if other else None


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of the normalizer and the pre-tokenizer, in order."""
    both = [step for name in ("normalizer", "pre_tokenizer") if (step := state.get(name))]
    return [each for step in both for each in step.get("normalizers", step.get("pretokenizers", [step]))]


def _tokens(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    fallback = state["model"].get("byte_fallback")
    for token, i in vocabulary.items():
        tokens[i] = token
        kinds[i] = BYTE if fallback and len(token) == 6 and token.startswith("<0x") else NORMAL
    for added in state["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Each token's score: minus the rank of the first merge that yields it, as sentencepiece merges by score."""
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), -float(rank))
    return [ranks.get(token, _LOWEST_SCORE) for token in tokens]


def _prefixes_space(state: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    steps = _steps(state)
    metaspace = any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return metaspace or any(step.get("type") == "Prepend" for step in steps)


def _split_name(state: dict[str, Any], path: Any, remedy: str) -> str:
    """llama.cpp's name of the pre-tokenizer."""

    def essence(split: Any) -> Any:  # trim_offsets does not change the tokens
        if isinstance(split, dict):
            return {name: essence(value) for name, value in split.items() if name != "trim_offsets"}
        return [essence(each) for each in split] if isinstance(split, list) else split

    split, whole = essence(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    names = (name for name, known in PRE_TOKENIZERS.items() if essence(known) == split)
    name = next((name for name in names if (name in WHOLE_PIECES) == whole), None)
    if name is None:
        raise ZebraError(f"the tokenizer of {path} has a pre-tokenizer that zebra cannot export. {remedy}")
    return name

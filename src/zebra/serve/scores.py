"""Tokens in lists of log-probabilities: the text that each token adds to an answer, and its bytes.

"Zoë 🐈"    tokens  Zo    ë      a space, half of 🐈   the other half
            text    Zo    ë      " \\ufffd"            \\ufffd
            bytes   5a6f  c3ab   20 f0 9f              90 88
"""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from zebra.data.encoding import decode_after
from zebra.serve.events import TokenLogprob

_NO_CHARACTER = "\ufffd"


def scored_token(
    tokenizer: PreTrainedTokenizerBase, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    """Build a `TokenLogprob`: look up the token's text and bytes."""
    text = _text_within(tokenizer, token)
    bare = text.encode() if _NO_CHARACTER not in text else _stored_bytes(str(tokenizer.convert_ids_to_tokens(token)))
    return TokenLogprob(text, logprob, bare, top)


def _text_within(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text that a token adds after other text."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return decode_after(tokenizer, before, [token], special=True)


def _stored_bytes(stored: str) -> bytes | None:
    """The bytes of a token that is part of a character, from its vocabulary entry; None if that is unknown.

    Vocabularies write such tokens in one of two ways: `<0xF0>` is a byte (sentencepiece), or each character stands
    for a byte (GPT-2).
    """
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", stored):
        return bytes.fromhex(match[1])
    alphabet = _alphabet()
    return bytes(alphabet[one] for one in stored) if all(one in alphabet for one in stored) else None


@functools.cache
def _alphabet() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}

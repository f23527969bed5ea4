"""Decode tokens to text as they are generated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from zebra.data.encoding import decode, decode_after


class TextWriter(BaseStreamer):
    """A streamer that decodes tokens as they are generated: whole characters, with the spaces between words.

    The text of a token depends on its neighbours (a leading space, bytes of one character). So a few earlier tokens are
    decoded again with the new ones, and the text beyond theirs is new. The streamer of transformers starts afresh after
    each line and may lose a space there; the one of tokenizers fails on bytes that are not UTF-8.

    Args:
        on_text: called with each new piece of text.
        special: write special tokens as text too.
    """

    _BEFORE, _BYTES = 8, 4
    """How many earlier tokens are decoded again, and how many tokens one character may take."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None] | None = None,
        *,
        special: bool = False,
    ):
        self._tokenizer, self._on_text = tokenizer, on_text
        self._special = special
        self._before: list[int] = []
        self._new: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt on the first call, and new tokens on each further call."""
        if not self._before:
            self._before = self._last(value.flatten().tolist())
            return
        for token in value.flatten().tolist():
            self._new.append(token)
            whole = decode(self._tokenizer, self._before + self._new, special=self._special)
            if len(self._new) >= self._BYTES or not whole.endswith("\ufffd"):
                self.end()

    def end(self) -> None:
        """Write the text that is held back."""
        piece = decode_after(self._tokenizer, self._before, self._new, special=self._special)
        self._before, self._new = self._last(self._before + self._new), []
        self.text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)

    def _last(self, tokens: list[int]) -> list[int]:
        """The last few tokens, from the start of a character: some decoders garble all bytes after half a character."""
        for size in range(self._BEFORE, self._BEFORE + self._BYTES):
            if not decode(self._tokenizer, tokens[-size:], special=self._special).startswith("\ufffd"):
                return tokens[-size:]
        return tokens[-self._BEFORE :]

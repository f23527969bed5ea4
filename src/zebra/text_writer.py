"""Tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from zebra.data.encoding import decode, decode_after


class TextWriter(BaseStreamer):
    """Tokens to text as they come: whole characters, with the space that the tokenizer puts between words.

    A token's text depends on its neighbours (a leading space, bytes of one character), so a few tokens before the new
    ones are decoded again with them, and the text beyond theirs is new. transformers' own streamer starts again after
    each line and loses a space that may follow; that of tokenizers fails on bytes that are no UTF-8.

    Args:
        on_text: called with each piece.
        special: special tokens are text too.
    """

    _BEFORE, _BYTES = 8, 4
    """Tokens decoded again; tokens that one character may take."""

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
        """The prompt first, then new tokens."""
        if not self._before:
            self._before = self._last(value.flatten().tolist())
            return
        for token in value.flatten().tolist():
            self._new.append(token)
            whole = decode(self._tokenizer, self._before + self._new, special=self._special)
            if len(self._new) >= self._BYTES or not whole.endswith("\ufffd"):
                self.end()

    def end(self) -> None:
        """Write what is held back."""
        piece = decode_after(self._tokenizer, self._before, self._new, special=self._special)
        self._before, self._new = self._last(self._before + self._new), []
        self.text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)

    def _last(self, tokens: list[int]) -> list[int]:
        """A few last tokens, the first of which begins a character: some decoders spoil all bytes behind half a one."""
        for size in range(self._BEFORE, self._BEFORE + self._BYTES):
            if not decode(self._tokenizer, tokens[-size:], special=self._special).startswith("\ufffd"):
                return tokens[-size:]
        return tokens[-self._BEFORE :]

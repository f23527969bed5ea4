"""Windows of a text in which tokens are scored, by three conventions, which give different perplexities:

disjoint    [-------][-------][---]   windows side by side; every token but the first of each window is scored once
strided     [-------]                 windows of `length`, moved by `stride`; the first scores all tokens but its first,
              [-----==]               each other one its last `stride`: nearly a full context before each token
truncated   [-------].......          the first `length` tokens of each document that has as many
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zebra.data.corpus import Corpus
from zebra.data.encoding import Window, window_at, windows_of
from zebra.errors import ZebraError

CONVENTIONS = ("disjoint", "strided", "truncated")


@dataclass(frozen=True)
class ScoredWindow:
    """A window of the `text` (n,) of the document at an index, and the first token of the window that is scored."""

    document: int
    text: NDArray[np.integer]
    window: Window
    scored_from: int

    @property
    def tokens(self) -> NDArray[np.integer]:
        """The tokens (T,), made when needed: those of all windows may be several times the text."""
        return self.window.tokens(self.text)


def scored_windows(
    corpus: Corpus,
    length: int,
    convention: str,
    *,
    stride: int | None = None,
    prompt: int | None = None,
    prefix: tuple[int, ...] = (),
) -> list[ScoredWindow]:
    """The windows of all documents; the arguments are those of `zebra.evaluate.perplexity.perplexity`.

    Raises:
        ZebraError: contradicting options, or a text too short.
    """
    _check_options(length, convention, stride, prompt, prefix)
    step, first, windows = stride or max(1, length // 4), max(1, len(prefix), prompt or 0), []
    for i, tokens in enumerate(corpus):
        if convention == "disjoint":
            scored = [(window, first) for window in windows_of(tokens, length, prefix)]
        else:
            start = window_at(tokens, 0, length, prefix)
            scored = [(start, first)] if convention == "strided" or len(start) == length else []
        if convention == "strided":
            for last in range(start.end + step, len(tokens) + step, step):
                stop = min(last, len(tokens))
                window = replace(window_at(tokens, stop - length + len(prefix), length, prefix), end=stop)
                scored.append((window, max(first, len(window) - (stop - (last - step)))))
        windows += [ScoredWindow(i, tokens, one, after) for one, after in scored if len(one) > after]
    if not windows:
        raise ZebraError(
            f"no document has enough tokens for the {convention} convention at length {length:,}; the longest has "
            f"{int(corpus.lengths.max(initial=0)):,}. Give longer documents, join them, or use a shorter length."
        )
    return windows


def _check_options(
    length: int, convention: str, stride: int | None, prompt: int | None, prefix: tuple[int, ...]
) -> None:
    if convention not in CONVENTIONS:
        raise ZebraError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}. Choose one.")
    if length <= (least := max(1, len(prefix))):
        raise ZebraError(
            f"the length must be at least {least + 1}, {least} to see and one to predict; got {length}. Raise it."
        )
    if stride is not None and (convention != "strided" or not 1 <= stride < length):
        raise ZebraError(
            f"a stride requires the strided convention and must be from 1 to length - 1; got {stride} "
            f"with the {convention} convention and length {length}. Change one of them."
        )
    if prompt is not None and not 1 <= prompt < length:
        raise ZebraError(
            f"the prompt must be from 1 to length - 1; got {prompt} with length {length}. Change one of them."
        )

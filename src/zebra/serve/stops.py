"""Strings that end an answer and are no part of it."""

from __future__ import annotations


class StopFilter:
    """Text as it comes, without the first stop string and all that follows.

    What may be the beginning of a stop string is held back until more text decides.

        stop "END"    in: "a E" "N" "x"    out: "a " "" "ENx"

    Args:
        stop: the strings.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop, self._back, self.stopped = stop, "", False

    def put(self, text: str) -> str:
        """The part of the text so far that is certain, and was not returned before."""
        if self.stopped:
            return ""
        text = self._back + text
        hits = [at for string in self._stop if (at := text.find(string)) >= 0]
        if hits:
            self._back, self.stopped = "", True
            return text[: min(hits)]
        held = max((_overlap(text, string) for string in self._stop), default=0)
        self._back = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back: no stop string came."""
        text, self._back = self._back, ""
        return text


def _overlap(text: str, string: str) -> int:
    """The longest end of a text with which a string begins."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)

"""Stop strings, which end an answer and are not part of it."""

from __future__ import annotations


class StopFilter:
    """Cuts streamed text before the first stop string.

    Text that may be the beginning of a stop string is held back until more text decides.

        stop "END"    in: "a E" "N" "x"     out: "a " "" "ENx"
                      in: "a E" "N" "Dx"    out: "a " "" ""

    Args:
        stop: the stop strings.

    Attributes:
        stopped: whether a stop string was seen.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop, self._back, self.stopped = stop, "", False

    def put(self, text: str) -> str:
        """Add text; return what is certain and was not returned before."""
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
        """Return the text that was held back; no stop string followed."""
        text, self._back = self._back, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest suffix of a text that is a proper prefix of a string."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)

"""Which tokens of a sequence each process holds: two chunks in zig-zag, so that all see as many keys.

    chunk      0   1   2   3   4   5   6   7       c = ceil(N / 2 P) tokens each; here P = 4
    process    0   1   2   3   3   2   1   0       r holds the chunks r and 2 P - 1 - r

Causal queries of chunk m see m c keys and those of their own chunk up to themselves: (2 P - 1) c for both chunks of any
process. Shards in the order of the tokens would leave the last process up to twice the mean. A process fetches

    global    (2 P - 2 - r) c                 the tokens before its second chunk, but for its first
    local     min(w - 1, start) for each      those before each of its chunks that a window of w reaches

(The order is that of ring attention for causal masks, arXiv 2407.21783, section 3.3.2.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shards:
    """N tokens over P processes. The last chunks of a length that does not divide end in padding."""

    tokens: int
    processes: int

    @property
    def chunk(self) -> int:
        """c, the tokens of a chunk."""
        return -(-self.tokens // (2 * self.processes))

    @property
    def length(self) -> int:
        """The tokens that a process holds."""
        return 2 * self.chunk

    @property
    def padded(self) -> int:
        """The tokens of the whole sequence with its padding."""
        return self.processes * self.length

    def held(self, process: int) -> tuple[range, range]:
        """The tokens of a process's two chunks."""
        first, second = process * self.chunk, (2 * self.processes - 1 - process) * self.chunk
        return range(first, first + self.chunk), range(second, second + self.chunk)

    def seen(self, process: int, window: int | None) -> tuple[range, range]:
        """The tokens that the queries of each of a process's chunks see, from the first one's window to the last one.

        window: of a local layer; None is global.
        """
        first, second = (
            range(0 if window is None else max(0, one.start - window + 1), one.stop) for one in self.held(process)
        )
        return first, second

    def fetched(self, process: int, window: int | None) -> tuple[range, range]:
        """The tokens that a process sees and does not hold: before its first chunk, and between its two."""
        (first, second), seen = self.held(process), self.seen(process, window)
        return range(seen[0].start, first.start), range(max(seen[1].start, first.stop), second.start)

    def traffic(self, window: int | None, sinks: int = 0) -> list[tuple[int, int]]:
        """For each process the tokens that it fetches, and those of its own that others fetch, in one document.

        sinks: first tokens of the sequence, which come to each chunk whose keys begin behind them.
        """
        c, chunks = self.chunk, 2 * self.processes
        fetched, of_chunks, steps = [0] * self.processes, [0] * chunks, [0] * (chunks + 1)
        for process in range(self.processes):
            for tokens in self.fetched(process, window):
                if not tokens:
                    continue
                fetched[process] += len(tokens)
                first, unseen = divmod(tokens.start, c)  # the rest of a chunk, and whole ones behind it
                of_chunks[first] -= unseen
                steps[first] += c
                steps[tokens.stop // c] -= c
            for keys in self.seen(process, window):
                for token in range(min(sinks, keys.start)):
                    if self.owner(token // c) != process:
                        fetched[process] += 1
                        of_chunks[token // c] += 1
        covered = 0
        for chunk in range(chunks):
            covered += steps[chunk]
            of_chunks[chunk] += covered
        return [(count, of_chunks[r] + of_chunks[chunks - 1 - r]) for r, count in enumerate(fetched)]

    def owner(self, chunk: int) -> int:
        """The process that holds a chunk."""
        return min(chunk, 2 * self.processes - 1 - chunk)

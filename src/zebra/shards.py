"""Which tokens of a sequence each process holds: two chunks in zig-zag order, which balances the work of attention.

    chunk      0   1   2   3   4   5   6   7       c = ceil(N / 2 P) tokens each; here P = 4
    process    0   1   2   3   3   2   1   0       r holds the chunks r and 2 P - 1 - r

Causal queries of chunk m see the m c keys before it, and those of their own chunk up to themselves. For the two chunks
of any process, m c adds up to (2 P - 1) c. With contiguous shards the last process would have up to twice the mean
work. A process fetches

    global    (2 P - 2 - r) c                 the tokens before its second chunk, without its first chunk
    local     min(w - 1, start) for each      the tokens before each chunk that a window of w reaches, without its own

(The split is that of context parallelism in Llama 3, arXiv 2407.21783, section 3.3.2.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shards:
    """N tokens over P processes. If N is not a multiple of 2 P, the sequence ends in padding."""

    tokens: int
    processes: int

    @property
    def chunk(self) -> int:
        """The tokens of a chunk, c."""
        return -(-self.tokens // (2 * self.processes))

    @property
    def length(self) -> int:
        """The number of tokens that a process holds."""
        return 2 * self.chunk

    @property
    def padded(self) -> int:
        """The number of tokens of the whole sequence with its padding."""
        return self.processes * self.length

    def held(self, process: int) -> tuple[range, range]:
        """The tokens of a process's two chunks."""
        first, second = process * self.chunk, (2 * self.processes - 1 - process) * self.chunk
        return range(first, first + self.chunk), range(second, second + self.chunk)

    def seen(self, process: int, window: int | None) -> tuple[range, range]:
        """For each of a process's two chunks, the tokens that its queries see.

        Args:
            window: of a local layer; None for a global layer.
        """
        first, second = (
            range(0 if window is None else max(0, one.start - window + 1), one.stop) for one in self.held(process)
        )
        return first, second

    def fetched(self, process: int, window: int | None) -> tuple[range, range]:
        """The tokens that a process sees but does not hold: before its first chunk, and between its two chunks."""
        (first, second), seen = self.held(process), self.seen(process, window)
        return range(seen[0].start, first.start), range(max(seen[1].start, first.stop), second.start)

    def traffic(self, window: int | None, sinks: int = 0) -> list[tuple[int, int]]:
        """For each process, how many tokens it fetches and how many of its own the others fetch, for one document.

        Args:
            sinks: number of first tokens, which each chunk also fetches if its keys begin after them.
        """
        c, chunks = self.chunk, 2 * self.processes
        fetched, of_chunks, steps = [0] * self.processes, [0] * chunks, [0] * (chunks + 1)
        for process in range(self.processes):
            for tokens in self.fetched(process, window):
                if not tokens:
                    continue
                fetched[process] += len(tokens)
                first, unseen = divmod(tokens.start, c)  # the rest of a chunk, and whole chunks after it
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

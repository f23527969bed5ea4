"""Shards of a sequence: each token is in one shard, and the planned traffic equals a count token by token."""

from __future__ import annotations

import itertools

import pytest

from zebra.shards import Shards

LENGTHS, PROCESSES, WINDOWS = (1, 3, 16, 29, 40), (1, 2, 3, 4), (None, 1, 2, 5, 13, 100)


@pytest.mark.parametrize("processes", PROCESSES)
def test_every_token_is_held_by_its_owner_alone(processes: int) -> None:
    for tokens in LENGTHS:
        shards = Shards(tokens, processes)
        held = [token for process in range(processes) for chunk in shards.held(process) for token in chunk]
        assert sorted(held) == list(range(shards.padded))
        assert tokens <= shards.padded < tokens + 2 * processes
        for process in range(processes):
            of_process = [token for chunk in shards.held(process) for token in chunk]
            assert {shards.owner(token // shards.chunk) for token in of_process} == {process}


@pytest.mark.parametrize("processes", PROCESSES)
def test_traffic_counts_each_token_that_a_query_sees_and_another_holds(processes: int) -> None:
    for tokens, window, sinks in itertools.product(LENGTHS, WINDOWS, (0, 2, 7)):
        if window is None and sinks:
            continue
        shards = Shards(tokens, processes)
        fetched, sent = [0] * processes, [0] * processes
        for reader in range(processes):
            chunks = shards.held(reader)
            first = [[0 if window is None else max(0, query - window + 1) for query in chunk] for chunk in chunks]
            seen = {
                key
                for chunk, firsts in zip(chunks, first, strict=True)
                for query, start in zip(chunk, firsts, strict=True)
                for key in range(start, query + 1)
            }
            before = [key for firsts in first for key in range(min(sinks, firsts[0]))]
            for key in (*seen, *before):
                if (owner := shards.owner(key // shards.chunk)) != reader:
                    fetched[reader] += 1
                    sent[owner] += 1
        assert shards.traffic(window, sinks) == list(zip(fetched, sent, strict=True))


def test_the_traffic_of_a_global_layer_by_hand() -> None:
    """Process r fetches (2 P - 2 - r) c tokens; its first chunk goes to all others, its second one to the r before."""
    c, processes = 16, 8
    traffic = Shards(2 * processes * c, processes).traffic(None)
    assert traffic == [((2 * processes - 2 - r) * c, (processes - 1 + r) * c) for r in range(processes)]

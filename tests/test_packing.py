"""Training sequences: no token is lost or repeated, labels and positions are right, and sequences are well filled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zebra.data.corpus import Corpus
from zebra.data.packing import IGNORE, PackedSequences, pack
from zebra.errors import ZebraError


def corpus_of(*lengths: int, kind: Any = np.uint16) -> Corpus:
    """Documents whose tokens are all different, from 1 on, so that none equals padding (0)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.arange(1, offsets[-1] + 1).astype(kind), offsets)


def drawn(seed: int, documents: int = 60, longest: int = 40) -> Corpus:
    return corpus_of(*np.random.default_rng(seed).integers(1, longest, documents).tolist())


CORPORA = {
    "short": corpus_of(3, 4, 2, 5, 1, 1, 6),
    "long": corpus_of(50, 33, 16, 17, 15, 64),
    "even": corpus_of(16, 16, 16),
    "one": corpus_of(37),
    "empty documents": corpus_of(0, 9, 0, 0, 20, 0),
    "drawn": drawn(1),
    "wide": corpus_of(100, 200, kind=np.uint32),
}
corpora = pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA.keys())


def documents_of(corpus: Corpus) -> dict[int, int]:
    """Each token to its document."""
    return {int(token): i for i in range(len(corpus)) for token in corpus[i]}


def as_lists(sequences: PackedSequences) -> list[dict[str, Any]]:
    return [{name: tensor.tolist() for name, tensor in sequences[i].items()} for i in range(len(sequences))]


@corpora
@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("join", [False, True])
def test_rows_are_whole(corpus: Corpus, length: int, join: bool) -> None:
    sequences = pack(corpus, length, join=join, seed=0)
    assert len(sequences) > 0
    for i in range(len(sequences)):
        sequence = sequences[i]
        assert sorted(sequence) == ["input_ids", "labels", "position_ids"]
        for tensor in sequence.values():
            assert tensor.shape == (length,)
            assert tensor.dtype == torch.int64


@corpora
@pytest.mark.parametrize("length", [1, 7, 16])
def test_apart_has_every_token_once(corpus: Corpus, length: int) -> None:
    sequences = pack(corpus, length, join=False, seed=0)
    tokens = [token for sequence in as_lists(sequences) for token in sequence["input_ids"] if token]
    assert sorted(tokens) == corpus.tokens.tolist()
    assert sequences.tokens == len(corpus.tokens)


@corpora
@pytest.mark.parametrize("length", [1, 7, 16])
def test_apart_labels_and_positions(corpus: Corpus, length: int) -> None:
    """A piece continues while the next token is the next one of the same document."""
    document = documents_of(corpus)
    for sequence in as_lists(pack(corpus, length, join=False, seed=0)):
        position, padding = -1, False
        for t, token in enumerate(sequence["input_ids"]):
            before = sequence["input_ids"][t - 1] if t else None
            if token == 0:
                position = position + 1 if padding else 0
                padding = True
                assert sequence["labels"][t] == IGNORE == -100
            else:
                assert not padding
                goes_on = before == token - 1 and document[before] == document[token]
                position = position + 1 if goes_on else 0
                assert sequence["labels"][t] == (token if goes_on else IGNORE)
            assert sequence["position_ids"][t] == position


@corpora
@pytest.mark.parametrize("length", [7, 16])
def test_apart_cuts_no_document_that_fits(corpus: Corpus, length: int) -> None:
    sequences = pack(corpus, length, join=False, seed=0)
    whole = {i: [] for i in range(len(corpus))}
    for document, start, count in sequences.pieces.tolist():
        whole[document].append((start, count))
    for document, pieces in whole.items():
        size = int(corpus.lengths[document])
        assert sorted(pieces) == [(start, min(length, size - start)) for start in range(0, size, length)]


def next_fit(lengths: list[int], sequence: int) -> int:
    """Sequences of pieces in the order in which they come, a new sequence where one does not fit."""
    sequences, room = 0, 0
    for length in lengths:
        for start in range(0, length, sequence):
            piece = min(sequence, length - start)
            if piece > room:
                sequences, room = sequences + 1, sequence
            room -= piece
    return sequences


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("length", [16, 40, 64])
def test_best_fit_beats_first_come(seed: int, length: int) -> None:
    corpus = drawn(seed, longest=64)
    lengths = corpus.lengths.tolist()
    sequences = len(pack(corpus, length, join=False, seed=0))
    bound = -(-sum(lengths) // length)
    assert bound <= sequences <= next_fit(lengths, length)
    assert sequences <= 1.25 * bound


@pytest.mark.parametrize(
    ("lengths", "sequence", "expected"),
    [
        ([2, 3, 7, 8], 10, [[3, 0], [2, 1]]),  # each to the sequence that it fills
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([6, 7, 3, 4], 10, [[1, 2], [0, 3]]),
        ([8, 7, 6, 2, 2], 10, [[0, 3], [1, 4], [2]]),
        ([6, 9, 7, 3, 1], 10, [[1, 4], [2, 3], [0]]),
        ([10, 1], 10, [[0], [1]]),
    ],
)
def test_best_fit_by_hand(lengths: list[int], sequence: int, expected: list[list[int]]) -> None:
    sequences = pack(corpus_of(*lengths), sequence, join=False, seed=0)
    packed = [
        sequences.pieces[a:b, 0].tolist() for a, b in zip(sequences.firsts[:-1], sequences.firsts[1:], strict=True)
    ]
    assert packed == expected


def test_apart_by_hand() -> None:

    (sequence,) = as_lists(pack(corpus_of(5, 2, 1), 8, join=False, seed=0))
    assert sequence == {
        "input_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 0],
        "labels": [-100, 2, 3, 4, 5, -100, 7, -100],
    }
    *_, sequence = as_lists(pack(corpus_of(7, 3), 7, join=False, seed=0))
    assert sequence == {
        "input_ids": [8, 9, 10, 0, 0, 0, 0],
        "position_ids": [0, 1, 2, 0, 1, 2, 3],
        "labels": [-100, 9, 10, -100, -100, -100, -100],
    }


@corpora
@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("seed", [0, 5])
def test_joined_is_one_stream_of_whole_documents(corpus: Corpus, length: int, seed: int) -> None:
    sequences = pack(corpus, length, join=True, seed=seed)
    stream = [token for sequence in as_lists(sequences) for token in sequence["input_ids"]]
    total = len(corpus.tokens)
    assert len(sequences) == total // length
    assert sequences.tokens == len(stream) == total // length * length
    assert len(set(stream)) == len(stream)
    assert set(stream) <= set(corpus.tokens.tolist())
    document = documents_of(corpus)
    lengths = corpus.lengths
    for t, token in enumerate(stream):  # a document begins at its first token and ends at its last
        if t == 0 or document[stream[t - 1]] != document[token]:
            assert token == corpus[document[token]][0]
            if t:
                assert stream[t - 1] == corpus[document[stream[t - 1]]][-1]
        else:
            assert token == stream[t - 1] + 1
    # what is dropped is the end of the stream only
    assert sum(1 for d in range(len(corpus)) if lengths[d] and int(corpus[d][0]) in set(stream)) == len(
        {document[token] for token in stream}
    )


@corpora
@pytest.mark.parametrize("length", [1, 7, 16])
def test_joined_labels_and_positions(corpus: Corpus, length: int) -> None:
    for sequence in as_lists(pack(corpus, length, join=True, seed=3)):
        assert sequence["position_ids"] == list(range(length))
        assert sequence["labels"] == [IGNORE, *sequence["input_ids"][1:]]


def test_joined_in_an_order_drawn_by_the_seed() -> None:
    corpus = drawn(2)
    first, again, other = (as_lists(pack(corpus, 32, join=True, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [sequence["input_ids"] for sequence in first] != [
        corpus.tokens[i : i + 32].tolist() for i in range(0, len(first) * 32, 32)
    ]


def test_every_document_may_come_first() -> None:
    corpus = corpus_of(4, 4, 4)
    assert {pack(corpus, 12, join=True, seed=seed)[0]["input_ids"][0].item() for seed in range(20)} == {1, 5, 9}


def test_apart_does_not_depend_on_the_seed() -> None:
    assert as_lists(pack(drawn(2), 32, join=False, seed=1)) == as_lists(pack(drawn(2), 32, join=False, seed=2))


@pytest.mark.parametrize("join", [False, True])
def test_text_shorter_than_a_row_is_refused(join: bool) -> None:
    with pytest.raises(ZebraError, match="the text has 9 tokens, fewer than one sequence of 10"):
        pack(corpus_of(4, 5), 10, join=join, seed=0)
    assert len(pack(corpus_of(4, 5), 9, join=join, seed=0)) == 1

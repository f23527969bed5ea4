"""Mixtures: the requested shares in the packed sequences, no held-out document in training, duplicates used once."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import zstandard
from conftest import STORIES, TEXT
from pyarrow import parquet
from rich.console import Console
from transformers import AutoTokenizer

from zebra.data.composition import mixture_tables
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder
from zebra.data.mixture import Mixture, Source, SourceSplit, mix, select, split_sources
from zebra.errors import ZebraError

SEPARATOR = "<|endoftext|>"
STORY = [story.strip() for story in (TEXT / "tinystories_train.txt").read_text().split(SEPARATOR) if story.strip()]


def corpus_of(*lengths: int, first: int = 1, texts: str | None = None) -> Corpus:
    """Documents whose tokens are all different; equal letters in `texts` stand for documents with equal texts."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = list(texts) if texts else [f"{first} {i}" for i in range(len(lengths))]
    hashes = np.array([int(hashlib.md5(name.encode()).hexdigest()[:16], 16) for name in names], dtype=np.uint64)
    return Corpus(np.arange(first, first + offsets[-1]).astype(np.uint32), offsets, hashes)


def drawn(seed: int, documents: int = 200, longest: int = 300, first: int = 1) -> Corpus:
    return corpus_of(*np.random.default_rng(seed).integers(1, longest, documents).tolist(), first=first)


def documents(part: SourceSplit) -> list[int]:
    return part.train.tolist()


def tokens_of(mixture: Mixture) -> list[list[int]]:
    return [
        [token for token in mixture.sequences[i]["input_ids"].tolist() if token] for i in range(len(mixture.sequences))
    ]


# -- choosing


def test_a_bucket_is_half_open() -> None:
    corpus = corpus_of(1, 5, 9, 10, 11, 50)
    sources = [Source("short", corpus, max_tokens=10), Source("long", corpus, min_tokens=10)]
    assert [documents(part) for part in split_sources(sources, deduplicate=True)] == [[0, 1, 2], [3, 4, 5]]
    assert [source.bucket for source in sources] == ["[0, 10)", "[10, ∞)"]


def test_the_first_of_duplicates_is_kept() -> None:
    sources = [Source("one", corpus_of(1, 2, 3, 4, texts="abca")), Source("two", corpus_of(2, 5, 1, texts="bdd"))]
    splits = split_sources(sources, deduplicate=True)
    assert [documents(part) for part in splits] == [[0, 1, 2], [1]]
    assert [part.duplicates for part in splits] == [1, 2]
    splits = split_sources(sources, deduplicate=False)
    assert [documents(part) for part in splits] == [[0, 1, 2, 3], [0, 1, 2]]
    assert [part.duplicates for part in splits] == [0, 0]


def test_a_document_outside_its_bucket_shadows_no_other() -> None:
    sources = [Source("long", corpus_of(1, 20, texts="ab"), min_tokens=10), Source("all", corpus_of(1, 20, texts="ab"))]
    assert [documents(part) for part in split_sources(sources, deduplicate=True)] == [[1], [0]]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_what_is_held_out_depends_on_the_text_alone(deduplicate: bool) -> None:
    one = drawn(1)
    order = np.random.default_rng(0).permutation(len(one))
    shuffled = corpus_of(*one.lengths[order].tolist())
    shuffled = Corpus(shuffled.tokens, shuffled.offsets, one.hashes[order])
    (a,), (b,) = (split_sources([Source("s", c)], deduplicate=deduplicate, held_out=0.2) for c in (one, shuffled))
    held = set(one.hashes[a.held_out].tolist())
    assert held == set(shuffled.hashes[b.held_out].tolist())
    assert 0.1 < len(held) / len(one) < 0.3
    assert not held & set(one.hashes[a.train].tolist())
    assert len(a.train) + len(a.held_out) == len(one)
    (more,) = split_sources([Source("s", one)], deduplicate=deduplicate, held_out=0.5)
    assert held < set(one.hashes[more.held_out].tolist())  # a greater share holds out these and others


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("join", [False, True])
def test_what_is_held_out_is_never_in_a_sequence(deduplicate: bool, join: bool) -> None:
    """Not even as a duplicate in another source."""
    one, two = drawn(1), drawn(2, first=100_000)
    two = Corpus(two.tokens, two.offsets, np.concatenate([one.hashes[:100], two.hashes[100:]]))
    splits = split_sources([Source("one", one, 0.5), Source("two", two, 0.5)], deduplicate=deduplicate, held_out=0.1)
    assert sum(len(part.held_out) for part in splits)
    hashes = {int(part.source.corpus.hashes[i]) for part in splits for i in part.held_out}
    held = {
        int(token)
        for corpus in (one, two)
        for i in range(len(corpus))
        if int(corpus.hashes[i]) in hashes
        for token in corpus[i]
    }
    mixture = mix(splits, 3000, 128, join=join, seed=0)
    assert min(line.drawn / line.split.tokens for line in mixture.stats) > 3
    assert not held & {token for sequence in tokens_of(mixture) for token in sequence}
    gathered = select(splits, held_out=True).gathered()
    assert set(gathered.tokens.tolist()) <= held
    assert len(gathered) == sum(len(part.held_out) for part in splits)
    assert gathered[0].tolist() == one[splits[0].held_out[0]].tolist()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            Source("s", corpus_of(4, 7), min_tokens=8),
            {},
            r"s has no document .* 2 documents of 4 to 7 tokens, 0 lie in \[8, ∞\)",
        ),
        (Source("s", corpus_of(0, 0)), {}, "no document to train on: of 2 documents of 0 to 0 tokens"),
        (
            Source("s", corpus_of(5, texts="a")),
            {"held_out": 1 - 1e-12},
            "0 of them are duplicates and 1 held out. Widen",
        ),
        (Source("s", drawn(1, 3)), {"held_out": 1e-9}, "held_out 1e-09 holds out none of 3 documents. Raise it"),
    ],
)
def test_nothing_left_is_refused(source: Source, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        split_sources([source], deduplicate=True, **options)


def test_a_source_of_duplicates_alone_is_refused() -> None:
    with pytest.raises(ZebraError, match=r"the source two has no document to train on: .* 1 of them are duplicates"):
        split_sources(
            [Source("one", corpus_of(5, texts="a")), Source("two", corpus_of(5, texts="a"))], deduplicate=True
        )


# -- drawing


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (1 / 3, 2 / 3), (0.999, 0.001)])
@pytest.mark.parametrize("count", [40, 2000])
def test_the_shares_are_those_asked_for(shares: tuple[float, float], count: int, join: bool) -> None:
    one, two = drawn(1), drawn(2, first=100_000)
    splits = split_sources([Source("a", one, shares[0]), Source("b", two, shares[1])], deduplicate=True)
    mixture = mix(splits, count, 128, join=join, seed=3)
    packed = np.array([token for sequence in tokens_of(mixture) for token in sequence])
    assert len(packed) == mixture.sequences.tokens
    packed_shares = [(packed < 100_000).mean(), (packed >= 100_000).mean()]
    assert packed_shares == pytest.approx(shares, abs=0.001)
    assert [line.share for line in mixture.stats] == pytest.approx(packed_shares)
    assert [line.drawn for line in mixture.stats] == [(packed < 100_000).sum(), (packed >= 100_000).sum()]
    assert len(mixture.sequences) == count if join else 0.97 * count < len(mixture.sequences) <= count


def test_part_of_a_mixture_counts_its_own_tokens() -> None:
    splits = split_sources([Source("a", drawn(1), 0.7), Source("b", drawn(2, first=100_000), 0.3)], deduplicate=True)
    mixture = mix(splits, 40, 128, join=True, seed=0)
    part = mixture.take(np.array([31, 4, 5]))
    assert tokens_of(part) == [tokens_of(mixture)[i] for i in (31, 4, 5)]
    tokens = np.concatenate(tokens_of(part))
    assert [line.drawn for line in part.stats] == [(tokens < 100_000).sum(), (tokens >= 100_000).sum()]
    assert mixture.take(np.arange(40)).stats == mixture.stats


@pytest.mark.parametrize("seed", range(3))
def test_documents_come_once_before_any_comes_twice(seed: int) -> None:
    corpus = drawn(1, documents=30)
    total = len(corpus.tokens)
    splits = split_sources([Source("s", corpus)], deduplicate=True)
    for count, length in ((1, total // 3), (1, total), (5, total // 2)):
        (line,) = (mixture := mix(splits, count, length, join=True, seed=seed)).stats
        counts = np.bincount([token for sequence in tokens_of(mixture) for token in sequence], minlength=total + 1)[1:]
        whole = count * length // total
        assert set(counts.tolist()) <= {whole, whole + 1}
        assert line.drawn / line.split.tokens == pytest.approx(count * length / total)


def test_only_one_document_of_a_source_is_cut() -> None:
    corpus = drawn(1, documents=50)
    mixture = mix(split_sources([Source("s", corpus)], deduplicate=True), 9, 128, join=True, seed=0)
    cut = mixture.drawn.lengths < corpus.lengths[mixture.drawn.documents]
    assert cut.sum() <= 1
    assert mixture.drawn.lengths.sum() == 9 * 128


def test_a_mixture_is_that_of_its_seed() -> None:
    def packed(seed: int, *sources: Source) -> list[list[int]]:
        return tokens_of(mix(split_sources(sources, deduplicate=True), 30, 128, join=True, seed=seed))

    two = [Source("a", drawn(1), 0.5), Source("b", drawn(2, first=100_000), 0.5)]
    assert packed(1, *two) == packed(1, *two)
    assert packed(1, *two) != packed(2, *two)


def test_a_source_is_drawn_alike_whatever_stands_beside_it() -> None:
    one, two = drawn(1), drawn(2, first=100_000)
    drawn_documents = []
    for beside in ([], [Source("b", two, 0.5)]):
        splits = split_sources([*beside, Source("a", one, 0.5 if beside else 1.0)], deduplicate=True)
        selection = mix(splits, 32 if beside else 16, 128, join=True, seed=1).drawn
        drawn_documents.append(selection.documents[selection.sources == len(beside)].tolist())
    assert drawn_documents[0] == drawn_documents[1]


def test_sequences_with_room_at_their_end_are_no_more_than_asked_for() -> None:
    """Documents of 0.6 sequences, so that no two fit into one."""
    corpus = corpus_of(*[60] * 500)
    mixture = mix(split_sources([Source("s", corpus)], deduplicate=True), 200, 100, join=False, seed=0)
    assert 195 <= len(mixture.sequences) <= 200
    assert mixture.sequences.tokens == pytest.approx(200 * 60, rel=0.03)


# -- from files


def four_kinds(folder: Path) -> list[Path]:
    """The stories of the examples: joined into long ones, as text, JSON Lines plain and packed, and parquet."""
    stories = list(STORY)
    random.Random(5).shuffle(stories)
    books = [f"{SEPARATOR}\n".join(stories[i : i + 12]).replace(SEPARATOR, "") for i in range(0, 240, 12)]
    lines = ["".join(json.dumps({"text": s, "n": 1}) + "\n" for s in stories[a:b]) for a, b in ((240, 500), (500, 700))]
    (folder / "books.txt").write_text(SEPARATOR.join(books))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines[1].encode()))
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories[650:900]))  # 50 again
    parquet.write_table(arrow.table({"body": stories[900:1200]}), folder / "d.parquet")
    return [folder / name for name in ("books.txt", "a.jsonl.gz", "b.jsonl.zst", "c.jsonl", "d.parquet")]


@pytest.mark.parametrize("join", [False, True])
def test_a_mixture_from_four_kinds_of_files(tmp_path: Path, join: bool) -> None:
    """Long documents are a fifth of the text and three fifths of the mixture."""
    books, packed_a, packed_b, plain, columns = four_kinds(tmp_path)
    encoder = Encoder.of(AutoTokenizer.from_pretrained(STORIES))

    def corpus(*files: Path, **options: Any) -> Corpus:
        return read_corpus([str(file) for file in files], encoder, cache=tmp_path / "c", **options)

    sources = [
        Source("long", corpus(books, separator=SEPARATOR), 0.6, min_tokens=1024),
        Source("packed", corpus(packed_a, packed_b), 0.17, max_tokens=1024),
        Source("plain", corpus(plain), 0.13, min_tokens=100, max_tokens=1024),
        Source("columns", corpus(columns, field="body"), 0.1),
    ]
    splits = split_sources(sources, deduplicate=True, held_out=0.02)
    assert splits[2].duplicates >= 40
    mixture = mix(splits, 256, 1024, join=join, seed=0)
    packed = np.zeros(len(sources))
    for document, _, count in mixture.sequences.pieces:
        packed[mixture.drawn.sources[document]] += count
    shares = packed / packed.sum()
    assert np.abs(shares - [source.share for source in sources]).max() < 0.001
    assert (
        sum(int((mixture.sequences[i]["labels"] >= 0).sum()) for i in range(len(mixture.sequences)))
        > 0.9 * packed.sum()
    )
    there = np.array([line.split.tokens for line in mixture.stats])
    assert there[0] / there.sum() < 0.3
    times = np.array([line.drawn / line.split.tokens for line in mixture.stats])
    assert times[0] > 1 > times[3]


# -- printing


def test_a_mixture_is_printed() -> None:
    one, two = corpus_of(*[100] * 20), corpus_of(*[1000] * 4, 1500, first=100_000)
    splits = split_sources([Source("short", one, 0.2), Source("long", two, 0.8, min_tokens=1000)], deduplicate=True)
    mixture = mix(splits, 100, 100, join=True, seed=0)
    shown = io.StringIO()
    Console(width=80, file=shown).print(mixture_tables(mixture))
    lines = [line.split() for line in shown.getvalue().splitlines() if line.strip()]
    assert ["short", "[0,", "∞)", "20", "2,000", "0", "0"] in lines
    assert ["long", "[1,000,", "∞)", "5", "5,500", "0", "0"] in lines
    assert ["short", "2,000", "20.00%", "20.00%", "1.00"] in lines
    assert ["long", "8,000", "80.00%", "80.00%", "1.45"] in lines
    assert "100 sequences of 100, 10,000 tokens" in shown.getvalue()
    by_length = {tuple(line[:3]): line[3:] for line in lines if "to" in line}
    assert by_length["0", "to", "256"] == ["26.7%", "20.0%"]
    assert by_length["256", "to", "512"] == ["0.0%", "0.0%"]
    assert set(by_length) == {
        ("0", "to", "256"),
        ("256", "to", "512"),
        ("512", "to", "1,024"),
        ("1,024", "to", "2,048"),
    }

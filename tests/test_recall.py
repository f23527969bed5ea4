"""Documents of recall: exact lengths, questions about what was told, growth, sequences by seed."""

from __future__ import annotations

import math
import re
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer

import zebra
from zebra.data.corpus import Corpus
from zebra.data.packing import IGNORE, pack
from zebra.data.recall import KINDS, Curriculum, RecallDataset, RecallGenerator
from zebra.errors import ZebraError
from zebra.evaluate.recall import recall_by_distance


@pytest.fixture(scope="module")
def recall(tokenizer: Any) -> RecallGenerator:
    return RecallGenerator(tokenizer)


RETRIEVAL = ROOT / "examples" / "retrieval-2.2M"

ASKS = {
    "entries": r"(\w+): (\d{5})\.",
    "lookup": r"Look up the key (\d{5}) again\. \1: (\d{5})\.",
    "needle": r"Which number is noted for (\w+)\? The number noted for \1 is (\d{5})\.",
    "passkey": r"What is the (pass key)\? The pass key is (\d{5})\.",
}
TELLS = {"needle": "The number noted for {} is {}.", "passkey": "The {} is {}."}


def only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in ("_EASY_WEIGHTS", "_SHORT_WEIGHTS", "_LONG_WEIGHTS"):
        monkeypatch.setattr(f"zebra.data.recall.{weights}", [int(one == kind) for one in KINDS])


@pytest.mark.parametrize("kind", ASKS)
@pytest.mark.parametrize("size", [130, 777])
def test_a_document_is_exact_and_asks_for_what_it_told(
    kind: str, size: int, recall: RecallGenerator, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the text, by patterns alone, answers every question, and finds the labels to be the answers."""
    only(kind, monkeypatch)
    ids, labels = recall.document(size, Random(size))
    assert len(ids) == len(labels) == size
    answers = [i for i, label in enumerate(labels) if label != IGNORE]
    assert all(labels[i] == ids[i] for i in answers)
    text = tokenizer.decode(ids)
    matches = list(re.finditer(ASKS[kind], text))
    pairs = [one.groups() for one in matches]
    if kind == "entries":
        pairs = [pair for i, pair in enumerate(pairs) if pair in pairs[:i]]
    assert pairs
    assert all(text.count(TELLS.get(kind, "{}: {}.").format(*pair)) >= 2 - (kind == "passkey") for pair in pairs)
    answer_text = tokenizer.decode([ids[i] for i in answers])
    assert all(number in answer_text for _, number in pairs)
    if size == 777 and kind != "passkey":
        assert len(pairs) > 5


@pytest.mark.parametrize("symbols", [0.0, 0.3, 1.0])
def test_symbols_that_are_labelled_are_told_before(
    symbols: float, recall: RecallGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A labelled symbol completes the beginning of a line that occurred before; repeating texts have one period."""
    for seed in range(20):
        only("pairs", monkeypatch)
        ids, labels = recall.document(90, Random(seed), symbols)
        assert len(ids) == len(labels) == 90
        line = 0
        for i, label in enumerate(labels):
            line = i if label == IGNORE else line
            beginning = ids[line : i + 1]
            assert label == IGNORE or any(ids[j : j + len(beginning)] == beginning for j in range(line))
        assert sum(label != IGNORE for label in labels) > 5
        only("repeats", monkeypatch)
        ids, labels = recall.document(90, Random(seed), symbols)
        periods = [j for j in range(2, 46) if all(a == b for a, b in zip(ids[1:], ids[1 + j :], strict=False))]
        assert len(ids) == len(labels) == 90
        assert labels == [IGNORE] * (periods[0] + 2) + ids[periods[0] + 2 :]


def test_symbols_grow_before_documents_do() -> None:
    curriculum = Curriculum(first=64, last=1024, hold=0.25, until=0.75)
    parts = [part / 8 for part in range(9)]
    assert [curriculum.at(part)[0] for part in parts] == [64, 64, 64, 128, 256, 512, 1024, 1024, 1024]
    assert [curriculum.at(part)[1] for part in parts] == [0.0, 0.25] + [1.0] * 7


def test_a_sequence_is_filled_by_documents_apart(recall: RecallGenerator) -> None:
    sequence = recall.sequence(1000, Random(1), longest=300)
    assert {name: tuple(values.shape) for name, values in sequence.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), (1000,)
    )
    starts = (sequence["position_ids"] == 0).nonzero()[:, 0].tolist()
    sizes = np.diff([*starts, 1000])
    assert len(sizes) > 3
    assert sizes.min() >= recall.min_tokens
    assert sizes.max() <= 300 + recall.min_tokens
    assert torch.equal(sequence["position_ids"], torch.cat([torch.arange(size) for size in sizes]))


def test_a_document_too_short_for_a_question_is_refused(recall: RecallGenerator) -> None:
    with pytest.raises(ZebraError, match=r"with one question requires a length of 79 tokens .*; got 78"):
        recall.lookups(78, Random(0))
    assert len(recall.lookups(79, Random(0))[0]) == 79


def test_text_is_a_haystack(tokenizer: Any) -> None:
    word = tokenizer.encode(" elephant", add_special_tokens=False)
    with_text = RecallGenerator(tokenizer, [np.array(word * 2000)])
    sequences = [with_text.sequence(1000, Random(i), longest=500)["input_ids"].tolist() for i in range(4)]
    assert any(" ".join(map(str, word * 3)) in " ".join(map(str, sequence)) for sequence in sequences)


def test_sequences_follow_from_the_seed_and_their_place(recall: RecallGenerator) -> None:
    text = pack(Corpus(np.repeat(np.arange(7, 47, dtype=np.uint16), 400), np.array([0, 16000])), 400, join=True, seed=0)

    def dataset(seed: int) -> RecallDataset:
        return RecallDataset(recall, text, share=0.5, curriculum=Curriculum(140, 400, 0.25, 0.5), count=40, seed=seed)

    first, again, other = dataset(1), dataset(1), dataset(2)
    assert len(first) == 40
    assert all(torch.equal(first[i]["input_ids"], again[i]["input_ids"]) for i in (39, 3, 17))
    assert not all(torch.equal(first[i]["input_ids"], other[i]["input_ids"]) for i in range(8))
    plain = [len(first[i]["input_ids"].unique()) == 1 for i in range(40)]
    assert first.text_indices.tolist() == [int(first[i]["input_ids"][0]) - 7 for i in range(40) if plain[i]]
    assert sum(plain[:10]) == 0
    assert 8 < sum(plain) < 22
    longest = [int(first[i]["position_ids"].max()) + 1 for i in range(40) if not plain[i]]
    assert longest[0] < 300
    assert max(longest[-8:]) == 400


@pytest.mark.parametrize("size", [200, 777])
def test_a_lookup_stands_where_its_answer_says(size: int, recall: RecallGenerator, tokenizer: Any) -> None:
    ids, answers = recall.lookups(size, Random(size))
    assert len(ids) == size
    assert answers
    for start, end, distance in answers:
        value, query = ids[start:end], tokenizer.decode(ids[:start])[-40:]
        assert value == ids[start - distance : end - distance]
        assert re.fullmatch(r"\d{5}", tokenizer.decode(value).strip())
        key = re.search(r"key (\d{5}) again\. \1: ?$", query)
        assert key
        assert f"{key[1]}: {tokenizer.decode(value).strip()}." in tokenizer.decode(ids[: start - 20])


def test_recall_is_the_mean_loss_of_the_values_by_distance() -> None:
    """By plain transformers' logits; a checkpoint that looks things up knows them, and one that does not guesses."""
    retrieval = zebra.load(RETRIEVAL)
    recall = RecallGenerator(AutoTokenizer.from_pretrained(RETRIEVAL))
    plain = AutoModelForCausalLM.from_pretrained(RETRIEVAL, dtype=torch.float32)
    scores = recall_by_distance(retrieval, recall, length=256, documents=4, first_bucket=64, seed=3)
    losses: dict[int, list[float]] = {0: [], 64: [], 128: []}
    for i in range(4):
        ids, answers = recall.lookups(256, Random(f"measured 3 256 {i}"))
        log_probabilities = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        for start, end, distance in answers:
            bucket = max(bound for bound in losses if bound <= distance)
            losses[bucket] += [-log_probabilities[t - 1, ids[t]].item() for t in range(start, end)]
    *scores, overall = scores
    assert overall.tokens == sum(map(len, losses.values()))
    assert overall.perplexity == pytest.approx(math.exp(sum(map(sum, losses.values())) / overall.tokens), rel=1e-3)
    assert {score.position_from: score.tokens for score in scores} == {b: len(one) for b, one in losses.items() if one}
    for score in scores:
        mean = sum(losses[score.position_from]) / len(losses[score.position_from])
        assert score.perplexity == pytest.approx(math.exp(mean), rel=1e-3)
        assert score.perplexity < 1.5
    guessing = recall_by_distance(
        zebra.load(STORIES), RecallGenerator(AutoTokenizer.from_pretrained(STORIES)), length=256, documents=2
    )
    assert all(score.perplexity > 5 for score in guessing)

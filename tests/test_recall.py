"""Documents of recall: exact lengths, questions about what was told, growth, rows by seed."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORIES
from transformers import AutoTokenizer

from zebra import Refusal
from zebra.data.corpus import Corpus
from zebra.data.packing import IGNORE, pack
from zebra.data.recall import KINDS, Growth, Recall, Taught


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def recall(tokenizer: Any) -> Recall:
    return Recall(tokenizer)


ASKS = {
    "entries": r"(\d{5}): (\d{5})\.",
    "lookup": r"Look up the key (\d{5}) again\. \1: (\d{5})\.",
    "needle": r"Which number is noted for (\w+)\? The number noted for \1 is (\d{5})\.",
    "passkey": r"What is the (pass key)\? The pass key is (\d{5})\.",
}
TELLS = {"needle": "The number noted for {} is {}.", "passkey": "The {} is {}."}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [130, 777])
def test_a_document_is_exact_and_asks_for_what_it_told(
    kind: str, size: int, recall: Recall, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the text, by patterns alone, answers every question."""
    monkeypatch.setattr("zebra.data.recall._WEIGHTS", [int(one == kind) for one in KINDS])
    ids, labels = recall.document(size, Random(size))
    assert len(ids) == len(labels) == size
    asked = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert set(labels[:asked]) == {IGNORE}
    assert labels[asked:] == ids[asked:]
    text, questions = (tokenizer.decode(part) for part in (ids[:asked], ids[asked:]))
    found = re.findall(ASKS[kind], questions)
    assert found
    assert re.sub(ASKS[kind], "", questions).strip() == ""
    assert all(TELLS.get(kind, "{}: {}.").format(*pair) in text for pair in found)
    if size == 777 and kind != "passkey":
        assert len(found) > 5


def test_a_document_too_small_is_refused(recall: Recall) -> None:
    with pytest.raises(Refusal, match=rf"at least {recall.least} tokens here; got 20"):
        recall.document(20, Random(0))


def test_a_row_is_filled_by_documents_apart(recall: Recall) -> None:
    row = recall.row(1000, 300, Random(1))
    assert {name: tuple(values.shape) for name, values in row.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), (1000,)
    )
    starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
    sizes = np.diff([*starts, 1000])
    assert len(sizes) > 3
    assert sizes.min() >= recall.least
    assert sizes.max() <= 300 + recall.least
    assert torch.equal(row["position_ids"], torch.cat([torch.arange(size) for size in sizes]))


def test_text_is_a_haystack(tokenizer: Any) -> None:
    word = tokenizer.encode(" elephant", add_special_tokens=False)
    with_text = Recall(tokenizer, [np.array(word * 2000)])
    rows = [with_text.row(1000, 500, Random(i))["input_ids"].tolist() for i in range(4)]
    assert any(" ".join(map(str, word * 3)) in " ".join(map(str, row)) for row in rows)


def test_documents_grow_by_a_constant_factor() -> None:
    growth = Growth(first=64, last=1024, until=0.5)
    assert [growth.longest(part / 8) for part in range(9)] == [64, 128, 256, 512, 1024, 1024, 1024, 1024, 1024]


def test_rows_follow_from_the_seed_and_their_place(recall: Recall) -> None:
    text = pack(Corpus(np.full(4000, 7, np.uint16), np.array([0, 4000])), 400, join=True, seed=0)

    def taught(seed: int) -> Taught:
        return Taught(recall, text, share=0.5, growth=Growth(140, 400, 0.5), count=40, seed=seed)

    ours, again, other = taught(1), taught(1), taught(2)
    assert len(ours) == 40
    assert all(torch.equal(ours[i]["input_ids"], again[i]["input_ids"]) for i in (39, 3, 17))
    assert not all(torch.equal(ours[i]["input_ids"], other[i]["input_ids"]) for i in range(8))
    plain = [bool((ours[i]["input_ids"] == 7).all()) for i in range(40)]
    assert 10 < sum(plain) < 30
    longest = [int(ours[i]["position_ids"].max()) + 1 for i in range(40) if not plain[i]]
    assert longest[0] < 300
    assert max(longest[-8:]) == 400

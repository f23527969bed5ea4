"""Perplexity by position against a brute-force computation from full logits."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORIES, TEXT, some
from transformers import LlamaConfig, LlamaForCausalLM

import zebra
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder, window_prefix, windows_of
from zebra.errors import ZebraError
from zebra.evaluate.intervals import bootstrap_mean, students_t
from zebra.evaluate.perplexity import Score, edges, evaluate_perplexity, perplexity, results_of, score_of
from zebra.evaluate.windows import CONVENTIONS, scored_windows
from zebra.model.checkpoint import load_tokenizer
from zebra.model.load import device_name
from zebra.model.self_extend import bounded_cache

VOCABULARY = 41


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def drawn(*lengths: int, seed: int = 0) -> Corpus:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, offsets[-1]).astype(np.uint16)
    return Corpus(tokens, offsets)


def brute_windows(n: int, length: int, convention: str, stride: int | None) -> list[tuple[int, int, int]]:
    """(first token, end, first scored token) of each window of a document of `n` tokens."""
    if convention == "truncated":
        return [(0, length, 1)] if n >= length else []
    if convention == "disjoint":
        return [(a, min(a + length, n), a + 1) for a in range(0, n, length)]
    step = stride or max(1, length // 4)
    windows, scored = [(0, min(length, n), 1)], min(length, n)
    while scored < n:
        end = min(scored + step, n)
        windows.append((end - length, end, scored))
        scored = end
    return windows


@dataclass
class Brute:
    """Losses and counts by (bucket, document), and how often each token of the corpus was scored."""

    sums: dict[tuple[int, int], float]
    counts: dict[tuple[int, int], int]
    scored: dict[tuple[int, int], int]


def brute(model: Any, corpus: Corpus, length: int, convention: str, stride: int | None, bounds: list[int]) -> Brute:
    losses = Brute(defaultdict(float), defaultdict(int), defaultdict(int))
    for document in range(len(corpus)):
        tokens = [int(token) for token in corpus[document]]
        for a, b, first in brute_windows(len(tokens), length, convention, stride):
            if b - a < 2:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([tokens[a:b]])).logits[0].double()
            chances = logits.log_softmax(-1)
            for t in range(first, b):
                position = t - a
                bucket = max(i for i, edge in enumerate(bounds[:-1]) if edge <= position)
                losses.sums[bucket, document] -= float(chances[position - 1, tokens[t]])
                losses.counts[bucket, document] += 1
                losses.scored[document, t] += 1
    return losses


def check(scores: list[Score], losses: Brute, bounds: list[int]) -> None:
    expected = []
    for bucket in range(len(bounds) - 1):
        documents = [d for b, d in losses.counts if b == bucket]
        if documents:
            total = sum(losses.sums[bucket, d] for d in documents)
            count = sum(losses.counts[bucket, d] for d in documents)
            expected.append((bounds[bucket], bounds[bucket + 1], math.exp(total / count), count, len(documents)))
    if len(bounds) > 2:
        total, count = sum(losses.sums.values()), sum(losses.counts.values())
        expected.append((0, bounds[-1], math.exp(total / count), count, len({d for _, d in losses.counts})))
    assert [(s.position_from, s.position_to, s.tokens, s.documents) for s in scores] == [
        (e[0], e[1], e[3], e[4]) for e in expected
    ]
    assert [s.perplexity for s in scores] == pytest.approx([e[2] for e in expected], rel=1e-5)


CASES = [
    ("disjoint", None),
    ("strided", None),
    ("strided", 1),
    ("strided", 3),
    ("strided", 4),
    ("truncated", None),
]


@pytest.mark.parametrize(("convention", "stride"), CASES)
@pytest.mark.parametrize(
    ("length", "batch_tokens"),
    [
        *((7, 50), (16, 8192), (21, 1)),
        *(pytest.param(n, most, marks=pytest.mark.full) for n in (5, 7, 16, 21) for most in (1, 50, 8192)),
    ],
)
def test_each_bucket_equals_full_logits(
    model: Any, convention: str, stride: int | None, length: int, batch_tokens: int
) -> None:
    corpus = drawn(33, 1, 2, 7, 21, 5, 16, 22, 49)
    bounds = edges(length, first=4)
    assert len(bounds) > 2
    losses = brute(model, corpus, length, convention, stride, bounds)
    options: dict[str, Any] = {"stride": stride, "first_bucket": 4, "batch_tokens": batch_tokens}
    check(perplexity(model, corpus, length=length, convention=convention, **options), losses, bounds)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_real_edges_and_odd_lengths(model: Any, convention: str) -> None:
    corpus = drawn(777, 300, 555)
    losses = brute(model, corpus, 555, convention, None, [0, 256, 512, 555])
    check(perplexity(model, corpus, length=555, convention=convention), losses, [0, 256, 512, 555])


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 31, 32, 33, 47, 50])
@pytest.mark.parametrize(("convention", "stride"), [case for case in CASES if case[0] != "truncated"])
def test_every_token_is_scored_once(n: int, convention: str, stride: int | None) -> None:
    """Disjoint leaves out each window's first token, strided the document's first alone."""
    length = 16
    document = np.arange(n)
    corpus = Corpus(document, np.array([0, n]))
    windows = scored_windows(corpus, length, convention, stride=stride)
    scored = [int(token) for w in windows for token in w.tokens[w.scored_from :]]
    unscored = set(range(0, n, length)) if convention == "disjoint" else {0}
    assert scored == [i for i in range(n) if i not in unscored]
    for i, window in enumerate(windows):
        assert len(window.tokens) <= length
        if convention == "strided" and i:  # nearly a full context before each token
            assert len(window.tokens) == length
            assert len(window.tokens) - window.scored_from <= (stride or length // 4)


@pytest.mark.parametrize("own", [True, False], ids=["begins with it", "without"])
@pytest.mark.parametrize("prefix", [(99,), (98, 99)], ids=str)
@pytest.mark.parametrize(("convention", "stride"), CASES)
def test_each_window_begins_with_the_prefix(
    convention: str, stride: int | None, prefix: tuple[int, ...], own: bool
) -> None:
    """Every token of the text is scored once, within `length` tokens; none of the prefix is, where windows put it."""
    length, text = 16, np.arange(50)
    document = np.concatenate([np.array(prefix), text]) if own else text
    corpus = Corpus(document, np.array([0, len(document)]))
    windows = scored_windows(corpus, length, convention, stride=stride, prefix=prefix)
    assert all(tuple(window.tokens[: len(prefix)]) == prefix for window in windows)
    assert all(len(window.tokens) == length for window in windows[:-1])
    scored = [int(token) for window in windows for token in window.tokens[window.scored_from :]]
    assert scored == list(range(length - len(prefix) if convention == "truncated" else 50))


def test_windows_are_no_copies_of_the_text() -> None:
    """With a prefix each window was one, all of them at once: four texts, by the strided convention."""
    text = np.zeros(1 << 20, np.uint16)
    tracemalloc.start()
    windows = scored_windows(Corpus(text, np.array([0, len(text)])), 8192, "strided", prefix=(1,))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(window.window) for window in windows) > 3.9 * len(text)
    assert most < text.nbytes


def test_a_document_within_joined_ones_does_not_get_its_beginning_twice() -> None:
    text = np.array([99, 1, 2, 3, 99, 4, 5, 6, 7, 8, 99, 9])
    windows = scored_windows(Corpus(text, np.array([0, len(text)])), 4, "disjoint", prefix=(99,))
    assert [window.tokens.tolist() for window in windows] == [[99, 1, 2, 3], [99, 4, 5, 6], [99, 7, 8, 99], [99, 9]]


@pytest.mark.parametrize("prefix", [(99,), (98, 99)], ids=str)
def test_a_window_that_its_prefix_fills_is_refused(prefix: tuple[int, ...]) -> None:
    """It would never come to the end of the text."""
    with pytest.raises(ZebraError, match=f"a window must have at least {len(prefix) + 1} tokens.*got {len(prefix)}"):
        list(itertools.islice(windows_of(np.arange(9), len(prefix), prefix), 20))


def test_the_beginning_is_the_tokenizers_habit_and_named(tmp_path: Path) -> None:
    """Against full logits of the window that a model with such a tokenizer reads: <s>, then a part of the text."""
    (tmp_path / "a.txt").write_text((TEXT / "tinystories_test.txt").read_text()[:900].replace("<|endoftext|>", " "))
    tokenizer, model = load_tokenizer(STORIES), zebra.load(STORIES)
    ids = tokenizer((tmp_path / "a.txt").read_text().strip())["input_ids"]
    assert ids[0] == tokenizer.bos_token_id

    def losses(start: int, end: int, first: int, before: list[int]) -> list[float]:
        window = torch.tensor([[*before, *ids[start:end]]])
        with torch.no_grad():
            chances = model(window, use_cache=False).logits[0].double().log_softmax(-1)
        return [-float(chances[t - 1, window[0, t]]) for t in range(first, window.shape[1])]

    def measured(**options: Any) -> dict[str, float]:
        rows = evaluate_perplexity(STORIES, [str(tmp_path / "a.txt")], lengths=[64], **options)
        return {row.task: math.log(row.value) * (row.n or 0) for row in rows}

    spans = [(0, 64), *((start, start + 63) for start in range(64, len(ids), 63))]
    with_bos = [*losses(0, 64, 1, []), *(loss for start, end in spans[1:] for loss in losses(start, end, 1, [1]))]
    without = [loss for start in range(0, len(ids), 64) for loss in losses(start, start + 64, 1, [])]
    assert measured() == pytest.approx({"perplexity-disjoint-bos": sum(with_bos)}, rel=1e-5)
    assert measured(bos=False) == pytest.approx({"perplexity-disjoint": sum(without)}, rel=1e-5)
    assert measured(prompt=32).keys() == {"perplexity-disjoint-bos-decoded"}
    assert (window_prefix(tokenizer), window_prefix(tokenizer, False)) == ((1,), ())
    bare = load_tokenizer(STORIES.parent / "retrieval-2.2M")
    assert (window_prefix(bare), window_prefix(bare, True)) == ((), (bare.bos_token_id,))
    bare.bos_token = None
    with pytest.raises(ZebraError, match="requires a tokenizer with a BOS token"):
        window_prefix(bare, True)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, [0, 2]),
        (255, [0, 255]),
        (256, [0, 256]),
        (257, [0, 256, 257]),
        (512, [0, 256, 512]),
        (4096, [0, 256, 512, 1024, 2048, 4096]),
        (5000, [0, 256, 512, 1024, 2048, 4096, 5000]),
    ],
)
def test_edges(length: int, expected: list[int]) -> None:
    assert edges(length) == expected


def test_a_shorter_first_bucket(model: Any) -> None:
    assert edges(256, first=32) == [0, 32, 64, 128, 256]
    assert edges(5, first=8) == [0, 5]
    corpus = drawn(33, 40)
    scores = perplexity(model, corpus, length=32, first_bucket=8)
    check(scores, brute(model, corpus, 32, "disjoint", None, [0, 8, 16, 32]), [0, 8, 16, 32])


def test_one_bucket_is_not_said_twice(model: Any) -> None:
    (score,) = perplexity(model, drawn(40), length=16)
    assert (score.position_from, score.position_to, score.tokens, score.documents) == (0, 16, 37, 1)


def test_a_bucket_without_tokens_is_left_out(model: Any) -> None:
    scores = perplexity(model, drawn(5, 4), length=16, first_bucket=4)
    assert [(s.position_from, s.position_to, s.documents) for s in scores] == [(0, 4, 2), (4, 8, 1), (0, 16, 2)]


# -- intervals


def test_an_interval_brackets_the_value(model: Any) -> None:
    corpus = drawn(*range(20, 50))
    scores = perplexity(model, corpus, length=24, first_bucket=8)
    assert len(scores) == 4
    for score in scores:
        assert score.low is not None
        assert score.high is not None
        assert score.low < score.perplexity < score.high
    assert perplexity(model, corpus, length=24, first_bucket=8, seed=0) == scores
    others = perplexity(model, corpus, length=24, first_bucket=8, seed=1)
    assert [score.perplexity for score in others] == [score.perplexity for score in scores]
    assert others != scores


def test_one_document_has_no_interval(model: Any) -> None:
    for corpus in (drawn(600), drawn(600, 1)):
        for score in perplexity(model, corpus, length=300):
            assert (score.low, score.high, score.documents) == (None, None, 1)
    first, last, whole = perplexity(model, drawn(300, 30), length=300)
    assert (first.documents, last.documents, whole.documents) == (2, 1, 2)
    assert first.low is not None
    assert last.low is None


def test_equal_documents_have_an_interval_of_no_width(model: Any) -> None:
    tokens = np.tile(drawn(20).tokens, 5)
    (score,) = perplexity(model, Corpus(tokens, np.arange(0, 101, 20)), length=20)
    assert score.low == pytest.approx(score.perplexity)
    assert score.high == pytest.approx(score.perplexity)


@pytest.mark.parametrize("n", some([2, 3, 4, 8, 30], 3))
def test_intervals_of_few_documents_hold_the_truth_in_95_of_100(n: int) -> None:
    drawn, held, trials = np.random.default_rng(n), 0, 400
    for seed in range(trials):
        counts = drawn.integers(8, 12, n)
        estimate = bootstrap_mean(drawn.normal(2.0, 0.5, n) * counts, counts, seed)
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= 2.0 <= estimate.high
    assert 0.91 < held / trials < 0.98


def test_an_interval_of_many_documents_takes_memory_for_one_draw() -> None:
    counts = np.ones(2000)
    tracemalloc.start()
    bootstrap_mean(counts, counts, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 * counts.nbytes


def test_students_t_and_bounds() -> None:
    assert [round(students_t(freedom), 2) for freedom in (1, 10, 11, 20, 120)] == [12.71, 2.23, 2.20, 2.09, 1.98]
    estimate = bootstrap_mean(np.array([0.0, 1.0]), np.ones(2), 0, bounds=(0, 1))
    assert estimate == (0.5, 0.0, 1.0)


def test_the_interval_is_95_percent_over_documents() -> None:
    """Many documents of one size: nearly the mean and 1.96 standard errors, in the logarithm."""
    counts = np.full(2000, 10.0)
    losses = np.random.default_rng(1).normal(2.0, 0.5, 2000)
    score = score_of(0, 16, losses * counts, counts, 0)
    error = losses.std() / math.sqrt(2000)
    assert score.perplexity == pytest.approx(math.exp(losses.mean()))
    assert score.low is not None
    assert score.high is not None
    assert math.log(score.low) == pytest.approx(losses.mean() - 1.96 * error, abs=0.15 * error)
    assert math.log(score.high) == pytest.approx(losses.mean() + 1.96 * error, abs=0.15 * error)
    assert (score.tokens, score.documents) == (20_000, 2000)


def test_the_interval_weighs_documents_by_their_tokens() -> None:
    """Every resample is a mean over tokens: with one huge document it stays near that one's value."""
    sums, counts = np.array([1e6 * 2.0, 5.0, 5.0, 5.0, 0.0]), np.array([1e6, 1.0, 1.0, 1.0, 0.0])
    score = score_of(0, 16, sums, counts, 0)
    assert score.documents == 4
    assert score.perplexity == pytest.approx(math.exp(2), rel=1e-4)
    assert score.low == pytest.approx(math.exp(2), rel=1e-4)
    widened = 3 * students_t(3) / students_t(10**9) * math.sqrt(4 / 3)
    assert score.high == pytest.approx(math.exp(2 + widened), rel=1e-3)  # it is drawn in 1 - 0.75**4 = 68 % only


# -- the model's side


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_as_it_was(model: Any, training: bool) -> None:
    model.train(training)
    modes: list[tuple[bool, bool]] = []
    handle = model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    try:
        perplexity(model, drawn(40), length=16)
        assert model.training is training
    finally:
        handle.remove()
        model.eval()
    assert modes
    assert set(modes) == {(False, False)}


def test_batches_hold_as_many_tokens_as_asked(model: Any) -> None:
    sizes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    try:
        perplexity(model, drawn(16 * 5 + 3, 16), length=16, batch_tokens=35)
        perplexity(model, drawn(32), length=16, batch_tokens=1)
    finally:
        handle.remove()
    assert sizes == [(2, 16), (2, 16), (1, 16), (1, 3), (1, 16), (1, 16), (1, 16)]


# -- refusals


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ((40,), {"convention": "sliding"}, "convention must be one of disjoint, strided, truncated; got 'sliding'"),
        ((40,), {"length": 1}, "at least 2, .* got 1"),
        ((40,), {"stride": 4}, "a stride requires the strided convention.* got 4 with the disjoint convention"),
        ((40,), {"stride": 4, "convention": "truncated"}, "with the truncated convention"),
        ((40,), {"stride": 0, "convention": "strided"}, "got 0 with the strided convention and length 16"),
        ((40,), {"stride": 16, "convention": "strided"}, "from 1 to length - 1; got 16"),
        ((40,), {"stride": -1, "convention": "strided"}, "got -1"),
        ((15, 9), {"convention": "truncated"}, "truncated convention at length 16; the longest has 15"),
        ((1, 1, 0), {}, "disjoint convention at length 16; the longest has 1"),
        ((1,), {"convention": "strided"}, "the longest has 1"),
    ],
)
def test_refusals(model: Any, lengths: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        perplexity(model, drawn(*lengths), **({"length": 16} | options))


def test_a_token_without_an_embedding_is_refused(model: Any) -> None:
    corpus = drawn(40)
    corpus.tokens[7] = VOCABULARY - 1
    perplexity(model, corpus, length=16)
    corpus.tokens[7] = VOCABULARY
    with pytest.raises(ZebraError, match="the text has token ID 41, but the model has 41 embeddings"):
        perplexity(model, corpus, length=16)


# -- rows and texts


def test_scores_become_rows() -> None:
    scores = [Score(0, 256, 9.0, 8.0, 10.0, 100, 4), Score(0, 512, 7.0, None, None, 300, 1)]
    first, second = results_of(scores, 512, "perplexity-strided", run="r", model="m", layout="GL:8", seed=5, device="d")
    assert (first.task, first.metric, first.value, first.length) == ("perplexity-strided", "perplexity", 9.0, 512)
    assert (first.position_from, first.position_to, first.n, first.low, first.high) == (0, 256, 100, 8.0, 10.0)
    assert (first.run, first.model, first.layout, first.seed, first.device) == ("r", "m", "GL:8", 5, "d")
    assert (second.position_to, second.value, second.n, second.low, second.high) == (512, 7.0, 300, None, None)


def test_rows_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("--".join("Once upon a time there was a little cat. " * n for n in (1, 4, 6)))
    rows = evaluate_perplexity(STORIES, [str(text)], lengths=[16, 40], separator="--", device="cpu", seed=3, run="mine")
    assert [(row.length, row.position_from, row.position_to) for row in rows] == [(16, 0, 16), (40, 0, 40)]
    for row in rows:
        assert (row.run, row.model, row.layout, row.seed) == ("mine", str(STORIES), "full", 3)
        assert row.device == device_name("cpu")
        assert row.low is not None
        assert row.low <= row.value <= row.high
        assert 1 < row.value < 512
    (joined,) = evaluate_perplexity(
        STORIES, [str(text)], lengths=[40], separator="--", join=True, device="cpu", convention="strided"
    )
    assert (joined.task, joined.seed) == ("perplexity-strided-bos", 0)
    assert joined.n is not None
    assert rows[1].n is not None
    assert joined.n > rows[1].n
    (striped,) = evaluate_perplexity(STORIES, [str(text)], lengths=[40], separator="--", stripes="GL:4", device="cpu")
    assert striped.layout.endswith(":4")
    assert striped.value != rows[1].value

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("zebra.model.load_options.load", never)
    with pytest.raises(ZebraError, match="no document has enough tokens"):
        evaluate_perplexity(STORIES, [str(text)], lengths=[16, 4000], separator="--", convention="truncated")


def test_lengths_beyond_the_text_and_the_model_are_named(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was a little cat. " * 80)

    def measure(length: int, **options: Any) -> None:
        evaluate_perplexity(STORIES, text, lengths=[length], check_only=True, **options)

    measure(512)
    measure(600, self_extend="auto:1024")
    with pytest.warns(UserWarning, match="600 tokens exceeds the 512 positions that this model was trained for"):
        measure(600)
    with pytest.warns(UserWarning, match=r"no document fills a context of 100,000 tokens; the longest window has"):
        measure(100_000, self_extend="auto:4096")
    with pytest.warns(UserWarning, match="no document fills"), pytest.warns(UserWarning, match="exceeds the 512"):
        measure(100_000)


def test_perplexity_behind_a_prompt_is_that_of_decoding_token_by_token(text: Path) -> None:
    """A prompt is read by the window; what is decoded behind it sees all where the model decodes fully."""
    long = text / "long.txt"
    long.write_text("Once upon a time there was a zebra with stripes, local and global. " * 9)
    arguments: dict[str, Any] = {"lengths": [60], "convention": "truncated", "stripes": "GL:5+2", "device": "cpu"}
    (row,) = evaluate_perplexity(STORIES, [str(long)], **arguments, prompt=40, full_decode=True)
    assert (row.task, row.layout) == ("perplexity-truncated-bos-decoded", "GL:5+2, full decode")
    assert (row.position_from, row.position_to, row.n) == (40, 60, 20)
    expected = {}
    for full_decode in (True, False):
        model = zebra.load(STORIES, stripes="GL:5+2", full_decode=full_decode)
        encoded = read_corpus([str(long)], Encoder.of(load_tokenizer(STORIES, model.config)))[0][:60]
        ids = torch.from_numpy(encoded.astype("int64"))[None]
        cache = bounded_cache(model)
        with torch.no_grad():
            parts = [model(x, past_key_values=cache, use_cache=True).logits for x in ids.split([40] + [1] * 20, dim=1)]
        logits = torch.cat(parts, dim=1)[0, 39:-1]
        expected[full_decode] = torch.nn.functional.cross_entropy(logits, ids[0, 40:]).exp().item()
    assert row.value == pytest.approx(expected[True], rel=1e-5)
    (windowed,) = evaluate_perplexity(STORIES, [str(long)], **arguments, prompt=40)
    assert windowed.value == pytest.approx(expected[False], rel=1e-5)
    assert abs(row.value / windowed.value - 1) > 1e-3
    with pytest.raises(ZebraError, match="affects only decoded tokens"):
        evaluate_perplexity(STORIES, [str(long)], **arguments, full_decode=True)
    for prompt in (0, 60):
        with pytest.raises(ZebraError, match="the prompt must be from 1 to length - 1"):
            evaluate_perplexity(STORIES, [str(long)], **arguments, prompt=prompt)

"""Retrieval samples: exact token counts, needles at their depths, answers that a script can read from the prompt."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import STORIES, TEXT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zebra import ZebraError
from zebra.data.haystack import (
    NOISE,
    Haystack,
    PromptTokenizer,
    contains_answer,
    min_body_tokens,
    normalize,
    place_needles,
)
from zebra.data.needles import Sample, SampleGenerator
from zebra.data.questions import (
    COMMON_WORDS,
    GENERATORS,
    MIN_WORDS,
    TASKS,
    WITHOUT_DEPTH,
    SampleContext,
    common_counts,
    frequent_counts,
)

KINDS = (
    *("stories260K", "WordPiece", "spaces behind"),
    *(pytest.param(kind, marks=pytest.mark.full) for kind in ("byte-level BPE", "Unigram", "word-level")),
)
DEPTHS = (0.0, 0.31, 0.5, 1.0)


def _trained(kind: str) -> Tokenizer:
    """A tokenizer of another kind, trained here."""
    rng = Random(1)
    words = [GENERATORS[name](rng) for name in ("words", "made-up words") for _ in range(8000)]
    prompts = [
        f"{d.instruction} {' '.join(d.needles)} {d.query}"
        for d in (TASKS[t](_Anything(rng)) for t in TASKS)  # type: ignore[arg-type]
    ]
    text = [*NOISE, *prompts, " ".join(words), (TEXT / "tinystories_test.txt").read_text()[:60_000], "0123456789"]
    makes: dict[str, tuple[Any, Any, Any, Any]] = {
        "byte-level BPE": (
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        ),
        "Unigram": (
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
            trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"]),
        ),
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(cleanup=False),
            trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"]),
        ),
        "word-level": (
            models.WordLevel(unk_token="[UNK]"),
            pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]),
            None,
            trainers.WordLevelTrainer(vocab_size=30_000, special_tokens=["[UNK]"]),
        ),
        "spaces behind": (
            models.BPE(),
            pre_tokenizers.Split(" ", "merged_with_previous"),
            decoders.Fuse(),
            trainers.BpeTrainer(vocab_size=700),
        ),
    }
    model, split, decoder, trainer = makes[kind]
    backend = Tokenizer(model)
    backend.pre_tokenizer = split
    if kind == "WordPiece":
        backend.normalizer = normalizers.Lowercase()
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(text, trainer)
    return backend


class _Anything:
    """A kit whose words are drawn without a tokenizer."""

    def __init__(self, rng: Random):
        self.rng = rng

    def draw(self, kind: str, count: int) -> list[Any]:
        from zebra.data.haystack import TokenizedText

        return [TokenizedText(GENERATORS[kind](self.rng), (1,)) for _ in range(count)]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "stories260K":
        return AutoTokenizer.from_pretrained(STORIES)
    backend = _trained(request.param)
    if request.param == "WordPiece":  # with tokens before and behind
        backend.add_special_tokens(["[CLS]", "[SEP]"])
        first, last = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
        backend.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def needles(tokenizer: Any) -> SampleGenerator:
    return SampleGenerator(tokenizer)


def read(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def solved(task: str, text: str) -> list[str]:
    """Read the answers from the text of the prompt, in lower case and with digits joined."""
    text = re.sub(r"(?<=\d) (?=\d)", "", normalize(text))
    if task == "passkey":
        return re.findall(r"the pass key is (\d{5}) ?\.", text)
    if task == "lookup":
        (key,) = re.findall(r"look up the key (\d{5}) again", text)
        return re.findall(rf"(?<!\d){key} ?: (\d{{5}}) ?\.", text)
    if task == "variables":
        held: dict[str, str] = {}
        for name, of in re.findall(r"\bset (\w+) to (\w+) ?\.", text):
            held[name] = held.get(of, of)
        (number,) = re.findall(r"names hold (\d{5}) now", text)
        return [name for name, value in held.items() if value == number]
    if task in WITHOUT_DEPTH:
        words = text[text.index("than the others") : text.rindex("which")].split()[3:]
        return [word for word, _ in Counter(words).most_common(COMMON_WORDS if task == "common-words" else 3)]
    query = re.findall(r"which .*?noted for ([\w, ]+?) ?\?", text)[-1]
    names = [name.strip() for name in re.split(r",|\band\b", query)]
    statements = re.findall(r"the number noted for (\w+) is (\d{5}) ?\.", text)
    return [number for name, number in statements if name in names]


def answers(sample: Sample) -> set[str]:
    return {answer.text.replace(" ", "").casefold() for answer in sample.answers}


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_has_the_exact_length_and_a_script_that_reads_it_answers(
    task: str, needles: SampleGenerator, tokenizer: Any
) -> None:
    for length, depth in product((401, 600, 1023), DEPTHS):
        for sample in needles.samples(task, length=length, depth=depth, count=2, seed=5):
            assert len(sample.ids) == length
            text = read(tokenizer, sample.ids)
            assert set(solved(task, text)) == answers(sample), text
            assert not answers(sample) & {one.text.replace(" ", "") for one in sample.distractors}
            sizes = {len(one.ids) for one in (*sample.answers, *sample.distractors)}
            assert len(sizes) == 1
            assert len({*sample.answers, *sample.distractors}) == len(sample.answers) + 9
            assert sample.depth == (None if task in WITHOUT_DEPTH else depth)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in WITHOUT_DEPTH])
def test_the_evidence_begins_where_the_sample_says(task: str, needles: SampleGenerator, tokenizer: Any) -> None:
    begins = {"passkey": "the pass key is", "variables": "set", "lookup": ""}.get(task, "the number noted for")
    for depth in DEPTHS:
        (sample,) = needles.samples(task, length=700, depth=depth, seed=2)
        assert list(sample.needle_starts) == sorted(sample.needle_starts)
        assert len(sample.needle_starts) in (1, len(sample.answers))
        texts = [normalize(read(tokenizer, sample.ids[at : at + 60])) for at in sample.needle_starts]
        assert all(text.startswith(begins) for text in texts), texts
        if task == "lookup":
            assert re.match(r"[\d ]+ ?: [\d ]+", texts[0])


def test_the_first_evidence_stands_at_its_depth_to_the_token(needles: SampleGenerator) -> None:
    """Its position is linear in the depth, between those at depth 0 and depth 1."""

    def place(depth: float) -> int:
        return needles.samples("passkey", length=777, depth=depth)[0].needle_starts[0]

    first, last = place(0), place(1)
    assert last - first > 500
    for depth in (0.1, 0.25, 1 / 3, 0.77):
        assert place(depth) == first + int(depth * (last - first) + 0.5)


def test_the_same_seed_gives_the_same_samples(needles: SampleGenerator, tokenizer: Any) -> None:
    for task in TASKS:
        drawn = needles.samples(task, length=500, depth=0.5, count=3, seed=1)
        assert drawn == SampleGenerator(tokenizer).samples(task, length=500, depth=0.5, count=3, seed=1)
        assert drawn[:2] == needles.samples(task, length=500, depth=0.5, count=2, seed=1)
        assert drawn[2:] == needles.samples(task, length=500, depth=0.5, first=2, seed=1)
        assert drawn != needles.samples(task, length=500, depth=0.5, count=3, seed=2)
        assert len({sample.ids for sample in drawn}) == 3


def test_the_least_length_is_enough_at_every_depth(needles: SampleGenerator) -> None:
    for task in TASKS:
        with pytest.raises(ZebraError, match=f"^{task} requires a length of at least") as refused:
            needles.samples(task, length=3, depth=0.5)
        least = int(re.findall(r"at least ([\d,]+)", str(refused.value))[0].replace(",", ""))
        for length, depth in product((least + 4, least + 5), (0, 0.3, 0.9, 1)):
            (sample,) = needles.samples(task, length=length, depth=depth)
            assert len(sample.ids) == length


def test_own_text_lies_uncut_around_the_evidence(tokenizer: Any) -> None:
    """Without the evidence, the body is a stretch of the text; with it, it stands between sentences."""
    text = " ".join((TEXT / "tinystories_test.txt").read_text()[:9000].split())
    tokens = np.array(tokenizer.encode(text))
    needles, writer = SampleGenerator(tokenizer, [tokens]), PromptTokenizer(tokenizer)
    stream = tokens[len(writer.prefix) :].tolist()
    ahead = [
        *writer.prefix,
        *writer.encode_first("Somewhere in this text a pass key is hidden. Find it and remember it."),
    ]
    tail = writer.encode("What is the pass key? The pass key is")
    for depth in DEPTHS:
        (sample,) = needles.samples("passkey", length=600, depth=depth)
        number = sample.answers[0].text.replace(" ", "")
        piece = writer.encode(f"The pass key is {number}. Keep it in mind: {number} is the pass key.")
        at = sample.needle_starts[0]
        assert sample.ids[at : at + len(piece)] == piece
        hay = [*sample.ids[len(ahead) : at], *sample.ids[at + len(piece) : len(sample.ids) - len(tail)]]
        assert any(stream[i : i + len(hay)] == hay for i in range(len(stream)))
        if depth:
            assert re.search(r"[.!?][\"']*\s*$", read(tokenizer, sample.ids[len(ahead) : at]))
    with pytest.raises(ZebraError, match=r"the haystack must have at least [\d,]+ tokens; got [\d,]+"):
        needles.samples("passkey", length=100_000, depth=0.5)


def test_sentences_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training on recall draws others in every step."""

    class Sentence(str):
        """A string that a weak reference can follow."""

    monkeypatch.setattr("zebra.data.haystack._SENTENCES", 8)
    writer, followed = PromptTokenizer(AutoTokenizer.from_pretrained(STORIES)), []
    for i in range(50):
        sentence = Sentence(f"The number noted for an apple is {i}.")
        writer.encode(sentence)
        followed.append(weakref.ref(sentence))
    del sentence
    assert sum(one() is not None for one in followed) == 8


def brute(size: int, depth: float, evidence: int) -> int:
    rest = size - evidence
    return min(range(rest + 1), key=lambda place: (abs(place - depth * rest), -place))


@pytest.mark.parametrize("depth", [0, 0.2, 0.5, 0.99, 1])
@pytest.mark.parametrize("size", [30, 31, 47, 200])
def test_pieces_are_placed_to_the_token(size: int, depth: float) -> None:
    evidence, others = [[-1] * 5, [-2] * 4, [-3] * 3], [[-4] * 6, [-5] * 3]
    assert min_body_tokens(evidence, others) == 30
    hay = Haystack.of_pieces([list(range(10 * i, 10 * i + n)) for i, n in enumerate([7, 9, 10, 3] * 20)])
    for seed in range(20):
        body, places = place_needles(Random(seed), hay, size, depth, evidence, others)
        assert len(body) == size
        assert places[0] == brute(size, depth, 12)
        assert [body[at : at + len(piece)] for at, piece in zip(places, evidence, strict=True)] == evidence
        assert sorted(token for token in body if token < 0) == sorted(
            t for piece in (*evidence, *others) for t in piece
        )
        around = [token for token in body if token >= 0]
        assert around in [hay.tokens[i : i + len(around)].tolist() for i in range(len(hay.tokens))]


def test_a_window_begins_a_sentence_where_it_should() -> None:
    hay = Haystack.of_pieces([[1, 2, 3], [4, 5], [6]] * 8)
    assert hay.tokens[:7].tolist() == [1, 2, 3, 4, 5, 6, 1]
    for seed, before in product(range(10), (0, 1, 5, 40)):
        tokens, starts = hay.window(Random(seed), before, 40 - before)
        assert len(tokens) == 40
        assert before in starts
        assert before == 40 or tokens[before] in (1, 4, 6)
    without = Haystack(np.arange(10), np.array([0, 10]))
    assert without.window(Random(0), 4, 4)[1] == [4]
    with pytest.raises(ZebraError, match="the haystack must have at least 11 tokens; got 10"):
        without.window(Random(0), 5, 6)


def test_a_haystack_takes_as_much_memory_as_its_documents(tokenizer: Any) -> None:
    documents = [np.arange(9, dtype=np.uint16), np.arange(5, dtype=np.uint16)]
    haystack = Haystack.of_documents(documents, PromptTokenizer(tokenizer))
    assert haystack.tokens.nbytes == 2 * (9 + 5)
    assert haystack.starts.nbytes == 8 * len(haystack.starts)  # a list of numbers takes five times as much


def test_answers_are_the_commonest_words_at_any_length() -> None:
    for words in [*range(MIN_WORDS, 700), 3001, 50_000]:
        common = common_counts(words)
        assert sum(common) == words
        assert min(common[:5]) >= 3 * max(common[5:])
        frequent = frequent_counts(words)
        assert sum(frequent) == words
        assert frequent[0] > frequent[1] > frequent[2] > frequent[3] >= max(frequent[4:])


def test_says_finds_whole_words() -> None:
    assert contains_answer("it is  48213.", "48213")
    assert contains_answer("The Lantern, harbour", "lantern")
    assert not contains_answer("148213", "48213")
    assert not contains_answer("482131", "48213")
    assert not contains_answer("", "48213")


def test_a_tokenizer_that_cannot_write_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "x": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ZebraError, match=r"cannot encode numbers such as '[0-9]{5}'"):
        SampleGenerator(few).samples("passkey", length=100, depth=0)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "12345": 1, "54321": 2, ".": 3, "x": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    writer = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    monkeypatch.setitem(GENERATORS, "numbers", lambda rng: rng.choice(["12345", "54321", "99999"]))
    assert {one.text for one in SampleContext(writer, Random(0)).draw("numbers", 2)} == {"12345", "54321"}
    with pytest.raises(ZebraError, match=r"requires 3 different numbers of 1 tokens, but this tokenizer has only 2"):
        SampleContext(writer, Random(0)).draw("numbers", 3)


@pytest.mark.parametrize(
    ("arguments", "says_"),
    [
        ({"task": "pass-key"}, "the task must be one of passkey, needle, .*frequent-words; got 'pass-key'"),
        ({"depth": 1.1}, "the depth must be from 0 to 1; got 1.1"),
        ({"depth": -0.1}, "got -0.1"),
        ({"depth": float("nan")}, "got nan"),
        ({"depth": None}, "got None"),
        ({"count": 0}, "samples must be from 1 to 100,000; got 0"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], says_: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES)
    with pytest.raises(ZebraError, match=says_):
        SampleGenerator(tokenizer).samples(**{"task": "passkey", "length": 300, "depth": 0.5} | arguments)

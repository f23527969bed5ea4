"""Questions about documents: what is cut, what batches and the cache must not change, what the scores say."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, TEXT, Zebra, generate_tokens, refused
from test_retrieval import Scripted
from torch import Tensor
from transformers import AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.data.qa import (
    ANSWER_IN_QUESTION,
    DOCUMENT_NOT_NEEDED,
    DUPLICATE_QUESTION,
    EMPTY_ANSWER,
    EVIDENCE_CUT,
    QAExample,
    words,
)
from zebra.evaluate.documents import Outcome, evaluate_documents, per_token
from zebra.evaluate.overlap import Overlap
from zebra.evaluate.prompts import Prompts
from zebra.evaluate.scoring import greedy_answers
from zebra.evaluate.target import EvalTarget
from zebra.report import write_report
from zebra.results import read_results

TALES = (TEXT / "tinystories_test.txt").read_text().split("<|endoftext|>")
LONG = " ".join(TALES[:6])


def item(document: str = LONG, question: str = "Who ran?", *answers: str) -> QAExample:
    return QAExample("one", 1, document, question, answers or ("the dog",))


@pytest.mark.parametrize("length", [40, 57, 200, 511])
def test_the_middle_of_the_document_is_cut(length: int, tokenizer: Any) -> None:
    prompt = Prompts(tokenizer).fitting(item(), length)
    assert length - 4 < len(prompt.ids) <= length
    text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.endswith("\n\nQuestion: Who ran?\nAnswer:")
    head, tail = prompt.document.split("\n...\n")
    assert LONG.startswith(head)
    assert LONG.endswith(tail)
    assert prompt.cut is not None
    first, last = prompt.cut[0], prompt.document_tokens - prompt.cut[1]
    assert 0 <= first - last <= 1
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(ids) == prompt.document_tokens
    assert tokenizer(head, add_special_tokens=False)["input_ids"] == ids[:first]


def test_what_fits_is_whole(tokenizer: Any) -> None:
    prompts, short = Prompts(tokenizer), item(TALES[0])
    whole = prompts.fitting(short, None)
    assert whole == prompts.fitting(short, len(whole.ids))
    assert (whole.cut, whole.document) == (None, TALES[0])
    assert prompts.fitting(short, len(whole.ids) - 1).cut is not None


def test_braces_stay_as_they_are(tokenizer: Any) -> None:
    odd = item("a {question} {0} b", "what is {document}?")
    ids = Prompts(tokenizer, "{question}|{document}|").ids(odd, odd.document)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what is {document}?|a {question} {0} b|"


def test_a_question_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ZebraError, match=r"the prompt of one takes \d+ tokens .* only 20 are available"):
        Prompts(tokenizer).fitting(item(), 20)
    with pytest.raises(ZebraError, match="once each; got 'tell me'"):
        Prompts(tokenizer, "tell me")


def test_a_chat_template_is_around_it(tokenizer: Any) -> None:
    with pytest.raises(ZebraError, match="no chat template"):
        Prompts(tokenizer, chat=True).ids(item(), "x")
    chats = AutoTokenizer.from_pretrained(STORIES)
    chats.chat_template = "[{{ messages[0]['content'] }}] says:"
    prompt = Prompts(chats, chat=True).fitting(item(), 100)
    text = chats.decode(prompt.ids, skip_special_tokens=True)
    assert text.startswith("[" + LONG[:20])
    assert text.endswith("Answer:] says:")
    assert len(prompt.ids) <= 100


def lcs(one: list[str], two: list[str]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(two):
            return 0
        if one[i] == two[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def f(common: int, one: int, two: int) -> float:
    return 0.0 if common == 0 else 2 * common / (one + two)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("the cat sat on the mat", "a cat lay on the mat, the mat!"),
        ("Yes. It's the DOG", "its dog"),
        ("", "dog"),
        ("nothing of it", "dog"),
        ("one two three four", "four three two one"),
    ],
)
def test_overlap_is_the_formula(text: str, reference: str) -> None:
    """F1 = 2 common / (words + words); ROUGE's words are letters and digits, SQuAD's have no articles."""
    scores = Overlap()(text, [reference, "zzz"])
    one, two = words(text), words(reference)
    assert scores["f1"] == pytest.approx(f(sum((Counter(one) & Counter(two)).values()), len(one), len(two)))
    clean = ["".join(c if c.isalnum() else " " for c in part.lower()).split() for part in (text, reference)]
    for n in (1, 2):
        grams = [list(zip(*(part[i:] for i in range(n)), strict=False)) for part in clean]
        common = sum((Counter(grams[0]) & Counter(grams[1])).values())
        assert scores[f"rouge{n}"] == pytest.approx(f(common, len(grams[0]), len(grams[1])))
    assert scores["rougeL"] == pytest.approx(f(lcs(*clean), len(clean[0]), len(clean[1])))


@pytest.mark.parametrize(
    ("text", "reference", "same", "of"),
    [("Собака бежит домой", "собака спит дома", 1, 3), ("狗跑回家", "猫跑回家。", 3, 4), ("Café!", "cafe", 0, 1)],
)
def test_overlap_counts_words_of_every_script(text: str, reference: str, same: int, of: int) -> None:
    scores = Overlap()(text, [reference])
    assert scores["rouge1"] == pytest.approx(same / of)
    if "。" not in reference:  # SQuAD drops ASCII's punctuation alone
        assert scores["f1"] == pytest.approx(same / of)


def test_english_words_are_those_of_the_authors_script() -> None:
    from rouge_score import rouge_scorer

    text, reference = "The dog_house isn't 3.5 m high;  it IS!", "A dog house, 3.5 m: it isn't high."
    expected = rouge_scorer.RougeScorer(["rouge2"]).score(reference, text)["rouge2"].fmeasure
    assert Overlap()(text, [reference])["rouge2"] == expected > 0


@pytest.fixture(scope="module", params=[None, "4:32"], ids=["striped", "self-extend"])
def model(request: pytest.FixtureRequest) -> Any:
    return zebra.load(STORIES, stripes="GLLL:33", self_extend=request.param)


def test_a_batch_of_several_lengths_answers_as_each_alone(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(tale)["input_ids"][:n] for tale, n in zip(TALES, (150, 90, 160, 3), strict=False)]
    alone = [generate_tokens(model, tokenizer, torch.tensor([ids]), max_new_tokens=12)[0] for ids in prompts]
    expected = [tokenizer.decode(new, skip_special_tokens=True).strip() for new in alone]
    room = {"max_new_tokens": [12] * 4}
    for batch_tokens in (1000, 100):
        assert greedy_answers(model, tokenizer, prompts, **room, batch_tokens=batch_tokens) == expected
    stop = expected[0][4:6]
    assert greedy_answers(model, tokenizer, prompts, **room, stop=[stop]) == [
        text.partition(stop)[0].strip() for text in expected
    ]


def test_the_likelihood_is_per_token_and_over_the_references(model: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(tale)["input_ids"][:n] for tale, n in zip(TALES, (150, 90), strict=False)]
    references = [[(403, 407), (403, 407, 261)], [(432,)]]
    log_likelihoods = per_token(model, prompts, references, batch_tokens=100)
    for prompt, own, value in zip(prompts, references, log_likelihoods, strict=True):
        with torch.no_grad():
            each = [
                sum(
                    float(model(torch.tensor([[*prompt, *ids[:i]]]), use_cache=False).logits[0, -1].log_softmax(-1)[t])
                    for i, t in enumerate(ids)
                )
                / len(ids)
                for ids in own
            ]
        assert value == pytest.approx(sum(each) / len(each), abs=1e-4)


@pytest.mark.parametrize(
    "loading",
    [
        {"stripes": "GLLL:33+2"},
        {"stripes": "GLLL:33", "self_extend": "4:32"},
        {"stripes": "GLLL:33", "full_decode": True},
    ],
    ids=["striped", "self-extend", "full-decode"],
)
def test_what_long_prompts_share_is_read_once(loading: dict[str, Any], tokenizer: Any) -> None:
    """Two documents with several questions, and a prompt that leaves its document in the middle, in mixed order."""
    model = zebra.load(STORIES, **loading)
    one, other = (tokenizer(tale)["input_ids"][i:] for i, tale in enumerate(("".join(TALES[:3]), "".join(TALES[3:6]))))
    documents = [one[:400], other[:430], one[:300] + other[:100]]
    ends = [(0, (403, 407)), (1, (432,)), (0, (403, 261)), (2, (407,)), (1, (261, 5)), (0, (9,))]
    prompts = [[*documents[i], *end] for i, end in ends]
    references = [[(403, 407), (261,)]] * len(prompts)
    room = {"max_new_tokens": [8] * len(prompts)}
    alone = [
        (*greedy_answers(model, tokenizer, [ids], max_new_tokens=[8]), *per_token(model, [ids], references[:1]))
        for ids in prompts
    ]
    read = []
    hook = model.register_forward_hook(lambda _, args, output: read.append(args[0].numel() if args else 0))
    answers = greedy_answers(model, tokenizer, prompts, **room, batch_tokens=128)
    hook.remove()
    assert answers == [answer for answer, _ in alone]
    assert per_token(model, prompts, references, batch_tokens=128) == pytest.approx([one for _, one in alone], abs=1e-4)
    assert sum(read) == len({tuple(ids[:n]) for ids in prompts for n in range(1, len(ids))})


class Copier(Scripted):
    """Predicts the tokens that followed earlier occurrences of the last token."""

    def next(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(len(self.tokenizer))
        logits[[after for token, after in itertools.pairwise(tokens) if token == tokens[-1]]] = 5.0
        return logits


class Deaf(Scripted):
    """Predicts the same tokens whatever it reads."""

    def next(self, tokens: list[int]) -> Tensor:
        return torch.arange(len(self.tokenizer)).float() / 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six items: one good, and one for each fault that needs no model; one answer that stands in the middle alone."""
    tale = TALES[1].strip()
    middle = tale + " The giraffe slept. " + TALES[2]
    lines = [
        {"id": "good", "document": tale, "question": "Who?", "answers": [tale[:30], "dog"]},
        {"id": "again", "document": tale, "qa": [{"question": q, "answers": "dog"} for q in ("Who?", "Who was it?")]},
        {"id": "empty", "document": tale, "question": "Where?", "answers": ["..."]},
        {"id": "given", "document": tale, "question": "Was it a dog or a cat?", "answers": ["a cat"]},
        {"id": "lost", "document": middle, "question": "Which animal slept?", "answers": ["The giraffe"]},
    ]
    path = tmp_path / "tales.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def by_name(outcomes: list[Outcome]) -> dict[str, list[str]]:
    return {one.example.name: one.faults for one in outcomes}


EXPECTED = {
    "good": [],
    "again#0": [DUPLICATE_QUESTION],
    "again#1": [],
    "empty": [EMPTY_ANSWER],
    "given": [ANSWER_IN_QUESTION],
    "lost": [EVIDENCE_CUT],
}


@pytest.mark.filterwarnings("ignore:at 2.. tokens")
def test_the_data_are_looked_at_without_the_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvalTarget, "load", None)
    rows, outcomes = evaluate_documents(STORIES, file, lengths=[260], check_only=True, answer_tokens=20)
    assert by_name(outcomes) == EXPECTED
    assert {row.metric: row.value * 6 for row in rows} == {
        **dict.fromkeys((EMPTY_ANSWER, DUPLICATE_QUESTION, ANSWER_IN_QUESTION, EVIDENCE_CUT), pytest.approx(1)),
        "duplicate answer": 0,
        "document cut": pytest.approx(sum(one.prompt.cut is not None for one in outcomes)),
        "any fault": pytest.approx(4),
    }
    assert {(row.task, row.length, row.n) for row in rows} == {("documents-check-tales", 260, 6)}


@pytest.mark.filterwarnings("ignore:at 2.. tokens")
def test_a_model_that_does_not_read_needs_no_document(
    file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"lengths": [260], "score": "likelihood", "answer_tokens": 8}
    monkeypatch.setattr(EvalTarget, "load", lambda self: Deaf(tokenizer).eval())
    rows, outcomes = evaluate_documents(STORIES, file, **how)
    assert all((DOCUMENT_NOT_NEEDED in one.faults) == bool(one.scores) for one in outcomes)
    monkeypatch.setattr(EvalTarget, "load", lambda self: Copier(tokenizer).eval())
    more, outcomes = evaluate_documents(STORIES, file, **how)
    assert DOCUMENT_NOT_NEEDED not in by_name(outcomes)["good"]
    value = {row.metric: row for row in rows + more}
    assert value["log_likelihood"].value > value["log_likelihood_without_document"].value
    assert (value["log_likelihood"].n, value[DOCUMENT_NOT_NEEDED].n) == (5, 6)


def test_a_model_that_says_the_answer_scores_all(file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zebra.evaluate.documents.greedy_answers", lambda *_, **__: ["Dog!", "a dog", "cow", "cat", "giraffe"]
    )
    monkeypatch.setattr(EvalTarget, "load", lambda self: Deaf(tokenizer).eval())
    with pytest.warns(UserWarning, match="a length of .* exceeds the 512 positions"):
        rows, outcomes = evaluate_documents(STORIES, file, beyond=True, answer_tokens=300)
    by_metric = {row.metric: row for row in rows}
    assert by_metric["f1"].value == pytest.approx(4 / 5)
    assert by_metric["f1"].n == 5
    assert by_metric["f1"].low is not None
    assert by_metric["document cut"].value == 0
    assert [one.prediction for one in outcomes] == ["Dog!", "a dog", "cow", None, "cat", "giraffe"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"score": "recall"}, "score must be generate or likelihood; got 'recall'"),
    ({"answer_tokens": 0}, "answer_tokens must be at least 1; got 0"),
    ({"lengths": [300, 600]}, "600 tokens exceeds the 512 positions .*--beyond"),
    ({"limit": 0}, "limit must be at least 1; got 0"),
    ({"rope": "dynamic:2"}, "fixed frequencies; those of a rope of type dynamic change"),
    ({"device": "moon"}, "device 'moon' is not available"),
    ({"self_extend": "4:700"}, "below the trained length"),
    ({"lengths": [140]}, "Use a longer length"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_bad_input_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], why: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvalTarget, "load", None)
    with pytest.raises(ZebraError, match=why):
        evaluate_documents(STORIES, file, **changes)


def test_a_file_without_a_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"document": "d", "question": "q", "answers": ["?"]}))
    with pytest.raises(ZebraError, match="none of the 1 items has a reference answer"):
        evaluate_documents(STORIES, tmp_path / "x.jsonl", check_only=True)


def test_the_verb_its_items_and_its_page(file: Path, tmp_path: Path, zebra: Zebra) -> None:
    arguments = ("evaluate", "documents", STORIES, file, "--length", "256,300", "--answer-tokens", 8, "--limit", 4)
    arguments += ("--json", "--items", tmp_path / "items.jsonl", "--out", tmp_path / "results.jsonl")
    done = zebra(*arguments)
    assert done.returncode == 0, done.stderr
    assert "zebra: at 256 tokens" in done.stderr
    results = json.loads(done.stdout)["results"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results
    scores = [row for row in results if row["task"] == "documents-generate-tales"]
    assert {(row["metric"], row["length"], row["n"]) for row in scores} == {
        (metric, length, 3) for metric in ("rouge1", "rouge2", "rougeL", "f1") for length in (256, 300)
    }
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [(one["name"], one["length"]) for one in items[:5]] == [
        *((name, 256) for name in ("good", "again#0", "again#1", "empty")),
        ("good", 300),
    ]
    mean = math.fsum(one["scores"]["f1"] for one in items[:3]) / 3
    assert next(row["value"] for row in scores if row["metric"] == "f1") == pytest.approx(mean)
    write_report(read_results(tmp_path / "results.jsonl"), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "the data of tales" in page
    assert "tales, by generation" in page


def test_bad_lines_are_refused_in_one_line(tmp_path: Path, zebra: Zebra) -> None:
    (tmp_path / "x.jsonl").write_text('{"document": "d"}\n[]\n')
    done = zebra("evaluate", "documents", STORIES, tmp_path / "x.jsonl", "--check-only")
    refused(done, "has 2 bad records: line 1 has no field", "line 2 is a JSON")

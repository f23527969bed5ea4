"""Retrieval scores: a script that reads the prompt gets all, a guesser one in ten, and the cache changes nothing."""

from __future__ import annotations

import importlib
import json
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STORIES, TEXT, Zebra, generate_tokens, refused
from test_needles import solved
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import zebra
from zebra import ZebraError
from zebra.data.haystack import PromptTokenizer
from zebra.data.needles import Sample, SampleGenerator
from zebra.data.questions import TASKS, WITHOUT_DEPTH
from zebra.evaluate import scoring
from zebra.evaluate.intervals import wilson
from zebra.evaluate.retrieval import evaluate_retrieval, retrieval
from zebra.evaluate.scoring import log_likelihoods
from zebra.report import write_report
from zebra.report.series import percent
from zebra.results import Result, read_results, write_results

LENGTH = 420


@pytest.fixture(scope="module")
def needles(tokenizer: Any) -> SampleGenerator:
    return SampleGenerator(tokenizer)


class Scripted(PreTrainedModel, GenerationMixin):
    """A model whose logits are a function of the tokens so far; it knows earlier tokens only from the cache."""

    config_class = LlamaConfig
    _supports_attention_backend = True

    def __init__(self, tokenizer: Any):
        super().__init__(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, bos_token_id=1, eos_token_id=2))
        self.unused = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer

    def next(self, tokens: list[int]) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **_: Any) -> Any:
        seen = input_ids[:, None, :, None].float()
        if past_key_values is not None:
            seen, _ = past_key_values.update(seen, seen, 0)
        tokens = seen[:, 0, :, 0].long().tolist()
        count = logits_to_keep or input_ids.shape[1]
        logits = [[self.next(row[: len(row) - i]) for i in reversed(range(count))] for row in tokens]
        return CausalLMOutputWithPast(
            logits=torch.stack([torch.stack(row) for row in logits]), past_key_values=past_key_values
        )


class Oracle(Scripted):
    """Reads the question and says the answers, in the order in which it finds them."""

    task = ""

    def next(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(len(self.tokenizer))
        if len(tokens) < LENGTH:
            return logits
        writer = PromptTokenizer(self.tokenizer)
        left = [list(writer.encode(answer)) for answer in solved(self.task, writer.decode(tokens[:LENGTH]))]
        answered = tokens[LENGTH:]
        while whole := [answer for answer in left if answer == answered[: len(answer)]]:
            answered = answered[len(whole[0]) :]
            left.remove(whole[0])
        for answer in left:
            if answer[: len(answered)] == answered:
                logits[answer[len(answered)]] = 9.0
        if not left:
            logits[2] = 9.0
        return logits


class Guesser(Scripted):
    """Logits that have nothing to do with the question."""

    def next(self, tokens: list[int]) -> Tensor:
        return torch.randn(len(self.tokenizer), generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**40))


@pytest.mark.parametrize(
    ("task", "score"),
    [
        *((task, "generate") for task in TASKS),
        ("multivalue", "likelihood"),
        *(pytest.param(task, "likelihood", marks=pytest.mark.full) for task in TASKS if task != "multivalue"),
    ],
)
def test_a_script_that_reads_the_prompt_finds_every_answer(
    task: str, score: str, tokenizer: Any, needles: SampleGenerator
) -> None:
    oracle = Oracle(tokenizer).eval()
    oracle.task = task
    samples = [s for depth in (0, 0.4, 1) for s in needles.samples(task, length=LENGTH, depth=depth, count=2)]
    assert retrieval(oracle, tokenizer, samples, score=score, batch_tokens=1000) == [1.0] * 6


def test_a_guesser_is_near_chance(tokenizer: Any, needles: SampleGenerator) -> None:
    guesser = Guesser(tokenizer).eval()
    scores: list[float] = []
    for task in TASKS:
        samples = needles.samples(task, length=LENGTH, depth=0.5, count=25)
        scores += retrieval(guesser, tokenizer, samples, score="likelihood")
        assert sum(retrieval(guesser, tokenizer, samples[:4], score="generate")) < 0.5
    low, high = wilson(sum(scores) / len(scores), len(scores))
    assert low < 0.1 < high


@pytest.fixture(scope="module")
def striped() -> Any:
    return zebra.load(STORIES, stripes="GLLL:65")


@pytest.mark.parametrize("batch_tokens", [64, 10_000, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 300))])
def test_likelihoods_are_those_of_whole_texts(striped: Any, needles: SampleGenerator, batch_tokens: int) -> None:
    """Chunks, cache, padding on both sides and copies against one plain forward for each candidate."""
    _equal_whole_texts(striped, needles.samples("multikey", length=300, depth=0.5, count=3), batch_tokens)


def test_likelihoods_under_self_extend_are_those_of_whole_texts(needles: SampleGenerator) -> None:
    extended = zebra.load(STORIES, stripes="GLLL:65", self_extend="4:32")
    _equal_whole_texts(extended, needles.samples("needle", length=700, depth=0.5, count=2), 256)


def _equal_whole_texts(model: Any, samples: list[Sample], batch_tokens: int) -> None:
    with torch.no_grad():
        prompts = [sample.ids[7 * i :] for i, sample in enumerate(samples)]
        answers = [[one.ids for one in (*s.answers, *s.distractors)][: 10 - i] for i, s in enumerate(samples)]
        answers[-1][0] += answers[-1][0]
        sums = log_likelihoods(model, prompts, answers, batch_tokens=batch_tokens)
        for prompt, own, row in zip(prompts, answers, sums, strict=True):
            for ids, value in zip(own, row, strict=True):
                logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].double()
                chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                whole = sum(float(chances[i, token]) for i, token in enumerate(ids))
                assert value == pytest.approx(whole, abs=1e-3)


def test_short_prompts_with_long_answers_form_few_logits_at_once(striped: Any) -> None:
    """A batch of 100 questions by answers of 100 tokens is 1.8 GiB of logits of 49,152 tokens."""
    formed: list[int] = []
    prompts, answers = [[1, 5 + i, 6] for i in range(100)], [[[7 + i] * 100, [9]] for i in range(100)]
    with striped.register_forward_hook(lambda module, args, output: formed.append(output.logits[..., 0].numel())):
        sums = log_likelihoods(striped, prompts, answers)
        assert max(formed) <= 1024
        assert sums[42] == pytest.approx(log_likelihoods(striped, prompts[42:43], answers[42:43])[0], rel=1e-4)


def test_a_batch_goes_on_as_each_alone(striped: Any, tokenizer: Any, needles: SampleGenerator) -> None:
    samples = needles.samples("passkey", length=300, depth=0.5, count=3)
    ids = torch.tensor([sample.ids for sample in samples])
    together = generate_tokens(striped, tokenizer, ids, max_new_tokens=12)
    assert together == [generate_tokens(striped, tokenizer, row[None], max_new_tokens=12)[0] for row in ids]
    assert together == generate_tokens(striped, tokenizer, ids, max_new_tokens=12, prefill_chunk=64)


def test_an_answer_counts_where_the_continuation_has_it(
    striped: Any, tokenizer: Any, needles: SampleGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = needles.samples("multivalue", length=300, depth=0.5)
    answer = f"{sample.answers[2].text}, {sample.distractors[0].text} and {sample.answers[0].text}."
    sequence = torch.tensor([[*sample.ids, *tokenizer.encode(answer)]])
    monkeypatch.setattr(scoring, "generate_with", lambda *_, **__: SimpleNamespace(sequences=sequence))
    assert retrieval(striped, tokenizer, [sample]) == [0.5]


def test_samples_of_several_lengths_and_tasks_score_as_each_alone(
    striped: Any, tokenizer: Any, needles: SampleGenerator
) -> None:
    cells = [("multivalue", 300), ("passkey", 310), ("needle", 200), ("multiquery", 330), ("multivalue", 250)]
    samples = [s for task, length in cells for s in needles.samples(task, length=length, depth=0.5, count=2)]
    alone = [retrieval(striped, tokenizer, [sample], score="likelihood")[0] for sample in samples]
    assert retrieval(striped, tokenizer, samples, score="likelihood", batch_tokens=1000) == alone
    assert len(set(alone)) > 1


def test_wilsons_interval() -> None:
    """Against the roots of (p - m)² = z² p (1 - p) / n, and its textbook value for 10 of 10."""
    for mean, n in ((0.3, 20), (0.95, 7), (0.5, 1000), (0.0, 12)):
        for p in wilson(mean, n):
            assert (p - mean) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_rows_have_length_and_depth_in_columns(tmp_path: Path) -> None:
    rows = evaluate_retrieval(
        STORIES,
        tasks=["passkey", "frequent-words", "passkey"],
        lengths=[320, 260],
        depths=[1, 0.5],
        samples=3,
        score="likelihood",
        stripes="GL:64",
        seed=4,
    )
    cells = [(row.task, row.length, row.depth) for row in rows]
    assert cells == [
        *(("retrieval-likelihood-passkey", length, depth) for length in (260, 320) for depth in (0.5, 1)),
        *(("retrieval-likelihood-frequent-words", length, None) for length in (260, 320)),
    ]
    for row in rows:
        assert (row.metric, row.n, row.seed, row.layout) == ("accuracy", 3, 4, "GL:64")
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
    write_results(tmp_path / "results.jsonl", rows)
    assert read_results(tmp_path / "results.jsonl") == rows


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["passkey", "haystack"]}, "the task must be one of passkey, .* got 'haystack'"),
    ({"tasks": []}, "at least one task"),
    ({"lengths": [40]}, "passkey requires a length of at least"),
    ({"depths": [0, 2]}, "the depth must be from 0 to 1; got 2"),
    ({"samples": 0}, "samples must be from 1 to 100,000; got 0"),
    ({"score": "recall"}, "score must be generate or likelihood; got 'recall'"),
    ({"lengths": [600]}, "600 tokens exceeds the 512 positions .*--beyond"),
    ({"lengths": [1400], "self_extend": "4:256"}, "1,400 tokens exceeds the 1,280 positions .* Self-Extend 4:256"),
    ({"rope": "dynamic:2"}, "fixed frequencies; those of a rope of type dynamic change"),
    ({"device": "moon"}, "device 'moon' is not available"),
    ({"dtype": "int4"}, "dtype must be one of"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_bad_input_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zebra.model.load_options.load", None)
    with pytest.raises(ZebraError, match=why):
        evaluate_retrieval(STORIES, **{"tasks": ["passkey"], "lengths": [300], "depths": [0], "samples": 1} | changes)


def test_a_haystack_too_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zebra.model.load_options.load", None)
    (tmp_path / "few.txt").write_text("Once upon a time. " * 20)
    with pytest.raises(ZebraError, match=r"the haystack must have at least .* tokens; got "):
        evaluate_retrieval(STORIES, tasks=["needle"], lengths=[200, 500], haystack=[str(tmp_path / "few.txt")])


def test_a_checkpoint_without_a_tokenizer_is_refused(stories: Path) -> None:
    for file in stories.glob("*token*"):
        file.unlink()
    with pytest.raises(ZebraError, match=r"the tokenizer of .* cannot be read"):
        evaluate_retrieval(stories, tasks=["passkey"], lengths=[300])


def test_beyond_the_model_only_when_told() -> None:
    kwargs: dict[str, Any] = {"tasks": ["passkey"], "lengths": [530], "depths": [0.5], "samples": 1}
    with pytest.warns(UserWarning, match="530 tokens exceeds the 512 positions"):
        (row,) = evaluate_retrieval(STORIES, beyond=True, **kwargs)
    assert row.length == 530
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = evaluate_retrieval(STORIES, rope="yarn:2", **kwargs)
        (other,) = evaluate_retrieval(STORIES, self_extend="4:128", **kwargs)
    assert row.layout == "full yarn:2"
    assert other.layout == "full, self-extend 4:128"


COMMON = ("evaluate", "retrieval", STORIES, "--samples", 2, "--score", "likelihood")


def test_the_verb_and_its_page(zebra: Zebra, tmp_path: Path) -> None:
    arguments = (*COMMON, "--task", "passkey,common-words", "--length", "300,360", "--depth", "0,1")
    done = zebra(*arguments, "--json", "--out", tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(row["length"], row["depth"]) for row in results] == [
        *((length, depth) for length in (300, 360) for depth in (0, 1)),
        *((length, None) for length in (300, 360)),
    ]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results
    write_report(read_results(tmp_path / "results.jsonl"), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "passkey, by likelihood: answers found, by length and depth" in page
    assert (tmp_path / "report-retrieval-2.svg").is_file()


def test_the_table_and_a_warning(zebra: Zebra) -> None:
    text = ("--haystack", TEXT / "tinystories_test.txt", "--beyond")
    done = zebra(*COMMON, "--task", "needle", "--length", "530", "--depth", "0.5", *text)
    assert done.returncode == 0, done.stderr
    assert "needle in own text, by likelihood" in " ".join(done.stdout.split())
    assert done.stderr.startswith("zebra: a length of 530 tokens exceeds the 512 positions")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("needle", "--length", "530"), ("--beyond",)),
        (("needle", "--length", "4k"), ("--length must be numbers", "'4k'")),
        (("needle", "--length", "300", "--depth", "middle"), ("--depth must be numbers", "'middle'")),
    ],
)
def test_a_refusal_is_one_line(arguments: tuple[str, ...], words: tuple[str, ...], zebra: Zebra) -> None:
    refused(zebra(*COMMON, "--task", *arguments), *words)


def test_every_task_is_in_the_guide() -> None:
    guide = (STORIES.parent.parent / "docs" / "evaluating.md").read_text()
    for task in TASKS:
        assert f"| `{task}` |" in guide
    assert set(WITHOUT_DEPTH) < set(TASKS)


# benchmarks/retrieval.py, the page of the example under layouts


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with its files elsewhere."""
    module = importlib.import_module("retrieval")
    for name in ("FILE", "PAGE", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    return module


def _cells(bench: ModuleType, part: str, layout: str, far: float, model: str = "x") -> list[Result]:
    make = {"run": part, "model": model, "layout": layout, "metric": "accuracy", "length": bench.TRAINED, "n": 20}
    return [
        Result(task=f"retrieval-generate-{task}", depth=depth, value=far if depth < 1 else 1.0, **make)
        for task in bench.TASKS
        for depth in bench.DEPTHS
    ]


def _laid_out(bench: ModuleType) -> list[Result]:
    rows = _cells(bench, "layouts", "full", 1.0)
    for layout, far in {"GL": 0.5, "LG": 0.8, "GLLL": 0.05, "1": 0.2, "2": 0.7, "3": 0.3, "L": 0.0, "0,3": 0.9}.items():
        rows += _cells(bench, "layouts", f"{layout}:{bench.WINDOW}", far)
    selected = {"run": "layouts", "model": "x", "task": "selection-greedy-lookup", "metric": "held_out_rise"}
    return rows + [Result(layout=f"{chosen}:{bench.WINDOW}", value=0.1, **selected) for chosen in ("0,3", "2")]


def test_the_page_of_layouts_says_best_worst_and_measured(bench: ModuleType) -> None:
    rows = _laid_out(bench)
    _, *lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in bench.findings(rows)[0].blocks]
    assert lines[0].startswith("Full attention: 100 % (")
    assert "2 of 4 layers global: the best offset is LGLG with 80 % (" in lines[1]
    assert "the worst GLGL with 50 % (" in lines[1]
    assert "; 0 of 2 measured offsets find less than 10 %" in lines[1]
    assert "zebra.select chose GLLG: 90 % (" in lines[1]
    assert "1 of 4 layers global: the best offset is LLGL with 70 % (" in lines[2]
    assert "the worst GLLL with 5 % (" in lines[2]
    assert "; 1 of 4 measured offsets find less than 10 %" in lines[2]
    assert "zebra.select chose LLGL: 70 % (" in lines[2]
    _, *tables = bench.within([*rows, *_cells(bench, "adapted", "GLLL:128", 0.9)])[0].blocks
    assert [table.title for table in tables] == list(bench.TASKS)
    names = ["full", "GLGL", "LGLG", "GLLG *", "GLLL", "LGLL", "LLGL *", "LLLG", "LLLL"]
    assert [line[0].text for line in tables[0].body] == names
    line = tables[0].body[4]
    assert [cell.text for cell in line[1:]] == [percent(share, 0) for share in (0.05, 1, 0.9, 1)]
    assert line[1].dim == "{:.0f}–{:.0f}".format(*(100 * bound for bound in wilson(0.05, 40)))


def test_the_page_of_layouts_is_written_from_its_rows(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    further = [replace(row, run="beyond", length=4 * bench.TRAINED) for row in _cells(bench, "beyond", "full", 0.25)]
    write_results(bench.FILE, [*_cells(bench, "layouts", "L:128", 0.9), *further])
    monkeypatch.setitem(bench.PARTS, "layouts", lambda: iter([_laid_out(bench)]))
    bench.main(["layouts"])
    rows = read_results(bench.FILE)
    assert rows == [*_laid_out(bench), *further]
    text = bench.PAGE.read_text()
    assert f"| passkey, {4 * bench.TRAINED:,} |" in text
    assert "(../images/retrieval-layouts.svg)" in text
    assert ET.fromstring(bench.PICTURE.read_text()).tag.endswith("svg")
    bench.main(["--page"])
    assert bench.PAGE.read_text() == text
    with pytest.raises(ZebraError, match="parts are layouts, adapted, beyond"):
        bench.main(["layuots"])

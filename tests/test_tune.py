"""Instruction tuning end to end: packed equals single, a kill changes nothing, bad input is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import STORIES, Zebra, changed, refused, tiny_config, tiny_model
from test_adapt import KILLS, RUN_FILES, kill_while_training, names
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import zebra
from zebra import ZebraError
from zebra.data.conversations import TokenizedConversation
from zebra.data.corpus import Corpus
from zebra.data.mixture import Source, mix, split_sources
from zebra.data.packing import IGNORE
from zebra.evaluate.answers import answer_losses
from zebra.model.attention import NAME
from zebra.model.families import model_class, with_stripes
from zebra.model.load_options import loaded_layout_name
from zebra.results import Result, read_results
from zebra.stripes import Stripes
from zebra.train.chat import Chat
from zebra.train.dry_run import dry_run
from zebra.train.instructions import read_instructions
from zebra.train.recipe_file import read_recipe
from zebra.train.sft import AnswerSequences, TokenizedSource, as_dataset
from zebra.train.source import CheckpointStart, read_source
from zebra.train.tune import tune
from zebra.train.tune_recipe import TuneRecipe

STEPS = 6
WORDS = ("dog", "cat", "bird", "boy", "girl", "mom", "frog", "bear")


def write(folder: Path) -> None:
    """Short and long conversations, without a fault."""
    short = [
        {"prompt": f"What does the {a} see, {b}?", "completion": f"The {a} sees a {b}."} for a in WORDS for b in WORDS
    ]
    story = "One day the {} went to the park with a {}. They played and played and were happy. "
    long = [
        {
            "document": (story.format(a, b) * 4).strip(),
            "question": "Who went to the park?",
            "answer": f"The {a} went with a {b}.",
            "kind": "qa",
        }
        for a in WORDS
        for b in WORDS
    ]
    for name, lines in (("short", short), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe(run: Path, folder: Path, **changes: Any) -> TuneRecipe:
    tree: dict[str, Any] = {
        "run": str(run),
        "model": str(STORIES),
        "stripes": "GLLL:33",
        "chat_template": "plain",
        "data": {
            "sources": [
                {"name": "short", "files": [str(folder / "short.jsonl")], "share": 0.25},
                {"name": "long", "files": [str(folder / "long.jsonl")], "share": 0.75},
            ],
            "held_out": 0.1,
        },
        "train": {
            "length": 256,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "evaluate": {"eval_steps": 3},
    }
    return TuneRecipe.model_validate(changed(tree, changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """One uninterrupted run, the measure of all others."""
    run = tmp_path_factory.mktemp("tune") / "run"
    return run, tune(recipe(run, data))


@pytest.mark.parametrize(
    ("source", "stripes", "rope", "layouts"),
    [
        ("GLLL:33+2", "GLLL:33+2", None, ["GLLL:33+2"]),
        ("GLLL:33+2", None, None, ["GLLL:33+2"]),
        ("GLLL:33+2", "GLLL:33", None, ["GLLL:33+2", "GLLL:33"]),
        ("GLLL:33", None, "linear:2", ["GLLL:33", "GLLL:33 linear:2"]),
    ],
)
def test_what_training_starts_from_is_measured_once_for_each_layout(
    source: str, stripes: str | None, rope: str | None, layouts: list[str], tmp_path: Path
) -> None:
    zebra.convert(STORIES, tmp_path / "source", source)
    tuned = recipe(tmp_path / "run", tmp_path, model=str(tmp_path / "source"), stripes=stripes, rope=rope)
    start = CheckpointStart(tuned, *read_source(tuned))
    assert [loaded_layout_name(model, rope) for model, rope in start.untrained()] == layouts


def values(rows: list[Result], metric: str) -> list[float]:
    return [row.value for row in rows if row.metric == metric]


def test_a_run_leaves_a_checkpoint_and_its_rows(finished: tuple[Path, list[Result]], data: Path) -> None:
    run, rows = finished
    assert names(run) == RUN_FILES
    assert read_results(run / "results.jsonl") == rows
    assert len(values(rows, "loss")) == STEPS
    measured = [(row.task, row.model, row.layout) for row in rows if row.metric == "answer_loss"]
    suites = ("answers-short", "answers-long")
    assert measured == [
        (suite, model, layout)
        for model, layout in (
            *((str(STORIES), "full"), (str(STORIES), "GLLL:33")),
            *((f"{run}@3", "GLLL:33"), (f"{run}@6", "GLLL:33"), (str(run / "model"), "GLLL:33")),
        )
        for suite in suites
    ]
    for suite in suites:
        losses = [row.value for row in rows if row.task == suite]
        assert losses[-1] < losses[1] - 0.5
        assert losses[-2] == pytest.approx(losses[-1], rel=1e-6)  # what was measured last is what was written
    shares = {row.task: row.value for row in rows if row.metric == "share"}
    assert shares["data-long"] == pytest.approx(0.75, abs=0.05)
    kinds = {row.task: row for row in rows if row.metric == "tokens" and row.task.startswith("instructions-")}
    assert set(kinds) == {"instructions-short", "instructions-qa"}
    assert tune(recipe(run, data)) == rows


def test_the_tuned_checkpoint_is_a_plain_one_that_chats(
    finished: tuple[Path, list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    model = run / "model"
    assert names(model) == names(STORIES) | {"zebra.json", "chat_template.jinja"}
    plain, words = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    source = json.loads((STORIES / "config.json").read_text())
    assert (plain.config.pad_token_id, plain.config.use_cache) == (source["pad_token_id"], True)
    assert "Assistant" in words.chat_template
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "What does the dog see, cat?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    torch.testing.assert_close(plain(prompt).logits, zebra.load(model)(prompt).logits, atol=1e-4, rtol=1e-4)


# Packing


def packed(lengths: list[int], row: int) -> tuple[AnswerSequences, TokenizedSource]:
    rng = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 97, (n,), generator=rng).numpy() for n in lengths]
    answers = [torch.rand(n, generator=rng).numpy() < 0.4 for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    hashes = np.arange(len(lengths), dtype=np.uint64)
    corpus = Corpus(np.concatenate(ids).astype(np.uint32), offsets.astype(np.int64), hashes)
    tokens = TokenizedSource(corpus, np.concatenate(answers), ["a"] * len(lengths))
    splits = split_sources([Source("a", corpus)], deduplicate=True)
    return AnswerSequences(mix(splits, 2, row, join=False, seed=0, whole=True).sequences, [tokens]), tokens


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_conversations_equal_single_ones(family: str) -> None:
    """Through trl's collator and a striped model: logits in float64, and the labels of the answers alone."""
    rows, tokens = packed([5, 30, 41, 1, 17, 44, 23], 80)
    config = with_stripes(tiny_config(family), Stripes.parse("GLLL:9"))
    torch.manual_seed(7)
    model = model_class(config)._from_config(config, attn_implementation=NAME, dtype=torch.float64).eval()
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([as_dataset(rows)[i] for i in range(len(rows))])
    with torch.no_grad():
        together = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    assert (batch["position_ids"][0] == 0).sum() > len(rows)
    at = 0
    for i in range(len(rows)):
        for document, _, count in rows.packed.pieces[rows.packed.firsts[i] : rows.packed.firsts[i + 1]]:
            one = tokens[rows.packed.documents.documents[document]]
            assert len(one.input_ids) == count
            with torch.no_grad():
                alone = model(torch.tensor([one.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(together[at : at + count], alone, atol=1e-10, rtol=1e-10)
            expected = [token if answer else IGNORE for token, answer in zip(*one, strict=True)]
            assert batch["labels"][0, at : at + count].tolist() == [IGNORE, *expected[1:]]
            at += count
    assert at == batch["input_ids"].shape[1]


def test_the_loss_is_that_of_the_answers_one_by_one(finished: tuple[Path, list[Result]], data: Path) -> None:
    """The first logged loss, through trl and packing, equals torch's cross-entropy of single conversations."""
    _, rows = finished
    run = recipe(data / "unused", data)
    chat = Chat(AutoTokenizer.from_pretrained(STORIES), "plain", "stories")
    scored = read_instructions(run, chat, lambda: pytest.fail("no model is asked")).sequences
    model = AutoModelForCausalLM.from_pretrained(zebra.convert(STORIES, data / "striped", "GLLL:33"))
    sums, counts = [], []
    for i in range(len(scored)):
        one, at = scored[i], 0
        total, answers = 0.0, 0
        for length in one["seq_lengths"]:
            ids = torch.tensor([one["input_ids"][at : at + length]])
            labels = torch.tensor(one["labels"][at : at + length])
            with torch.no_grad():
                logits = model(ids).logits[0]
            total += cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=IGNORE).item()
            answers += int((labels[1:] != IGNORE).sum())
            at += length
        sums.append(total)
        counts.append(answers)
    first = values(rows, "loss")[0]
    pairs = [(sums[i] + sums[j]) / (counts[i] + counts[j]) for i in range(len(sums)) for j in range(i)]
    assert min(abs(pair - first) for pair in pairs) < 1e-5


def test_the_loss_of_answers_is_that_of_torch() -> None:
    model = tiny_model("llama")
    conversations = [
        TokenizedConversation(
            torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist(),
            [i > n // 2 for i in range(n)],
        )
        for n in (7, 30, 12)
    ]
    model = model.__class__._from_config(model.config, attn_implementation=NAME)
    scored, counts = answer_losses(model, conversations, batch_tokens=40)
    for one, total, count in zip(conversations, scored, counts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([one.input_ids]), use_cache=False).logits[0]
        labels = torch.tensor([t if a else IGNORE for t, a in zip(*one, strict=True)])
        expected = cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=IGNORE)
        assert total == pytest.approx(expected.item(), rel=1e-5)
        assert count == sum(one.assistant_mask)


@pytest.mark.full
@pytest.mark.parametrize("when", ["between saves", "inside the export"])
def test_a_killed_run_resumes_to_the_same_losses(
    when: str, finished: tuple[Path, list[Result]], data: Path, tmp_path: Path
) -> None:
    training_recipe = recipe(tmp_path / "run", data)
    kill_while_training(training_recipe, KILLS[when][0], tmp_path, "tune")
    assert not (tmp_path / "run" / "model").exists()
    rows = tune(training_recipe)
    _, expected = finished
    for metric in ("loss", "answer_loss"):
        assert values(rows, metric) == values(expected, metric)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4}},
        pytest.param({"train__activation_checkpointing": True}, marks=pytest.mark.full),
        pytest.param({"train__bf16": True}, marks=pytest.mark.full),
        pytest.param({"train__gradient_accumulation_steps": 2, "stripes": None}, marks=pytest.mark.full),
        pytest.param({"lora": {"r": 4, "merge": False}}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_choice_of_a_recipe_runs(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    rows = tune(recipe(tmp_path / "run", data, train__max_steps=2, evaluate=None, data__held_out=None, **changes))
    assert len(values(rows, "loss")) == 2
    assert all(0 < loss < 10 for loss in values(rows, "loss"))
    assert (tmp_path / "run" / "model" / "chat_template.jinja").exists()


# Bad input


def test_bad_input_is_one_line_before_any_training(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"

    def refused(match: str, line: str | None = None, **changes: Any) -> None:
        if line is not None:
            bad.write_text(line)
            changes["data"] = {"files": [str(bad)]}
        with pytest.raises(ZebraError, match=match):
            tune(recipe(tmp_path / "run", data, evaluate=None, **changes))
        assert not (tmp_path / "run").exists()

    good = json.dumps({"prompt": "x", "completion": "y"})
    refused(r"line 2 is not JSON", f"{good}\n{{")
    refused("the data have 1 sequences of 256 tokens, fewer than the 2 of one step", good)
    refused(r"no conversation in .*bad\.jsonl", "")
    refused("has no chat template. Set chat_template", good, chat_template=None)
    long = json.dumps({"prompt": "a dog " * 300, "completion": "y"})
    refused(r"bad\.jsonl, line 2 is too long: it has [\d,]+ tokens, train.length is 256", f"{good}\n{long}")
    bad.write_text(long)
    refused(r"no conversation left to train on.* 1 too long", data={"files": [str(bad)], "too_long": "drop"})


def test_a_refusal_is_one_line_on_the_command_line(data: Path, tmp_path: Path, zebra: Zebra) -> None:
    training_recipe = recipe(tmp_path / "run", data, chat_template=None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(training_recipe.model_dump(mode="json")))
    refused(zebra("tune", tmp_path / "recipe.yaml"), "zebra: the tokenizer of ", " has no chat template. ")
    with pytest.raises(ZebraError, match=r"unknown key data\.held"):
        read_recipe(tmp_path / "recipe.yaml", TuneRecipe, ["data.held=1"])
    assert dry_run(training_recipe).total > 0


def test_a_mixture_of_whole_conversations_ends_nearest_to_its_shares(data: Path) -> None:
    rows, tokens = packed([60, 60, 60, 60, 60], 100)
    assert [len(rows[i]["input_ids"]) for i in range(len(rows))] == [60, 60]
    assert all(len(tokens[i].input_ids) == 60 for i in range(5))
    splits = split_sources([Source(name, tokens.corpus, 0.5) for name in ("a", "b")], deduplicate=False)
    with pytest.raises(ZebraError, match="cannot hold one whole document of each of 2 sources"):
        mix(splits, 1, 100, join=False, seed=0, whole=True)


def test_updates_of_the_head_are_rejected_by_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot include lm_head, which trl does not support; remove it"):
        recipe(tmp_path / "run", tmp_path, lora={"target_modules": ["q_proj", "lm_head"]})

"""A recipe's texts: files or a mixture to rows, what is held out, and a run that keeps to the text it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES, TEXT

from zebra.errors import ZebraError
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.train.adapt import adapt
from zebra.train.directory import inputs_of
from zebra.train.recipe import AdaptRecipe
from zebra.train.run_results import source_results
from zebra.train.texts import TextTraining, read_texts

SEPARATOR = "<|endoftext|>"
STORY = str(TEXT / "tinystories_validation.txt")
TREE: dict[str, Any] = {
    "run": "run",
    "model": str(STORIES),
    "data": {"files": [STORY], "separator": SEPARATOR, "join": True},
    "train": {
        "length": 256,
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
    },
}


def recipe(**sections: Any) -> AdaptRecipe:
    return AdaptRecipe.model_validate(TREE | sections)


def texts(**sections: Any) -> TextTraining:
    return read_texts(recipe(**sections), load_tokenizer(STORIES, read_config(STORIES)))


def stories() -> list[str]:
    return [story.strip() for story in Path(STORY).read_text().split(SEPARATOR) if story.strip()]


def source(name: str, share: float, files: list[Path | str], **options: Any) -> dict[str, Any]:
    return {"name": name, "share": share, "files": list(map(str, files)), "separator": SEPARATOR, **options}


def trained_on(texts_read: TextTraining) -> set[int]:
    """The hash of every document with a token in a row."""
    drawn = texts_read.sequences.documents
    return {int(drawn.corpora[drawn.sources[d]].hashes[drawn.documents[d]]) for d in texts_read.sequences.pieces[:, 0]}


def test_a_text_shorter_than_a_step_is_refused(tmp_path: Path) -> None:
    """Each step had as many sequences as there were, and nothing said so."""
    (tmp_path / "short.txt").write_text(stories()[0] * 2)
    with pytest.raises(ZebraError, match=r"the data have \d sequences of 256 tokens, fewer than the 6 of one step"):
        texts(data={"files": [str(tmp_path / "short.txt")]})


def test_files_are_each_document_once(capsys: pytest.CaptureFixture[str]) -> None:
    texts_read = texts()
    assert len(trained_on(texts_read)) >= 199  # the end that fills no row may be a document
    assert (texts_read.held_out, texts_read.stats) == (None, [])
    assert capsys.readouterr().err == ""


def test_duplicates_are_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text(SEPARATOR.join([*stories(), *stories()[:7]]))
    data = TREE["data"] | {"files": [str(twice)]}
    trained = texts(data=data)
    assert capsys.readouterr().err == "200 documents to train on; 7 dropped as duplicates.\n"
    assert trained.sequences.tokens == texts().sequences.tokens
    assert texts(data=data | {"deduplicate": False}).sequences.tokens > trained.sequences.tokens


def test_what_is_held_out_is_measured_on_and_not_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    data = TREE["data"] | {"held_out": 0.2, "append_eos": True}
    texts_read = texts(data=data, evaluate={"length": 32})
    assert texts_read.held_out is not None
    out = len(texts_read.held_out)
    assert 20 < out < 60
    assert capsys.readouterr().err == f"{200 - out} documents to train on; {out} held out.\n"
    assert texts_read.sequences.documents.documents.tolist() == sorted(set(range(200)) - held(texts_read))
    assert all(texts_read.held_out[i][-1] == 2 for i in range(out))
    joined = texts(data=data, evaluate={"length": 3000, "join": True}).held_out
    assert joined is not None
    assert joined.lengths.min() >= 3000
    assert joined.tokens.tolist() == texts_read.held_out.tokens.tolist()


def test_a_length_that_no_document_fills_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"files": [STORY], "separator": SEPARATOR, "length": 4096}
    texts(evaluate=evaluation)
    assert "no document fills a context of 4,096 tokens; the longest window has " in capsys.readouterr().err
    texts(evaluate=evaluation | {"join": True})
    texts(evaluate=evaluation | {"length": 256})
    assert "no document fills" not in capsys.readouterr().err


def test_measuring_on_what_is_trained_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.txt"
    new.write_text(SEPARATOR.join([*stories()[:3], "A story of its own."]))
    texts(evaluate={"files": [str(new)], "separator": SEPARATOR, "length": 32})
    assert "3 of the 4 evaluation documents are also in the training text." in capsys.readouterr().err
    new.write_text("A story of its own." * 20)
    texts(evaluate={"files": [str(new)], "length": 32})
    assert capsys.readouterr().err == ""


def held(texts_read: TextTraining) -> set[int]:
    """The places of the documents that are held out."""
    return set(range(200)) - set(texts_read.sequences.documents.documents.tolist())


def test_a_mixture_fills_the_rows_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two buckets of the same files and a file of records; 120 rows are 20 steps of 2 rows, 3 times."""
    records = tmp_path / "r.jsonl"
    train = (TEXT / "tinystories_test.txt").read_text().split(SEPARATOR)
    records.write_text("".join(json.dumps({"body": story}) + "\n" for story in train))
    sources = [
        source("long", 0.5, [STORY], min_tokens=400),
        source("short", 0.2, [STORY], max_tokens=400),
        {"name": "records", "share": 0.3, "files": [str(records)], "field": "body"},
    ]
    data = {"sources": sources, "join": True, "held_out": 0.05, "num_proc": 2}
    tuned = recipe(data=data, evaluate={"length": 64})
    texts_read = texts(data=data, evaluate={"length": 64})
    assert len(texts_read.sequences) == 120
    assert [line.share for line in texts_read.stats] == pytest.approx([0.5, 0.2, 0.3], abs=0.001)
    assert texts_read.held_out is not None
    assert len(texts_read.held_out) == sum(len(line.split.held_out) for line in texts_read.stats)
    printed = capsys.readouterr().err
    assert "120 sequences of 256, 30,720 tokens" in printed
    assert "[400, ∞)" in printed
    assert "50.00%" in printed
    assert "epochs" in printed
    columns = {"model": "m", "layout": "GL:8", "run": "r", "seed": 0, "device": "cpu"}
    rows = source_results(texts_read.stats, length=tuned.train.length, **columns)
    values = {(row.task, row.metric): row.value for row in rows}
    assert values["data-long", "share_asked"] == 0.5
    assert values["data-records", "share"] == pytest.approx(0.3, abs=0.001)
    assert sum(values[f"data-{name}", "tokens_drawn"] for name in ("long", "short", "records")) == 30_720
    assert {row.length for row in rows} == {256}
    assert [len(line.split.train) for line in texts_read.stats] == list(dict.fromkeys(row.n for row in rows))


def test_the_digest_of_files_is_that_of_their_texts(tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(STORY).read_text())
    alone, measured = recipe(), recipe(evaluate={"files": [str(copy)], "separator": SEPARATOR, "length": 32})

    def digest(read: AdaptRecipe) -> str:
        return str(inputs_of(read, {}, finished=False)["files"])

    first = digest(measured)
    assert digest(measured) == first != digest(alone)
    copy.write_text(copy.read_text().replace("Once", "Twice", 1))
    assert digest(measured) != first


def test_a_run_on_a_mixture_measures_on_what_it_holds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "stories.txt"
    files.write_text(Path(STORY).read_text())
    tuned = recipe(
        run=str(tmp_path / "run"),
        data={"sources": [source("all", 1.0, [files])], "join": True, "held_out": 0.1},
        train=TREE["train"] | {"max_steps": 2, "logging_steps": 1, "save_steps": 1},
        evaluate={"length": 64},
    )

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zebra.train.source.CheckpointStart.export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapt(tuned)
    monkeypatch.undo()
    files.write_text(Path(STORY).read_text().replace("Once", "Twice", 1))
    with pytest.raises(ZebraError, match=r"files \(.*stories\.txt\) changed since"):
        adapt(tuned)
    files.write_text(Path(STORY).read_text())
    rows = adapt(tuned)
    assert {row.metric for row in rows if row.task == "data-all"} >= {"share", "share_asked", "epochs", "held_out"}
    assert {row.task for row in rows} == {"data-all", "perplexity-disjoint-bos", "speed", "train", "cost"}

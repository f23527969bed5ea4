"""Tasks of lm-eval: the model's own numbers, lengths in a column, no downloads, errors that say what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, Zebra
from test_retrieval import Scripted
from torch import Tensor
from transformers import AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.evaluate import harness, harness_retrieval
from zebra.evaluate.harness import evaluate_tasks
from zebra.evaluate.harness_model import language_model
from zebra.evaluate.lm_eval_compat import isolated, task_errors
from zebra.evaluate.scoring import log_likelihoods
from zebra.evaluate.target import EvalTarget
from zebra.report import write_report
from zebra.results import read_results

ITEMS = [
    {"text": "Once upon a time there was a little", "ends": ["girl named Lily", "zzz qq"], "right": 0},
    {"text": "The sun was", "ends": ["xx yy zz", "shining and the sky was blue"], "right": 1},
    {"text": "Tom and Anna went to the", "ends": ["park", "because"], "right": 1},
]
TASK = """
task: tiny_ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: right
doc_to_choice: ends
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
"""
LENGTHS = """
task: tiny_lengths
dataset_path: ""
custom_dataset: !function make.build
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: text
process_results: !function make.score
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 4}
metric_list:
  - {metric: "4096", aggregation: !function make.mean, higher_is_better: true}
  - {metric: "60", aggregation: !function make.mean, higher_is_better: true}
  - {metric: "90", aggregation: !function make.mean, higher_is_better: true}
"""
MAKE = '''
import datasets

def build(max_seq_lengths=(4096,), **rest):
    """As RULER's: a task for each length, whose metric is named after it."""
    (length,) = max_seq_lengths
    return {"test": datasets.Dataset.from_list([{"text": "One day", "length": length}] * 5)}

def score(item, results):
    return {"4096": -1.0, str(item["length"]): float(item["length"] == 90)}

def mean(values):
    print("foreign words on stdout")
    values = [value for value in values if value >= 0]
    return sum(values) / len(values) if values else -1
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks, and their data."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    where = {"file": tmp_path / "items.jsonl", "cache": tmp_path / "datasets"}
    (tmp_path / "tasks" / "ends.yaml").write_text(TASK.format(**where))
    (tmp_path / "tasks" / "lengths.yaml").write_text(LENGTHS)
    (tmp_path / "tasks" / "make.py").write_text(MAKE)
    group = "group: tiny\ntask: [tiny_ends]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "tasks" / "group.yaml").write_text(group)
    return tmp_path / "tasks"


@pytest.mark.parametrize("loading", [{"stripes": "GLLL:5"}, {"self_extend": "4:6"}], ids=["striped", "extended"])
def test_a_task_gives_what_the_model_prefers(folder: Path, tokenizer: Any, loading: dict[str, Any]) -> None:
    """The harness's accuracy against likelihoods of our own, on the model as it was loaded."""
    model, right = zebra.load(STORIES, **loading), 0
    for item in ITEMS:
        prompt = tokenizer(item["text"])["input_ids"]
        ends = [tokenizer(f"{item['text']} {end}")["input_ids"][len(prompt) :] for end in item["ends"]]
        with torch.no_grad():
            ((one, two),) = log_likelihoods(model, [prompt], [ends])
        right += int(two > one) == item["right"]
    assert 0 < right < len(ITEMS)
    rows = evaluate_tasks(STORIES, tasks=["tiny", "tiny_ends"], include=folder, batch_size=2, **loading)
    group, task = rows
    assert group.task == "harness-tiny"
    assert group.value == task.value == pytest.approx(right / len(ITEMS))
    assert (task.task, task.metric, task.n) == ("harness-tiny_ends", "acc", 3)
    assert task.low is not None
    assert task.low < task.value
    assert task.length == max(len(tokenizer(f"{i['text']} {end}")["input_ids"]) for i in ITEMS for end in i["ends"])
    assert task.versions["task"] == "2.5"
    assert task.versions["lm-eval"]
    assert task.layout == ("GLLL:5" if "stripes" in loading else "full, self-extend 4:6")


def test_the_harness_reads_no_end_of_text_behind_a_prompt(ending_stories: Path, tokenizer: Any) -> None:
    ending, seen = AutoTokenizer.from_pretrained(ending_stories), {}
    for name, one in (("ending", ending), ("plain", tokenizer)):
        lm = language_model(zebra.load(STORIES), one, 64, 2)
        ids, mask = lm.tok_batch_encode(["Once upon", "One"], left_truncate_len=64)
        shorter, _ = lm.tok_batch_encode(["Once upon a time"], left_truncate_len=2)
        seen[name] = [lm._encode_pair("Once upon a time", " there was"), ids[mask > 0].tolist(), shorter.tolist()]
    assert seen["ending"] == seen["plain"]


def test_examples_before_a_question_are_those_whose_length_was_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[list[Any]] = []
    measured = harness._measured

    def record(lm: Any, tasks: Any, *rest: Any) -> Any:
        (task,) = tasks["tasks"].values()
        requests.append([request.args for request in task.instances])
        results = measured(lm, tasks, *rest)
        requests.append([request.args for request in task.instances])
        return results

    monkeypatch.setattr(harness, "_measured", record)
    evaluate_tasks(STORIES, tasks=["tiny_ends"], include=folder, shots=1)
    assert requests[0] == requests[1]


def test_lengths_are_a_column(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate_tasks(STORIES, tasks=["tiny_lengths", "tiny_ends"], include=folder, lengths=[90, 60], limit=2)
    results = [(row.task, row.metric, row.length, row.value, row.n) for row in rows if row.task != "harness-tiny_ends"]
    assert results == [
        ("harness-tiny_lengths", "accuracy", 60, 0.0, 2),
        ("harness-tiny_lengths", "accuracy", 90, 1.0, 2),
    ]
    assert sum(row.task == "harness-tiny_ends" for row in rows) == 1
    (own,) = evaluate_tasks(STORIES, tasks=["tiny_lengths"], include=folder, limit=2)
    assert (own.metric, own.length, own.n, own.low) == ("accuracy", 4096, None, None)
    assert capsys.readouterr().out == ""


class Knows(Scripted):
    """Knows some texts by heart and continues them."""

    texts: tuple[list[int], ...] = ()

    def next(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(len(self.tokenizer))
        tokens = tokens[tokens.index(1) :] if 1 in tokens else tokens  # padding on the left
        for text in self.texts:
            if text[: len(tokens)] == tokens and len(text) > len(tokens):
                logits[text[len(tokens)]] = 9.0
        return logits


@pytest.mark.parametrize("right", [True, False])
def test_our_tasks_are_solved_by_a_model_that_knows_the_answers(
    right: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["zebra-passkey", "zebra-lookup-likelihood", "zebra-multivalue", "zebra-common-words-likelihood"]
    knows = Knows(tokenizer).eval()
    for name in names:
        config = harness_retrieval.configuration(name, tokenizer, 300, 2, 0)
        for item in config["custom_dataset"]()["test"]:
            count = len(item["answers"])
            assert abs(len(tokenizer(item["prompt"])["input_ids"]) - 300) < 15
            known = item["choices"][:count] if right else item["choices"][count : count + 1]
            ends = known if name.endswith("likelihood") else [" ".join(known)]
            knows.texts += tuple(tokenizer(f"{item['prompt']} {end}")["input_ids"] for end in ends)
    monkeypatch.setattr(EvalTarget, "load", lambda self: knows)
    rows = evaluate_tasks(STORIES, tasks=names, lengths=[300], limit=2)
    assert [(row.task, row.value, row.length, row.n) for row in rows] == [
        (f"harness-{name}", float(right), 300, 2) for name in names
    ]


BROKEN = {
    "no data": (TASK, "the data of the task tiny_ends do not exist: .*gone.jsonl.*data_files"),
    "of the hub": (
        "task: tiny_hub\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n",
        "the data of the task tiny_hub are not on this machine.*'nobody/nothing'.*lm_eval run --model dummy",
    ),
    "no package": (
        "task: tiny_import\ndataset_path: ''\ncustom_dataset: !function lacks.build\n",
        "the task tiny_import requires packages that are not installed: .*no_such_package",
    ),
    "fetches": (
        "task: tiny_fetch\ndataset_path: ''\ncustom_dataset: !function fetch.build\n",
        "the data of the task tiny_fetch are not on this machine, and zebra downloads nothing here",
    ),
    "broken": (
        "task: tiny_broken\ndataset_path: ''\ncustom_dataset: !function fetch.wrong\n",
        "the task tiny_broken cannot be built: ZeroDivisionError",
    ),
}


@pytest.fixture
def server() -> Iterator[str]:
    """A server that has whatever is requested."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: Any) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_there_is_refused(case: str, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, why = BROKEN[case]
    where = {"file": tmp_path / "gone.jsonl", "cache": tmp_path / "datasets"}
    (tmp_path / "one.yaml").write_text(text.format(**where) if text is TASK else text)
    (tmp_path / "lacks.py").write_text("import no_such_package\ndef build(**_): pass")
    fetch = f"import urllib.request\ndef build(**_): urllib.request.urlopen('{server}')\ndef wrong(**_): 1 / 0"
    (tmp_path / "fetch.py").write_text(fetch)
    monkeypatch.setattr(EvalTarget, "load", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ZebraError, match=why):
        evaluate_tasks(
            STORIES, tasks=[text.splitlines()[text.startswith("\n")].removeprefix("task: ")], include=tmp_path
        )


def test_the_surroundings_come_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    monkeypatch.setenv("https_proxy", "http://own")
    before = dict(os.environ)
    with isolated():
        print("said")
        assert os.environ["https_proxy"] == os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert dict(os.environ) == before
    assert capsys.readouterr() == ("", "said\n")
    with pytest.raises(ZebraError, match="as it was"), task_errors("x"):
        raise ZebraError("as it was")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["zebra-needles"], "lengths": [300]}, "zebra's tasks are zebra-passkey, .*got 'zebra-needles'"),
    ({"tasks": ["zebra-needle"]}, "zebra-needle requires lengths for its texts; got none. Give --length"),
    ({"tasks": ["zebra-needle"], "lengths": [40]}, "needle requires a length of at least"),
    ({"tasks": ["tiny_ends"], "lengths": [300]}, "none of tiny_ends supports a length"),
    ({"tasks": ["zebra-passkey"], "lengths": [510], "limit": 1}, "1 of 1 of zebra-passkey.*--cut.*--beyond"),
    ({"tasks": ["tiny_ends"], "cut": True, "beyond": True}, "got both"),
    ({"tasks": ["tiny_ends"], "limit": 0}, "limit=0"),
    ({"tasks": ["tiny_ends"], "shots": -1}, "shots=-1"),
    ({"tasks": ["tiny_ends"], "chat": True}, "no chat template"),
    ({"tasks": ["tiny_ends"], "include": "nowhere"}, "no folder at nowhere"),
    ({"tasks": ["tiny_ends"], "rope": "dynamic:2"}, "a rope of type dynamic"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_bad_input_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvalTarget, "load", None)
    with pytest.raises(ZebraError, match=why):
        evaluate_tasks(STORIES, **{"include": folder} | changes)


def test_too_long_is_cut_or_run_when_told() -> None:
    kwargs: dict[str, Any] = {"tasks": ["zebra-passkey"], "lengths": [520], "limit": 1}
    with pytest.warns(UserWarning, match=r"exceed the 512 positions .* truncated on the left: 1 of 1"):
        (cut,) = evaluate_tasks(STORIES, cut=True, **kwargs)
    with pytest.warns(UserWarning, match="results beyond them show how it fails"):
        (whole,) = evaluate_tasks(STORIES, beyond=True, **kwargs)
    assert cut.length == whole.length == 520


def test_full_decoding_does_not_show_in_what_is_read(folder: Path) -> None:
    with pytest.warns(UserWarning, match="the harness reads requests in one pass"):
        (row,) = evaluate_tasks(STORIES, tasks=["tiny_ends"], include=folder, stripes="GLLL:5", full_decode=True)
    assert "full" in row.layout


@pytest.fixture
def few_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lm-eval without its own 14,000 task files, which take ten seconds to read."""
    from lm_eval.tasks import TaskManager

    def without(include_defaults: bool, **rest: Any) -> Any:
        return TaskManager(include_defaults=False, **rest)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without)
    return folder


def test_a_name_that_is_not_there_is_refused_with_its_neighbours(few_tasks: Path) -> None:
    with pytest.raises(ZebraError, match=r"no task 'tiny_end' among the 3 of lm-eval.*similar are tiny_ends"):
        evaluate_tasks(STORIES, tasks=["tiny_end"], include=few_tasks)


@pytest.mark.full
def test_the_tasks_of_the_harness_are_refused_without_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvalTarget, "load", None)
    with pytest.raises(ZebraError, match=r"the data of the task hellaswag .*'Rowan/hellaswag'.*--tasks hellaswag"):
        evaluate_tasks(STORIES, tasks=["hellaswag"])
    with pytest.raises(ZebraError, match=r"no task 'helaswag' among the 1.,.*hellaswag"):
        evaluate_tasks(STORIES, tasks=["helaswag"])


def test_without_the_extra_it_is_said_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ZebraError, match=r"pip install '\.\[tasks\]'"):
        evaluate_tasks(STORIES, tasks=["zebra-passkey"], lengths=[300])


def test_the_verb_and_its_page(folder: Path, tmp_path: Path, zebra: Zebra) -> None:
    arguments = ("evaluate", "tasks", STORIES, "--tasks", "tiny_ends,zebra-lookup-likelihood", "--length", "300")
    arguments += ("--include", folder, "--limit", 2, "--out", tmp_path / "results.jsonl", "--json")
    done = zebra(*arguments)
    assert done.returncode == 0, done.stderr
    assert [row["task"] for row in json.loads(done.stdout)["results"]] == [
        "harness-tiny_ends",
        "harness-zebra-lookup-likelihood",
    ]
    write_report(read_results(tmp_path / "results.jsonl"), tmp_path / "report.html")
    assert "tiny_ends, stories260K full, 2 items" in (tmp_path / "report.html").read_text()

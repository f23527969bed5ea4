"""Several verbs as one recipe: each stage once, again when what it depends on changed, the same after any kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import STORIES, TEXT, Zebra, changed, refused
from test_tune import write as write_conversations
from transformers import AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.files import directory_lock
from zebra.pipeline.recipe import read_pipeline
from zebra.pipeline.run import digest_of, inputs_of, plan, run
from zebra.pipeline.stages import results_in

SEPARATOR = "<|endoftext|>"
EVALUATION = {
    "perplexity": {"text": ["{data}/few.txt"], "separator": SEPARATOR, "lengths": [256]},
    "retrieval": {"tasks": ["passkey"], "lengths": [128], "depths": [0.5], "samples": 4, "score": "likelihood"},
}
STAGES: dict[str, dict[str, Any] | None] = {
    "before": {"kind": "evaluate", "from": "model", **EVALUATION},
    "convert": {"stripes": "GLLL:33"},
    "adapt": {
        "data": {"files": ["{data}/few.txt"], "separator": SEPARATOR, "join": True},
        "train": {"length": 128, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
        "evaluate": {"files": ["{data}/few.txt"], "separator": SEPARATOR, "length": 128},
    },
    "tune": {
        "chat_template": "plain",
        "data": {"files": ["{data}/long.jsonl"], "quality": {"act": "off"}},
        "train": {"length": 256, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
        "evaluate": {"suites": [{"name": "short", "files": ["{data}/short.jsonl"]}]},
    },
    "evaluate": dict(EVALUATION),
    "report": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_conversations(folder)
    for name in ("short", "long"):
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(file.read_text().splitlines()[:12]))
    few = (TEXT / "tinystories_test.txt").read_text().split(SEPARATOR)[:10]
    (folder / "few.txt").write_text(SEPARATOR.join(few))
    return folder


def recipe(data: Path, to: Path, *stages: str, **changes: Any) -> Path:
    """A pipeline's recipe in a file; of all stages where none is named."""
    text = json.dumps({name: STAGES[name] for name in stages or STAGES}).replace("{data}", str(data))
    tree = {"run": str(to / "run"), "model": str(STORIES), "stages": json.loads(text)}
    file = to / "pipeline.yaml"
    file.write_text(yaml.safe_dump(changed(tree, changes), sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted pipeline, the measure of all others."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        done = run(read_pipeline(recipe(data, folder)))
    assert [one.why for one in done] == ["new"] * 6
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished pipeline somewhere else, where things may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def results(folder: Path) -> list[tuple[Any, ...]]:
    """What the rows of a pipeline's stages say, but for where things lie and how fast it went."""
    rows = [row for name in STAGES for row in results_in(folder / name)]
    return [
        (row.run, row.layout, row.task, row.metric, row.value, row.length, row.position_from, row.low, row.n)
        for row in rows
        if row.task != "speed"
    ]


def why(path: Path, *overrides: str) -> dict[str, str | None]:
    return {one.stage.name: one.why for one in plan(read_pipeline(path, overrides))}


# Going through


def test_each_stage_hands_its_checkpoint_on(finished: Path) -> None:
    rows = {name: results_in(finished / name) for name in STAGES}
    assert [row.layout for row in rows["before"]] == ["full"] * len(rows["before"])
    models = {name: {row.model for row in rows[name] if row.metric != "loss"} for name in rows}
    trained = {name: f"{finished}/{name}/model" for name in ("adapt", "tune")}
    assert models["before"] == {str(STORIES)}
    assert models["adapt"] == {f"{finished}/convert/striped", trained["adapt"]}
    assert models["tune"] == {trained["adapt"], trained["tune"]}
    assert models["evaluate"] == {trained["tune"]}
    assert {row.layout for name in ("adapt", "evaluate") for row in rows[name] if row.task != "cost"} == {"GLLL:33"}
    assert {row.run for row in rows["evaluate"]} == {"evaluate"}
    words = AutoTokenizer.from_pretrained(finished / "tune" / "model")
    assert "Assistant" in words.chat_template
    page = (finished / "report" / "report.html").read_text()
    assert page.count("GLLL:33") > 3
    for name in ("before", "adapt", "tune", "evaluate"):
        assert name in page


def test_an_evaluation_is_that_of_the_verb(finished: Path, data: Path) -> None:
    from zebra.evaluate.perplexity import evaluate_perplexity

    expected = evaluate_perplexity(
        finished / "tune" / "model", [str(data / "few.txt")], lengths=[256], separator=SEPARATOR
    )
    results = [row for row in results_in(finished / "evaluate") if row.metric == "perplexity"]
    assert [row.value for row in results] == [row.value for row in expected]


def test_what_is_done_is_not_done_again(finished: Path, data: Path, copy: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    done = run(read_pipeline(recipe(data, copy.parent)))  # in another place, too
    assert [one.why for one in done] == [None] * 6
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before
    assert results(copy) == results(finished)


def test_a_changed_input_is_named_and_reruns_what_depends_on_it(data: Path, copy: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path)
    assert why(path, "stages.tune.train.max_steps=6") == dict.fromkeys(STAGES) | {
        "tune": "train.max_steps changed",
        "evaluate": "after tune",
        "report": "after tune",
    }
    assert why(path, "stages.convert.stripes=GL:33")["convert"] == "stripes changed"
    file = data / "long.jsonl"
    text = file.read_text()
    file.write_text(text + "\n")
    states = why(path)
    file.write_text(text)
    assert (states["adapt"], states["tune"], states["report"]) == (None, f"{file} changed", "after tune")

    before = {name: (copy / name / "results.jsonl").read_text() for name in ("tune", "evaluate")}
    stages = read_pipeline(recipe(data, tmp_path), ["stages.evaluate.perplexity.lengths=[128]"])
    done = run(stages)
    assert [one.why for one in done] == [None] * 4 + ["perplexity.lengths changed", "the results of evaluate changed"]
    assert (copy / "tune" / "results.jsonl").read_text() == before["tune"]
    assert (copy / "evaluate.1" / "results.jsonl").read_text() == before["evaluate"]
    assert {row.length for row in results_in(copy / "evaluate")} == {128}
    assert all(one is None for one in why(path, "stages.evaluate.perplexity.lengths=[128]").values())


def test_what_was_changed_by_others_is_not_trusted(data: Path, copy: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path)
    config = copy / "adapt" / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("}", " }"))
    assert why(path) == dict.fromkeys(STAGES) | {
        "tune": "its checkpoint changed",
        "evaluate": "after tune",
        "report": "after tune",
    }
    shutil.rmtree(copy / "adapt" / "model")
    assert why(path)["adapt"] == "gone"
    (copy / "convert.json").unlink()
    with pytest.raises(ZebraError, match=r"convert exists without its record .*convert\.json\. Move it away"):
        plan(read_pipeline(path))


def test_a_damaged_record_is_refused_behind_stages_that_are_to_run(data: Path, copy: Path, tmp_path: Path) -> None:
    path, record = recipe(data, tmp_path), copy / "tune.json"
    tree = json.loads(record.read_text())
    for damaged in ("", "[]", json.dumps({"inputs": {}}), json.dumps(tree | {"inputs": 1})):
        record.write_text(damaged)
        for more in ([], ["stages.adapt.train.max_steps=6"]):
            with pytest.raises(ZebraError, match=r"stage tune: .*tune\.json is damaged"):
                plan(read_pipeline(path, more))


def test_a_checkpoint_is_known_by_its_digest_of(finished: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished / "tune" / "model", tmp_path / "model"))
    whole = digest_of(model)
    assert whole == digest_of(finished / "tune" / "model")
    seen = {whole}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        file = model / name
        was = file.read_bytes()
        file.write_bytes(was[:-2] + b" " + was[-2:-1])
        seen.add(digest_of(model))
        file.write_bytes(was)
    card = json.loads((model / "zebra.json").read_text())
    (model / "zebra.json").write_text(json.dumps(card | {"commit": "another"}))
    assert digest_of(model) == whole
    (model / "zebra.json").write_text(json.dumps(card | {"sinks": 4}))
    assert len({*seen, digest_of(model)}) == 6


def test_another_process_at_work_is_refused(data: Path, tmp_path: Path) -> None:
    stages = read_pipeline(recipe(data, tmp_path, "convert"))
    with directory_lock(tmp_path / "run"), pytest.raises(ZebraError, match="another process is at work"):
        run(stages)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_run_and_does_nothing(data: Path, tmp_path: Path, zebra: Zebra) -> None:
    arguments = ("run", recipe(data, tmp_path), "--dry-run")
    states = {one["stage"]: one["state"] for one in json.loads(zebra(*arguments, "--json").stdout)["stages"]}
    assert states == {
        "before": "new",
        "convert": "new",
        "adapt": "after convert",
        "tune": "after adapt",
        "evaluate": "after tune",
        "report": "after before",
    }
    assert "after convert" in zebra(*arguments).stdout
    assert not (tmp_path / "run").exists()


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["stages.adapt.train.lenght=9"], r"stage adapt: unknown key train\.lenght; did you mean length"),
    "unknown key of an evaluation": (
        ["stages.evaluate.perplexity.texts=[a]"],
        "stage evaluate: its perplexity: unknown key texts",
    ),
    "a contradiction": (["stages.tune.train.warmup_steps=99"], "stage tune: .*warmup_steps"),
    "no such kind": (["stages.before.kind=reports"], "no stage of the kind reports; did you mean report"),
    "no such name": (["stages.train={}"], "no stage of the kind train"),
    "a name that is a path": (["stages.a/b={kind: report}"], "letters, digits"),
    "from a later stage": (["stages.before.from=tune"], "stage before: from names a stage before it"),
    "from one without a checkpoint": (["stages.tune.from=before"], "from names a stage before it .*got before"),
    "no first checkpoint": (["model=null"], "stage before: it begins with a checkpoint, and no stage before it writes"),
    "a missing checkpoint": (["model=nowhere"], "no checkpoint at nowhere"),
    "the pipeline's key": (["stages.tune.model=x"], "stage tune: the pipeline sets model of a stage"),
    "missing text": (["stages.adapt.data.files=[nothing.txt]"], r"stage adapt: there is no text at nothing\.txt"),
    "missing conversations": (["stages.tune.data.files=[nothing.jsonl]"], "stage tune: there is no text at nothing"),
    "bad conversations": (["stages.tune.data.files=[bad.jsonl]"], r"stage tune: bad\.jsonl has 1 bad record: line 1"),
    "no template": (
        ["stages.tune.chat_template=null"],
        r"stage tune: the tokenizer of .*/adapt/model has no chat",
    ),
    "a layer beyond": (["stages.convert.stripes=9:33"], "stage convert: .*layer 9"),
    "sinks of no layer": (["stages.convert.stripes=G:33+4"], "stage convert: .*4 sinks belong to local layers"),
    "from of a report": (["stages.report={from: tune}"], "stage report: unknown key from"),
    "two layouts": (["stages.convert.select={budget: 2, window: 9, length: 64}"], "either stripes or select"),
    "no such task": (["stages.evaluate.retrieval.tasks=[pass]"], "stage evaluate: .*passkey"),
    "a length beyond": (
        ["stages.evaluate.retrieval.lengths=[4096]"],
        "stage evaluate: a length of 4,096 tokens",
    ),
    "no such Self-Extend": (["stages.evaluate.perplexity.self_extend=x"], "stage evaluate: .*Self-Extend"),
    "nothing to evaluate": (["stages.evaluate={}"], "stage evaluate: an evaluation takes at least one of perplexity"),
    "an adapter is no checkpoint": (["stages.adapt.lora={merge: false}"], "stage tune: .*is a peft adapter"),
    "not an object": (["stages=[]"], "stages: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_stage(case: str, data: Path, tmp_path: Path, zebra: Zebra) -> None:
    overrides, message = BAD[case]
    (tmp_path / "bad.jsonl").write_text("{")
    path = recipe(data, tmp_path)
    done = zebra("run", path, *(part for one in overrides for part in ("--set", one)), cwd=tmp_path)
    refused(done)
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_report_stands_at_the_end_and_a_launcher_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZebraError, match="stage report: a report is of the stages before it"):
        read_pipeline(recipe(data, tmp_path, "report", "convert"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZebraError, match="a pipeline is one process"):
        read_pipeline(recipe(data, tmp_path))


# Kills

KILLS = {
    "convert": "before the record",
    "adapt": """
from zebra.train import trainer
shown = trainer._ShowProgress.on_log
def on_log(self, args, state, control, logs, **kwargs):
    shown(self, args, state, control, logs, **kwargs)
    if state.global_step == 3:
        die()
trainer._ShowProgress.on_log = on_log
""",
    "tune": """
from zebra.train import export
written = export.write_config
def write_config(config, where):
    if "tune" in str(where):
        die()
    written(config, where)
export.write_config = write_config
""",
    "evaluate": """
from zebra.pipeline import stages
measured = stages._measured
def _measured(name, arguments, checkpoint, **more):
    if name == "retrieval" and more.get("run") == "evaluate":
        die()
    return measured(name, arguments, checkpoint, **more)
stages._measured = _measured
""",
    "report": """
from zebra.pipeline import stages
from zebra.report import page
written = stages.write_report
def write_report(rows, html, **more):
    if html.parent.name == "report":
        page.html = lambda *_: die()
    written(rows, html, **more)
stages.write_report = write_report
""",
}
BEFORE_THE_RECORD = """
from zebra.pipeline import run
written = run._write_record
def _write_record(stage, inputs, *, done):
    if done and stage.name == "{stage}":
        die()
    written(stage, inputs, done=done)
run._write_record = _write_record
"""


def killed(path: Path, hook: str) -> None:
    code = "import os, signal\ndef die(): os.kill(os.getpid(), signal.SIGKILL)\n" + hook
    done = subprocess.run(
        [sys.executable, "-c", code + "\nfrom zebra.cli import main\nmain()", "run", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_in_the_adaptation_changes_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, "convert", "adapt")
    killed(path, KILLS["adapt"])
    assert json.loads((tmp_path / "run" / "adapt.json").read_text())["done"] is False
    assert [one.why for one in run(read_pipeline(path))] == [None, "begun"]
    expected = [row for row in results(finished) if row[0] == "adapt"]
    assert results(tmp_path / "run") == expected
    assert digest_of(tmp_path / "run" / "adapt" / "model") == digest_of(finished / "adapt" / "model")


@pytest.mark.full
@pytest.mark.parametrize("when", ["within", "before the record"])
@pytest.mark.parametrize("stage", KILLS)
def test_a_kill_in_each_stage_changes_nothing(
    stage: str, when: str, finished: Path, data: Path, tmp_path: Path
) -> None:
    if (stage, when) == ("convert", "within"):
        pytest.skip("a conversion is one rename")
    path = recipe(data, tmp_path)
    killed(path, KILLS[stage] if when == "within" else BEFORE_THE_RECORD.format(stage=stage))
    done = {one.stage.name: one.why for one in run(read_pipeline(path))}
    at = list(STAGES).index(stage)
    assert list(done.values()) == [None] * at + ["begun"] + ["new"] * (len(STAGES) - at - 1)
    assert results(tmp_path / "run") == results(finished)
    for name in ("adapt", "tune"):
        assert digest_of(tmp_path / "run" / name / "model") == digest_of(finished / name / "model")


@pytest.mark.full
def test_a_pipeline_from_scratch(data: Path, tmp_path: Path) -> None:
    """The first checkpoint is trained too, with its tokenizer: what is not there yet cannot be tried beforehand."""
    adapt = STAGES["adapt"]
    assert adapt is not None
    pretrain = json.loads(json.dumps({"data": adapt["data"], "train": adapt["train"]}).replace("{data}", str(data)))
    pretrain |= {"model": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}}
    pretrain["model"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    pretrain["tokenizer"] = {"vocab_size": 300}
    path = recipe(data, tmp_path, "convert", "adapt")
    tree = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump({"run": tree["run"], "stages": {"pretrain": pretrain, **tree["stages"]}}, sort_keys=False)
    )
    assert [one.why for one in run(read_pipeline(path))] == ["new"] * 3
    assert zebra.load(tmp_path / "run" / "adapt" / "model").config.vocab_size == 300
    assert "train.max_steps" in inputs_of(read_pipeline(path)[0])
    assert "hidden_size" in json.dumps(inputs_of(read_pipeline(path)[0]))


def test_the_shipped_pipeline_is_one() -> None:
    stages = read_pipeline(STORIES.parent / "pipeline-tiny.yaml")
    assert [stage.kind for stage in stages] == ["evaluate", "convert", "adapt", "tune", "evaluate", "report"]

"""Pipelines: each stage runs once, none with changed inputs, and a killed one resumes to the same results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import KILL_AT_A_LOG, STORIES, TEXT, Zebra, changed, killed, refused
from test_tune import write as write_conversations
from transformers import AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.files import directory_lock
from zebra.model.checkpoint import checkpoint_digests
from zebra.pipeline.recipe import read_pipeline
from zebra.pipeline.run import inputs_of, plan, run
from zebra.results import Result, read_results

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
    done = run(read_pipeline(recipe(data, folder)))
    assert [stage["state"] for stage in done] == ["new"] * 6
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished pipeline somewhere else, where things may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def results_in(folder: Path) -> list[Result]:
    file = folder / "results.jsonl"
    return read_results(file) if file.exists() else []


def results(folder: Path) -> list[tuple[Any, ...]]:
    """The results of a pipeline's stages, but for where things lie and how fast it went."""
    return [
        (one.run, one.layout, one.task, one.metric, one.value, one.length, one.position_from, one.low, one.n)
        for name in STAGES
        for one in results_in(folder / name)
        if one.task != "speed"
    ]


def states(path: Path, *overrides: str) -> dict[str, str]:
    return {stage["stage"]: stage["state"] for stage in plan(read_pipeline(path, overrides))}


DONE = dict.fromkeys(STAGES, "done") | {"report": "new"}


# Going through


def test_each_stage_hands_its_checkpoint_on(finished: Path) -> None:
    by_stage = {name: results_in(finished / name) for name in STAGES}
    assert {result.layout for result in by_stage["before"]} == {"full"}
    models = {name: {one.model for one in by_stage[name] if one.metric != "loss"} for name in by_stage}
    trained = {name: f"{finished}/{name}/model" for name in ("adapt", "tune")}
    assert models["before"] == {str(STORIES)}
    assert models["adapt"] == {f"{finished}/convert/striped", trained["adapt"]}
    assert models["tune"] == {trained["adapt"], trained["tune"]}
    assert models["evaluate"] == {trained["tune"]}
    assert {one.layout for name in ("adapt", "evaluate") for one in by_stage[name] if one.task != "cost"} == {"GLLL:33"}
    assert {result.run for result in by_stage["evaluate"]} == {"evaluate"}
    tokenizer = AutoTokenizer.from_pretrained(finished / "tune" / "model")
    assert "Assistant" in tokenizer.chat_template
    page = (finished / "report" / "report.html").read_text()
    assert page.count("GLLL:33") > 3
    for name in ("before", "adapt", "tune", "evaluate"):
        assert name in page


def test_an_evaluation_is_that_of_the_verb(finished: Path, data: Path) -> None:
    from zebra.evaluate.perplexity import evaluate_perplexity

    expected = evaluate_perplexity(
        finished / "tune" / "model", [str(data / "few.txt")], lengths=[256], separator=SEPARATOR
    )
    measured = [result for result in results_in(finished / "evaluate") if result.metric == "perplexity"]
    assert [result.value for result in measured] == [result.value for result in expected]


def test_what_is_done_is_not_done_again(finished: Path, data: Path, copy: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if "report" not in file.parts[-2:]}
    done = run(read_pipeline(recipe(data, copy.parent)))  # in another place, too
    assert {stage["stage"]: stage["state"] for stage in done} == DONE
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert results(copy) == results(finished)


def test_a_changed_input_is_named_and_refused(data: Path, copy: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path)

    def refusal(*overrides: str) -> str:
        with pytest.raises(ZebraError) as error:
            run(read_pipeline(path, overrides))
        return str(error.value)

    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    assert refusal("stages.tune.train.max_steps=6") == (
        f"stage tune: {copy}/tune was created with other inputs: train.max_steps changed since. "
        "Restore them to resume it, or rename that folder."
    )
    assert "stripes changed" in refusal("stages.convert.stripes=GL:33")
    assert "perplexity.lengths changed" in refusal("stages.evaluate.perplexity.lengths=[128]")
    file = data / "long.jsonl"
    text = file.read_text()
    file.write_text(text + "\n")
    assert f"stage tune: {copy}/tune was created with other inputs: its files ({file}) changed" in refusal()
    file.write_text(text)
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before

    (copy / "evaluate").rename(copy / "evaluate.128")
    stages = read_pipeline(path, ["stages.evaluate.perplexity.lengths=[128]"])
    assert {stage["stage"]: stage["state"] for stage in run(stages)} == DONE | {"evaluate": "new"}
    assert {result.length for result in results_in(copy / "evaluate")} == {128}
    assert states(path, "stages.evaluate.perplexity.lengths=[128]") == DONE


def test_a_stage_after_one_that_is_to_run_is_refused(data: Path, copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "adapt")
    with pytest.raises(ZebraError, match=r"stage tune: .*/tune depends on the stage adapt, which is not done"):
        plan(read_pipeline(recipe(data, tmp_path)))


def test_what_was_changed_by_others_is_not_trusted(data: Path, copy: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path)
    config = copy / "adapt" / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("}", " }"))
    with pytest.raises(ZebraError, match=r"stage tune: .*its checkpoint .*changed"):
        plan(read_pipeline(path))
    shutil.rmtree(copy / "adapt" / "model")
    with pytest.raises(ZebraError, match=r"stage tune: the checkpoint .*adapt/model is missing"):
        plan(read_pipeline(path))
    (copy / "convert" / ".inputs.json").unlink()
    with pytest.raises(ZebraError, match=r"convert exists, but .*\.inputs\.json is missing\. Rename"):
        plan(read_pipeline(path))


def test_a_damaged_record_is_refused(data: Path, copy: Path, tmp_path: Path) -> None:
    for damaged in ("", "1", "[1]"):
        (copy / "tune" / ".inputs.json").write_text(damaged)
        with pytest.raises(ZebraError, match=r"stage tune: .*inputs\.json is damaged"):
            plan(read_pipeline(recipe(data, tmp_path)))


def test_a_checkpoint_is_known_by_its_digest(finished: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished / "tune" / "model", tmp_path / "model"))
    whole = checkpoint_digests(model)
    assert whole == checkpoint_digests(finished / "tune" / "model")
    seen = {str(whole)}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        file = model / name
        was = file.read_bytes()
        file.write_bytes(was[:-2] + b" " + was[-2:-1])
        seen.add(str(checkpoint_digests(model)))
        file.write_bytes(was)
    card = json.loads((model / "zebra.json").read_text())
    (model / "zebra.json").write_text(json.dumps(card | {"commit": "another"}))
    assert checkpoint_digests(model) == whole
    (model / "zebra.json").write_text(json.dumps(card | {"sinks": 4}))
    assert len({*seen, str(checkpoint_digests(model))}) == 6
    (model / "README.md").write_text("about it")
    assert len({*seen, str(checkpoint_digests(model))}) == 6


def test_another_process_at_work_is_refused(data: Path, tmp_path: Path) -> None:
    stages = read_pipeline(recipe(data, tmp_path, "convert"))
    with directory_lock(tmp_path / "run"), pytest.raises(ZebraError, match="another process is using"):
        run(stages)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_run_and_does_nothing(data: Path, tmp_path: Path, zebra: Zebra) -> None:
    arguments = ("run", recipe(data, tmp_path), "--dry-run")
    stages = json.loads(zebra(*arguments, "--json").stdout)["stages"]
    assert [(stage["stage"], stage["state"]) for stage in stages] == [(name, "new") for name in STAGES]
    assert "convert" in zebra(*arguments).stdout
    assert not (tmp_path / "run").exists()


def test_one_text_of_an_evaluation_needs_no_list(data: Path, tmp_path: Path) -> None:
    one = f"stages.before.perplexity.text={data / 'few.txt'}"
    assert states(recipe(data, tmp_path, "before"), one) == {"before": "new"}


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["stages.adapt.train.lenght=9"], r"stage adapt: unknown key train\.lenght; did you mean length"),
    "unknown key of an evaluation": (
        ["stages.evaluate.perplexity.texts=[a]"],
        "stage evaluate: its perplexity: unknown key texts",
    ),
    "a wrong value of an evaluation": (
        ["stages.evaluate.perplexity.lengths=300"],
        r"stage evaluate: its perplexity: lengths: .*\(got 300\)",
    ),
    "a contradiction": (["stages.tune.train.warmup_steps=99"], "stage tune: .*warmup_steps"),
    "no such kind": (["stages.before.kind=reports"], "unknown stage kind reports; did you mean report"),
    "no such name": (["stages.train={}"], "unknown stage kind train"),
    "a name that is a path": (["stages.a/b={kind: report}"], "letters, digits"),
    "from a later stage": (["stages.before.from=tune"], "stage before: from must be model or an earlier stage"),
    "from one without a checkpoint": (["stages.tune.from=before"], "from must be model or an earlier .*got before"),
    "no first checkpoint": (["model=null"], "stage before: it requires a checkpoint, and no stage before it writes"),
    "a missing checkpoint": (["model=nowhere"], "no checkpoint at nowhere"),
    "the pipeline's key": (["stages.tune.model=x"], "stage tune: the pipeline sets model. Remove"),
    "missing text": (["stages.adapt.data.files=[nothing.txt]"], r"stage adapt: no file matches nothing\.txt"),
    "missing conversations": (["stages.tune.data.files=[nothing.jsonl]"], "stage tune: no file matches nothing"),
    "bad conversations": (["stages.tune.data.files=[bad.jsonl]"], r"stage tune: bad\.jsonl has 1 bad record: line 1"),
    "no template": (
        ["stages.tune.chat_template=null"],
        r"stage tune: the tokenizer of .*/adapt/model has no chat",
    ),
    "a layer beyond": (["stages.convert.stripes=9:33"], "stage convert: .*layer 9"),
    "sinks of no layer": (["stages.convert.stripes=G:33+4"], "stage convert: .*only local layers support 4 sinks"),
    "from of a report": (["stages.report={from: tune}"], "stage report: unknown key from"),
    "two layouts": (["stages.convert.select={budget: 2, window: 9, length: 64}"], "either stripes or select"),
    "no such task": (["stages.evaluate.retrieval.tasks=[pass]"], "stage evaluate: .*passkey"),
    "a length beyond": (
        ["stages.evaluate.retrieval.lengths=[4096]"],
        "stage evaluate: a length of 4,096 tokens",
    ),
    "no length": (["stages.evaluate.perplexity.lengths=[]"], "stage evaluate: perplexity requires at least one length"),
    "no such Self-Extend": (["stages.evaluate.perplexity.self_extend=x"], "stage evaluate: .*Self-Extend"),
    "nothing to evaluate": (["stages.evaluate={}"], "stage evaluate: an evaluation requires at least one of"),
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


def test_a_stage_for_several_processes_is_refused_before_any_stage(data: Path, tmp_path: Path) -> None:
    stages = read_pipeline(recipe(data, tmp_path, "adapt"), ["stages.adapt.parallel.shard=2"])
    with pytest.raises(ZebraError, match=r"stage adapt: parallel\.shard 2 requires a multiple of 2 processes; 1 was"):
        plan(stages)


def test_a_report_stands_at_the_end_and_a_launcher_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZebraError, match="stage report: a report requires another stage before it"):
        read_pipeline(recipe(data, tmp_path, "report", "convert"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZebraError, match="a pipeline must run in one process"):
        read_pipeline(recipe(data, tmp_path))


# Kills

BEFORE_RETRIEVAL = """
from zebra.pipeline import run
measured = run._measured
def _measured(name, arguments, checkpoint, **more):
    if name == "retrieval" and more.get("run") == "{stage}":
        die()
    return measured(name, arguments, checkpoint, **more)
run._measured = _measured
"""
KILLS = {
    "before": BEFORE_RETRIEVAL.format(stage="before"),
    "adapt": KILL_AT_A_LOG,
    "tune": """
from zebra.train import source
written = source.write_config
def write_config(config, where):
    if "tune" in str(where):
        die()
    written(config, where)
source.write_config = write_config
""",
    "evaluate": BEFORE_RETRIEVAL.format(stage="evaluate"),
    "report": """
from zebra.pipeline import run
from zebra.report import page
written = run.write_report
def write_report(results, html, **more):
    if html.parent.name == "report":
        page.html = lambda *_: die()
    written(results, html, **more)
run.write_report = write_report
""",
}
BEFORE_A_STAGE = """
from zebra.pipeline import run
perform = run._perform
def _perform(stage, before):
    if stage.name == "{stage}":
        die()
    perform(stage, before)
run._perform = _perform
"""


@pytest.mark.full
def test_a_kill_in_the_adaptation_changes_nothing(finished: Path, data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, "convert", "adapt")
    killed(KILL_AT_A_LOG, "run", path)
    assert [stage["state"] for stage in run(read_pipeline(path))] == ["done", "begun"]
    expected = [result for result in results(finished) if result[0] == "adapt"]
    assert results(tmp_path / "run") == expected
    assert checkpoint_digests(tmp_path / "run" / "adapt" / "model") == checkpoint_digests(finished / "adapt" / "model")


@pytest.mark.full
@pytest.mark.parametrize("when", ["within", "before"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_each_stage_changes_nothing(
    stage: str, when: str, finished: Path, data: Path, tmp_path: Path
) -> None:
    if (stage, when) == ("convert", "within"):
        pytest.skip("a conversion is one rename")
    path = recipe(data, tmp_path)
    killed(KILLS[stage] if when == "within" else BEFORE_A_STAGE.format(stage=stage), "run", path)
    done = [one["state"] for one in run(read_pipeline(path))]
    at = list(STAGES).index(stage)
    begun = "begun" if when == "within" and stage != "report" else "new"
    assert done == ["done"] * at + [begun] + ["new"] * (len(STAGES) - at - 1)
    assert results(tmp_path / "run") == results(finished)
    for name in ("adapt", "tune"):
        assert checkpoint_digests(tmp_path / "run" / name / "model") == checkpoint_digests(finished / name / "model")


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
    assert [stage["state"] for stage in run(read_pipeline(path))] == ["new"] * 3
    assert zebra.load(tmp_path / "run" / "adapt" / "model").config.vocab_size == 300
    assert "train.max_steps" in inputs_of(read_pipeline(path)[0])
    assert "hidden_size" in json.dumps(inputs_of(read_pipeline(path)[0]))


def test_the_shipped_pipeline_is_one() -> None:
    stages = read_pipeline(STORIES.parent / "pipeline-tiny.yaml")
    assert [stage.kind for stage in stages] == ["evaluate", "convert", "adapt", "tune", "evaluate", "report"]

"""The command line: one line and a code for what goes wrong, one JSON document for what is measured."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import STORIES, TEXT, Zebra, refused

from zebra import doctor
from zebra.kernels import native

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Some real stories, of 300 tokens and more, split by SEPARATOR."""
    path = tmp_path / "few.txt"
    path.write_text(SEPARATOR.join((TEXT / "tinystories_test.txt").read_text().split(SEPARATOR)[:12]))
    return path


def test_every_verb_has_help_with_an_example(zebra: Zebra) -> None:
    top = zebra("--help")
    assert top.returncode == 0
    verbs = [
        "plan",
        "convert",
        "select",
        "verify",
        "adapt",
        "tune",
        "pretrain",
        "run",
        "study",
        "generate",
        "report",
        "doctor",
    ]
    for verb in (*verbs, "evaluate", "data"):
        assert f"│ {verb} " in top.stdout
    verbs += [f"evaluate {verb}" for verb in ("perplexity", "retrieval", "tasks", "documents")]
    for verb in (*verbs, "data instructions", "data check"):
        page = zebra(*verb.split(), "--help")
        assert page.returncode == 0
        assert f" zebra {verb} " in page.stdout.split("╯")[-1]


def test_convert_verify_evaluate_report(zebra: Zebra, tmp_path: Path, few: Path) -> None:
    out = tmp_path / "striped"
    done = zebra("convert", STORIES, out, "--stripes", "GLLL:129")
    assert done.returncode == 0, done.stderr
    assert "CwmForCausalLM, GLLL:129, layers GLLLG" in done.stdout

    done = zebra("verify", out, "--against", STORIES, "--json")
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == 7
    assert all(check["passed"] for check in checks)

    rows = tmp_path / "results.jsonl"
    done = zebra(
        *("evaluate", "perplexity", out, few, "--length", "300,512"),
        *("--separator", SEPARATOR, "--json", "--out", rows),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    columns = "run model layout task metric value length position_from position_to depth n low high seed device"
    assert set(results[0]) == {*columns.split(), "versions", "commit"}
    assert {row["length"] for row in results} == {300, 512}
    assert {row["layout"] for row in results} == {"GLLL:129"}
    assert 3 < results[-1]["value"] < 6
    assert [json.loads(line) for line in rows.read_text().splitlines()] == results

    records = tmp_path / "stories.jsonl"
    stories = few.read_text().split(SEPARATOR)
    records.write_text("".join(json.dumps({"body": story}) + "\n" for story in stories))
    done = zebra(
        *("evaluate", "perplexity", out, records, "--field", "body", "--num-proc", 2, "--length", "300,512", "--json")
    )
    assert done.returncode == 0, done.stderr
    assert [row["value"] for row in json.loads(done.stdout)["results"]] == [row["value"] for row in results]
    refused(zebra("evaluate", "perplexity", out, records, "--length", 300), "'text'", "its fields are body")

    done = zebra("report", rows, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_verify_says_when_a_conversion_is_wrong(zebra: Zebra, tmp_path: Path) -> None:
    zebra("convert", STORIES, tmp_path / "out", "--stripes", "GLLL:16")
    config = tmp_path / "out" / "config.json"
    written = json.loads(config.read_text())
    written["rope_parameters"]["rope_theta"] = 20000.0
    config.write_text(json.dumps(written))
    done = zebra("verify", tmp_path / "out", "--against", STORIES)
    assert done.returncode == 1
    assert "DIFFERENT" in done.stdout


def test_a_rope_of_the_command_line(zebra: Zebra, tmp_path: Path, few: Path) -> None:
    assert zebra("convert", STORIES, tmp_path / "out", "--stripes", "GLLL:16", "--rope", "yarn:8").returncode == 0
    assert zebra("verify", tmp_path / "out", "--against", STORIES, "--rope", "yarn:8").returncode == 0
    done = zebra("convert", STORIES, tmp_path / "two", "--stripes", "GLLL:16", "--rope", "yarn:1")
    assert done.returncode == 2
    assert "got yarn:1" in done.stderr
    arguments = (few, "--length", "600", "--separator", SEPARATOR, "--join", "--json")
    rows = [
        json.loads(zebra("evaluate", "perplexity", path, *arguments, *rope).stdout)["results"][-1]
        for path, rope in ((tmp_path / "out", ()), (STORIES, ("--stripes", "GLLL:16", "--rope", "yarn:8")))
    ]
    assert rows[0]["value"] == rows[1]["value"]
    assert [row["layout"] for row in rows] == ["GLLL:16", "GLLL:16 yarn:8"]


def test_a_layout_of_the_command_line_equals_a_converted_checkpoint(zebra: Zebra, tmp_path: Path, few: Path) -> None:
    zebra("convert", STORIES, tmp_path / "out", "--stripes", "GL:65")
    arguments = (few, "--length", "400", "--separator", SEPARATOR, "--json")
    one = zebra("evaluate", "perplexity", "./out/", *arguments, cwd=tmp_path)
    two = zebra("evaluate", "perplexity", STORIES, *arguments, "--stripes", "GL:65")
    values = [[row["value"] for row in json.loads(done.stdout)["results"]] for done in (one, two)]
    assert values[0] == values[1]
    assert {row["model"] for row in json.loads(one.stdout)["results"]} == {"out"}


def test_doctor_shows_the_kernels_and_why_they_decline(zebra: Zebra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernels", functools.cache(doctor.kernels))  # some seconds
    done = zebra("doctor", "--json")
    report = json.loads(done.stdout)
    served = {(case["request"], case["dtype"]): case["kernel"] for case in report["kernels"]}
    assert served["local, prefill, 128 tokens", "float32"] == "banded"
    assert served["decode", "bfloat16"] in {"fused", "decode"}  # where nothing can be compiled, and where it can
    assert report["machine"]["native kernel"] == native.instructions()
    assert "it does not support a window" in report["declines"]["fused"]
    assert report["declines"]["reference"] == []
    assert report["machine"]["torch"]
    page = zebra("doctor")
    assert page.returncode == 0
    assert page.stdout.count("it does not support a window") == 1


BAD = {
    "missing checkpoint": (["convert", "nowhere", "out", "--stripes", "GL:9"], ["no checkpoint at nowhere"]),
    "bad notation": (["convert", STORIES, "out", "--stripes", "GXL:9"], ["G (global) and L (local)"]),
    "no window": (["convert", STORIES, "out", "--stripes", "GLLL"], ["PATTERN:WINDOW"]),
    "window of zero": (["convert", STORIES, "out", "--stripes", "GLLL:0"], ["integer from 1 to", "got 0"]),
    "layer beyond": (["convert", STORIES, "out", "--stripes", "0,7:9"], ["layer 7", "5 layers"]),
    "same target": (["convert", STORIES, STORIES, "--stripes", "GL:9"], ["must be different directories"]),
    "verify dense": (["verify", STORIES, "--against", STORIES], ["no stripes"]),
    "missing text": (["evaluate", "perplexity", STORIES, "nothing.txt", "--length", "64"], ["no file matches"]),
    "bad length": (
        ["evaluate", "perplexity", STORIES, TEXT, "--length", "many"],
        ["--length must be numbers", "'many'"],
    ),
    "short text": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "64", "--convention", "truncated"],
        ["no document has enough tokens"],
    ),
    "empty text": (["evaluate", "perplexity", STORIES, "empty.txt", "--length", "64"], ["only whitespace"]),
    "not UTF-8": (["evaluate", "perplexity", STORIES, "latin.txt", "--length", "64"], ["not UTF-8", "byte 3"]),
    "bad convention": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "64", "--convention", "sliding"],
        ["'sliding' is not one of 'disjoint'"],
    ),
    "self-extend": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "9", "--self-extend", "8:512"],
        ["below the trained length", "trained at 512"],
    ),
    "sinks without local layers": (
        ["convert", STORIES, "out", "--stripes", "G:9+4"],
        ["only local layers support 4 sinks"],
    ),
    "a window of a dense model": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "4", "--window", "9"],
        ["requires local layers, but this layout is full"],
    ),
    "full decoding of a dense model": (
        ["generate", STORIES, "--prompt", "Once", "--full-decode"],
        ["only local layers support full decoding"],
    ),
    "full decoding with nothing decoded": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "4", "--stripes", "GL:2", "--full-decode"],
        ["Set a prompt, such as 2 (--prompt)"],
    ),
    "missing recipe": (["adapt", "nothing.yaml"], ["nothing.yaml cannot be read"]),
    "unknown key": (["adapt", "recipe.yaml", "--set", "train.lenght=9"], ["unknown key train.lenght", "length"]),
    "recipe of a missing model": (["adapt", "recipe.yaml", "--set", "model=gone"], ["no checkpoint at gone"]),
    "recipe beyond the model": (["adapt", "recipe.yaml", "--set", "stripes=8:9"], ["layer 8"]),
    "text shorter than a row": (
        ["adapt", "recipe.yaml", "--set", "data.files=[short.txt]"],
        ["fewer than one sequence"],
    ),
    "seed below zero": (["adapt", "recipe.yaml", "--set", "train.seed=-1"], ["train.seed", "greater than or equal"]),
    "endless rate": (["adapt", "recipe.yaml", "--set", "train.weight_decay=.inf"], ["train.weight_decay"]),
    "a switch for a number": (
        ["adapt", "recipe.yaml", "--set", "train.max_steps=true"],
        ["train.max_steps", "valid integer"],
    ),
    "a word for a switch": (["adapt", "recipe.yaml", "--set", "data.join=off please"], ["data.join", "valid boolean"]),
    "a NUL in a path": (["adapt", "recipe.yaml", "--set", 'run="a\\0b"'], ["NUL"]),
    "a key twice": (["adapt", "twice.yaml"], ["twice.yaml is not valid YAML", "duplicate key run"]),
    "a huge window": (["convert", STORIES, "out", "--stripes", f"GL:{10**22}"], ["to 2^31 - 1"]),
    "a huge factor": (
        ["convert", STORIES, "out", "--stripes", "GL:9", "--rope", "yarn:1e300"],
        ["a rope must be none"],
    ),
    "no such device": (
        ["evaluate", "perplexity", STORIES, "short.txt", "--length", "4", "--device", "cuda:77"],
        ["device 'cuda:77' is not available"],
    ),
    "recipe of another verb": (["study", "recipe.yaml"], ["recipe.yaml is a recipe of `zebra adapt`"]),
    "verify alone": (["verify", STORIES], ["against (--against)"]),
    "verify an export that is gone": (
        ["verify", "gone.gguf", "--against", STORIES, "--engine", "gguf"],
        ["gone.gguf does not exist. Pass what `zebra export` wrote"],
    ),
    "verify elsewhere": (
        ["verify", STORIES, "--against", STORIES, "--device", "tape"],
        ["device 'tape' is not available"],
    ),
    "verify in integers": (["verify", STORIES, "--against", STORIES, "--dtype", "int8"], ["float64', 'float32"]),
    "target without a name": (["convert", STORIES, ".", "--stripes", "GL:9"], ["exists already"]),
    "a length in words": (
        ["plan", "llama-2-7b", "--length", "4k"],
        ["'--length'", "integer in digits", "plan --help"],
    ),
    "plan no layout": (["plan", "llama-2-7b", "--length", "64", "--stripes", ""], ["PATTERN:WINDOW", "got ''"]),
    "plan no extension": (["plan", "llama-2-7b", "--length", "64", "--self-extend", ""], ["GROUP:WINDOW", "got ''"]),
    "plan no memory": (["plan", "llama-2-7b", "--length", "64", "--memory", ""], ["a positive number", "got ''"]),
    "no such verb": (["evaluate", "nosuch"], ["No such command 'nosuch'", "evaluate --help"]),
    "no such option": (["doctor", "--jsn"], ["No such option", "--json"]),
    "no target": (["convert", STORIES], ["Missing argument 'target'"]),
    "no rows": (["report", "nothing.jsonl"], ["no results file"]),
    "broken rows": (["report", "recipe.yaml"], ["recipe.yaml, line 1 is not a result"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_code_2(tmp_path: Path, case: str, zebra: Zebra) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "recipe.yaml").write_text(
        f"run: run\nmodel: {STORIES}\nstripes: GL:9\ndata: {{files: [{TEXT}]}}\n"
        "train: {length: 64, max_steps: 2, learning_rate: 1.0e-3}\n"
    )
    (tmp_path / "twice.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "run: other\n")
    before = {p.name for p in tmp_path.iterdir()}
    arguments, words = BAD[case]
    refused(zebra(*arguments, cwd=tmp_path), *words)
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A recipe of a training that does not end by itself."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: run\nmodel: {STORIES}\nstripes: GL:9\ndata: {{files: [{TEXT}/tinystories_test.txt]}}\n"
        "train: {length: 64, max_steps: 100000, learning_rate: 1.0e-3, logging_steps: 1, save_steps: 100}\n"
    )
    return path


def interrupted(folder: Path, code: int, stderr: str) -> None:
    """Exit code 130, one line that says so, and no result."""
    assert code == 130
    assert "Traceback" not in stderr
    assert "interrupted" in stderr.splitlines()[-1]
    assert not (folder / "run" / "model").exists()
    assert not (folder / "run" / "results.jsonl").exists()


def test_an_interrupt_ends_with_130_and_nothing_half_written(
    endless: Path, tmp_path: Path, zebra: Zebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    step = torch.optim.AdamW.step

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        steps.append(step(*args, **kwargs))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        done = zebra("adapt", endless, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    interrupted(tmp_path, done.returncode, done.stderr)


@pytest.mark.full
def test_an_interrupt_of_a_process(endless: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "zebra", "adapt", str(endless)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("step 2/"):
                break
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        interrupted(tmp_path, running.wait(timeout=60), rest)


def test_a_run_in_this_process_leaves_nothing_behind(zebra: Zebra, tmp_path: Path) -> None:
    def state() -> list[Any]:
        loggers = ("", "transformers", "zebra")
        logs = [(log.level, list(log.handlers)) for log in map(logging.getLogger, loggers)]
        process = [dict(os.environ), Path.cwd(), sys.argv, sys.stdin, sys.stdout, sys.stderr]
        return [*logs, *process, list(warnings.filters), torch.get_num_threads(), torch.get_rng_state().tolist()]

    transformers.logging.get_verbosity()  # sets its handler, once
    before = state()
    sampled = ("--max-new-tokens", 2, "--temperature", 1.0)
    assert zebra("generate", STORIES, "--prompt", "Once", *sampled, cwd=tmp_path).returncode == 0
    assert zebra("generate", STORIES, cwd=tmp_path).returncode == 2
    assert state() == before


def test_an_error_in_a_process_of_its_own(zebra_process: Zebra) -> None:
    refused(zebra_process("convert", "nowhere", "out", "--stripes", "GL:9"), "no checkpoint at nowhere")


def test_a_reader_that_leaves_ends_the_command_in_silence() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "zebra", "plan", "llama-2-7b", "--length", "512", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_without_a_verb_shows_the_help(zebra: Zebra) -> None:
    for group in ((), ("evaluate",)):
        done = zebra(*group)
        assert (done.returncode, done.stderr) == (2, "")
        assert done.stdout.count("│ perplexity" if group else "│ generate") == 1

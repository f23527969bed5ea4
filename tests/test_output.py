"""Output of commands: results are not lost, and control characters in names do not reach a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORIES, Zebra, refused
from safetensors.torch import save_file

from zebra.cli import show
from zebra.errors import machine_fault, printable
from zebra.progress import TextConsole, bar, only_errors
from zebra.results import Result, append_results, read_results, to_json

HOSTILE = "\x1b]0;title\x07\x1b[31mred\r\x9b2J [/bold] [red] :smile: \udcff"


def result(**columns: Any) -> Result:
    return Result(
        **{"run": "r", "model": "m", "layout": "full", "task": "bench t", "metric": "loss", "value": 1.5} | columns
    )


def work() -> None:
    raise AssertionError("it came to its work")


class Failing(io.TextIOBase):
    """A stdout that cannot be written."""

    encoding = "utf-8"

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def test_results_are_in_their_file_before_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for as_json in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Failing())
            with pytest.raises(OSError, match="No space"):
                show.results([result()], as_json, tmp_path / "out.jsonl")
    assert len(read_results(tmp_path / "out.jsonl")) == 2


def test_results_are_printed_where_their_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        show.results([result(value=1.25)], False, tmp_path / "file" / "out.jsonl")
    assert "1.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        (("evaluate", "perplexity", STORIES, "text", "--length", 16), "--out"),
        (("evaluate", "retrieval", STORIES, "--task", "passkey", "--length", 99), "--out"),
        (("evaluate", "tasks", STORIES, "--tasks", "zebra-passkey", "--length", 99), "--out"),
        (("evaluate", "documents", STORIES, "text"), "--items"),
        (("data", "instructions", "text"), "--out"),
        (("doctor", "--measure"), "--out"),
        (("plan", "llama-2-7b", "--length", 99), "--picture"),
        (("report", "text"), "--out"),
        (("select", STORIES, "--budget", 2, "--window", 8, "--length", 32, "--text", "text"), "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    zebra: Zebra, tmp_path: Path, verb: tuple[object, ...], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("Once upon a time.")
    monkeypatch.setattr("zebra.cli.show.working", work)
    refused(zebra(*verb, option, "text/out.svg", cwd=tmp_path), "text/out.svg", "cannot be written: Not a directory")


BAD_VALUES = {
    "select": [
        *(("--budget", value) for value in ("foo", "0", "1.5", "flops:2", "cache:x", "8@9")),
        *(("--length", "0"), ("--samples", "3"), ("--seed", "-1"), ("--window", "0")),
    ],
    "perplexity": [
        ("--length", "0"),
        ("--length", "512,-1"),
        ("--stride", "0"),
        ("--prompt", "0"),
        ("--num-proc", "0"),
    ],
    "retrieval": [("--length", "1"), ("--depth", "0,2"), ("--depth", "nan"), ("--samples", "0")],
    "tasks": [("--limit", "0"), ("--shots", "-1"), ("--batch-size", "0"), ("--length", "0")],
    "documents": [("--limit", "0"), ("--answer-tokens", "0"), ("--length", "0")],
    "generate": [
        *((option, "0") for option in ("--max-new-tokens", "--num-beams", "--top-k", "--prefill-chunk")),
        *(
            ("--temperature", "-1"),
            ("--top-p", "2"),
            ("--min-p", "-1"),
            ("--repetition-penalty", "-1"),
            ("--seed", "-1"),
        ),
    ],
    "verify": [("--length", "0"), ("--dtype", "int8")],
}
VERBS: dict[str, tuple[object, ...]] = {
    "select": ("select", STORIES, "--budget", 2, "--window", 8, "--length", 32, "--text", "text"),
    "perplexity": ("evaluate", "perplexity", STORIES, "text", "--length", 16),
    "retrieval": ("evaluate", "retrieval", STORIES, "--task", "passkey", "--length", 99),
    "tasks": ("evaluate", "tasks", STORIES, "--tasks", "zebra-passkey", "--length", 99),
    "documents": ("evaluate", "documents", STORIES, "text"),
    "generate": ("generate", STORIES, "--prompt", "Once"),
    "verify": ("verify", STORIES, "--against", STORIES),
}


@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb in VERBS for option in BAD_VALUES[verb]])
def test_a_bad_value_is_refused_before_any_work(
    zebra: Zebra, tmp_path: Path, verb: str, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows is `show.working`, in which alone torch is imported."""
    (tmp_path / "text").write_text("Once upon a time.")
    monkeypatch.setattr("zebra.cli.show.working", work)
    refused(zebra(*VERBS[verb], *option, cwd=tmp_path))


def test_a_torn_file_is_refused_with_the_line_and_never_joined(zebra: Zebra, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    append_results(out, [result()])
    out.write_text(out.read_text() + result().json()[:50])
    text = tmp_path / "text"
    text.write_text("Once upon a time.")
    done = zebra("evaluate", "perplexity", STORIES, text, "--length", 4, "--out", out)
    refused(done, "line 2 is not a result: it was cut off. Remove that line")
    append_results(out, [result()])
    lines = out.read_text().splitlines()
    assert [lines[0], lines[2]] == [result().json()] * 2
    out.write_text("\n".join([result().json()] * 2))  # whole, without a line break at its end
    append_results(out, [result()])
    assert len(read_results(out)) == 3


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = command.replace("zebra", f"{sys.executable} -m zebra")
    return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    done = shell("zebra plan llama-2-7b --length 512 > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert "No space left on device. Free some space" in done.stderr.decode()


def test_a_stdout_that_is_not_utf8_gets_escapes_and_whole_json(tmp_path: Path) -> None:
    append_results(tmp_path / "naïve.jsonl", [result(model="naïve–")])
    command = f"cd {tmp_path}; zebra report naïve.jsonl -o naïve.html"
    done = shell(command, PYTHONIOENCODING="ascii")
    assert done.stdout.decode("ascii") == "na\\xefve.html: 1 results\n", done.stderr
    ascii_stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", ascii_stdout)
        show.results([result(model="naïve \U0001f993")], as_json=True)
        ascii_stdout.flush()
    written: Any = ascii_stdout.buffer
    assert json.loads(written.getvalue())["results"][0]["model"] == "naïve \U0001f993"


def test_any_name_is_written_and_read_again(tmp_path: Path) -> None:
    """A file name that is not UTF-8 has surrogates in Python, which UTF-8 does not allow."""
    append_results(tmp_path / "out.jsonl", [result(model=HOSTILE)])
    assert read_results(tmp_path / "out.jsonl") == [result(model=HOSTILE)]
    assert printable(to_json({HOSTILE: HOSTILE})) == to_json({HOSTILE: HOSTILE})


PRINTED: dict[str, Callable[[], Any]] = {
    "results": lambda: show.results([result(model=HOSTILE, run=HOSTILE)], as_json=False),
    "json": lambda: show.results([result(model=HOSTILE)], as_json=True),
    "faults": lambda: show.faults([(HOSTILE, HOSTILE)], 3, as_json=False),
    "stages": lambda: show.stages(
        [{"stage": HOSTILE, "kind": "a", "from": HOSTILE, "state": "done", "seconds": 1.0}], [], as_json=False
    ),
    "machine": lambda: show.machine({"cpu": HOSTILE}, [], as_json=False),
    "conversion": lambda: show.conversion(dict.fromkeys(("target", "class", "layout", "layers"), HOSTILE), False),
    "note": lambda: show.note(HOSTILE),
    "console": lambda: TextConsole(stderr=True).print(f"{HOSTILE} step", soft_wrap=True),
    "bar": lambda: _bar(HOSTILE),
    "generated": lambda: _generate(HOSTILE),
}


def _bar(text: str) -> None:
    with bar(text, 2, "x") as advance:
        advance(1, note=text)


def _generate(text: str) -> None:
    with show.writing(True) as write:
        assert write is not None
        write(text)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", PRINTED)
def test_names_do_not_act_on_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    PRINTED[name]()
    text = terminal.getvalue()
    assert "title" in text
    for control in ("\x1b]", "\x1b[31m", "\x07", "\x9b", "\rred"):
        assert control not in text
    if name != "json":
        assert "[/bold] [red" in text


def test_an_error_line_does_not_act_on_a_terminal(zebra: Zebra, tmp_path: Path) -> None:
    name = "\x1b[31mred\x9b"
    for verb in (
        ("report", name),
        ("convert", name, tmp_path / "x", "--stripes", "GL:9"),
        ("plan", name, "--length", 9),
    ):
        done = zebra(*verb, cwd=tmp_path)
        refused(done, "red")
        assert printable(done.stderr) == done.stderr
    done = zebra("evaluate", name)
    assert printable(done.stderr) == done.stderr


def _beyond_the_disk(write: Callable[[str], Any], file: Path) -> Exception:
    """The error of a write beyond a limit on file sizes, which fails like one on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        write(str(file))
    except Exception as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("it was written")


def test_a_full_disk_is_one_line_whatever_writes(tmp_path: Path) -> None:
    tensor = torch.zeros(10_000)
    writers: list[Callable[[str], Any]] = [
        lambda file: Path(file).write_text("x" * 9999),
        lambda file: torch.save(tensor, file),
        lambda file: save_file({"x": tensor}, file),
        lambda file: np.save(file, np.zeros(9999)),
        lambda file: np.zeros(9999).tofile(file),
    ]
    for i, write in enumerate(writers):
        line = machine_fault(_beyond_the_disk(write, tmp_path / str(i)))
        assert line is not None, i
        assert "File too large" in line or "is the disk full?" in line
    for error in (RuntimeError("basic_ios::clear: iostream error"), OSError(28, "No space left on device", "a/b")):
        assert machine_fault(error) is not None
    assert "a/b. Free some space" in str(machine_fault(OSError(28, "No space left on device", "a/b")))


def test_too_little_memory_is_one_line_with_the_remedy() -> None:
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")]
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        errors.append(raised.value)
    errors.append(OSError(12, "Cannot allocate memory"))
    for error in errors:
        assert str(machine_fault(error)).startswith("out of memory"), error
        assert "Use a shorter length" in str(machine_fault(error))
    assert "when allocating 20.00 GiB" in str(machine_fault(errors[0]))


def test_a_full_disk_in_a_copy_of_a_folder_is_one_line() -> None:
    """shutil collects what failed in an error without a number."""
    error = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    assert machine_fault(error) == "No space left on device. Free some space. No partial output was left."


def test_other_errors_keep_their_traceback() -> None:
    for error in (RuntimeError("PytorchStreamReader failed"), ValueError("bad"), OSError("Can't load the tokenizer")):
        assert machine_fault(error) is None


def test_a_fault_of_the_machine_in_a_verb_is_one_line(zebra: Zebra, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        return torch.empty(1 << 50)  # type: ignore[return-value]

    monkeypatch.setattr("zebra.generation.generate", fail)
    refused(zebra("generate", STORIES, "--prompt", "Once"), "out of memory when allocating ", "--dtype bfloat16")


def test_a_logger_speaks_again_when_the_last_that_asked_for_quiet_is_done() -> None:
    """Two threads, the first of which is done first."""
    logger = logging.getLogger("zebra.tests.quiet")
    logger.setLevel(logging.INFO)
    first, second = only_errors(logger.name), only_errors(logger.name)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.INFO

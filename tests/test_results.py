"""Results: written whole, appended, read again, and rejected with file and line."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from zebra import __version__
from zebra.errors import ZebraError
from zebra.provenance import git_commit, processor, versions
from zebra.results import Result, append_results, read_results, to_json, write_results

COLUMNS = {"run": "r", "model": "m", "layout": "GLLL:512", "task": "perplexity-disjoint", "metric": "perplexity"}


def result(**changes: Any) -> Result:
    return Result(**(COLUMNS | {"value": 1.5} | changes))


FULL = {
    "length": 4096,
    "position_from": 256,
    "position_to": 512,
    "depth": 0.25,
    "n": 12,
    "low": 1.0,
    "high": 2.0,
    "seed": 3,
    "device": "cpu, 1 thread",
}


def test_a_result_is_one_line_of_json() -> None:
    text = result(**FULL, run="naïve\nrun").json()
    assert "\n" not in text
    assert "naïve" in text
    assert json.loads(text) == COLUMNS | FULL | {
        "run": "naïve\nrun",
        "value": 1.5,
        "versions": versions(),
        "commit": git_commit(),
    }


def test_a_result_does_not_change_and_is_not_shared() -> None:
    first, second = result(), result()
    with pytest.raises(FrozenInstanceError):
        first.value = 2.0  # type: ignore[misc]
    first.versions["torch"] = "changed"
    assert second.versions["torch"] != "changed"
    assert versions()["torch"] != "changed"


def test_the_device_of_a_result_names_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from zebra.model.load import device_name

    assert device_name("cpu").startswith(f"{processor()}, {torch.get_num_threads()} thread")
    monkeypatch.setattr("sys.platform", "a system that does not name it")
    monkeypatch.setattr("platform.processor", lambda: "")
    processor.cache_clear()
    assert processor() == "cpu"
    processor.cache_clear()


def test_versions_name_what_the_result_depends_on() -> None:
    import torch

    names = versions()
    assert {"python", "torch", "transformers"} <= set(names)
    assert names["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert names.get("zebra", __version__) == __version__


def test_the_commit_is_a_hash_or_none() -> None:
    commit = git_commit()
    assert commit is None or (len(commit.rstrip("+")) == 12 and int(commit.rstrip("+"), 16) >= 0)


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    results = [result(**FULL), result(value=2.0, model="модель")]
    write_results(path, results)
    assert read_results(path) == results
    assert path.read_bytes().count(b"\n") == 2
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]


def test_write_replaces_and_append_adds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    append_results(path, [result(value=1.0)])
    append_results(path, (result(value=v) for v in (2.0, 3.0)))
    assert [r.value for r in read_results(path)] == [1.0, 2.0, 3.0]
    write_results(path, [result(value=4.0)])
    assert [r.value for r in read_results(path)] == [4.0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [result(value=1.0)])

    def broken() -> Any:
        yield result(value=2.0)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_results(path, broken())
    assert [r.value for r in read_results(path)] == [1.0]


def test_a_write_that_is_killed_at_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [result(value=1.0)])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zebra.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, [result(value=2.0)])
    assert [r.value for r in read_results(path)] == [1.0]


def test_blank_lines_and_missing_optional_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("\n" + json.dumps(COLUMNS | {"value": 2}) + "\n  \n")
    (read,) = read_results(str(path))
    assert (read.value, read.length, read.device) == (2, None, "cpu")


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    """JSON has no NaN; other tools stop at it."""
    append_results(tmp_path / "results.jsonl", [result(value=math.nan, high=math.inf)])
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()
    assert json.loads((tmp_path / "results.jsonl").read_text())["value"] is None
    read = read_results(tmp_path / "results.jsonl")[0]
    assert math.isnan(read.value)
    assert read.high is None
    assert to_json({"a": [math.inf, 1.5, (math.nan,)]}) == '{"a": [null, 1.5, [null]]}'


@pytest.mark.parametrize(
    ("column", "value"), [("length", "4096"), ("n", 1.5), ("low", []), ("versions", "1"), ("model", 3), ("seed", True)]
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, column: str, value: object) -> None:
    line = json.loads(result().json()) | {column: value}
    (tmp_path / "results.jsonl").write_text(json.dumps(line))
    with pytest.raises(ZebraError, match=f"line 1 is not a result: the column {column}"):
        read_results(tmp_path / "results.jsonl")


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ZebraError, match="no results file at"):
            read_results(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("5", "not a JSON object"),
        ("null", "not a JSON object"),
        ('["run"]', "not a JSON object"),
        ("{}", r"missing columns \['run', 'model', 'layout', 'task', 'metric', 'value'\]"),
        (json.dumps(COLUMNS), r"missing columns \['value'\]"),
        (json.dumps(COLUMNS | {"value": 1, "lenght": 5}), r"unknown columns \['lenght'\]"),
        (result().json()[:40], "Unterminated|Expecting"),
    ],
)
def test_a_broken_line_is_refused_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(result().json() + "\n\n" + line + "\n")
    with pytest.raises(ZebraError, match=message) as refused:
        read_results(path)
    assert f"{path}, line 3 is not a result" in str(refused.value)


def test_all_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([result().json(), "{", result().json(), "5", "{}"]))
    with pytest.raises(ZebraError, match=r"line 2 is not a result: .*\. Neither are 2 others: lines 4, 5\."):
        read_results(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_any_text_in_a_column_is_read_again(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "results.jsonl"
    results = [result(model=f"a{separator}b")]
    write_results(path, results)
    assert read_results(path) == results


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ZebraError):
        read_results(path)

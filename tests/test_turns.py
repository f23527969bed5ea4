"""benchmarks/turns.py: turns of a chat, of ours and of servers. No test looks at speed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES

import turns
import turns_page
import turns_rounding
import turns_subjects
from zebra.errors import ZebraError
from zebra.results import Result, read_results, write_results
from zebra_bench import servers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns") / "stories"
    shutil.copytree(STORIES, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_three_turns_are_measured_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns, "WARM_UP", "Say this: a cat.")
    monkeypatch.setattr(turns_subjects, "ANSWER", 8)
    monkeypatch.setattr(turns, "ROOM", 128)
    options = ["--checkpoint", str(checkpoint), "--length", "64", "--out", str(tmp_path / "turns.jsonl")]
    options += ["--stripes", "GL:17"]
    turns.main(["conversation-stripes", *options])
    rows = read_results(tmp_path / "turns.jsonl")
    values = {(one.task, one.metric): one.value for one in rows}
    assert {(one.run, one.model, one.layout, one.length) for one in rows} == {
        ("conversation-stripes", "stories", "GL:17", 64)
    }
    for turn in ("turn 2", "turn 3"):
        assert 64 < values[turn, "cached_tokens"] < values[turn, "prompt_tokens"]
    assert values["turn 3", "planned_cache_bytes"] <= values["turn 3", "cache_bytes"]
    capsys.readouterr()
    turns.main(["conversation-stripes", *options])
    assert (read_results(tmp_path / "turns.jsonl"), capsys.readouterr().out) == (rows, "")
    with pytest.raises(ZebraError, match="subjects are conversation, "):
        turns.main(["llama-server", *options])


def test_beyond_the_trained_length_subjects_reach_further(checkpoint: Path) -> None:
    near, far = (turns.subjects(checkpoint, length, "GL:17", None) for length in (64 - turns.ROOM, 1024))
    assert [near[f"serve{way}"].loading for way in ("", "-stripes", "-self-extend")] == [
        {},
        {"stripes": "GL:17"},
        {"self_extend": "auto:513"},
    ]
    assert [far[f"conversation{way}"].loading for way in ("", "-stripes")] == [
        {"rope": "yarn:4"},
        {"stripes": "GL:17", "self_extend": "auto:2048"},
    ]


def test_a_server_is_sent_all_messages_and_its_counts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = []

    def lines(port: int, path: str, body: bytes | None = None) -> Iterator[bytes]:
        bodies.append(body)
        yield b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n'
        yield b'data: {"choices": [{"delta": {"content": "A cat"}}]}\n'
        yield b'data: {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}\n'
        yield b"data: [DONE]\n"

    monkeypatch.setattr(turns_subjects, "response_lines", lines)
    served = turns_subjects.Served(1, "m")
    assert [list(served.ask(text)) for text in ("Who?", "And?")] == [["A cat"], ["A cat"]]
    assert served.counts() == {"prompt_tokens": 9, "cached_tokens": 4}
    assert b'"content": "A cat"}, {"role": "user", "content": "And?"' in bodies[1]


def test_the_page_has_a_line_for_each_subject_and_says_whether_the_goal_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"serve": 0.25, "llama-server": 0.5, "serve-stripes": 9.0, "transformers": 20.0}
    rows = [
        Result(run=run, model="m", layout="full", task=f"turn {turn}", metric=metric, value=value, length=4096)
        for (run, value), turn in itertools.product(seconds.items(), (1, 2, 3))
        for metric in ("seconds_to_first_token", "tokens_per_second")
    ]
    more: dict[str, Any] = {"run": "serve", "model": "m", "layout": "full", "task": "turn 3", "length": 4096}
    rows += [
        Result(metric="cache_bytes", value=2**20, **more),
        Result(metric="planned_cache_bytes", value=2**19, **more),
    ]
    monkeypatch.setattr(turns_page, "PAGE", tmp_path / "turns.md")
    write_results(tmp_path / "turns.jsonl", rows)
    turns_page.write_page(read_results(tmp_path / "turns.jsonl"))
    page = (tmp_path / "turns.md").read_text()
    goal = "0.25 s with zebra serve and 0.50 s with llama-server. The ratio is 0.50; the goal, at most 1.2, is met."
    assert goal in page
    assert "| zebra serve | full | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |" in page
    assert "| transformers serve | full | 20.0 |" in page
    assert page.index("| zebra serve |") < page.index("| transformers serve |") < page.index("| llama-server |")
    assert "| zebra serve | full | 0.5 | 1.0 | – | – |" in page
    with pytest.raises(ZebraError, match="there are no results of turns"):
        turns_page.write_page([])


def test_rounding_is_that_of_sixteen_bits(checkpoint: Path) -> None:
    values = turns_rounding.rounding(checkpoint, "One day Tim went to the park. " * 4, turns.QUESTIONS, 8)
    differences = [values[name][0] for name in ("cached_difference", "dtype_difference")]
    assert all(0 < one < 0.1 for one in differences)
    assert values["likeliest_share"][0] > 0.9
    assert {n for _, n in values.values()} == {24}


def test_a_server_that_ends_at_once_is_one_clear_error() -> None:
    command = ["sh", "-c", "echo no model; exit 1"]
    with (
        pytest.raises(ZebraError, match="does not come up: no model"),
        servers.running(command, servers.free_port()),
    ):
        raise AssertionError

"""Self-Extend's map of distances: the paper's figure, the two regions, the reach by brute force, the sizing rule."""

from __future__ import annotations

import math

import pytest
import torch

from zebra import SelfExtend, ZebraError
from zebra.masks import within
from zebra.positions import grouped_key, grouped_query, relative, suggest

SETTINGS = [(1, 4), (2, 4), (3, 4), (4, 4), (8, 4), (3, 1), (5, 16), (16, 5)]

FIGURE = """
0
1 0
2 1 0
3 2 1 0
4 3 2 1 0
4 4 3 2 1 0
5 5 4 3 2 1 0
5 5 4 4 3 2 1 0
6 6 5 5 4 3 2 1 0
6 6 5 5 4 4 3 2 1 0
"""


def test_the_papers_figure() -> None:
    """A model trained at 7 tokens reads 10 with a window of 4 and groups of 2: the largest distance is 6."""
    rows = [[relative(i, j, 2, 4) for j in range(i + 1)] for i in range(10)]
    assert rows == [[int(d) for d in line.split()] for line in FIGURE.strip().splitlines()]
    assert SelfExtend(2, 4).reach(7) == 10
    assert relative(9, 0, 2, 4) == 6


@pytest.mark.parametrize(("group", "window"), SETTINGS)
def test_ints_and_tensors_agree(group: int, window: int) -> None:
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
    actual = relative(i, j, group, window)
    for a in range(40):
        for b in range(a + 1):
            assert int(actual[a, b]) == relative(a, b, group, window)


@pytest.mark.parametrize(("group", "window"), SETTINGS)
def test_near_is_exact_and_far_is_grouped(group: int, window: int) -> None:
    for i in range(60):
        previous = -1
        for j in range(i, -1, -1):
            d = relative(i, j, group, window)
            expected = i - j if within(i, j, window) else grouped_query(i, group, window) - grouped_key(j, group)
            assert d == expected
            assert d >= previous  # never falls with the distance
            assert i - j != window or window <= d <= window + 1  # no gap and no repetition at the seam
            assert group > 1 or d == i - j
            previous = d


@pytest.mark.parametrize("trained", [17, 20, 64])
@pytest.mark.parametrize(("group", "window"), SETTINGS)
def test_reach_is_the_longest_text_whose_distances_the_model_knows(trained: int, group: int, window: int) -> None:
    def largest(n: int) -> int:
        return max(relative(i, 0, group, window) for i in range(n))

    n = SelfExtend(group, window).reach(trained)
    assert largest(n) < trained <= largest(n + 1)
    assert largest(n) == relative(n - 1, 0, group, window)
    if window % group == 0:
        assert n == (trained - window) * group + window


def test_the_sizing_rule_gives_the_authors_settings() -> None:
    assert [str(suggest(4096, n)) for n in (16384, 25000)] == ["16:1024", "32:1024"]


@pytest.mark.parametrize("trained", [8, 9, 100, 512, 4096, 131072])
@pytest.mark.parametrize("times", [1.01, 2, 5, 16, 300])
def test_a_suggestion_reaches_its_target_within_half_the_trained_length(trained: int, times: float) -> None:
    target = math.ceil(trained * times) + 1
    actual = suggest(trained, target)
    assert actual.reach(trained) >= target
    assert actual.window + (target - actual.window) / actual.group <= trained / 2
    half = SelfExtend(max(1, actual.group // 2), actual.window)
    assert actual.group == 2 or half.window + (target - half.window) / half.group > trained / 2
    actual.check(trained)
    assert SelfExtend.parse(f"auto:{target}", trained) == actual


@pytest.mark.parametrize("text", ["8:1024", "1:1", "3:7:log"])
def test_the_notation_is_read_as_it_is_printed(text: str) -> None:
    assert str(SelfExtend.parse(text)) == text
    assert SelfExtend.parse(f" {text.replace(':', ' : ')} ") == SelfExtend.parse(text)
    assert SelfExtend.parse(text).log_scale == text.endswith("log")


@pytest.mark.parametrize(
    ("text", "trained", "words"),
    [
        ("8", None, "GROUP:WINDOW"),
        ("8:", None, "GROUP:WINDOW"),
        ("GLLL:8", None, "GROUP:WINDOW"),
        ("-8:8", None, "GROUP:WINDOW"),
        ("8:99999999999", None, "GROUP:WINDOW"),
        ("auto:4096", None, "if the trained length is known"),
        ("auto:4096:log", 512, "GROUP:WINDOW"),
        ("0:8", None, "from 1 to .*; got 0:8"),
        ("8:0", None, "from 1 to .*; got 8:0"),
        ("auto:512", 512, "above the trained length"),
        ("auto:9999999999", 512, "below 2\\^31"),
        ("auto:4096", 4, "at least 8 tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, trained: int | None, words: str) -> None:
    with pytest.raises(ZebraError, match=words):
        SelfExtend.parse(text, trained)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "8", 2**31])
def test_a_group_and_a_window_are_whole_numbers_of_at_least_one(number: object) -> None:
    for arguments in ((number, 8), (8, number)):
        with pytest.raises(ZebraError, match="both integers from 1"):
            SelfExtend(*arguments)  # type: ignore[arg-type]


def test_a_window_of_the_trained_length_is_refused() -> None:
    SelfExtend(2, 511).check(512)
    with pytest.raises(ZebraError, match=r"got 2:512 for a model trained at 512 tokens\. Lower the window.* to 128"):
        SelfExtend(2, 512).check(512)


def test_the_query_scale_is_one_up_to_the_trained_length() -> None:
    setting = SelfExtend(8, 64, log_scale=True)
    assert setting.query_scale(torch.tensor([0, 511, 512**2 - 1]), 512).tolist() == pytest.approx([1, 1, 2])
    positions = torch.tensor([0, 511, 512, 4095])
    expected = [max(1.0, math.log(p + 1) / math.log(512)) for p in positions.tolist()]
    assert setting.query_scale(positions, 512).tolist() == pytest.approx(expected)

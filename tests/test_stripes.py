"""The layout notation: what parses, what it means for each layer, what is refused and how."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from zebra.errors import ZebraError
from zebra.stripes import GLOBAL, LOCAL, Stripes, visible_pairs


def letters(kinds: tuple[str, ...]) -> str:
    return "".join({GLOBAL: "G", LOCAL: "L"}[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("text", "layers", "expected", "window"),
    [
        ("GLLL:512", 9, "GLLLGLLLG", 512),
        ("GLLL:1", 2, "GL", 1),
        ("LG:8", 5, "LGLGL", 8),
        ("G:16", 3, "GGG", 16),
        ("L:16", 3, "LLL", 16),
        ("gLl:7", 4, "GLLG", 7),
        ("0,4,9,31:1024", 32, "GLLLGLLLLG" + "L" * 21 + "G", 1024),
        ("0:2", 1, "G", 2),
        ("2,0:5", 4, "GLGL", 5),
        ("  1 , 3 : 6 ", 5, "LGLGL", 6),
    ],
)
def test_what_a_layout_means(text: str, layers: int, expected: str, window: int) -> None:
    stripes = Stripes.parse(text)
    assert letters(stripes.layer_types(layers)) == expected
    assert stripes.window == window


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("GLLL:512", "GLLL:512"),
        ("glll : 512", "GLLL:512"),
        ("9,0, 4:8", "0,4,9:8"),
        ("31:1024", "31:1024"),
        ("L:3", "L:3"),
        ("GL:0064", "GL:64"),
        ("GLLL:512+4", "GLLL:512+4"),
        ("0,3 : 8 + 016 ", "0,3:8+16"),
        ("GL:9+0", "GL:9"),
    ],
)
def test_printing_and_parsing_are_inverse(text: str, printed: str) -> None:
    stripes = Stripes.parse(text)
    assert str(stripes) == printed
    assert Stripes.parse(printed) == stripes
    assert hash(Stripes.parse(printed)) == hash(stripes)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
def test_grouped_is_the_papers_layout(stride: int) -> None:
    stripes = Stripes.grouped(stride=stride, window=5)
    assert [kind == GLOBAL for kind in stripes.layer_types(15)] == [i % stride == 0 for i in range(15)]
    assert stripes.window == 5


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("GLLLGLLL", "GLLL:9"),
        ("GLLLGLL", "GLLL:9"),
        ("GGGG", "G:9"),
        ("LLLL", "L:9"),
        ("LGLG", "LG:9"),
        ("GLLL", "GLLL:9"),
        ("LLLG", "3:9"),
        ("GLLGLLLL", "0,3:9"),
        ("G", "G:9"),
        ("L", "L:9"),
    ],
)
def test_of_finds_the_shortest_layout(kinds: str, expected: str) -> None:
    assert str(Stripes.of([GLOBAL if kind == "G" else LOCAL for kind in kinds], 9)) == expected


@pytest.mark.parametrize("layers", range(1, 8))
def test_of_is_inverse_to_layer_types(layers: int) -> None:
    for number in range(2**layers):
        kinds = tuple(GLOBAL if number >> i & 1 else LOCAL for i in range(layers))
        stripes = Stripes.of(kinds, 3)
        assert stripes.layer_types(layers) == kinds
        assert stripes.window == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0, "pattern": "G"}, r"from 1 to 2\^31 - 1; got 0"),
        ({"window": -5, "pattern": "G"}, "got -5"),
        ({"window": True, "pattern": "G"}, "got True"),
        ({"window": 2.0, "pattern": "G"}, r"got 2\.0"),
        ({"window": "8", "pattern": "G"}, "got '8'"),
        ({"window": 8}, "Give exactly one"),
        ({"window": 8, "pattern": "G", "global_layers": (0,)}, "Give exactly one"),
        ({"window": 8, "pattern": ""}, "at least one layer.* got ''"),
        ({"window": 8, "pattern": "GXL"}, "got 'GXL'"),
        ({"window": 8, "pattern": "gl"}, "got 'gl'"),
        ({"window": 8, "pattern": "GL\n"}, "letters G"),
        ({"window": 8, "global_layers": ()}, "use the pattern L:8"),
        ({"window": 8, "global_layers": (1, 1)}, r"got \[1, 1\]"),
        ({"window": 8, "global_layers": (-1,)}, r"got \[-1\]"),
        ({"window": 8, "global_layers": (0, True)}, "distinct integers"),
        ({"window": 8, "global_layers": (0.0,)}, "distinct integers"),
    ],
)
def test_refused_layouts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        Stripes(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stripes must be written"),
        ("GLLL", "got 'GLLL'"),
        (":512", "stripes must be written"),
        ("GLLL:", "stripes must be written"),
        ("GLLL:512:3", "stripes must be written"),
        ("G,L:5", "stripes must be written"),
        ("0;4:5", "stripes must be written"),
        ("0,:5", "stripes must be written"),
        ("-1:5", "stripes must be written"),
        ("GLLL:1.5", "stripes must be written"),
        ("GLLX:5", "got 'GLLX'"),
        ("GLLL:0", r"from 1 to 2\^31"),
        ("GLLL:-3", "got -3"),
        ("3,3:4", r"got \[3, 3\]"),
        ("GL:" + "9" * 5000, "stripes must be written"),
    ],
)
def test_refused_notation(text: str, message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        Stripes.parse(text)


@pytest.mark.parametrize("stride", [0, -1, True, 2.0, "4"])
def test_refused_stride(stride: Any) -> None:
    with pytest.raises(ZebraError, match="the stride, the number of layers in a group, must"):
        Stripes.grouped(stride=stride, window=4)


def test_a_layer_beyond_the_depth_is_refused() -> None:
    stripes = Stripes.parse("0,4:8")
    assert letters(stripes.layer_types(5)) == "GLLLG"
    with pytest.raises(ZebraError, match=r"0,4:8 names layer 4, but the model has 4 layers.* up to 3"):
        stripes.layer_types(4)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_layers_is_refused(layers: int) -> None:
    with pytest.raises(ZebraError, match="at least one layer"):
        Stripes.parse("GL:8").layer_types(layers)


def test_a_layout_does_not_change() -> None:
    with pytest.raises(AttributeError):
        Stripes.parse("GL:8").window = 9  # type: ignore[misc]


def test_visible_pairs_is_the_count_of_the_mask() -> None:
    for length, window, sinks in product((0, 1, 2, 5, 16, 33), (None, 1, 2, 5, 16, 33, 100), (0, 1, 4, 50)):
        counted = sum(1 for i in range(length) for j in range(i + 1) if window is None or i - j < window or j < sinks)
        assert visible_pairs(length, window, sinks) == counted, (length, window, sinks)


def test_sinks_are_part_of_the_layout() -> None:
    assert Stripes.parse("GLLL:512+4") == Stripes(512, "GLLL", sinks=4) != Stripes(512, "GLLL")
    with pytest.raises(ZebraError, match=r"a list with one entry per layer; got 'GLLL'"):
        Stripes.of("GLLL", 9)
    assert Stripes.of((GLOBAL, LOCAL), 9, sinks=2) == Stripes.parse("GL:9+2")
    for sinks in (-1, True, 2**31, "4"):
        with pytest.raises(ZebraError, match="sinks, the number of first tokens"):
            Stripes(9, "GL", sinks=sinks)  # type: ignore[arg-type]

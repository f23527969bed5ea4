"""Files nobody meant, made of good ones by hypothesis: each is read, or rejected with a ZebraError and no other."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import source
from test_gguf import write as write_gguf

from faults.commands import recipes
from zebra.data.records import parse_records
from zebra.errors import ZebraError
from zebra.gguf import config_fields, read_header
from zebra.model.checkpoint import load_tokenizer, read_config, read_local_attention
from zebra.model.weights import check_weights
from zebra.plan.decoder import read_decoder
from zebra.results import read_results
from zebra.train.recipe import AdaptRecipe, PretrainRecipe
from zebra.train.recipe_file import checked, parse_yaml
from zebra.train.tune_recipe import TuneRecipe

ODD = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["nope", "\x1b[31m", "\ud800", "[red]"])
)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:3]):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one to three values replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([*paths(tree)] or [("new",)]))
        parent = tree
        for key in way:
            parent = parent[key]
        if draw(st.booleans()) and draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = draw(VALUES)
    return tree


@st.composite
def mutated(draw: st.DrawFn, content: bytes, first: int) -> bytes:
    """Bytes of which some of the first are changed, or that are cut there."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, min(first, len(content)) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, first))] if draw(st.booleans()) else content)


def rejected_or_read(read: Callable[[], Any]) -> None:
    with suppress(ZebraError):
        read()


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path_factory.mktemp("odd") / "stories260K"))


def read_checkpoint(path: Path) -> None:
    config = read_config(path)
    read_local_attention(path)
    check_weights(path, config)


@given(changed(json.loads((STORIES / "config.json").read_text())))
def test_config_json(stories: Path, tree: Any) -> None:
    (stories / "config.json").write_text(json.dumps(tree))
    for read in (read_checkpoint, read_decoder):
        rejected_or_read(lambda read=read: read(stories))
    shutil.copy(STORIES / "config.json", stories)


@settings(max_examples=10)
@given(changed(json.loads((STORIES / "tokenizer.json").read_text())))
def test_tokenizer_json(stories: Path, tree: Any) -> None:
    (stories / "tokenizer.json").write_text(json.dumps(tree))

    def read() -> None:
        load_tokenizer(stories)("Once upon a time")

    rejected_or_read(read)


@given(mutated((STORIES / "model.safetensors").read_bytes(), 3000))
def test_safetensors(stories: Path, content: bytes) -> None:
    (stories / "model.safetensors").write_bytes(content)
    config = read_config(STORIES)
    rejected_or_read(lambda: check_weights(stories, config))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", source()).read_bytes()


@given(st.data())
def test_gguf(gguf: bytes, data: st.DataObject) -> None:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data.draw(mutated(gguf, 2000)))
        file.flush()
        rejected_or_read(lambda: config_fields(read_header(file.name)))


@given(st.lists(VALUES.map(json.dumps).map(str.encode) | st.binary(max_size=20), max_size=4))
def test_json_lines(lines: list[bytes]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(b"\n".join(lines))
        file.flush()
        rejected_or_read(lambda: parse_records(Path(file.name), lambda record: [record.fields], "fields"))
        rejected_or_read(lambda: read_results(file.name))


KINDS: dict[str, Any] = {"adapt": AdaptRecipe, "tune": TuneRecipe, "pretrain": PretrainRecipe}


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda name: st.tuples(st.just(name), changed(recipes()[name]))))
def test_recipes(case: tuple[str, Any]) -> None:
    name, tree = case
    rejected_or_read(lambda: checked(tree, KINDS[name], "recipe"))


@given(st.text("{}[]:,-&*!|>'\"#%@ \n\tab1~.", max_size=40) | st.text(max_size=20))
def test_any_text_is_yaml_or_rejected(text: str) -> None:
    with suppress(ZebraError, yaml.YAMLError):
        parse_yaml(text)

"""Read a recipe: YAML of bounded size, overrides, and errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from zebra.data.documents import find_files
from zebra.errors import ZebraError, did_you_mean
from zebra.files import check_regular_file


class _Loader(yaml.SafeLoader):
    """YAML with decimal numbers, no dates, and unique keys: YAML 1.1 reads the layout 2:33 as 153, and 010 as 8."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)

R = TypeVar("R", bound=BaseModel)
_MOST_CHARACTERS, _MOST_VALUES = 1 << 20, 100_000


def parse_yaml(text: str) -> Any:
    """Parse YAML text, whose size is checked before any alias is expanded.

    Raises:
        yaml.YAMLError: not YAML; too large, also after its aliases are expanded; nested too deeply.
    """
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {_MOST_CHARACTERS:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases expanded it has more than {_MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _values(node: Any, sizes: dict[int, float]) -> float:
    """The number of values below a node; a node with aliases counts in each place."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # for an alias inside its own node
        inner = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        sizes[id(node)] = 1 + sum(_values(one, sizes) for one in inner)
    return sizes[id(node)]


def read_recipe(path: str | os.PathLike[str], kind: type[R], overrides: Sequence[str] = ()) -> R:
    """Read a recipe and apply overrides `a.b=value`, whose values are YAML.

    Raises:
        ZebraError: no file, or not YAML; an unknown key, a wrong value or a contradiction (see `checked`).
    """
    check_regular_file(Path(path))
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ZebraError(f"the recipe {path} cannot be read: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ZebraError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise ZebraError(f"the recipe {path} is not a mapping of keys to values. See recipes/ for examples.")
    for override in overrides:
        _override(tree, override)
    if "\\x00" in repr(tree):
        raise ZebraError(f"{path}: values cannot contain a NUL character. Remove it.")
    return checked(tree, kind, str(path))


def as_recipe(recipe: R | str | os.PathLike[str], kind: type[R]) -> R:
    """The recipe itself, or the one in a file.

    Raises:
        ZebraError: neither a recipe of this class nor a path; what `read_recipe` raises.
    """
    if isinstance(recipe, kind):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        name = type(recipe).__name__
        raise ZebraError(
            f"a recipe must be a {kind.__name__} or the path of a YAML file; got a {name}. Pass one of these."
        )
    return read_recipe(recipe, kind)


def checked(tree: Any, kind: type[R], name: str) -> R:
    """Validate a tree of keys and values as a recipe; errors begin with `name`.

    Raises:
        ZebraError: an unknown key (with the nearest known one), a wrong value, a contradiction.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ZebraError(f"{name}: " + "; ".join(_message(problem, kind) for problem in error.errors())) from None


_FILES = ("files", "leaks", "text", "haystack", "file", "include")
_MAYBE_FILES = ("tokenizer", "chat_template")


def named_files(tree: Any, key: str = "") -> list[str]:
    """The files, folders and globs that a recipe names, at any depth: the values of the keys for files."""
    if isinstance(tree, dict):
        return [file for name, inner in tree.items() for file in named_files(inner, name)]
    if isinstance(tree, list | tuple):
        return [file for inner in tree for file in named_files(inner, key)]
    if not isinstance(tree, str):
        return []
    is_file = (
        key in _FILES or (key in _MAYBE_FILES and Path(tree).exists()) or (key == "tasks" and Path(tree).is_file())
    )
    return [tree] if is_file else []


def check_files(recipe: BaseModel) -> None:
    """Check that the files that a recipe names exist, without reading them.

    Raises:
        ZebraError: what `find_files` raises.
    """
    find_files(named_files(recipe.model_dump()))


def _override(tree: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name.strip():
        raise ZebraError(f"an override must be a.b=value; got {override!r}. Write for example train.max_steps=100.")
    *parents, last = name.strip().split(".")
    for parent in parents:
        inner = tree.get(parent, {})
        if not isinstance(inner, dict):
            raise ZebraError(f"the override {override!r} goes below {parent}, which is a value. See the recipe's keys.")
        tree[parent] = dict(inner)  # a copy: a YAML alias is one table in two places
        tree = tree[parent]
    try:
        tree[last] = parse_yaml(value)
    except (yaml.YAMLError, ValueError):
        raise ZebraError(f"the value of the override {override!r} is not valid YAML. Quote it.") from None


def _message(problem: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        schema = kind.model_json_schema()
        sections = [schema, *schema.get("$defs", {}).values()]
        known = [name for section in sections for name in section.get("properties", ())]
        remedy = did_you_mean(str(problem["loc"][-1]), known, "see recipes/ for the known keys.")
        return f"unknown key {where}; {remedy}"
    if problem["type"] == "missing":
        return f"the key {where} is missing; add it."
    value = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{where}: {message}{value}." if where else f"{message}."

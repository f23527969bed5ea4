"""A run's directory: it belongs to one recipe with one set of inputs, and to one process at a time.

run/recipe.yaml     the resolved recipe; a second start of the same recipe resumes, of another is refused
run/inputs.json     what the recipe's names stood for: digests of files and of the source, the number of processes
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from zebra.data.documents import find_files
from zebra.errors import ZebraError, first_line
from zebra.files import atomic_write, directory_lock, file_digest
from zebra.train.recipe import Recipe, named_files


def is_first_process() -> bool:
    """Whether this process, of those of a launcher, is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def locked_run(recipe: Recipe) -> Iterator[Path]:
    """Lock the run's directory for this process; of several processes of a training the first one does.

    Raises:
        ZebraError: the directory is of another recipe or of no run; another process is at work in it.
    """
    run = Path(recipe.run)
    check_recipe(run, recipe)
    with directory_lock(run) if is_first_process() else nullcontext():
        check_recipe(run, recipe)  # another process may have been here first
        yield run


def inputs_of(recipe: Recipe, digests: dict[str, object], *, finished: bool) -> dict[str, object]:
    """What a run's results depend on: the digests of its start and of its files, and the number of processes.

    A finished run may have lost its files, and may be read again by any number of processes.

    Raises:
        ZebraError: files that do not exist.
    """
    inputs = dict(digests)
    try:
        inputs["files"] = digests_of_files(recipe.model_dump())
    except ZebraError:
        if not finished:
            raise
    return inputs if finished else inputs | {"processes": processes()}


def digests_of_files(tree: dict[str, Any]) -> dict[str, str]:
    """Of each file that a recipe's section names, its digest.

    Raises:
        ZebraError: files that do not exist.
    """
    return {str(file): file_digest(file) for file in find_files(named_files(tree))}


def record_inputs(run: Path, recipe: Recipe, inputs: dict[str, Any]) -> None:
    """Write down the recipe and what its names stand for."""
    atomic_write(run / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    atomic_write(run / "inputs.json", json.dumps(inputs, indent=2) + "\n")


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn the errors of torch and safetensors on a full disk into one line."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "I/O error" not in str(error) and "inline_container" not in str(error):
            raise
        raise ZebraError(
            f"{run} cannot be written, is the disk full? ({first_line(error)}) Free some space; "
            "the same command goes on from the last whole checkpoint."
        ) from None


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Check that a directory is absent, or that of this recipe.

    Raises:
        ZebraError: a directory of another recipe, or of no run; a damaged recipe.
    """
    file = run / "recipe.yaml"
    if file.exists():
        try:
            first = type(recipe).model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError):
            raise ZebraError(f"{file} is damaged: it is no recipe. Name another run, or remove {run}.") from None
        if different := differing_keys(recipe, first):
            raise ZebraError(
                f"{run} holds a run of another recipe: {', '.join(different)} differ. "
                "Name another run, or remove the directory."
            )
    elif run.exists() and (not run.is_dir() or any(not file.name.startswith(".") for file in run.iterdir())):
        raise ZebraError(f"{run} exists and is no run of zebra: it has no recipe.yaml. Name another run.")


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """The keys that two recipes differ in, but for those that change no number: a directory may be moved."""
    items = flatten(one.model_dump()).items() ^ flatten(other.model_dump()).items()
    return sorted({name for name, _ in items} - {"run", "data.num_proc", "data.cache_dir"})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe's values, each under the path of its keys, `train.max_steps`."""
    values: dict[str, str] = {}
    for name, value in tree.items():
        values |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return values

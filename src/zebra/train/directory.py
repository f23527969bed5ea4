"""A run's directory: it belongs to one recipe with one set of inputs, and to one process at a time.

run/recipe.yaml     the resolved recipe; a second start of the same recipe resumes, of another is refused
run/inputs.json     what the recipe's names stood for: digests of the text and of the source, how many processes
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

from zebra.errors import ZebraError, first_line
from zebra.files import atomic_write, directory_lock
from zebra.train.recipe import Recipe


def is_first_process() -> bool:
    """Under a launcher one process writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def occupied(recipe: Recipe) -> Iterator[Path]:
    """Hold the run's directory for this process; of several processes the first one holds it.

    Raises:
        ZebraError: the directory is of another recipe or of no run; another process is at work in it.
    """
    run = Path(recipe.run)
    check_recipe(run, recipe)
    with directory_lock(run) if is_first_process() else nullcontext():
        check_recipe(run, recipe)  # another process may have been here first
        yield run


def record(run: Path, recipe: Recipe, inputs: dict[str, Any]) -> None:
    """Write down the recipe and what its names stand for.

    Raises:
        ZebraError: a run that began with other inputs, and would go on with these.
    """
    kept = run / "inputs.json"
    if kept.exists():
        try:
            began = dict(json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ZebraError(f"{kept} is damaged. Name another run, or remove {run}.") from None
        changed = sorted(name for name in inputs if inputs[name] != began.get(name))
        if changed:
            raise ZebraError(
                f"{run} began with other inputs: {' and '.join(changed)} changed since. "
                "Restore them to go on with it, or name another run."
            )
    atomic_write(run / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    atomic_write(kept, json.dumps(inputs, indent=2) + "\n")


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn what torch and safetensors say of a full disk into one line."""
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
    """Refuse a directory of another recipe, or of no run."""
    mine = run / "recipe.yaml"
    if mine.exists():
        try:
            theirs = type(recipe).model_validate(yaml.safe_load(mine.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError):
            raise ZebraError(f"{mine} is damaged: it is no recipe. Name another run, or remove {run}.") from None
        if different := differing(recipe, theirs):
            raise ZebraError(
                f"{run} holds a run of another recipe: {', '.join(different)} differ. "
                "Name another run, or remove the directory."
            )
    elif run.exists() and (not run.is_dir() or any(not file.name.startswith(".") for file in run.iterdir())):
        raise ZebraError(f"{run} exists and is no run of zebra: it has no recipe.yaml. Name another run.")


def differing(one: Recipe, other: Recipe) -> list[str]:
    """The keys that two recipes differ in, but for those that change no number."""
    found = flat(one.model_dump()).items() ^ flat(other.model_dump()).items()
    return sorted({name for name, _ in found} - {"data.num_proc", "data.cache_dir"})


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe's values, each under the path of its keys, `train.max_steps`."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return found

"""A run's directory: it belongs to one recipe with one set of inputs, and to one process at a time.

run/recipe.yaml     the resolved recipe; starting it again resumes the run, and starting another one is an error
run/inputs.json     digests of the files and of the source that the recipe names; the number of sequences in a step

Before its first complete checkpoint a run has nothing worth keeping, so until then its recipe and inputs may change.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from zebra.data.documents import find_files
from zebra.errors import ZebraError, first_line
from zebra.files import atomic_write, directory_lock, file_digest, is_vacant
from zebra.train.processes import is_first_process, sequences_per_step
from zebra.train.recipe import Recipe
from zebra.train.recipe_file import named_files, parse_yaml

COMPLETE = "COMPLETE"
"""The file, written last, that marks a checkpoint as complete."""
_SEQUENCES = "sequences of a step"
_SHARES_OF_A_STEP = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
_WITHOUT_EFFECT = {
    *("run", "data.num_proc", "data.cache_dir"),
    *(f"train.{name}" for name in ("activation_checkpointing", "save_steps", "save_total_limit")),
}
"""Keys that do not change the results."""
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")


@contextmanager
def locked_run(recipe: Recipe) -> Iterator[Path]:
    """Lock the run's directory; of several training processes the first locks it for all.

    Raises:
        ZebraError: the directory belongs to another recipe or to no run; another process works in it.
    """
    run = Path(recipe.run)
    check_recipe(run, recipe, may_be_longer=True)
    with directory_lock(run) if is_first_process() else nullcontext():
        check_recipe(run, recipe, may_be_longer=True)  # another process may have been here first
        yield run


def has_trained(run: Path) -> bool:
    """Whether a run has a complete checkpoint, or the files that are written after the last one."""
    return any((run / name).exists() for name in ("model", "results.jsonl")) or any(
        run.glob(f"checkpoints/checkpoint-*/{COMPLETE}")
    )


def inputs_of(recipe: Recipe, digests: dict[str, object], *, finished: bool) -> dict[str, object]:
    """What a run's results depend on: digests of its start and of its files, and the number of sequences in a step.

    A finished run may have lost its files, and any number of processes may read it again.

    Raises:
        ZebraError: files that do not exist.
    """
    inputs = dict(digests)
    try:
        inputs["files"] = digests_of_files(recipe.model_dump())
    except ZebraError:
        if not finished:
            raise
    return inputs if finished else inputs | {_SEQUENCES: sequences_per_step(recipe)}


def digests_of_files(tree: dict[str, Any]) -> dict[str, str]:
    """The digest of each file that a recipe's section names.

    Raises:
        ZebraError: files that do not exist.
    """
    return {str(file): file_digest(file) for file in find_files(named_files(tree))}


def record_inputs(run: Path, recipe: Recipe, inputs: dict[str, Any]) -> None:
    """Write the recipe and its inputs; remove results of an earlier start with other ones."""
    texts = {
        "recipe.yaml": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        "inputs.json": json.dumps(inputs, indent=2) + "\n",
    }
    written = {name: (run / name).read_bytes() for name in texts if (run / name).exists()}
    if not has_trained(run) and any(text != texts[name].encode() for name, text in written.items()):
        (run / "before.jsonl").unlink(missing_ok=True)
    for name, text in texts.items():
        atomic_write(run / name, text)


def reopen(run: Path) -> None:
    """Prepare a finished run for more steps: remove its results, its report and its model.

    Raises:
        ZebraError: there is no complete checkpoint of its last step.
    """
    model, removed = run / "model", run / ".model.removed"
    if model.exists():
        steps = _first_recipe(run)["train"]["max_steps"]
        if not (run / "checkpoints" / f"checkpoint-{steps}" / COMPLETE).exists():
            raise ZebraError(
                f"more steps of {run} require its checkpoint of step {steps}, which is missing. "
                f"Start another run with {model} as its model."
            )
    for name in ("results.jsonl", "report.html", "model.json"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(removed, ignore_errors=True)
    if model.exists():
        os.replace(model, removed)
        shutil.rmtree(removed)


def is_longer(run: Path, recipe: Recipe) -> bool:
    """Whether a recipe has more steps than the one with which the run began."""
    return has_trained(run) and _first_recipe(run)["train"]["max_steps"] < recipe.train.max_steps


def _first_recipe(run: Path) -> Any:
    return parse_yaml((run / "recipe.yaml").read_text(encoding="utf-8"))


def record_export(run: Path) -> None:
    """Write `run/model.json`, the digest of each file of the trained checkpoint, unless it exists."""
    if not (run / "model.json").exists():  # it is missing too if a kill came between model/ and it
        atomic_write(run / "model.json", json.dumps(_export_digests(run), indent=2) + "\n")


def check_export(run: Path) -> None:
    """Check that the trained checkpoint, if there is one, is unchanged since the training wrote it.

    Raises:
        ZebraError: a file that is missing, added or changed.
    """
    file = run / "model.json"
    if not (run / "model").exists() or not file.exists():
        return
    written, present = json.loads(file.read_text(encoding="utf-8")), _export_digests(run)
    changed = sorted(name for name in {*written, *present} if written.get(name) != present.get(name))
    if changed:
        raise ZebraError(
            f"{run / 'model'} is not what this run wrote: {', '.join(changed)} changed since. Remove that folder and "
            "results.jsonl to write it again, or move it elsewhere."
        )


def _export_digests(run: Path) -> dict[str, str]:
    files = sorted(file for file in (run / "model").rglob("*") if file.is_file() and file.suffix != ".md")
    return {str(file.relative_to(run / "model")): file_digest(file) for file in files}


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn the errors of a full disk, also those of torch and safetensors, into one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_save = any(code.co_name == "save" and code.co_filename == torch.serialization.__file__ for code in frames)
        if not is_full and not in_save and "I/O error" not in str(error):
            raise
        raise ZebraError(
            f"{run} cannot be written; is the disk full? ({first_line(error)}) Free some space and run the same "
            "command again: it continues from the last complete checkpoint."
        ) from None


def check_recipe(run: Path, recipe: Recipe, *, may_be_longer: bool = False) -> None:
    """Check that a directory is absent, belongs to this recipe, or has no complete checkpoint yet.

    Args:
        may_be_longer: accept a recipe with more steps, if they continue the same training.

    Raises:
        ZebraError: a directory of another recipe, or of no run; a damaged recipe.
    """
    file = run / "recipe.yaml"
    if file.exists():
        if (run / "inputs.json").exists() and not has_trained(run):
            return
        try:
            first = type(recipe).model_validate(_first_recipe(run))
        except (yaml.YAMLError, ValueError):
            raise ZebraError(f"{file} is damaged: it is not a recipe. Name another run, or remove {run}.") from None
        different = differing_keys(recipe, first)
        if _sequences_recorded(run) == sequences_per_step(recipe):  # the same steps, by other processes
            different = [name for name in different if name not in _SHARES_OF_A_STEP]
        if may_be_longer and different == ["train.max_steps"] and recipe.train.max_steps > first.train.max_steps:
            _check_longer(run, recipe)
        elif different:
            raise ZebraError(
                f"{run} holds a run of another recipe: {', '.join(different)} differ. "
                "Name another run, or remove the directory."
            )
    elif not is_vacant(run):
        raise ZebraError(f"{run} exists but is not a run of zebra: it has no recipe.yaml. Name another run.")


def _sequences_recorded(run: Path) -> int | None:
    try:
        return json.loads((run / "inputs.json").read_text(encoding="utf-8")).get(_SEQUENCES)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # then only the recipe is compared


def _check_longer(run: Path, recipe: Recipe) -> None:
    """Check that more steps continue the same training: no step may depend on how many follow."""
    schedule, data = recipe.train.lr_scheduler_type, getattr(recipe, "data", None)
    drawn = [f"data.{name}" for name in ("sources", "recall") if getattr(data, name, None) is not None]
    if schedule not in _SCHEDULES_WITHOUT_END:
        reason = f"with train.lr_scheduler_type {schedule} the learning rate depends on the number of steps"
    elif drawn:
        reason = f"{' and '.join(drawn)} are drawn for a fixed number of steps"
    else:
        return
    model = run / "model"
    raise ZebraError(
        f"{run} holds a run of fewer steps, whose train.max_steps cannot be raised: {reason}. "
        f"Name another run{f', with {model} as its model' if model.exists() else ''}."
    )


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """The keys in which two recipes differ, without those that do not change the results."""
    items = flatten(one.model_dump()).items() ^ flatten(other.model_dump()).items()
    changed = {name for name, _ in items if not name.startswith("parallel.")}
    return sorted(changed - _WITHOUT_EFFECT)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe's values as text, by the path of their keys, such as `train.max_steps`."""
    values: dict[str, str] = {}
    for name, value in tree.items():
        values |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return values

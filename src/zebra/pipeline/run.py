"""A pipeline: stages in their order, each performed once, and again when its inputs have changed.

    <run>/<stage>/        what the stage wrote: a checkpoint, results.jsonl, report.html
    <run>/<stage>.json    its inputs: its section of the recipe, digests of its checkpoint and its files, zebra's
                          version; and whether it is done

A finished stage with the same inputs is skipped. One that was killed goes on where its verb can. One whose inputs
changed begins anew, in an empty folder; its earlier folder is renamed to <run>/<stage>.1, .2, ...
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zebra.data.documents import find_files
from zebra.errors import ZebraError
from zebra.files import atomic_write, directory_lock
from zebra.model.checkpoint import checkpoint_digest, read_local_attention
from zebra.pipeline.recipe import Stage
from zebra.pipeline.stages import check, perform
from zebra.progress import console
from zebra.provenance import versions
from zebra.train.directory import flatten
from zebra.train.recipe import named_files

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


@dataclass(frozen=True)
class StageState:
    """A stage, why it runs (None: it was done), and the seconds that it took."""

    stage: Stage
    why: str | None
    seconds: float | None = None

    def columns(self) -> dict[str, Any]:
        """What is printed of it."""
        stage = self.stage
        return {
            "stage": stage.name,
            "kind": stage.kind,
            "from": stage.after or (stage.source.name if stage.source else ""),
            "state": self.why or "done already",
            "seconds": self.seconds,
            "folder": str(stage.folder),
        }


def plan(stages: Sequence[Stage]) -> list[StageState]:
    """Which stages would run; each of those is checked, on placeholders of checkpoints that do not exist yet.

    Raises:
        ZebraError: as `check`, and a folder or a record that is not a pipeline's.
    """
    states: dict[str, StageState] = {}
    with TemporaryDirectory() as folder:
        for stage in stages:
            with _naming(stage, folder):
                began = _read_record(stage)
                waits = [name for name in (stage.after, *stage.before) if name and states[name].why is not None]
                why = f"after {waits[0]}" if waits else _why(stage, began, inputs_of(stage))
                if why is not None:
                    before = states[stage.after] if stage.after else None
                    source = _placeholder(before.stage, folder) if before and before.why else stage.source
                    check(stage, source, _placeholder(stage, folder))
                states[stage.name] = StageState(stage, why)
    return list(states.values())


def _placeholder(stage: Stage, folder: str) -> Path:
    """Where in a temporary folder the placeholder of a stage's checkpoint is."""
    return Path(folder, stage.name, stage.checkpoint.name if stage.checkpoint else "")


def run(stages: Sequence[Stage]) -> list[StageState]:
    """Go through a pipeline from where it stands.

    Raises:
        ZebraError: as `plan`; what a stage rejects while it works; another process at work.
    """
    plan(stages)
    states = []
    with directory_lock(stages[0].folder.parent):
        for at, stage in enumerate(stages, start=1):
            with _naming(stage):
                start, inputs = time.perf_counter(), inputs_of(stage)
                why = _why(stage, _read_record(stage), inputs)
                console.print(f"{at} of {len(stages)}, {stage.name}: {why or 'done already'}", soft_wrap=True)
                if why is not None:
                    _begin(stage, inputs, why)
                    perform(stage)
                    gc.collect()  # the Trainer's cycles hold its model, whose memory the next stage needs
                    _write_record(stage, inputs, done=True)
            states.append(StageState(stage, why, time.perf_counter() - start))
    return states


@contextmanager
def _naming(stage: Stage, folder: str | None = None) -> Iterator[None]:
    """Errors name the stage, and the checkpoint that a placeholder in `folder` stands for."""
    try:
        with warnings.catch_warnings(action="ignore") if folder else nullcontext():
            yield
    except ZebraError as error:
        text = str(error).replace(f"{folder}/", f"{stage.folder.parent}/") if folder else str(error)
        raise ZebraError(f"stage {stage.name}: {text}") from None


# What a stage depends on


def inputs_of(stage: Stage) -> dict[str, str]:
    """All that a stage's results depend on: names to values, or to digests; where the pipeline lies is not among them.

    Raises:
        ZebraError: files that do not exist.
    """
    section = stage.recipe.model_dump(mode="json", exclude={"run"} | ({"model"} if stage.source else set()))
    inputs = {"zebra": versions().get("zebra", ""), "kind": stage.kind} | flatten(section)
    inputs |= {str(file): _digest(file) for file in find_files(named_files(section))}
    inputs |= {f"the results of {name}": _digest(folder / "results.jsonl") for name, folder in stage.before.items()}
    return inputs | ({"its checkpoint": digest_of(stage.source)} if stage.source else {})


def digest_of(checkpoint: Path) -> str:
    """A digest of a checkpoint: its weights by samples, its other files whole, of zebra.json what it adds to them."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.is_file()]
    whole = [file for file in files if file.name != "zebra.json" and not file.name.endswith(_WEIGHTS)]
    parts = [checkpoint_digest(checkpoint), repr(read_local_attention(checkpoint))]
    parts += [f"{file.name} {_digest(file)}" for file in whole]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# The record next to a stage


def _record(stage: Stage) -> Path:
    return stage.folder.with_name(f"{stage.name}.json")


def _read_record(stage: Stage) -> dict[str, Any] | None:
    """A stage's inputs when it began and whether it is done; None where it never began.

    Raises:
        ZebraError: a folder without a record; a damaged record.
    """
    record, folder = _record(stage), stage.folder
    if not record.exists():
        if folder.exists():
            raise ZebraError(f"{folder} exists without its record {record}. Move it away to begin the stage anew.")
        return None
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        return {"inputs": dict(tree["inputs"]), "done": bool(tree["done"])}
    except (ValueError, TypeError, KeyError):
        raise ZebraError(f"{record} is damaged. Move it and {folder} away to begin the stage anew.") from None


def _why(stage: Stage, began: dict[str, Any] | None, inputs: dict[str, str]) -> str | None:
    """Why a stage runs; None where it is done."""
    if began is None:
        return "new"
    before = began["inputs"]
    changed = sorted(name for name in {*inputs, *before} if inputs.get(name) != before.get(name))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{', '.join(changed[:3])}{more} changed"
    if not began["done"]:
        return "begun"
    outputs = stage.checkpoint or stage.folder
    return None if outputs.exists() else "gone"


def _begin(stage: Stage, inputs: dict[str, str], why: str) -> None:
    """Record a stage's inputs; what was written from other inputs is renamed."""
    if why != "begun" and stage.folder.exists():
        aside = next(n for n in itertools.count(1) if not stage.folder.with_name(f"{stage.name}.{n}").exists())
        console.print(f"the earlier {stage.name} is now {stage.folder}.{aside}", soft_wrap=True)
        stage.folder.rename(stage.folder.with_name(f"{stage.name}.{aside}"))
    _write_record(stage, inputs, done=False)


def _write_record(stage: Stage, inputs: dict[str, str], *, done: bool) -> None:
    atomic_write(_record(stage), json.dumps({"inputs": inputs, "done": done}, indent=2) + "\n")

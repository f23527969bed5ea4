"""A pipeline: stages in their order, each done once, and done again when what it depends on has changed.

    <run>/<stage>/        what the stage made: a checkpoint, results.jsonl, report.html
    <run>/<stage>.json    what it depends on, by content: its section, its checkpoint, its files, zebra's version; and
                          what it made. Written when the stage begins, and again, with what it made, when it is done

A stage whose record is as things are is skipped. One that was begun goes on where its verb can. One whose inputs
changed begins anew, in an empty folder: what it had made is kept beside it as <run>/<stage>.1, .2, ...
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zebra.data.documents import find_files
from zebra.errors import ZebraError
from zebra.files import atomic_write, directory_lock
from zebra.model.checkpoint import checkpoint_digest, read_local_attention
from zebra.pipeline.recipe import Stage
from zebra.pipeline.stages import perform, rehearse
from zebra.progress import console
from zebra.provenance import versions
from zebra.train.directory import flat

# What a stage depends on, and what it made

_FILES = ("files", "leaks", "text", "haystack", "file", "include")
_PERHAPS = ("tokenizer", "chat_template")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def inputs_of(stage: Stage) -> dict[str, str]:
    """All that a stage's results depend on, name to value or content hash; where things lie is no matter of content.

    Raises:
        ZebraError: files that are not there.
    """
    given = stage.recipe.model_dump(mode="json", exclude={"run"} | ({"model"} if stage.source else set()))
    found = {"zebra": versions().get("zebra", ""), "kind": stage.kind} | flat(given)
    found |= {str(file): _hash(file) for file in find_files(list(_patterns(given)))}
    found |= {f"the rows of {name}": _hash(folder / "results.jsonl") for name, folder in stage.before.items()}
    return found | ({"its checkpoint": content(stage.source)} if stage.source else {})


def _patterns(tree: Any, key: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from _patterns(inner, name)
    elif isinstance(tree, list | tuple):
        for inner in tree:
            yield from _patterns(inner, key)
    elif isinstance(tree, str) and (key in _FILES or (key in _PERHAPS and Path(tree).exists())):
        yield tree


def content(checkpoint: Path) -> str:
    """A hash of a checkpoint: its weights by samples (`checkpoint_digest`), its other files whole,
    and of zebra.json what it adds.
    """
    if not checkpoint.is_dir():
        return ""
    found, whole = hashlib.sha256(), (checkpoint / "config.json").is_file()  # an adapter has none
    if whole:
        found.update(f"{checkpoint_digest(checkpoint)} {read_local_attention(checkpoint)!r}".encode())
    for file in sorted(file for file in checkpoint.iterdir() if file.is_file()):
        if file.name not in ("config.json", "zebra.json") and not (whole and file.name.endswith(_WEIGHTS)):
            found.update(f"{file.name} {_hash(file)}".encode())
    return found.hexdigest()


def _hash(file: Path) -> str:
    if not file.is_file():
        return ""
    at = file.stat()
    return _hashed(file, at.st_mtime_ns, at.st_size)


@functools.cache
def _hashed(file: Path, *unchanged: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _made(stage: Stage) -> dict[str, str]:
    page = {"page": _hash(stage.folder / "report.html")} if stage.kind == "report" else {}
    made = {"checkpoint": content(stage.made)} if stage.made else {}
    return made | page | {"rows": _hash(stage.folder / "results.jsonl")}


# The record beside a stage


def _record_of(stage: Stage) -> Path:
    return stage.folder.with_name(f"{stage.name}.json")


def _kept(stage: Stage) -> tuple[dict[str, str], dict[str, str] | None] | None:
    """What a stage's record says that it depends on, and what it made, if it is done; None where it never began.

    Raises:
        ZebraError: a folder that no record is of; a damaged record.
    """
    record, folder = _record_of(stage), stage.folder
    if not record.exists():
        if folder.exists():
            raise ZebraError(f"{folder} exists, and {record}, which would say what of, does not. Move it away.")
        return None
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        made = kept["made"]
        return dict(kept["inputs"]), None if made is None else dict(made)
    except (ValueError, TypeError, KeyError):
        raise ZebraError(f"{record} is damaged. Move it and {folder} away to begin the stage anew.") from None


def _why(stage: Stage, inputs: dict[str, str]) -> str | None:
    """Why a stage is to be run; None where it is done.

    Raises:
        ZebraError: what `_kept` refuses; a folder that was changed since the stage was done.
    """
    kept = _kept(stage)
    if kept is None:
        return "new"
    theirs, made = kept
    changed = sorted(name for name in {*inputs, *theirs} if inputs.get(name) != theirs.get(name))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"{', '.join(changed[:3])}{more} changed"
    if made is None or not stage.folder.exists():
        return "begun" if made is None else "gone"
    if changed := sorted(name for name, found in _made(stage).items() if found != made.get(name)):
        said = ", ".join(changed)
        raise ZebraError(f"{stage.folder} was changed since it was done: {said}. Put it back, or move it away.")
    return None


def _begin(stage: Stage, inputs: dict[str, str], why: str) -> None:
    """Write down what a stage depends on; what was made of other inputs is kept beside it."""
    if why != "begun" and stage.folder.exists():
        aside = next(n for n in itertools.count(1) if not stage.folder.with_name(f"{stage.name}.{n}").exists())
        console.print(f"what {stage.name} had made is kept in {stage.folder}.{aside}", soft_wrap=True)
        stage.folder.rename(stage.folder.with_name(f"{stage.name}.{aside}"))
    _write(stage, inputs, None)


def _write(stage: Stage, inputs: dict[str, str], made: dict[str, str] | None, seconds: float = 0.0) -> None:
    record = {"inputs": inputs, "made": made, "seconds": round(seconds, 1)}
    atomic_write(_record_of(stage), json.dumps(record, indent=2) + "\n")


# Going through


@dataclass(frozen=True)
class StageState:
    """A stage, why it runs (None: it was done), and the seconds that it took."""

    stage: Stage
    why: str | None
    seconds: float | None = None

    def columns(self) -> dict[str, Any]:
        """What is printed of it."""
        stage = self.stage
        source = stage.after or (stage.source.name if stage.source else "")
        return {
            "stage": stage.name,
            "kind": stage.kind,
            "from": source,
            "state": self.why or "done already",
            "seconds": self.seconds,
            "folder": str(stage.folder),
        }


def plan(stages: Sequence[Stage]) -> list[StageState]:
    """What a pipeline would do, and refuses whatever of its stages can be refused before any of them works."""
    found: dict[str, StageState] = {}
    with TemporaryDirectory() as folder:
        for stage in stages:
            with _of(stage, folder):
                waits = [name for name in (stage.after, *stage.before) if name and found[name].why is not None]
                _kept(stage)  # refused now, not behind the stages before it
                inputs = inputs_of(replace(stage, source=None) if waits else stage)  # a checkpoint that will be anew
                why = f"after {waits[0]}" if waits else _why(stage, inputs)
                before = found[stage.after] if stage.after else None
                source = _stand_in(folder, before.stage) if before and before.why is not None else stage.source
                if why is not None:
                    rehearse(stage, source, _stand_in(folder, stage))
                found[stage.name] = StageState(stage, why)
    return list(found.values())


def _stand_in(folder: str, stage: Stage) -> Path:
    """Where the stand-in of its checkpoint stands."""
    return Path(folder, stage.name, stage.made.name if stage.made else "")


@contextmanager
def _of(stage: Stage, folder: str | None = None) -> Iterator[None]:
    """Refusals of a stage, with its name, and with the name of the checkpoint that a stand-in stands for."""
    try:
        with warnings.catch_warnings(action="ignore") if folder else nullcontext():
            yield
    except ZebraError as refusal:
        said = str(refusal).replace(f"{folder}/", f"{stage.folder.parent}/")
        raise ZebraError(f"stage {stage.name}: {said}") from None


def run(stages: Sequence[Stage]) -> list[StageState]:
    """Go through a pipeline from where it stands.

    Raises:
        ZebraError: what `plan` refuses; what a stage refuses while it works; another process at work.
    """
    plan(stages)
    found = []
    with directory_lock(stages[0].folder.parent):
        for at, stage in enumerate(stages, start=1):
            with _of(stage):
                start, inputs = time.perf_counter(), inputs_of(stage)
                why = _why(stage, inputs)
                console.print(f"{at} of {len(stages)}, {stage.name}: {why or 'done already'}", soft_wrap=True)
                if why is not None:
                    _begin(stage, inputs, why)
                    perform(stage)
                    gc.collect()  # the Trainer's rings hold its model, where the next one wants the memory
                    _write(stage, inputs, _made(stage), time.perf_counter() - start)
            found.append(StageState(stage, why, time.perf_counter() - start))
    return found

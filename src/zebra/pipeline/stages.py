"""What a stage of a pipeline does: run, and tried beforehand.

A stage is tried on a stand-in of the checkpoint that does not exist yet: the source's files, linked, under the config
that the stages before it would write. What a verb refuses of configs, tokenizers and data, it refuses there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zebra.data.conversations import read_conversations
from zebra.errors import ZebraError
from zebra.evaluate import documents
from zebra.evaluate.selection import select
from zebra.model.checkpoint import read_config, read_local_attention, write_config, write_zebra_json
from zebra.model.families import stripes_of, with_stripes
from zebra.model.load import convert, converted_config
from zebra.model.local import LocalAttention
from zebra.pipeline.recipe import MEASURES, Convert, Stage
from zebra.plan.cost import Run, flops
from zebra.plan.decoder import decoder
from zebra.plan.devices import Device
from zebra.plan.memory import memory
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes
from zebra.train.adapt import adapt, adapted, open_source
from zebra.train.chat import Chat
from zebra.train.dry_run import dry_run
from zebra.train.measuring import local_for
from zebra.train.pretrain import config_of, pretrain
from zebra.train.recipe import Section, SourceRecipe
from zebra.train.trainer import check_machine
from zebra.train.tune_recipe import TuneRecipe


def perform(stage: Stage) -> None:
    """Run a stage from where it stands."""
    _PERFORM[stage.kind](stage)


def _convert(stage: Stage) -> None:
    recipe, stripes, made = stage.recipe, stage.recipe.stripes, stage.made
    assert stage.source is not None
    assert made is not None
    if recipe.select is not None:
        found = select(stage.source, **_selected(recipe), work=stage.folder / "selection", run=stage.name)
        write_results(stage.folder / "results.jsonl", found.rows)
        stripes = found.stripes
    if not made.exists():  # a kill may have come behind it
        convert(stage.source, made, stripes, rope=recipe.rope, full_decode=recipe.full_decode)


def _selected(recipe: Convert) -> dict[str, Any]:
    assert recipe.select is not None
    return recipe.select.model_dump() | {"rope": recipe.rope}


def _train(stage: Stage) -> None:
    """Run a training's recipe, and write its page."""
    if stage.kind == "tune":
        from zebra.train.tune import tune  # trl is an extra

        tune(stage.recipe)
    elif stage.kind == "adapt":
        adapt(stage.recipe)
    else:
        pretrain(stage.recipe)
    write_report(rows_in(stage.folder), stage.folder / "report.html")


def _evaluate(stage: Stage) -> None:
    rows: list[Result] = []
    assert stage.source is not None
    for name, given in stage.recipe:
        file = stage.folder / f"{name}.jsonl"
        if given is not None and not file.exists():
            write_results(file, _measured(name, given, stage.source, run=stage.name)[0])
        rows += read_results(file) if given is not None else []
    write_results(stage.folder / "results.jsonl", rows)


def _measured(name: str, given: Section, checkpoint: Path, **more: Any) -> tuple[list[Result], list[Any]]:
    """Rows, and of documents what came of each item."""
    arguments = given.model_dump() | more
    if name != "documents":
        return MEASURES[name](checkpoint, **arguments), []
    own = {field.name: arguments.pop(field.name) for field in fields(documents.Options)}
    return documents.evaluate_documents(checkpoint, **arguments, options=documents.Options(**own))


def _report(stage: Stage) -> None:
    rows = [row for folder in stage.before.values() for row in rows_in(folder)]
    write_report(rows, stage.folder / "report.html", title=stage.recipe.title)


def rows_in(folder: Path) -> list[Result]:
    """The rows that a stage left; none where it made none."""
    file = folder / "results.jsonl"
    return read_results(file) if file.exists() else []


_PERFORM = {
    "convert": _convert,
    "adapt": _train,
    "tune": _train,
    "pretrain": _train,
    "evaluate": _evaluate,
    "report": _report,
}

# Trying beforehand


@dataclass(frozen=True)
class Work:
    """What a stage will compute: runs of the planner and how often each, the tokens, and the bytes on one device.

    Of a training they are its steps, of a measurement its reading; what is measured on a training's way is not in it.
    """

    runs: tuple[tuple[Run, float], ...] = ()
    tokens: int = 0
    memory: int = 0
    facts: dict[str, str] | None = None

    def cost(self, device: Device) -> tuple[float, float]:
        """FLOPs, and the least seconds that a device takes for them."""
        runs = [(run if run.dtype in device.flops else replace(run, dtype="float32"), n) for run, n in self.runs]
        count = sum(n * sum(flops(run).values()) for run, n in runs)
        return count, sum(n * sum(device.seconds(run).values()) for run, n in runs)


def rehearse(stage: Stage, source: Path | None, made: Path) -> Work:
    """Try a stage on a checkpoint or its stand-in, write a stand-in for what it would make, and say what it costs.

    Raises:
        ZebraError: what the stage itself would refuse before it works, but of texts to train on only that they exist.
    """
    if stage.kind == "report":
        return Work()
    if stage.kind not in ("evaluate", "convert"):
        return _rehearse_training(stage, source, made)
    assert source is not None
    if stage.kind == "evaluate":
        return _rehearse_evaluation(stage, source)
    return _rehearse_conversion(stage, source, made)


def _rehearse_conversion(stage: Stage, source: Path, made: Path) -> Work:
    recipe = stage.recipe
    if (recipe.stripes is None) == (recipe.select is None):
        raise ZebraError("a conversion takes either stripes or select. Give one of them, such as stripes: GLLL:512.")
    work, stripes = Work(), Stripes.parse(recipe.stripes or f"0:{recipe.select.window}")
    if recipe.select is not None and _has_tokenizer(source):
        found = select(source, **_selected(recipe), check_only=True)
        stripes, work = found.stripes, _reading(source, None, [(row.length, row.value) for row in found.rows])
    config, local = converted_config(source, stripes, recipe.rope, recipe.full_decode)
    _stand_in(source, made, config, local)
    return work


def _rehearse_training(stage: Stage, source: Path | None, made: Path) -> Work:
    recipe, files = stage.recipe, {}
    if not isinstance(recipe, SourceRecipe):
        check_machine(recipe.train)
        config = config_of(recipe)
    else:
        assert source is not None
        recipe = recipe.model_copy(update={"model": str(source)})
        if _has_tokenizer(source):
            config, tokenizer = open_source(recipe)
            files = _read_for_tuning(recipe, tokenizer) if isinstance(recipe, TuneRecipe) else {}
        else:
            config = adapted(recipe, read_config(source))
    local, train, reckoned = local_for(recipe), recipe.train, dry_run(recipe)
    low = recipe.lora if isinstance(recipe, SourceRecipe) else None
    if low is not None and not low.merge:  # what it makes is no whole checkpoint
        _stand_in(None, made, None, local, {"adapter_config.json": ""})
    else:
        _stand_in(source, made, config, local, files)
    run = {
        "length": train.length,
        "batch": train.per_device_train_batch_size,
        "dtype": train.compute_dtype,
        "phase": "train",
    }
    run |= {"checkpointing": train.gradient_checkpointing, "lora": low.r if low else None}
    passes = train.max_steps * train.gradient_accumulation_steps
    runs = _runs(config, local, [(run, passes)])
    return Work(runs, passes * train.per_device_train_batch_size * train.length, reckoned.total, reckoned.facts)


def _has_tokenizer(checkpoint: Path) -> bool:
    """A stand-in for a model that is trained from scratch has neither tokenizer nor weights."""
    return any(checkpoint.glob("tokenizer*"))


def _read_for_tuning(recipe: TuneRecipe, tokenizer: Any) -> dict[str, str]:
    """Read the conversations, and return the template that tuning will write."""
    import zebra.train.tune  # noqa: F401  refuses where the extra is not installed

    chat = Chat(tokenizer, recipe.chat_template, recipe.model)
    data, suites = recipe.data, (recipe.evaluate and recipe.evaluate.suites) or []
    sets = [data.files or [], *(one.files for one in data.sources or []), *(suite.files for suite in suites)]
    for files in filter(None, sets):
        read_conversations(files)
    return {"chat_template.jinja": chat.template} if recipe.chat_template else {}


def _rehearse_evaluation(stage: Stage, source: Path) -> Work:
    given = [(name, one) for name, one in stage.recipe if one is not None]
    if not given:
        raise ZebraError(f"an evaluation takes at least one of {', '.join(MEASURES)}; got none. Give one.")
    if not _has_tokenizer(source):
        return Work()
    works = []
    for name, one in given:
        rows, outcomes = _measured(name, one, source, check_only=True)
        reads = [(row.length, row.value) for row in rows if row.metric == "tokens"]
        reads += [(outcome.prompt_tokens, outcome.prompt_tokens) for outcome in outcomes]
        works.append(_reading(source, one.stripes, reads))
    runs = tuple(run for work in works for run in work.runs)
    return Work(runs, sum(work.tokens for work in works), max(work.memory for work in works))


def _reading(source: Path, stripes: str | None, reads: list[tuple[int | None, float]]) -> Work:
    """Texts to read: the tokens of each, and of all together of its length."""
    config = read_config(source, routed=stripes is not None)
    config = with_stripes(config, Stripes.parse(stripes)) if stripes else config
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    asked = [({"length": max(1, n or 1), "dtype": dtype}, tokens / max(1, n or 1)) for n, tokens in reads]
    runs = _runs(config, read_local_attention(source), asked)
    held = max((sum(memory(run).values()) for run, _ in runs), default=0)
    return Work(runs, round(sum(tokens for _, tokens in reads)), held)


def _runs(
    config: Any, local: LocalAttention, asked: list[tuple[dict[str, Any], float]]
) -> tuple[tuple[Run, float], ...]:
    """Runs of the planner; none for a model that it cannot reckon."""
    with suppress(ZebraError):
        stripes, sizes = stripes_of(config), decoder(config.to_dict(), name="the model")
        stripes = stripes and replace(stripes, sinks=local.sinks)
        return tuple((Run(decoder=sizes, stripes=stripes, **run), times) for run, times in asked)
    return ()


def _stand_in(
    source: Path | None, made: Path, config: Any, local: LocalAttention, files: dict[str, str] | None = None
) -> None:
    made.mkdir(parents=True)
    own = {"config.json", "zebra.json", *(files or {})}
    for file in source.iterdir() if source is not None else ():
        if file.name not in own:
            (made / file.name).symlink_to(file.resolve())
    for name, text in (files or {}).items():
        (made / name).write_text(text, encoding="utf-8")
    if config is not None:
        write_config(config, made)
        write_zebra_json(made, config, local, source=source)

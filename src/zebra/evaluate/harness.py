"""Tasks of EleutherAI's lm-evaluation-harness: its own by name, yours from YAML files, and our retrieval tasks.

    name ─► TaskManager ─► tasks ─► requests ─► HFLM(pretrained=model) ─► evaluate ─► results

The model is that of `zebra.load`, with its stripes, Self-Extend and bounded cache. Nothing is downloaded: missing data
are an error. Only this module and `zebra.evaluate.harness_model` import lm-eval, which the extra `tasks` installs.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from zebra.data.documents import Names, names_of
from zebra.data.encoding import prompt_tokens
from zebra.errors import ZebraError, missing_package
from zebra.evaluate.harness_model import language_model, render_chat
from zebra.evaluate.harness_retrieval import PREFIX, check_retrieval_task, configuration, retrieval_tasks
from zebra.evaluate.intervals import wilson
from zebra.evaluate.lm_eval_compat import isolated, task_errors
from zebra.evaluate.target import EvalTarget
from zebra.model.finite import checking_logits
from zebra.model.local import local_attention_of
from zebra.provenance import versions
from zebra.results import Result

_BERNOULLI_METRICS = ("acc", "acc_norm", "accuracy", "exact_match", "em")
"""Metrics that are 0 or 1 for each item, so that Wilson's interval applies to their mean."""
_MAX_NEW_TOKENS = 256
"""Tokens that the harness generates if a task does not say how many."""

Tasks = dict[str, dict[str, Any]]
"""Tasks and groups by name, as `TaskManager.load` returns them."""


def evaluate_tasks(
    checkpoint: str | os.PathLike[str],
    *,
    tasks: Names,
    lengths: Sequence[int] = (),
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    include: str | os.PathLike[str] | None = None,
    cut: bool = False,
    beyond: bool = False,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> list[Result]:
    """Load tasks, then a checkpoint, and measure.

    The length of a result is the requested one if the task takes lengths. Otherwise it is the number of tokens of the
    longest request with its answer.

    Args:
        tasks: names of the harness's tasks, groups and tags, paths of YAML files, or names of `retrieval_tasks`.
        lengths: for tasks that make texts of a length: ours, and those of the harness that read `max_seq_lengths`.
        shots: few-shot examples before each question; None, and a task that sets 0, keep the task's own number.
        limit: use only the first items of each task.
        batch_size: requests that run at once.
        chat: put requests into the tokenizer's chat template.
        include: a folder with YAML tasks.
        cut: let the harness cut the beginnings of requests that are too long for the model.
        beyond: run such requests whole, with a warning.
        check_only: load no model; the results are the numbers of tokens that it would read.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: as `EvalTarget`; lm-eval is not installed; an unknown task, missing data or packages of a task;
            requests beyond the model's context length without `cut` or `beyond`.
    """
    _check(cut, beyond, batch_size, limit, shots)
    target = EvalTarget(checkpoint, **loading)
    if chat and not target.tokenizer.chat_template:
        raise ZebraError("this checkpoint's tokenizer has no chat template. Leave chat out.")
    with isolated():
        loaded = _load(target, names_of(tasks), lengths, include, limit, seed)
        sizes = {
            length: {
                name: _prepare(task, target.tokenizer, shots, limit, chat, seed) for name, task in some["tasks"].items()
            }
            for length, some in loaded.items()
        }
        max_length = _max_length(target, sizes, cut, beyond)
        if check_only:
            columns = {"run": run, "metric": "tokens"} | target.columns()
            return [
                Result(task=f"harness-{name}", value=sum(its), length=max(its), **columns)
                for of_length in sizes.values()
                for name, its in of_length.items()
            ]
        model = target.load()
        if local_attention_of(model).full_decode:
            warnings.warn(
                "full decoding affects only generated tokens: for tasks scored by likelihood, the harness reads "
                "requests in one pass, and local layers keep their window.",
                stacklevel=2,
            )
        lm = language_model(model, target.tokenizer, max_length, batch_size)
        columns = {"run": run, "seed": seed} | target.columns(model)
        results: list[Result] = []
        for length, some in loaded.items():
            with task_errors(" and ".join(some["tasks"])), checking_logits(model):
                measured = _measured(lm, some, limit, chat)
            for name in dict.fromkeys([*measured.get("groups", {}), *measured["results"]]):
                results += _results(name, measured, length, sizes[length].get(name), columns)
        return results


def _check(cut: bool, beyond: bool, batch_size: int, limit: int | None, shots: int | None) -> None:
    """Check what needs no checkpoint: the options, and that lm-eval is installed."""
    if cut and beyond:
        raise ZebraError(
            "requests that are too long are either cut (--cut) or run whole (--beyond); got both. Choose one."
        )
    if min(batch_size, 1 if limit is None else limit, 1 if shots is None else shots + 1) < 1:
        raise ZebraError(
            f"batch_size and limit must be at least 1, and shots at least 0; got batch_size={batch_size}, "
            f"limit={limit} and shots={shots}. Raise them."
        )
    try:
        importlib.import_module("lm_eval")
    except ImportError:
        raise missing_package("a task of lm-eval", "lm-eval", "tasks") from None


def _measured(lm: Any, tasks: Tasks, limit: int | None, chat: bool) -> dict[str, Any]:
    """Run tasks; returns the results as the harness returns them."""
    import lm_eval

    return lm_eval.evaluate(
        lm=lm,
        task_dict=tasks,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


# Tasks


def _load(
    target: EvalTarget,
    names: Sequence[str],
    lengths: Sequence[int],
    include: str | os.PathLike[str] | None,
    limit: int | None,
    seed: int,
) -> dict[int | None, Tasks]:
    """Load tasks, by length; those that take no length are under None."""
    if include is not None and not os.path.isdir(include):
        raise ZebraError(f"there is no folder at {include}. Give a folder with YAML tasks.")
    names, lengths = list(dict.fromkeys(names)), sorted(set(lengths))
    of_harness = [name for name in names if not name.startswith(PREFIX)]
    metadata: dict[str, Any] = {"tokenizer": target.checkpoint}  # the manager passes it to the tasks that it loads
    manager = _manager(of_harness, include, metadata)
    loaded: dict[int | None, Tasks] = {
        length: {"tasks": {}, "groups": {}, "group_map": {}} for length in (None, *lengths)
    }

    def load(name: str, source: Any, length: int | None) -> bool:
        """Load a task at a length; returns whether it takes one."""
        with task_errors(name):
            tasks = manager.load([source])
        takes = any(task.config.custom_dataset for task in tasks["tasks"].values())
        for kind, members in tasks.items():
            loaded[length if takes else None][kind] |= members
        return takes

    for name in names:
        if name in of_harness:
            for length in [*loaded][1:] or [None]:
                metadata |= {} if length is None else {"max_seq_lengths": [length]}
                if not load(name, name, length):
                    break
            continue
        check_retrieval_task(name, lengths)
        for length in lengths:
            load(name, configuration(name, target.tokenizer, length, limit, seed), length)
    if lengths and not any(loaded[length]["tasks"] for length in lengths):
        raise ZebraError(f"none of {', '.join(names)} supports a length: their texts are fixed. Leave it out.")
    return {length: some for length, some in loaded.items() if some["tasks"]}


def _manager(names: Sequence[str], include: str | os.PathLike[str] | None, metadata: dict[str, Any]) -> Any:
    """The harness's index of tasks. Its own 14,000 files are read only if a name is not found without them.

    Raises:
        ZebraError: an unknown name.
    """
    from lm_eval.tasks import TaskManager

    path = None if include is None else str(include)
    for defaults in (False, True):
        manager = TaskManager(include_path=path, include_defaults=defaults, metadata=metadata)
        files = [name for name in names if name.endswith(".yaml") and os.path.isfile(name)]
        unknown = [name for name in names if name not in manager.task_index and name not in files]
        if not unknown:
            return manager
    near = difflib.get_close_matches(unknown[0], [*manager.all_tasks, *retrieval_tasks()], 3) or ["hellaswag", "mmlu"]
    raise ZebraError(
        f"there is no task {unknown[0]!r} among the {len(manager.all_tasks):,} of lm-eval and {PREFIX}*; similar are "
        f"{', '.join(near)}. `lm_eval ls tasks` lists them; --include adds a folder of your own."
    )


def _prepare(
    task: Any, tokenizer: PreTrainedTokenizerBase, shots: int | None, limit: int | None, chat: bool, seed: int
) -> list[int]:
    """Set the number of few-shot examples as the harness's own command does, and build the requests.

    Returns:
        The tokens of each request with its answer; rolling requests are left out, as the harness splits them to fit.
    """
    default = task.get_config("num_fewshot")
    if shots is not None and default != 0:  # a task that sets 0 keeps it
        task.set_config(key="num_fewshot", value=shots)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    templated = functools.partial(render_chat, tokenizer) if chat else None
    with task_errors(task.config.task):
        task.build_all_requests(
            limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=templated
        )
        sizes = []
        for request in task.instances:
            if request.request_type == "generate_until":
                prompt, options = request.args
                sizes.append(len(prompt_tokens(tokenizer, prompt)) + options.get("max_gen_toks", _MAX_NEW_TOKENS))
            elif request.request_type == "loglikelihood":
                sizes.append(len(prompt_tokens(tokenizer, "".join(request.args))))
    task.set_fewshot_seed(seed=seed)  # the harness builds them again, with the same examples
    return sizes or [0]


def _max_length(
    target: EvalTarget, sizes: Mapping[int | None, Mapping[str, list[int]]], cut: bool, beyond: bool
) -> int | None:
    """The most tokens that the harness may give to the model in one sequence.

    Raises:
        ZebraError: requests beyond the model's context length, without `cut` or `beyond`.
    """
    every = [(name, its) for of_length in sizes.values() for name, its in of_length.items()]
    limit, most = target.context_length, max(max(its) for _, its in every)
    if limit is None or most <= limit:
        return limit or most or None
    if beyond:
        target.check_length(most, beyond)
        return most
    too_long = [(name, sum(size > limit for size in its), len(its)) for name, its in every]
    counts = ", ".join(f"{count:,} of {total:,} of {name}" for name, count, total in too_long if count)
    passes = f"requests of up to {most:,} tokens, answer included, exceed the {limit:,} positions that this model reads"
    if not cut:
        raise ZebraError(
            f"{passes}: {counts}. Use fewer shots, {target.ways_beyond()}; or truncate them on the left (--cut), or "
            "run them anyway (--beyond)."
        )
    warnings.warn(f"{passes}, and are truncated on the left: {counts}.", stacklevel=3)
    return limit


# Results


def _results(
    name: str, measured: dict[str, Any], length: int | None, sizes: list[int] | None, columns: dict[str, Any]
) -> Iterator[Result]:
    """The results of a task, or of a group, which has no sizes."""
    values, shots = measured["results"][name], measured["n-shot"].get(name) or 0
    of_task = {"lm-eval": importlib.metadata.version("lm_eval"), "task": str(measured["versions"].get(name))}
    for key, value in values.items():
        metric, comma, variant = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        n, error = values.get("sample_len"), values.get(f"{metric}_stderr,{variant}")
        context = length or max(sizes or [0]) or None
        if metric.isdecimal():  # RULER names a metric by its length; its value is -1 if it has no items
            if value < 0:
                continue
            n = n if int(metric) == length else None
            metric, context = "accuracy", int(metric)
        low = high = None
        if metric in _BERNOULLI_METRICS and n and sizes:
            low, high = wilson(float(value), n)
        elif isinstance(error, int | float):
            low, high = value - 1.96 * error, value + 1.96 * error
        yield Result(
            task=f"harness-{name}" + (f" {shots}-shot" if shots else ""),
            metric=metric if variant == "none" else f"{metric} {variant}",
            value=float(value),
            length=context,
            n=n,
            low=low,
            high=high,
            versions=versions() | of_task,
            **columns,
        )

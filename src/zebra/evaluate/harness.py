"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model: its own by name, yours from YAML, and our retrieval.

    name ─► TaskManager ─► tasks ─► requests ─► HFLM(pretrained=model) ─► evaluate ─► rows

The harness does what it does anywhere else; the model is the one of `zebra.load`, with its stripes, Self-Extend and
bounded cache. Nothing is downloaded: data that is not there is refused. lm-eval, of the extra `tasks`, is imported here
alone.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.errors import ZebraError
from zebra.evaluate.intervals import wilson
from zebra.evaluate.likelihood import BATCH_TOKENS
from zebra.evaluate.lm_eval_compat import made, offline, quiet
from zebra.evaluate.target import EvalTarget
from zebra.evaluate.tasks import OWN, check_own, configuration, own_tasks
from zebra.model.load_options import LoadOptions
from zebra.model.local import local_attention_of
from zebra.progress import console
from zebra.provenance import versions
from zebra.results import Result

_SHARES = ("acc", "acc_norm", "accuracy", "exact_match", "em")
_ROOM = 256
"""Tokens that the harness makes where a task does not say how many."""


def evaluate_tasks(
    checkpoint: str | os.PathLike[str],
    *,
    tasks: Sequence[str],
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
    """Load tasks, then a checkpoint, and measure: the rows of `zebra evaluate tasks`.

    A row's length is the one that was asked for where the task takes lengths, and else the tokens of its longest
    request, with its answer.

    Args:
        tasks: names of the harness's tasks, groups and tags, paths of YAML files, names of `own_tasks`.
        lengths: for tasks that make texts of a length: ours, and those of the harness that read `max_seq_lengths`.
        shots: examples before each question; the task's own number where None.
        limit: how many items of each task are taken.
        batch_size: requests that are run at once.
        chat: put requests into the tokenizer's chat template.
        include: a folder with YAML tasks.
        cut: let the harness cut the beginnings of requests that are too long for the model.
        beyond: run them whole, with a warning.
        check_only: load no model; the rows are the tokens that it would read.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: lm-eval is not installed, a task that is not there, data or packages of a task that are not there,
            requests beyond the model without `cut` or `beyond`, what `EvalTarget` refuses.
    """
    if cut and beyond:
        raise ZebraError("what is too long is cut (--cut) or run whole (--beyond); got both. Choose one.")
    if min(batch_size, 1 if limit is None else limit, 1 if shots is None else shots + 1) < 1:
        raise ZebraError(
            f"a batch and a limit are at least 1, and shots at least 0; got a batch of {batch_size}, a limit of "
            f"{limit} and {shots} shots. Raise what is below."
        )
    _installed()
    subject = EvalTarget(checkpoint, LoadOptions(**loading))
    if chat and not subject.tokenizer.chat_template:
        raise ZebraError("this checkpoint's tokenizer has no chat template. Leave chat out.")
    with quiet(), offline():
        rounds = _rounds(subject, tasks, lengths, include, limit, seed)
        for one in rounds:
            one.settle(subject.tokenizer, shots=shots, limit=limit, chat=chat, seed=seed)
        room = _check_room(subject, rounds, cut, beyond)
        if check_only:
            common = {"run": run, "metric": "tokens"} | subject.columns()
            return [
                Result(task=f"harness-{name}", value=sum(sizes), length=max(sizes), **common)
                for one in rounds
                for name, sizes in one.sizes.items()
            ]
        model = subject.load()
        if local_attention_of(model).full_decode:
            warnings.warn(
                "full decoding shows in tokens that are generated: where a task asks for likelihoods, the harness reads"
                " requests whole, and local layers keep their window.",
                stacklevel=2,
            )
        host = _host(model, subject.tokenizer, room, batch_size)
        common = {"run": run, "seed": seed} | subject.columns(model)
        return [row for one in rounds for row in one.rows(one.run(host, limit, chat), common)]


def _installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ZebraError(
            "these tasks are those of lm-eval, which is not installed: pip install 'zebra-llm[tasks]'."
        ) from None


# Tasks


def _rounds(
    subject: EvalTarget,
    names: Sequence[str],
    lengths: Sequence[int],
    include: str | os.PathLike[str] | None,
    limit: int | None,
    seed: int,
) -> list[_Round]:
    """A round for each length, of the tasks that make texts of a length, and one for all others."""
    if include is not None and not os.path.isdir(include):
        raise ZebraError(f"there is no folder at {include}. Give one that has tasks as YAML files.")
    foreign = [name for name in dict.fromkeys(names) if not name.startswith(OWN)]
    own = [name for name in dict.fromkeys(names) if name.startswith(OWN)]
    for name in own:
        check_own(name, lengths)
    metadata: dict[str, Any] = {"tokenizer": str(subject.checkpoint)}  # the manager hands it to the tasks that it loads
    manager = _manager(foreign, include, metadata)
    rounds = {length: _Round(length) for length in (None, *sorted(set(lengths)))}
    for name in foreign:
        for length in [*rounds][1:] or [None]:
            if length is not None:
                metadata |= {"max_seq_lengths": [length]}
            found = made(name, lambda name=name: manager.load([name]))  # type: ignore[misc]
            takes = any(task.config.custom_dataset for task in found["tasks"].values())
            rounds[length if takes else None].add(found)
            if not takes:
                break
    if lengths and not own and not any(one.found["tasks"] for length, one in rounds.items() if length):
        raise ZebraError(f"none of {', '.join(names)} takes a length: its texts are as long as they are. Leave it out.")
    for name in own:
        for length in sorted(set(lengths)):
            config = configuration(name, subject.tokenizer, length, limit, seed)
            rounds[length].add(made(name, lambda config=config: manager.load([config])))  # type: ignore[misc]
    return [one for one in rounds.values() if one.found["tasks"]]


def _manager(names: Sequence[str], include: str | os.PathLike[str] | None, metadata: dict[str, Any]) -> Any:
    """The harness's index of tasks. Its own are 14,000 files, which are read only where one of them is wanted.

    Raises:
        ZebraError: a name that is not there.
    """
    from lm_eval.tasks import TaskManager

    path = None if include is None else str(include)
    manager = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
    if not all(_knows(manager, name) for name in names):
        manager = TaskManager(include_path=path, include_defaults=True, metadata=metadata)
    for name in names:
        if not _knows(manager, name):
            near = difflib.get_close_matches(name, [*manager.all_tasks, *own_tasks()], 3) or ["hellaswag", "mmlu"]
            raise ZebraError(
                f"there is no task {name!r} among the {len(manager.all_tasks):,} of lm-eval and {OWN}*; near it are "
                f"{', '.join(near)}. `lm_eval ls tasks` lists them; --include adds a folder of your own."
            )
    return manager


def _knows(manager: Any, name: str) -> bool:
    return name in manager.task_index or (name.endswith(".yaml") and os.path.isfile(name))


# Rounds


class _Round:
    """Tasks that are run together, made at one length where they take one."""

    def __init__(self, length: int | None):
        self.length = length
        self.found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        self.sizes: dict[str, list[int]] = {}

    def add(self, found: dict[str, Any]) -> None:
        """Tasks as `TaskManager.load` gives them."""
        for part, members in found.items():
            self.found[part] |= members

    def settle(
        self, tokenizer: PreTrainedTokenizerBase, *, shots: int | None, limit: int | None, chat: bool, seed: int
    ) -> None:
        """Settle the number of examples as the harness's own command does, then see how long the requests are."""
        for name, task in self.found["tasks"].items():
            default = task.get_config("num_fewshot")
            if shots is not None and default != 0:  # a task that says 0 keeps it
                task.set_config(key="num_fewshot", value=shots)
            elif default is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
            self.sizes[name] = made(name, lambda task=task: _sizes(task, tokenizer, limit, chat))  # type: ignore[misc]

    def run(self, host: Any, limit: int | None, chat: bool) -> dict[str, Any]:
        """The harness's results."""
        from lm_eval.evaluator import evaluate

        return made(
            " and ".join(self.found["tasks"]),
            lambda: evaluate(
                lm=host,
                task_dict=self.found,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            ),
        )

    def rows(self, results: dict[str, Any], common: dict[str, Any]) -> Iterator[Result]:
        """Groups first, then tasks."""
        for name in dict.fromkeys([*results.get("groups", {}), *results["results"]]):
            yield from self._rows(name, results, common)

    def _rows(self, name: str, results: dict[str, Any], common: dict[str, Any]) -> Iterator[Result]:
        found, shots = results["results"][name], results["n-shot"].get(name) or 0
        own = {"lm-eval": importlib.metadata.version("lm_eval"), "task": str(results["versions"].get(name))}
        for key, value in found.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            length = self.length or max(self.sizes.get(name, [0])) or None
            n, error = found.get("sample_len"), found.get(f"{metric}_stderr,{how}")
            if metric.isdecimal():  # RULER's name of a length, and -1 where there was nothing of it
                if value < 0:
                    continue
                n = n if int(metric) == self.length else None
                metric, length = "accuracy", int(metric)
            low = high = None
            if metric in _SHARES and n and name in self.sizes:
                low, high = wilson(float(value), n)
            elif isinstance(error, int | float):
                low, high = value - 1.96 * error, value + 1.96 * error
            yield Result(
                task=f"harness-{name}" + (f" {shots}-shot" if shots else ""),
                metric=metric if how == "none" else f"{metric} {how}",
                value=float(value),
                length=length,
                n=n,
                low=low,
                high=high,
                versions=versions() | own,
                **common,
            )


def _sizes(task: Any, tokenizer: PreTrainedTokenizerBase, limit: int | None, chat: bool) -> list[int]:
    """The tokens of each request with its answer; rolling ones, which come in windows that fit, left out."""

    def templated(history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    task.build_all_requests(
        limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=templated if chat else None
    )

    found = []
    for request in task.instances:
        first, second = (*request.args, None)[:2]
        if request.request_type == "generate_until":
            size = len(tokenizer(first, verbose=False)["input_ids"])
            found.append(size + second.get("max_gen_toks", _ROOM))
        elif request.request_type == "loglikelihood":
            found.append(len(tokenizer(first + second, verbose=False)["input_ids"]))
    return found or [0]


def _check_room(subject: EvalTarget, rounds: Sequence[_Round], cut: bool, beyond: bool) -> int | None:
    """The tokens that the harness may give to the model at once.

    Raises:
        ZebraError: requests beyond the model's reach, and nobody told to cut them or to go beyond.
    """
    every = [(name, sizes) for one in rounds for name, sizes in one.sizes.items()]
    reach, most = subject.reach, max(max(sizes) for _, sizes in every)
    if reach is None or most <= reach:
        return reach or most or None
    if beyond:
        subject.check_length(most, beyond)
        return most
    over = [(name, sum(size > reach for size in sizes), len(sizes)) for name, sizes in every]
    of = ", ".join(f"{count:,} of {total:,} of {name}" for name, count, total in over if count)
    passes = f"requests of up to {most:,} tokens, answer included, pass the {reach:,} positions that this model reads"
    if not cut:
        raise ZebraError(
            f"{passes}: {of}. Take Self-Extend, a rope such as yarn:8 or fewer shots, let their beginnings be cut "
            "(--cut), or run them all the same (--beyond)."
        )
    warnings.warn(f"{passes}, and lose their beginnings: {of}.", stacklevel=3)
    return reach


def _host(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: int | None, batch_size: int) -> Any:
    """The harness's own host of transformers' models, without its bars where there is no terminal."""
    from lm_eval.models.huggingface import HFLM

    class Host(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or not console.is_terminal)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm or not console.is_terminal)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm or not console.is_terminal)

    model.generation_config.prefill_chunk_size = BATCH_TOKENS
    return Host(pretrained=model, tokenizer=tokenizer, max_length=room, batch_size=batch_size)

"""The verbs of `zebra evaluate`, which measure a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from zebra.cli import show
from zebra.cli.options import (
    Beyond,
    Checkpoint,
    Device,
    Dtype,
    FullDecode,
    Json,
    Lengths,
    Out,
    RopeOption,
    RunName,
    Seed,
    SelfExtendOption,
    Separator,
    StripesOption,
    Window,
    load_arguments,
    names,
    numbers,
)
from zebra.data.documents import find_files


def perplexity(
    checkpoint: Checkpoint,
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    length: Lengths,
    convention: Annotated[
        Literal["disjoint", "strided", "truncated"],
        typer.Option(metavar="NAME", help="How windows lie on a text: disjoint, strided or truncated."),
    ] = "disjoint",
    stride: Annotated[
        int | None, typer.Option(help="Tokens that each strided window scores. Default: a quarter of the length.")
    ] = None,
    separator: Separator = None,
    field: Annotated[str, typer.Option(help="Field of .jsonl or .parquet records that holds the text.")] = "text",
    num_proc: Annotated[int, typer.Option(min=1, metavar="INT", help="Processes that tokenise.")] = 1,
    join: Annotated[bool, typer.Option("--join", help="Join documents up to the length or longer.")] = False,
    prompt: Annotated[
        int | None,
        typer.Option(help="Read this many tokens of each window as a prompt; score the others as decoded after it."),
    ] = None,
    stripes: StripesOption = None,
    rope: RopeOption = None,
    self_extend: SelfExtendOption = None,
    window: Window = None,
    full_decode: FullDecode = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    run: RunName = "evaluate",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity by position, at one or more context lengths."""
    lengths = numbers("--length", length, int, "4096 or 512,4096")
    loading = load_arguments(checkpoint, stripes, rope, self_extend, window, full_decode, dtype, device)
    find_files(text)
    with show.working():
        from zebra.evaluate.perplexity import evaluate_perplexity

        results = evaluate_perplexity(
            checkpoint,
            text,
            lengths=lengths,
            convention=convention,
            stride=stride,
            separator=separator,
            field=field,
            num_proc=num_proc,
            join=join,
            prompt=prompt,
            seed=seed,
            run=run,
            **loading,
        )
    show.results(results, as_json, out)


def retrieval(
    checkpoint: Checkpoint,
    task: Annotated[
        str,
        typer.Option(
            help="passkey, needle, multikey, multivalue, multiquery, lookup, variables, common-words, frequent-words; "
            "several with commas."
        ),
    ],
    length: Lengths,
    depth: Annotated[
        str, typer.Option(help="Depths of the evidence, from 0 (start) to 1 (end), several with commas.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Samples of each task, length and depth.")] = 20,
    score: Annotated[
        Literal["generate", "likelihood"],
        typer.Option(
            metavar="NAME",
            help="generate: generate the answer; likelihood: compare likelihoods, for models that follow no question.",
        ),
    ] = "generate",
    haystack: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or glob of text to hide the evidence in; repeatable. Default: made-up text."),
    ] = None,
    beyond: Beyond = False,
    stripes: StripesOption = None,
    rope: RopeOption = None,
    self_extend: SelfExtendOption = None,
    window: Window = None,
    full_decode: FullDecode = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    run: RunName = "evaluate",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure retrieval from long texts: accuracy by length and depth, with 95 % intervals."""
    from zebra.data.needles import check_task

    tasks, lengths = names(task), numbers("--length", length, int, "1024,4096")
    depths = numbers("--depth", depth, float, "0,0.5,1")
    for name in tasks:
        check_task(name, depths[0], samples)
    loading = load_arguments(checkpoint, stripes, rope, self_extend, window, full_decode, dtype, device)
    find_files(haystack or ())
    with show.working():
        from zebra.evaluate.retrieval import evaluate_retrieval

        results = evaluate_retrieval(
            checkpoint,
            tasks=tasks,
            lengths=lengths,
            depths=depths,
            samples=samples,
            score=score,
            haystack=haystack or (),
            beyond=beyond,
            seed=seed,
            run=run,
            **loading,
        )
    show.results(results, as_json, out)


def tasks(
    checkpoint: Checkpoint,
    task_names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="Tasks of lm-eval (hellaswag, mmlu, ...), YAML files, or zebra-TASK and zebra-TASK-likelihood for a "
            "TASK of `evaluate retrieval`; several with commas.",
        ),
    ],
    length: Annotated[str | None, typer.Option(help="Context lengths of zebra-TASK, several with commas.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question. Default: as the task says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first items of each task. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests in one batch.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    include: Annotated[Path | None, typer.Option(help="Folder with your own YAML tasks.")] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the start of requests longer than the model.")] = False,
    beyond: Beyond = False,
    stripes: StripesOption = None,
    rope: RopeOption = None,
    self_extend: SelfExtendOption = None,
    window: Window = None,
    full_decode: FullDecode = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    run: RunName = "evaluate",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run tasks of the lm-evaluation-harness on data that is on this machine; nothing is downloaded."""
    from zebra.evaluate.tasks import PREFIX, check_retrieval_task

    lengths = [] if length is None else numbers("--length", length, int, "4096,16384")
    for name in names(task_names):
        if name.startswith(PREFIX):
            check_retrieval_task(name, lengths)
    loading = load_arguments(checkpoint, stripes, rope, self_extend, window, full_decode, dtype, device)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # bars of the harness and of datasets
    with show.working():
        from zebra.evaluate.harness import evaluate_tasks

        results = evaluate_tasks(
            checkpoint,
            tasks=names(task_names),
            lengths=lengths,
            shots=shots,
            limit=limit,
            batch_size=batch_size,
            chat=chat,
            include=include,
            cut=cut,
            beyond=beyond,
            seed=seed,
            run=run,
            **loading,
        )
    show.results(results, as_json, out)


def documents(
    checkpoint: Checkpoint,
    file: Annotated[Path, typer.Argument(help="JSON Lines of document, question and answers, or of document and qa.")],
    score: Annotated[
        Literal["generate", "likelihood"],
        typer.Option(metavar="NAME", help="generate: generate answers (ROUGE, F1); likelihood: of the references."),
    ] = "generate",
    length: Annotated[
        str | None,
        typer.Option(help="Tokens of prompt and answer, several with commas. Default: the model's own length."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first items. Default: all.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer to generate, or to score, at most.")] = 128,
    template: Annotated[str | None, typer.Option(help="Prompt with {document} and {question}. Default: plain.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End a generated answer at this string; repeatable.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Check the data; load no model.")] = False,
    items: Annotated[Path | None, typer.Option(help="JSON Lines file for each item's answer and scores.")] = None,
    beyond: Beyond = False,
    stripes: StripesOption = None,
    rope: RopeOption = None,
    self_extend: SelfExtendOption = None,
    window: Window = None,
    full_decode: FullDecode = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    run: RunName = "evaluate",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Answer questions about long documents: ROUGE and F1, or the likelihood of the reference, with a data check."""
    lengths = [] if length is None else numbers("--length", length, int, "4096,16384")
    loading = load_arguments(checkpoint, stripes, rope, self_extend, window, full_decode, dtype, device)
    find_files([str(file)])
    with show.working():
        from zebra.evaluate.documents import evaluate_documents
        from zebra.evaluate.prompts import TEMPLATE

        results, outcomes = evaluate_documents(
            checkpoint,
            file,
            lengths=lengths,
            limit=limit,
            beyond=beyond,
            check_only=check_only,
            seed=seed,
            run=run,
            score=score,
            answer_tokens=answer_tokens,
            template=template or TEMPLATE,
            chat=chat,
            stop=stop or (),
            **loading,
        )
    if items is not None:
        from zebra.files import atomic_write
        from zebra.results import to_json

        atomic_write(items, "".join(to_json(outcome.record()) + "\n" for outcome in outcomes))
    show.results(results, as_json, out)

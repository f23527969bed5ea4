"""The commands of `zebra evaluate`, which measure a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zebra.cli import options, show
from zebra.data.documents import check_texts
from zebra.data.qa import read_examples
from zebra.model.checkpoint_files import check_checkpoint


def perplexity(
    checkpoint: options.Checkpoint,
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    lengths: options.Lengths,
    convention: Annotated[
        Literal["disjoint", "strided", "truncated"],
        typer.Option(metavar="NAME", help="How texts are cut into scored chunks: disjoint, strided or truncated."),
    ] = "disjoint",
    stride: Annotated[
        int | None,
        typer.Option(min=1, metavar="INT", help="Scored tokens per strided chunk. Default: a quarter of the length."),
    ] = None,
    separator: options.Separator = None,
    field: options.Field = None,
    num_proc: Annotated[int, typer.Option(min=1, metavar="INT", help="Tokenizer processes.")] = 1,
    join: Annotated[
        bool, typer.Option("--join", help="Join documents into texts of at least --length tokens.")
    ] = False,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="INT",
            help="Read this many tokens of each chunk as a prompt; score the rest as decoded tokens.",
        ),
    ] = None,
    bos: options.Bos = None,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    run: options.RunName = "evaluate",
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity by position, at one or more context lengths."""
    arguments = _checked(locals())
    check_texts(text, separator=separator, field=field)
    with show.working():
        from zebra.evaluate.perplexity import evaluate_perplexity

        results = evaluate_perplexity(**arguments)
    show.results(results, as_json, out)


def retrieval(
    checkpoint: options.Checkpoint,
    tasks: Annotated[
        str,
        typer.Option(
            "--task",
            callback=options.names,
            help="Comma-separated: passkey, needle, multikey, multivalue, multiquery, lookup, variables, common-words, "
            "frequent-words.",
        ),
    ],
    lengths: options.Lengths,
    depths: Annotated[
        str,
        typer.Option(
            "--depth",
            callback=options.numbers("--depth", float, "0,0.5,1", least=0, most=1),
            help="Depths of the evidence, comma-separated, 0 (start) to 1 (end).",
        ),
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, metavar="INT", help="Samples per task, length and depth.")] = 20,
    score: Annotated[
        options.Score,
        typer.Option(
            metavar="NAME",
            help="generate: generate the answer; likelihood: compare likelihoods, for models that follow no question.",
        ),
    ] = "generate",
    haystack: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or glob of text to hide the evidence in; repeatable. Default: generated text."),
    ] = None,
    beyond: options.Beyond = False,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    run: options.RunName = "evaluate",
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Measure retrieval from long texts: accuracy by length and depth, with 95 % intervals."""
    arguments = _checked(locals())
    check_texts(haystack or ())
    from zebra.data.needles import check_task

    for name in arguments["tasks"]:
        check_task(name, arguments["depths"][0], samples)
    with show.working():
        from zebra.evaluate.retrieval import evaluate_retrieval

        results = evaluate_retrieval(**arguments)
    show.results(results, as_json, out)


def tasks(
    checkpoint: options.Checkpoint,
    tasks: Annotated[
        str,
        typer.Option(
            callback=options.names,
            help="Comma-separated: lm-eval tasks (hellaswag, mmlu, ...), YAML files, or zebra-TASK and "
            "zebra-TASK-likelihood for a TASK of `evaluate retrieval`.",
        ),
    ],
    lengths: Annotated[
        str | None,
        typer.Option("--length", callback=options.length_list, help="Context lengths of zebra-TASK, comma-separated."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, metavar="INT", help="Few-shot examples. Default: as in the task.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="INT", help="Use only the first items of each task. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="INT", help="Requests per batch.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    include: Annotated[Path | None, typer.Option(help="Folder with your own YAML tasks.")] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Cut too long requests at their start.")] = False,
    beyond: options.Beyond = False,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    run: options.RunName = "evaluate",
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Run tasks of the lm-evaluation-harness on data on this machine; nothing is downloaded."""
    arguments = _checked(locals())
    from zebra.evaluate.harness_retrieval import PREFIX, check_retrieval_task

    for name in arguments["tasks"]:
        if name.startswith(PREFIX):
            check_retrieval_task(name, arguments.get("lengths", ()))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # bars of the harness and of datasets
    with show.working():
        from zebra.evaluate.harness import evaluate_tasks

        results = evaluate_tasks(**arguments)
    show.results(results, as_json, out)


def documents(
    checkpoint: options.Checkpoint,
    file: Annotated[Path, typer.Argument(help="JSON Lines with document, question and answers, or document and qa.")],
    score: Annotated[
        options.Score,
        typer.Option(metavar="NAME", help="generate: ROUGE and F1 of answers; likelihood: that of the references."),
    ] = "generate",
    lengths: Annotated[
        str | None,
        typer.Option(
            "--length",
            callback=options.length_list,
            help="Tokens of prompt and answer, comma-separated. Default: the model's own length.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="INT", help="Use only the first items. Default: all.")
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="INT", help="Maximum number of answer tokens to generate or score.")
    ] = 128,
    template: Annotated[str | None, typer.Option(help="Prompt with {document} and {question}. Default: plain.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End a generated answer at this string; repeatable.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Check the data; load no model.")] = False,
    items: Annotated[
        Path | None,
        typer.Option(callback=options.output_file, help="JSON Lines file for the answer and scores of each item."),
    ] = None,
    beyond: options.Beyond = False,
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    run: options.RunName = "evaluate",
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Check and answer questions about long documents: ROUGE and F1, or the likelihood of the reference answers."""
    arguments = _checked(locals())
    read_examples(file)
    with show.working():
        from zebra.evaluate.documents import evaluate_documents

        results, outcomes = evaluate_documents(**arguments)
    try:
        if items is not None:
            from zebra.files import atomic_write
            from zebra.results import to_json

            atomic_write(items, "".join(to_json(outcome.record()) + "\n" for outcome in outcomes))
    finally:
        show.results(results, as_json, out)


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a measurement of a checkpoint that is there."""
    check_checkpoint(arguments["checkpoint"])
    return options.call_arguments(arguments, "out", "items")

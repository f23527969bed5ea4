"""Turns of a conversation about a document: seconds to the first token and tokens per second, of ours and of servers.

python benchmarks/turns.py CHECKPOINT                  all subjects, at 4,096 and 16,384 tokens
python benchmarks/turns.py CHECKPOINT 4096 zebra       this length, and the subjects with this in their names
python benchmarks/turns.py CHECKPOINT 4096 llama-server --gguf MODEL-F16.gguf

The conversation is a document of the benchmark's books with a question, then two more questions; answers are greedy,
each of 64 tokens. Subjects are `zebra.Conversation` three ways, `transformers serve` where its extra is installed, and
`llama-server` where it is on the path and --gguf names the model. Each server runs alone, on a port of its own, and is
asked through its streaming chat endpoint. The context that a subject cannot hold is left out, with a line on stderr.

Results go to benchmarks/results/turns-<name>.jsonl after each subject, in place of earlier ones of it at that length.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zebra.conversation import Conversation
from zebra.errors import ZebraError
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.context import longest_text
from zebra.model.load import device_name
from zebra.results import Result, read_results, write_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BOOKS = ROOT / "examples" / "books" / "validation"
LENGTHS = (4096, 16384)
QUESTIONS = ("What is this text about?", "Who is named in it?", "How does it end?")
ANSWER = 64
"""Tokens of an answer, at most."""
STRIPES = "GLLL:512"


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        first: seconds from the request to the first piece of text, tokenising and transport included.
        rate: pieces of text per second after the first; a piece is a token but for rare characters.
        cached, cache_bytes: tokens of the prompt that were not read, and bytes of the cache; None where unknown.
    """

    first: float
    rate: float | None
    cached: int | None = None
    cache_bytes: int | None = None


Ask = Callable[[str], Iterator[str]]


def document(tokenizer: Any, tokens: int) -> str:
    """The beginning of the books, of so many tokens."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(BOOKS.glob("*.txt")))
    ids = tokenizer(text[: tokens * 12], add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise ZebraError(f"the books in {BOOKS} have {len(ids):,} tokens; got {tokens:,}. Take a shorter length.")
    return str(tokenizer.decode(ids[:tokens]))


def timed(pieces: Iterator[str]) -> tuple[str, float, float | None]:
    """A text, the seconds to its first piece, and pieces per second after that."""
    start, times, text = time.perf_counter(), list[float](), ""
    for piece in pieces:
        times.append(time.perf_counter())
        text += piece
    if not times:
        raise ZebraError("the subject answered nothing. Ask another question.")
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return text, times[0] - start, rate


def ours(checkpoint: Path, **options: Any) -> Callable[[str], list[Turn]]:
    """Three turns of `zebra.Conversation`, loaded with some options."""

    def run(text: str) -> list[Turn]:
        chat, turns = Conversation(checkpoint, max_new_tokens=ANSWER, **options), []
        for question in QUESTIONS:
            message = question if chat.messages else f"{text}\n\n{question}"
            _, first, rate = timed(chat.reply(message))
            assert chat.last is not None
            turns.append(Turn(first, rate, chat.last.cached_tokens, chat.cache_bytes))
        return turns

    return run


def served(command: list[str], port: int, model: str) -> Callable[[str], list[Turn]]:
    """Three turns through a server's streaming chat endpoint."""

    def run(text: str) -> list[Turn]:
        turns, messages = list[Turn](), list[dict[str, str]]()
        with _server(command, port):
            for question in QUESTIONS:
                content = question if messages else f"{text}\n\n{question}"
                messages.append({"role": "user", "content": content})
                answer, first, rate = timed(_streamed(port, model, messages))
                messages.append({"role": "assistant", "content": answer})
                turns.append(Turn(first, rate))
        return turns

    return run


def _streamed(port: int, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": ANSWER, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=3600) as response:
        for line in response:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    yield delta["content"]


@contextmanager
def _server(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ZebraError(f"{' '.join(command)} does not come up. Run it by hand to see why.") from None
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def subjects(checkpoint: Path, length: int, gguf: Path | None) -> dict[tuple[str, str], Callable[[str], list[Turn]]]:
    """Those that can hold a document of so many tokens here, by the names of their model and layout in the results."""
    reach = longest_text(read_config(str(checkpoint)))
    needed = length + 1024
    fits = reach is None or needed <= reach
    one_thread, port = str(torch.get_num_threads()), _free_port()
    extended = {"self_extend": f"auto:{max(needed, (reach or 0) + 1)}"}
    rest: dict[str, Any] = {} if fits else extended
    suffix = "" if fits else ", Self-Extend"
    table = {
        ("zebra", "full" + suffix): ours(checkpoint, **rest),
        ("zebra", STRIPES + suffix): ours(checkpoint, stripes=STRIPES, **rest),
    }
    if fits:
        table["zebra", "full, Self-Extend"] = ours(checkpoint, **extended)
        command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--device", "cpu", "--dtype", "auto"]
        if _has_modules("fastapi", "uvicorn", "openai"):
            table["transformers serve", "full"] = served(command, port, str(checkpoint.absolute()))
        else:
            print("transformers serve is left out: its extra `serving` is not installed", file=sys.stderr)
        server = shutil.which("llama-server")
        if server and gguf:
            command = [server, "-m", str(gguf), "-c", str(needed), "-t", one_thread, "-np", "1", "--port", str(port)]
            table[f"llama-server {gguf.stem}", "full"] = served(command, port, gguf.stem)
        else:
            print("llama-server is left out: it is not on the path, or no --gguf names its model", file=sys.stderr)
    return table


def _has_modules(*names: str) -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) for name in names)


def results(model: str, layout: str, length: int, turns: list[Turn]) -> list[Result]:
    rows = []
    for number, turn in enumerate(turns, 1):
        values = {
            "seconds to the first token": turn.first,
            "tokens per second": turn.rate,
            "cached tokens": turn.cached,
            "cache bytes": turn.cache_bytes,
        }
        rows += [
            Result(
                run="turns",
                model=model,
                layout=layout,
                task=f"turn {number} of a chat",
                metric=metric,
                value=float(value),
                length=length,
                device=device_name("cpu"),
            )
            for metric, value in values.items()
            if value is not None
        ]
    return rows


def main(arguments: list[str]) -> None:
    gguf = None
    if "--gguf" in arguments:
        at = arguments.index("--gguf")
        gguf, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    if not arguments:
        raise SystemExit(__doc__)
    checkpoint, rest = Path(arguments[0]), arguments[1:]
    lengths = [int(one) for one in rest if one.isdigit()] or list(LENGTHS)
    names = [one for one in rest if not one.isdigit()]
    tokenizer = load_tokenizer(str(checkpoint), read_config(str(checkpoint)))
    path = RESULTS / f"turns-{checkpoint.name.lower()}.jsonl"
    for length in lengths:
        text = document(tokenizer, length)
        for (model, layout), run in subjects(checkpoint, length, gguf).items():
            if names and not any(name in f"{model} {layout}" for name in names):
                continue
            rows = results(model, layout, length, run(text))
            before = list(read_results(path)) if path.exists() else []
            before = [row for row in before if (row.model, row.layout, row.length) != (model, layout, length)]
            write_results(path, [*before, *rows])
            for row in rows:
                print(
                    f"{length:>6,}  {model:24} {layout:28} {row.task}  {row.metric:28} {row.value:14,.2f}", flush=True
                )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1:])

"""Many streaming clients for some minutes against `zebra serve`: no error, flat memory, each answer that of one client.

    python benchmarks/soak.py CHECKPOINT [--clients 32] [--seconds 120]

Prints one JSON object: answers, errors, answers that differ, and the server's resident memory over time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

PROMPTS = [f"{start} {who}" for start in ("Once upon a time", "One day", "In a big house") for who in ("a cat", "Tim")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    command = [sys.executable, "-m", "zebra", "serve", options.checkpoint, "--port", "0", "--no-page"]
    command += ["--cache-memory", "8MiB", "--max-queue", str(2 * options.clients)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = server.stderr.readline().partition("API ")[2].split("/v1")[0]
        try:
            report = soak(f"{address}/v1", server.pid, options)
        finally:
            server.terminate()
    print(json.dumps(report, indent=2))
    return 1 if report["errors"] or report["different"] or not report["memory_is_flat"] else 0


def soak(base_url: str, process: int, options: argparse.Namespace) -> dict[str, Any]:
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    name = client.models.list().data[0].id

    def text(prompt: str) -> str:
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=options.max_tokens, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    single = {prompt: text(prompt) for prompt in PROMPTS}
    start, end = time.monotonic(), time.monotonic() + options.seconds
    answers, errors, different, left = 0, list[str](), 0, 0
    lock, memory = threading.Lock(), list[tuple[float, float]]()

    def ask(number: int) -> None:
        nonlocal answers, different, left
        draws = random.Random(number)
        while time.monotonic() < end:
            prompt = draws.choice(PROMPTS)
            try:
                if draws.random() < 0.05:  # a client that leaves in mid-stream
                    with client.completions.create(model=name, prompt=prompt, max_tokens=400, stream=True) as stream:
                        next(iter(stream), None)
                    left += 1
                    continue
                same = text(prompt) == single[prompt]
                with lock:
                    answers += 1
                    different += not same
            except openai.OpenAIError as error:
                errors.append(str(error))

    with ThreadPoolExecutor(options.clients) as pool:
        work = [pool.submit(ask, number) for number in range(options.clients)]
        while any(not one.done() for one in work):
            memory.append((round(time.monotonic() - start, 1), resident_mib(process)))
            time.sleep(min(5.0, options.seconds / 10))
    warm = [size for at, size in memory if at >= options.seconds / 4]
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        "answers": answers,
        "clients_that_left": left,
        "errors": errors[:10],
        "different": different,
        "memory_mib": memory,
        "memory_is_flat": max(warm) - min(warm) < 0.05 * min(warm),
    }


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())

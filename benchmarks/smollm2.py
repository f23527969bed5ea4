"""SmolLM2-135M-Instruct from its GGUF file to four times its length: docs/results/smollm2.md.

make demo-llm                               first: it makes the checkpoint in runs/demo-llm/smollm2
python benchmarks/smollm2.py                everything; a day and more of two cores, and a rerun continues
python benchmarks/smollm2.py 16k offset     only these parts
python benchmarks/smollm2.py --page         measure nothing; write the page again

Each part is one command of zebra, printed as it begins. It may be stopped at any moment. When it has ended, its results
are copied to benchmarks/results/smollm2-PART.jsonl.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

from smollm2_claims import AUTO, GROUPS, MODEL
from smollm2_page import ANSWERS, RESULTS, ROOT, TUNED, write_page
from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.model.load import device_name
from zebra.results import Result, read_results, write_results
from zebra_bench.configs import SMOLLM2_STRIPES as CHOSEN
from zebra_bench.configs import SMOLLM2_STRIPES_WITH_SINKS as CHOSEN_WITH_SINKS

_LCAT = "adapt recipes/lcat-smollm2-cpu.yaml"
_COMPARE = f"compare {MODEL} examples/books/validation --budget-minutes 100000"
_SELECT = (
    f"select {MODEL} --length 8192 --order once "
    "--text examples/books/train/moby_dick.txt --text examples/books/train/pride_and_prejudice.txt"
)
_ALL = "linear,yarn,dynamic,self-extend,stripes+self-extend"
_TRAINED = "checkpoint=runs/lcat-smollm2-sinks/model"


def _extended(length: int, *options: str) -> str:
    """Methods under Self-Extend, which are not among those by name."""
    return " ".join(f"--with '{one} self_extend=auto:{length}'" for one in options)


PARTS = {
    "selection": (
        "runs/smollm2-selection",
        f"{_SELECT} --budget 15 --window 1024 --samples 8",
    ),
    "selection-sinks": ("runs/smollm2-selection-sinks", f"{_SELECT} --budget 8 --window 1024+4 --samples 4"),
    "chosen": ("runs/lcat-smollm2", _LCAT),
    "sinks": ("runs/lcat-smollm2-sinks", f"{_LCAT} --set stripes={CHOSEN}+4"),
    "offset": ("runs/lcat-smollm2-offset", f"{_LCAT} --set stripes=GL:1024"),
    "full": ("runs/lcat-smollm2-full", f"{_LCAT} --set stripes=null"),
    "sinks-16k": (
        "runs/lcat-smollm2-16k",
        f"{_LCAT} --set stripes={CHOSEN}+4 --set model=runs/lcat-smollm2-sinks/model --set rope=yarn:2 "
        "--set train.length=16384 --set train.max_steps=12 --set train.save_steps=6 --set train.logging_steps=3 "
        "--set evaluate.length=16384 --set evaluate.eval_steps=null",
    ),
    "lit": ("runs/lit-smollm2", "tune recipes/lit-smollm2-cpu.yaml"),
    "16k": (
        "runs/smollm2-16k",
        f"{_COMPARE} --length 16384 --methods {_ALL} "
        f"{_extended(16384, f'stripes={CHOSEN_WITH_SINKS}', f'stripes={CHOSEN}+4', _TRAINED)} "
        "--windows 16 --samples 10 --task passkey",
    ),
    "without-sinks": (
        "runs/smollm2-without-sinks",
        f"{_COMPARE} --length 16384 --methods self-extend,stripes+self-extend "
        f"{_extended(16384, *(f'stripes={one}' for one in ('GL:1024', CHOSEN, f'{CHOSEN}+4', CHOSEN_WITH_SINKS)))} "
        "--windows 8 --samples 2 --task passkey",
    ),
    "32k": (
        "runs/smollm2-32k",
        f"{_COMPARE} --length 32768 --methods linear,yarn,dynamic,self-extend,stripes+self-extend "
        f"{_extended(32768, f'stripes={CHOSEN_WITH_SINKS}', _TRAINED)} --windows 6 --samples 1 --task passkey",
    ),
    "groups": (
        "runs/smollm2-groups",
        f"{_COMPARE} --length 16384 --windows 8 --samples 1 --task passkey --methods self-extend "
        + " ".join(f"--with self_extend={one}" for one in GROUPS),
    ),
    "8k": (
        "runs/smollm2-8k",
        f"{_COMPARE} --length 8192 --stripes GL:1024 --windows 16 --samples 3 --methods stripes "
        f"--with stripes={CHOSEN} --with checkpoint=runs/lcat-smollm2/model "
        "--with checkpoint=runs/lcat-smollm2-full/model",
    ),
}
"""Of each part the folder that its command writes, and the command without it."""
NAMES = (*PARTS, "question", "documents")

_DOCUMENTS = (
    "evaluate documents {model} examples/instructions/squality_dev.jsonl --length 8192 --chat "
    "--template '{{document}}\n\n{{question}}' --score {score} --limit {limit} --items {folder}/{stem}-items.jsonl"
)
NUMBERS = ("48213", "70652", "19384")
QUESTION = {
    "full": "",
    f"full, self-extend {AUTO}": "--self-extend auto:16384",
    f"{CHOSEN}+4, self-extend {AUTO}": f"--self-extend auto:16384 --stripes {CHOSEN}+4",
    f"{CHOSEN_WITH_SINKS}, self-extend {AUTO}": f"--self-extend auto:16384 --stripes {CHOSEN_WITH_SINKS}",
}
"""The options of `generate`, by layout."""
_LIMITS = {"likelihood": 50, "generate": 25}


def measure(part: str) -> None:
    """Run the command of a part, and copy its results."""
    if part == "documents":
        return _measure_documents(Path("runs/smollm2-documents"))
    if part == "question":
        return _ask(Path("runs/smollm2-question"))
    folder, command = PARTS[part]
    _zebra(f"{command} {f'--set run={folder}' if 'recipes/' in command else f'--out {folder}'}")
    write_results(RESULTS / f"smollm2-{part}.jsonl", read_results(ROOT / folder / "results.jsonl"))


def _zebra(command: str) -> str:
    """Run a command, and return what it printed if it prints JSON."""
    print(f"zebra {command}", flush=True)
    stdout = subprocess.PIPE if "--json" in command else None
    words = [sys.executable, "-m", "zebra", *shlex.split(command)]
    return subprocess.run(words, check=True, cwd=ROOT, stdout=stdout, text=True).stdout or ""


def _ask(folder: Path) -> None:
    """The question of make demo-llm, with three numbers: the first line says it, 12,000 tokens of a book before."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    book = (ROOT / "examples" / "books" / "validation" / "three_men_in_a_boat.txt").read_text(encoding="utf-8")
    results = []
    for layout, number in itertools.product(QUESTION, NUMBERS):
        file = folder / f"{number}.txt"
        first = f"The boat house of this story has a secret number: {number}. Remember it.\n"
        last = "\nWhat is the secret number of the boat house? Answer with the number alone."
        atomic_write(ROOT / file, f"{first}\n{book[:50_000]}\n{last}\n")
        command = f"generate {MODEL} --chat --file {file} --max-new-tokens 16 --json {QUESTION[layout]}"
        answer = json.loads(_zebra(command))
        results.append(
            Result(
                run="question",
                model=MODEL,
                layout=layout,
                task=f"question-{number}",
                metric="answered",
                value=float(number in answer["text"]),
                n=1,
                length=answer["prompt_tokens"],
                seed=0,
                device=device_name("cpu"),
            )
        )
    write_results(RESULTS / "smollm2-question.jsonl", results)


def _measure_documents(folder: Path) -> None:
    """Questions about stories that nothing was trained on, by each model; the first question of three as a sample."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    samples: dict[str, dict[str, str]] = {}
    for at, (name, model) in enumerate(TUNED.items()):
        for score, limit in _LIMITS.items():
            stem = f"{at}-{score}"
            file = folder / f"{stem}.jsonl"
            if not (ROOT / file).is_file():
                command = _DOCUMENTS.format(model=model, score=score, limit=limit, folder=folder, stem=stem)
                _zebra(f"{command} --out {file}")
            results += read_results(ROOT / file)
        items = map(json.loads, (ROOT / folder / f"{stem}-items.jsonl").read_text().splitlines())
        for item in itertools.islice(items, 0, 15, 5):
            samples.setdefault(f"{item['group']}: {item['question']}", {})[name] = item["prediction"]
    write_results(RESULTS / "smollm2-documents.jsonl", results)
    atomic_write(ANSWERS, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def main(arguments: list[str]) -> None:
    if unknown := [one for one in arguments if one not in (*NAMES, "--page")]:
        raise ZebraError(f"parts are {', '.join(NAMES)}, or --page alone; got {', '.join(unknown)}.")
    for part in [] if "--page" in arguments else arguments or NAMES:
        measure(part)
    write_page(NAMES)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(str(error))

"""SmolLM2-135M-Instruct from its GGUF file to four times its length: docs/results/smollm2.md.

make demo-llm                               first: it makes the checkpoint in runs/demo-llm/smollm2
python benchmarks/smollm2.py                everything; a day and more of two cores, and a rerun continues
python benchmarks/smollm2.py 16k offset     only these parts
python benchmarks/smollm2.py --page         measure nothing; write the page again

Each part is one command of zebra, printed as it begins. It may be stopped at any moment. When it has ended, its results
are copied to benchmarks/results/smollm2-PART.jsonl.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import methods, page, retrieval, selection
from zebra.report.figures import Figure
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import split
from zebra.report.series import by_kind, number, percent, span_name, span_of
from zebra.results import Result, read_results, write_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
PICTURES = "../images/smollm2"

MODEL, NAME = "runs/demo-llm/smollm2", "SmolLM2-135M"
TEXT = "examples/books/validation"
CHOSEN = "7,13,14,15,16,17,18,19,20,21,22,23,24,25,26:1024"
"""What the part `selection` chose."""
LCAT = "adapt recipes/lcat-smollm2-cpu.yaml"
COMPARE = f"compare {MODEL} {TEXT} --budget-minutes 100000"
EXTENDED = f"--with stripes={CHOSEN} --with 'stripes={CHOSEN} self_extend=auto"
ALL = "--methods linear,yarn,dynamic,self-extend,stripes,stripes+self-extend"
GROUPS = ("4:1024", "4:2048", "8:1024", "8:4096", "16:2048")

PARTS = {
    "selection": f"select {MODEL} --budget 15 --window 1024 --length 8192 --samples 8 "
    "--text examples/books/train/great_expectations.txt --text examples/books/train/walden.txt",
    "chosen": LCAT,
    "offset": f"{LCAT} --set stripes=GL:1024",
    "full": f"{LCAT} --set stripes=null",
    "chosen-16k": f"{LCAT} --set model=runs/smollm2-chosen/model --set rope=yarn:2 --set train.length=16384 "
    "--set evaluate.length=16384 --set train.max_steps=25",
    "16k": f"{COMPARE} --length 16384 {ALL} {EXTENDED}:16384' --windows 16 --samples 10",
    "32k": f"{COMPARE} --length 32768 {ALL} {EXTENDED}:32768' --windows 6 --samples 4",
    "groups": f"{COMPARE} --length 16384 --methods self-extend "
    + " ".join(f"--with self_extend={one}" for one in GROUPS)
    + " --windows 16 --samples 10 --task passkey",
    "8k": f"{COMPARE} --length 8192 --methods stripes --with stripes={CHOSEN} "
    + " ".join(f"--with checkpoint=runs/smollm2-{one}/model" for one in ("chosen", "offset", "full"))
    + " --windows 16 --samples 10",
    "lit": "tune recipes/lit-smollm2-cpu.yaml --set model=runs/smollm2-chosen/model",
}
"""The command of each part, without the folder that it writes to."""

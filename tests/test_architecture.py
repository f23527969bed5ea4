"""Modules import lower ranks only, and `import zebra` and the command line load nothing heavy until they need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "zebra"

RANKS = {
    "errors": -1,
    "progress": -1,
    "files": -1,
    "provenance": -1,
    "signals": -1,
    "stripes": 0,
    "gguf": 0,
    "hub": 0,
    "engines": 0,
    "masks": 0,
    "positions": 0,
    "results": 0,
    "shards": 0,
    "kernels": 1,
    "data": 1,
    "plan": 1,
    "decoding": 2,
    "model": 2,
    "text_writer": 2,
    "exports": 3,
    "generation": 3,
    "evaluate": 4,
    "streaming": 4,
    "conversation": 5,
    "serve": 5,
    "train": 5,
    "doctor": 6,
    "measure": 6,
    "report": 6,
    "integrations": 6,
    "compare": 7,
    "pipeline": 7,
    "study": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 10,
}
STANDARD_LIBRARY_ONLY = {
    "engines",
    "errors",
    "files",
    "gguf",
    "stripes",
    "masks",
    "positions",
    "provenance",
    "results",
    "shards",
    "signals",
    "plan",
}
MAY_IMPORT_TRANSFORMERS = {
    *(
        "compare",
        "decoding",
        "exports",
        "model",
        "train",
        "evaluate",
        "generation",
        "integrations",
        "streaming",
        "conversation",
        "serve",
        "study",
        "text_writer",
    ),
}


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path, *, of_types: bool = True) -> set[str]:
    """What a module imports; without `of_types` only what it imports at run time."""
    tree = ast.parse(module.read_text())
    types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if of_types or node not in types]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_to_lower_ranks_or_the_own_folder() -> None:
    wrong = []
    for module in MODULES:
        folder = room(module)
        assert folder in RANKS, f"{folder} has no rank; give it one here and in docs/architecture.md"
        for name in imports(module):
            parts = name.split(".")
            if parts[0] != "zebra" or len(parts) == 1:
                continue
            imported = parts[1] if parts[1] in RANKS else "stripes"  # `from zebra import Stripes, __version__`
            if imported not in (folder, "errors") and RANKS[imported] >= RANKS[folder]:
                wrong.append(f"{module.relative_to(PACKAGE)} (rank {RANKS[folder]}) imports {name}")
    assert not wrong


ONLY_IN = {
    "trl": {"train/chat.py", "train/sft.py"},
    "lm_eval": {"evaluate/harness.py", "evaluate/harness_model.py"},
    "datasets": {"evaluate/harness_retrieval.py", "train/sft.py"},
    "rouge_score": {"evaluate/overlap.py"},
    "peft": {"train/lora.py"},
    "gradio": {"serve/page.py"},
    "prometheus_client": {"serve/metrics.py"},
    "uvicorn": {"serve/server.py"},
    "openai": {"serve/answers.py", "serve/page.py"},
    "axolotl": {"integrations/axolotl.py"},
}


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for module in MODULES:
        path, folder = str(module.relative_to(PACKAGE)), room(module)
        outside = {name.split(".")[0] for name in imports(module, of_types=False)} - {"zebra", "__future__"}
        rejected = {name for name in outside & set(ONLY_IN) if path not in ONLY_IN[name]}
        if folder in STANDARD_LIBRARY_ONLY:
            rejected |= outside - sys.stdlib_module_names
        if folder not in MAY_IMPORT_TRANSFORMERS:
            rejected |= outside & {"transformers"}
        wrong += [f"{path} imports {', '.join(sorted(rejected))}"] if rejected else []
    assert not wrong


@pytest.mark.parametrize("banned", ["utils.py", "base.py", "common.py", "helpers.py"])
def test_no_drawer_for_everything(banned: str) -> None:
    assert not list(PACKAGE.rglob(banned))


def test_only_the_command_line_knows_the_study() -> None:
    users = {room(module) for module in MODULES for name in imports(module) if name.startswith("zebra.study")}
    assert users <= {"study", "cli"}


HEAVY = ("torch", "transformers", "numpy", "matplotlib", "accelerate", "lm_eval", "datasets", "rouge_score", "fastapi")
LIGHT = {
    "--help": 0,
    "adapt --help": 0,
    "evaluate tasks --help": 0,
    "plan llama-2-7b --length 16384 --memory 80GiB": 0,
    "convert nowhere x --stripes GLLL:64": 2,
    "convert examples x --stripes GLLL:64": 2,
    "convert examples/stories260K examples --stripes GLLL:64": 2,
    "convert examples/stories260K x --stripes GXLL:64": 2,
    "select examples/stories260K --budget 2 --window many --length 64": 2,
    "verify nowhere": 2,
    "evaluate perplexity examples/stories260K nothing.txt --length 64": 2,
    "evaluate perplexity examples/stories260K README.md --length 64 --separator <nowhere>": 2,
    "evaluate perplexity examples/stories260K README.md --length 64 --field body": 2,
    "evaluate perplexity examples/stories260K examples/questions.jsonl --length 64": 2,
    "evaluate perplexity examples/stories260K README.md --length many": 2,
    "evaluate retrieval examples/stories260K --task passkey --length 64 --haystack examples/stories260K/config.json": 2,
    "evaluate documents examples/stories260K README.md": 2,
    "evaluate documents examples/stories260K examples/instructions/short_test.jsonl": 2,
    "compare examples/stories260K README.md --length 64 --separator <nowhere>": 2,
    "select examples/stories260K --budget 2 --window 8 --length 64 --task passkey --separator x": 2,
    "evaluate perplexity examples/stories260K README.md --length 64 --rope yarn:1": 2,
    "generate examples/stories260K --prompt Once --dtype int8": 2,
    "generate examples/stories260K --prompt Once --self-extend x": 2,
    "chat nowhere": 2,
    "chat examples/stories260K --file nothing.txt": 2,
    "serve nowhere": 2,
    "serve examples/stories260K --host 0.0.0.0": 2,
    "serve examples/stories260K --cache-memory many": 2,
    "adapt nothing.yaml": 2,
    "adapt recipes/demo.yaml --set train.lenght=9": 2,
    "adapt recipes/demo.yaml --set model=nowhere": 2,
    "adapt recipes/demo.yaml --set data.files=[nothing.txt]": 2,
    "tune recipes/tiny-lit-cpu.yaml --set train.lenght=9": 2,
    "pretrain recipes/retrieval-cpu.yaml --set train.lenght=9": 2,
    "study recipes/study-cpu.yaml --set nothing=9": 2,
    "study recipes/study-cpu.yaml --device h100-sxm": 2,
    "with -- no-such-tool --help": 2,
    "run examples/pipeline-tiny.yaml --set stages.tune.train.lenght=9": 2,
}
"""Command lines that answer without anything heavy, and their exit codes."""
LIGHT_BUT_FOR_NUMPY = {
    "evaluate retrieval examples/stories260K --task nope --length 64": 2,
    "evaluate tasks examples/stories260K --tasks zebra-nope --length 64": 2,
}


def test_the_front_door_loads_nothing_heavy() -> None:
    code = """
import sys
import zebra
from zebra.cli import main
zebra.Stripes.parse("GLLL:512")
for line in sys.argv[1:]:
    sys.argv = ["zebra", *line.split()]
    try:
        main()
    except SystemExit as end:
        print("ENDED", end.code, *sorted(set(HEAVY) & set(sys.modules)), line, sep="|")
"""
    code = f"HEAVY = {HEAVY!r}\n{code}"
    command = [sys.executable, "-c", code, *LIGHT, *LIGHT_BUT_FOR_NUMPY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ENDED|")]
    expected = [f"ENDED|{code}|{line}" for line, code in LIGHT.items()]
    expected += [f"ENDED|{code}|numpy|{line}" for line, code in LIGHT_BUT_FOR_NUMPY.items()]
    assert ended == expected, done.stdout + done.stderr


def test_public_names_are_there() -> None:
    import zebra

    for name in zebra.__all__:
        assert getattr(zebra, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = zebra.nothing


def test_only_the_attention_module_registers_with_transformers() -> None:
    users = [module for module in MODULES if any("AttentionInterface" in name for name in imports(module))]
    assert users == [PACKAGE / "model" / "attention.py"]

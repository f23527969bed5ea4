"""Imports point one way, and the front door is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "zebra"

RANKS = {
    "errors": -1,
    "progress": -1,
    "files": -1,
    "provenance": -1,
    "stripes": 0,
    "masks": 0,
    "positions": 0,
    "results": 0,
    "kernels": 1,
    "data": 1,
    "plan": 1,
    "model": 2,
    "generation": 3,
    "evaluate": 4,
    "train": 5,
    "doctor": 6,
    "measure": 6,
    "report": 6,
    "pipeline": 7,
    "study": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 10,
}
STANDARD_LIBRARY_ONLY = {"errors", "files", "stripes", "masks", "positions", "provenance", "results", "plan"}
MAY_IMPORT_TRANSFORMERS = {"model", "train", "evaluate", "generation", "study"}


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_point_to_lower_ranks_or_the_own_folder(module: Path) -> None:
    mine = room(module)
    assert mine in RANKS, f"{mine} has no rank; give it one here and in docs/architecture.md"
    for name in imports(module):
        parts = name.split(".")
        if parts[0] != "zebra" or len(parts) == 1:
            continue
        theirs = parts[1] if parts[1] in RANKS else "stripes"  # `from zebra import Stripes, __version__`
        if theirs not in (mine, "errors"):
            assert RANKS[theirs] < RANKS[mine], f"{module.name} (rank {RANKS[mine]}) imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(module: Path) -> None:
    outside = {name.split(".")[0] for name in imports(module)} - {"zebra", "__future__"}
    if room(module) in STANDARD_LIBRARY_ONLY:
        assert outside <= sys.stdlib_module_names, outside
    if room(module) not in MAY_IMPORT_TRANSFORMERS and room(module) != "cli":
        assert "transformers" not in outside
    assert "trl" not in outside or module.name in ("chat.py", "sft.py")
    assert "lm_eval" not in outside or module.name == "harness.py"
    assert "datasets" not in outside or module.relative_to(PACKAGE) in (Path("evaluate/tasks.py"), Path("train/sft.py"))
    assert "rouge_score" not in outside or module.name == "overlap.py"
    assert "peft" not in outside or module.name == "lora.py"


@pytest.mark.parametrize("banned", ["utils.py", "base.py", "common.py", "helpers.py"])
def test_no_drawer_for_everything(banned: str) -> None:
    assert not list(PACKAGE.rglob(banned))


def test_only_the_command_line_knows_the_study() -> None:
    users = {room(module) for module in MODULES for name in imports(module) if name.startswith("zebra.study")}
    assert users <= {"study", "cli"}


HEAVY = ("torch", "transformers", "numpy", "matplotlib", "accelerate", "lm_eval", "datasets", "rouge_score")


@pytest.mark.parametrize(
    "code",
    [
        "import zebra; zebra.Stripes.parse('GLLL:512')",
        "import sys; sys.argv = ['zebra', '--help']\n"
        "try:\n    from zebra.cli import main; main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['zebra', 'adapt', '--help']\n"
        "try:\n    from zebra.cli import main; main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['zebra', 'evaluate', 'tasks', '--help']\n"
        "try:\n    from zebra.cli import main; main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['zebra', 'plan', 'llama-2-7b', '--length', '16384', '--memory', '80GiB']\n"
        "try:\n    from zebra.cli import main; main()\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "help of a verb", "help of tasks", "plan"],
)
def test_the_front_door_loads_nothing_heavy(code: str) -> None:
    code += f"\nimport sys; print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout + done.stderr


def test_public_names_are_there() -> None:
    import zebra

    for name in zebra.__all__:
        assert getattr(zebra, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = zebra.nothing


def test_only_the_attention_module_registers_with_transformers() -> None:
    code = (
        "import zebra.kernels, zebra.model.cache, zebra.model.families, zebra.model.loss\n"
        "from transformers import AttentionInterface\n"
        "print('zebra' in AttentionInterface._global_mapping)\n"
        "import zebra.model.attention\n"
        "print('zebra' in AttentionInterface._global_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr

"""The documentation is true: links resolve, symbols exist, commands parse, and numbers are those of the results."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, Zebra

from zebra.model.routes import table
from zebra.results import read_results

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        target = link[0] or link[1]
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_paper_map_names_symbols_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "paper-map.md").read_text()
    symbols = re.findall(r"`(zebra\.[\w.]+)`", text)
    assert len(symbols) > 8
    for symbol in symbols:
        module, _, name = symbol.rpartition(".")
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:  # a method of a class
            module, _, owner = module.rpartition(".")
            holder = getattr(importlib.import_module(module), owner)
        assert hasattr(holder, name), symbol
    for test in re.findall(r"`(tests/[\w.]+)`", text):
        assert (ROOT / test).exists(), test


def commands(*pages: Path) -> list[str]:
    lines = []
    for page in pages:
        for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("zebra ")]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", commands(*PAGES))
def test_every_command_in_the_documents_parses(line: str) -> None:
    """Options and arguments are the verb's own; the command is not run."""
    import typer

    from zebra.cli import app

    arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("zebra", arguments, resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        _, command, rest = command.resolve_command(context, rest)
        context = command.make_context("zebra", list(rest), parent=context)
    assert not context.args


def test_the_built_in_models_and_devices_stand_in_the_guide_and_in_help(zebra: Zebra) -> None:
    from zebra.plan.devices import DEVICES
    from zebra.plan.shapes import SHAPES

    shown = re.sub(r"[\s│]+", " ", zebra("plan", "--help").stdout)
    guide = (ROOT / "docs" / "planning.md").read_text()
    for name in (*SHAPES, *DEVICES):
        assert f"`{name}`" in guide
        assert name in shown


def test_the_examples_of_the_help_are_of_a_fresh_checkout(zebra: Zebra, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes can be read with their overrides, the named files exist, and help shows the examples unchanged."""
    from zebra.cli import _COMMANDS
    from zebra.train.recipe import AdaptRecipe, PretrainRecipe
    from zebra.train.recipe_file import check_files, read_recipe
    from zebra.train.tune_recipe import TuneRecipe

    monkeypatch.chdir(ROOT)
    kinds = {"adapt": AdaptRecipe, "tune": TuneRecipe, "pretrain": PretrainRecipe}
    for example in _COMMANDS:
        words = shlex.split(example)
        for word in re.findall(r"(?:recipes|examples)/[\w./-]*", example):
            assert Path(word).exists(), example
        if kind := kinds.get(words[1]):
            check_files(read_recipe(words[2], kind, words[4::2]))
    for verb in ("adapt", "pretrain"):
        page = " ".join(zebra(verb, "--help").stdout.split())
        assert next(example for example in _COMMANDS if f" {verb} " in example) in page


QUICK = ("generating", "pipeline", "planning", "selecting")
SLOW = ("adapting", "evaluating", "families", "pretraining", "self-extend", "tuning", "untrained")
"""Guides that train, or measure for several seconds."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
def test_every_command_of_the_guides_runs(name: str, zebra: Zebra, tmp_path: Path) -> None:
    """In the order of the page, from a directory that has what the repository's root has."""
    for shipped in ("examples", "recipes"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    lines = commands(ROOT / "docs" / f"{name}.md")
    assert lines
    for line in lines:
        done = zebra(*shlex.split(line, comments=True)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


NOT_HERE = ("chat", "parallel", "serving")
"""Guides whose Python needs another checkpoint, several processes or a server: its imports alone are run."""
COMPILED = ("tools",)
GUIDES = sorted(page.stem for page in (ROOT / "docs").glob("*.md") if snippets(page))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in (*COMPILED, "api"))) for name in GUIDES]
)
def test_the_python_of_the_guides_runs(
    name: str, zebra: Zebra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the conversions of the page, from a directory that has what the repository's root has."""
    for shipped in ("examples", "recipes"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    monkeypatch.chdir(tmp_path)
    page, names = ROOT / "docs" / f"{name}.md", dict[str, object]()
    for line in commands(page):
        if line.startswith("zebra convert ") and name not in NOT_HERE:
            assert zebra(*shlex.split(line, comments=True)[1:]).returncode == 0, line
    for code in snippets(page):
        compile(code, str(page), "exec")
        exec("\n".join(re.findall(r"^(?:import|from) .*", code, re.MULTILINE)) if name in NOT_HERE else code, names)


def test_the_extras_that_are_named_exist_and_are_installed_from_a_checkout() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    sources = {file: file.read_text() for file in [*PAGES, *(ROOT / "src").rglob("*.py")]}
    for file, text in sources.items():
        assert "zebra-llm[" not in text, f"{file}: the package is in no registry"
        assert set(re.findall(r"pip install '\.\[(\w+)\]'", text)) <= extras, file
        assert set(re.findall(r'missing_package\(.*"(\w+)"\)', text)) <= extras, file
    assert sum(text.count("missing_package(") for text in sources.values()) > 8


def test_the_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)`", page.read_text())) <= targets, page


def test_the_readme_keeps_its_order() -> None:
    heads = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    assert heads == [
        "Install",
        "A real checkpoint in a few lines",
        "Measured",
        "Limits",
        "Where each piece lives",
    ]


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    """Each perplexity in the table of the README stands in a result of benchmarks/results/, at its positions."""
    results = [result for file in (ROOT / "benchmarks" / "results").glob("*.jsonl") for result in read_results(file)]
    lines = re.findall(r"^\| ([\d,]+)–([\d,]+) (\|.*)$", README, flags=re.MULTILINE)
    assert len(lines) == 8
    for start, end, cells in lines:
        low, high = int(start.replace(",", "")), int(end.replace(",", ""))
        measured = {
            f"{result.value:,.{2 if result.value < 100 else 1}f}"
            for result in results
            if result.metric == "perplexity" and (result.position_from, result.position_to) == (low, high)
        }
        numbers = re.findall(r"[\d.,]+", cells)
        assert len(numbers) >= 4
        assert set(numbers) <= measured, set(numbers) - measured


def test_published_results_say_where_they_come_from() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert all(one.device and one.versions and one.commit for one in read_results(file)), file


def test_the_page_of_smollm2_is_that_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/smollm2.py writes it; the README's table of methods has its numbers."""
    import smollm2
    import smollm2_page

    monkeypatch.setattr(smollm2_page, "PAGE", tmp_path / "smollm2.md")
    monkeypatch.setattr(smollm2_page, "PICTURES", tmp_path / "smollm2")
    smollm2.main(["--page"])
    page = (ROOT / "docs" / "results" / "smollm2.md").read_text()
    assert (tmp_path / "smollm2.md").read_text() == page
    lines = re.findall(r"^\| .+ \| ([*\d.,]+) \| ([*\d.,]+) \| (.+) \| .+ \| (?:\d+ MiB|–) \|$", README, re.MULTILINE)
    assert len(lines) == 17
    for cells in lines:
        assert all(cell.strip("*").replace(" %", "\N{NO-BREAK SPACE}%") in page for cell in cells), cells
    numbers = re.findall(r"\| (\d\d\.\d\d)(?= \|)", (ROOT / "docs" / "untrained.md").read_text())
    assert len(numbers) == 12
    assert all(f"| {number} " in page for number in numbers), numbers


def test_pictures_have_no_formulas_in_place_of_numbers() -> None:
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        assert "mathdefault" not in picture.read_text(encoding="utf-8"), picture


def test_the_page_of_engines_is_that_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/engines.py writes it, of what `make test-engines` measured."""
    import engines

    monkeypatch.setattr(engines, "PAGE", tmp_path / "engines.md")
    engines.write_page()
    assert (tmp_path / "engines.md").read_text() == (ROOT / "docs" / "results" / "engines.md").read_text()


@pytest.mark.full
def test_the_page_of_scale_is_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scale

    page = scale.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(scale, "PAGE", tmp_path / "scale.md")
    monkeypatch.setattr(scale, "PICTURE", tmp_path / "images" / "scale-curves.svg")
    (tmp_path / "images").mkdir()
    scale.main()
    assert (tmp_path / "scale.md").read_text(encoding="utf-8") == page


def test_the_table_of_compiled_layers_is_that_of_its_results() -> None:
    import compiled

    page = (ROOT / "docs" / "tools.md").read_text()
    written = re.search(r"<!-- compiled -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL)
    assert written is not None
    assert written.group(1) == compiled.table(read_results(compiled.RESULTS))


def test_the_page_of_turns_is_that_of_its_results() -> None:
    """benchmarks/turns.py writes it; the guides to chatting and serving have its numbers."""
    import turns_page

    page = (ROOT / "docs" / "results" / "turns.md").read_text()
    assert turns_page.markdown(read_results(ROOT / "benchmarks" / "results" / "turns.jsonl")) == page
    for name, count in (("chat", 6), ("serving", 5)):
        paragraphs = (ROOT / "docs" / f"{name}.md").read_text().split("\n\n")
        text = " ".join(one for one in paragraphs if "(results/turns.md" in one)
        numbers = re.findall(r"\d+\.\d+", text)
        assert len(numbers) == count
        assert all(f"| {number} |" in page for number in numbers), numbers


def test_the_numbers_of_stripes_without_training_are_those_of_the_results() -> None:
    results = read_results(ROOT / "benchmarks" / "results" / "untrained.jsonl")
    measured = {
        f"{result.value:.3f}"
        for result in results
        if (result.position_from, result.position_to) in ((256, 512), (1024, 2048))
    }
    page = (ROOT / "docs" / "untrained.md").read_text()
    numbers = re.findall(r"\| (\d\.\d{3})(?= \|)", page)
    assert len(numbers) == 24
    assert set(numbers) <= measured, set(numbers) - measured


def test_nothing_of_a_machine_or_a_registry_is_in_the_project() -> None:
    for page in [*PAGES, *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]:
        assert not re.search(r"(^|[\s\"'(=])/(home|root|tmp|work|opt)/", page.read_text()), page


def test_the_first_lines_of_python_in_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code = snippets(ROOT / "README.md")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "CwmForCausalLM"
    assert (tmp_path / "striped" / "zebra.json").is_file()


def test_the_page_of_the_api_has_the_public_names_and_signatures() -> None:
    import zebra

    written = dict(
        re.findall(r"^- `zebra\.(\w+)(\(.*\))?`", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    )
    assert sorted(written) == sorted(zebra.__all__)
    for name, signature in written.items():
        if signature:
            parameters = inspect.signature(getattr(zebra, name)).parameters.values()
            bare = [one.replace(annotation=one.empty) for one in parameters]
            shown = str(inspect.Signature(bare))
            assert signature == re.sub(r"=<function [^>]*>+( at \w+>)?", "=...", shown), name


def test_the_family_table_is_the_codes() -> None:
    """`python -m zebra.model.routes` prints it."""
    page = (ROOT / "docs" / "families.md").read_text()
    written = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL)
    assert written is not None
    assert written.group(1) == table()

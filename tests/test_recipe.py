"""Recipes: what is read, what an override does, and that every refusal names the key, the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import kind_of
from pydantic import ValidationError

from zebra.data.documents import find_files
from zebra.errors import ZebraError
from zebra.stripes import Stripes
from zebra.study.grid import study
from zebra.train.adapt import adapt
from zebra.train.pretrain import pretrain
from zebra.train.recipe import AdaptRecipe, RecipeSection
from zebra.train.recipe_file import named_files, read_recipe
from zebra.train.tune import tune

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

PLAIN: dict[str, Any] = {
    "run": "runs/x",
    "model": "some/where",
    "data": {"files": ["a.txt"]},
    "train": {"length": 64, "max_steps": 200, "learning_rate": 0.001},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """`recipe(tree or text, *overrides)`: written and read."""
    path = tmp_path / "recipe.yaml"

    def read(content: Any = PLAIN, *overrides: str) -> AdaptRecipe:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return read_recipe(path, AdaptRecipe, overrides)

    return read


def changed(**parts: Any) -> dict[str, Any]:
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in PLAIN.items()}
    for name, part in parts.items():
        tree[name] = tree.get(name, {}) | part if isinstance(part, dict) else part
    return tree


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_the_repository_are_read(path: Path) -> None:
    kind = kind_of(path)
    parsed = read_recipe(path, kind)
    assert parsed.run.startswith("runs/")
    assert kind.model_validate(parsed.model_dump()) == parsed


def test_there_are_recipes() -> None:
    assert list(RECIPES.glob("*.yaml"))


def test_what_is_left_out_has_its_default(recipe: Any) -> None:
    parsed = recipe()
    assert (parsed.run, parsed.model, parsed.stripes, parsed.evaluate) == ("runs/x", "some/where", None, None)
    assert parsed.data.model_dump() == {
        "files": ["a.txt"],
        "separator": None,
        "field": None,
        "join": False,
        "append_eos": False,
        "sources": None,
        "recall": None,
        "held_out": None,
        "deduplicate": True,
        "num_proc": 1,
        "cache_dir": None,
    }
    assert parsed.train.model_dump() == {
        "length": 64,
        "max_steps": 200,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw",
        "learning_rate": 0.001,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "device": "best",
        "bf16": False,
        "activation_checkpointing": "auto",
        "compile": False,
        "seed": 0,
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 2,
    }


def test_what_is_given_is_read(recipe: Any) -> None:
    parsed = recipe(
        changed(
            stripes="glll : 512",
            data={"files": ["a", "b/*"], "separator": "--", "join": True, "append_eos": True, "cache_dir": "here"},
            train={"adam_beta1": 0.8, "bf16": True, "lr_scheduler_type": "linear", "warmup_steps": 200},
            evaluate={"files": ["c"], "length": 2, "convention": "strided", "eval_steps": 200},
        )
    )
    assert parsed.stripes == "GLLL:512"
    assert parsed.data.files == ["a", "b/*"]
    assert (parsed.data.separator, parsed.data.join, parsed.data.append_eos, parsed.data.cache_dir) == (
        "--",
        True,
        True,
        "here",
    )
    assert (parsed.train.adam_beta1, parsed.train.adam_beta2) == (0.8, 0.95)
    assert (parsed.train.bf16, parsed.train.lr_scheduler_type, parsed.train.warmup_steps) == (True, "linear", 200)
    assert (parsed.evaluate.length, parsed.evaluate.convention, parsed.evaluate.eval_steps) == (2, "strided", 200)


def mixed(*changes: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A recipe with two sources, the first and second changed."""
    sources = [{"name": "long", "files": ["a"], "share": 0.6}, {"name": "short", "files": ["b"], "share": 0.4}]
    sources = [source | change for source, change in zip(sources, [*changes, {}, {}], strict=False)]
    return PLAIN | {"data": {"sources": sources} | data}


def test_a_mixture_is_read(recipe: Any) -> None:
    parsed = recipe(
        mixed({"min_tokens": 4096, "field": "body"}, {"max_tokens": 4096, "separator": "--"}, held_out=0.01)
    )
    long, short = parsed.data.sources
    assert (long.name, long.files, long.share) == ("long", ["a"], 0.6)
    assert (long.field, long.separator, long.min_tokens, long.max_tokens) == ("body", None, 4096, None)
    assert (short.field, short.separator, short.min_tokens, short.max_tokens) == (None, "--", 0, 4096)
    assert (parsed.data.files, parsed.data.held_out, parsed.data.deduplicate) == (None, 0.01, True)
    thirds = [{"name": name, "files": ["a"], "share": 1 / 3} for name in "abc"]
    assert len(recipe(PLAIN | {"data": {"sources": thirds}}).data.sources) == 3


def test_held_out_documents_need_no_files(recipe: Any) -> None:
    parsed = recipe(changed(data={"held_out": 0.05}, evaluate={"length": 4, "join": True}))
    assert (parsed.evaluate.files, parsed.data.held_out, parsed.evaluate.join) == (None, 0.05, True)
    assert AdaptRecipe.model_validate(parsed.model_dump()) == parsed
    assert recipe(changed(data={"held_out": 0.05})).evaluate is None  # so that two runs train on the same documents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN | {"data": {}}, r"data: the text requires either files or sources; got neither"),
        (mixed(files=["a"]), r"data: the text requires either files or sources; got both"),
        (mixed(separator="--"), r"data: separator applies only to files; set it in each source"),
        (mixed(field="body"), r"data: field applies only to files; set it in each source"),
        (mixed({"name": "short"}), r"data: names must be unique; got short twice"),
        (mixed({"share": 0.5}), r"data: the shares of the sources must sum to 1; got 0\.9"),
        (mixed({"share": 0.60001}), r"data: the shares of the sources must sum to 1; got 1\.00001"),
        (mixed({"share": 0}), r"data\.sources\.0\.share: .*greater than 0 \(got 0\)"),
        (mixed({"share": 1.5}), r"data\.sources\.0\.share: .*less than or equal to 1 \(got 1\.5\)"),
        (mixed({"files": []}), r"data\.sources\.0\.files: .*at least 1 item"),
        (
            mixed({"min_tokens": 8, "max_tokens": 8}),
            r"data\.sources\.0: max_tokens \(8\) must be above min_tokens \(8\)",
        ),
        (mixed({"min_token": 8}), r"unknown key data\.sources\.0\.min_token; did you mean min_tokens\?"),
        (PLAIN | {"data": {"sources": []}}, r"data\.sources: .*at least 1 item"),
        (changed(data={"held_out": 1}), r"data\.held_out: .*less than 1 \(got 1\)"),
        (changed(data={"held_out": 0.0}), r"data\.held_out: .*greater than 0"),
        (changed(data={"num_proc": 0}), r"data\.num_proc: .*\(got 0\)"),
        (changed(evaluate={"length": 4}), r"either evaluate\.files or data\.held_out; got neither"),
        (
            changed(data={"held_out": 0.1}, evaluate={"files": ["c"], "length": 4}),
            r"either evaluate\.files or data\.held_out; got both",
        ),
        (
            changed(data={"held_out": 0.1}, evaluate={"separator": "--", "length": 4}),
            r"evaluate\.separator applies only to evaluate\.files",
        ),
    ],
)
def test_refused_texts(recipe: Any, content: Any, message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        recipe(content)


def test_a_recipe_does_not_change(recipe: Any) -> None:
    parsed = recipe()
    with pytest.raises(ValidationError, match="frozen"):
        parsed.train.max_steps = 5


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001"])
def test_every_way_to_write_a_rate(recipe: Any, number: str) -> None:
    assert recipe(PLAIN, f"train.learning_rate={number}").train.learning_rate == 0.001


# -- overrides


def test_overrides(recipe: Any) -> None:
    parsed = recipe(
        PLAIN,
        "train.max_steps=400",
        " train.lr_scheduler_type =constant",
        "data.files=[b.txt, c.txt]",
        "data.separator='a=b'",
        "stripes=GL:8",
        "data.join=true",
        "run=one",
        "run=two",
        "evaluate.length=32",
        "evaluate.files=[d.txt]",
    )
    assert (parsed.train.max_steps, parsed.train.lr_scheduler_type, parsed.train.length) == (400, "constant", 64)
    assert parsed.data.files == ["b.txt", "c.txt"]
    assert (parsed.data.separator, parsed.data.join) == ("a=b", True)
    assert (parsed.stripes, parsed.run) == ("GL:8", "two")
    assert (parsed.evaluate.length, parsed.evaluate.files) == (32, ["d.txt"])


def test_an_override_of_an_alias_leaves_what_it_stands_for(tmp_path: Path) -> None:
    class Texts(RecipeSection):
        one: dict[str, dict[str, int]]
        two: dict[str, dict[str, int]]

    (tmp_path / "recipe.yaml").write_text("one: &same {inner: {a: 1}}\ntwo: *same\n")
    parsed = read_recipe(tmp_path / "recipe.yaml", Texts, ["two.inner.a=2", "two.inner.b=3"])
    assert (parsed.one, parsed.two) == ({"inner": {"a": 1}}, {"inner": {"a": 2, "b": 3}})


def test_an_empty_override_takes_a_value_away(recipe: Any) -> None:
    assert recipe(changed(stripes="GL:8"), "stripes=").stripes is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "must be a.b=value; got 'train.max_steps'"),
        ("=5", "must be a.b=value; got '=5'"),
        ("", "must be a.b=value"),
        ("run.deep=5", "'run.deep=5' goes below run, which is a value"),
        ("data.files.0=x", "goes below files"),
        ("train.max_steps=[1", "the value of the override 'train.max_steps=\\[1' is not valid YAML"),
        ("train.step=5", r"unknown key train\.step; did you mean max_steps\?"),
        ("trane.steps=5", r"unknown key trane; did you mean train\?"),
        ("train.max_steps=many", r"train\.max_steps: .*integer.* \(got 'many'\)"),
        ("stripes=10:20:30", r"stripes must be written .* got '10:20:30'"),
        ("run=-5", r"run: .*valid string \(got -5\)"),
        ("run=1_000", r"run: .*valid string \(got 1000\)"),
        ("run=1e3", r"run: .*valid string \(got 1000\.0\)"),
        ("train.max_steps=", r"train\.max_steps: .*integer.* \(got None\)"),
    ],
)
def test_refused_overrides(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        recipe(PLAIN, override)


# -- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(traning={"x": 1}), r"recipe\.yaml: unknown key traning; did you mean train(ing)?\?"),
        (changed(train={"lenght": 1}), r"unknown key train\.lenght; did you mean length\?"),
        (changed(train={"learningrate": 1}), r"unknown key train\.learningrate; did you mean learning_rate\?"),
        (changed(data={"seperator": "x"}), r"unknown key data\.seperator; did you mean separator\?"),
        (
            changed(evaluate={"files": ["a"], "length": 4, "convenion": 1}),
            r"unknown key evaluate\.convenion; did you mean convention\?",
        ),
        (changed(zzzz=1), "unknown key zzzz; see recipes/ for the known keys"),
        ({"run": "x", "model": "y", "data": PLAIN["data"]}, "the key train is missing; add it"),
        (changed() | {"train": {"length": 4, "max_steps": 1}}, r"the key train\.learning_rate is missing"),
        (
            changed(data={"recall": {"share": 1.0, "hold": 0.5, "until": 0.5}}),
            r"until \(0\.5\) must be above hold \(0\.5\); change one of them",
        ),
        (changed(data={"files": []}), r"data\.files: .*at least 1 item"),
        (changed(data={"files": "a.txt"}), r"data\.files: .*list.* \(got 'a\.txt'\)"),
        (changed(train={"length": 1}), r"train\.length: .*greater than or equal to 2 \(got 1\)"),
        (changed(train={"max_steps": 0}), r"train\.max_steps: .*\(got 0\)"),
        (changed(train={"per_device_train_batch_size": 0}), r"train\.per_device_train_batch_size: "),
        (changed(train={"gradient_accumulation_steps": 0}), r"train\.gradient_accumulation_steps: "),
        (changed(train={"learning_rate": 0}), r"train\.learning_rate: .*greater than 0 \(got 0\)"),
        (changed(train={"max_grad_norm": 0}), r"train\.max_grad_norm: "),
        (changed(train={"weight_decay": -1}), r"train\.weight_decay: "),
        (changed(train={"save_total_limit": 1}), r"train\.save_total_limit: .*\(got 1\)"),
        (changed(train={"lr_scheduler_type": "cosin"}), r"train\.lr_scheduler_type: .*'cosine'.*\(got 'cosin'\)"),
        (changed(train={"bf16": "yes"}), r"train\.bf16: .*\(got 'yes'\)"),
        (changed(train={"adam_beta2": 1.0}), r"train\.adam_beta2"),
        (changed(stripes="GLLL"), r"stripes: stripes must be written PATTERN:WINDOW.* \(got 'GLLL'\)"),
        (changed(stripes="GL:0"), r"stripes: the window, the number"),
        (
            changed(train={"save_steps": 15}),
            r"train: save_steps \(15\) must be a multiple of logging_steps \(10\).*change one",
        ),
        (
            changed(train={"lr_scheduler_type": "constant", "warmup_steps": 3}),
            r"train: lr_scheduler_type constant has no warm-up; got warmup_steps 3\. Set lr_scheduler_type to",
        ),
        (changed(train={"warmup_steps": 201}), r"train: warmup_steps \(201\) cannot exceed max_steps \(200\); lower"),
        (
            changed(evaluate={"files": ["a"], "length": 4, "eval_steps": 201}),
            r"evaluate\.eval_steps \(201\) cannot exceed train\.max_steps \(200\); lower it",
        ),
        (changed(evaluate={"files": ["a"], "length": 4, "eval_steps": 0}), r"evaluate\.eval_steps: "),
        (changed(evaluate={"files": ["a"], "length": 1}), r"evaluate\.length: "),
        ("run: [1", "is not valid YAML"),
        ("run: x\n\tmodel: y", "is not valid YAML"),
        ("- a\n- b", "is not a mapping of keys to values"),
        ("", "is not a mapping"),
        ("just words", "is not a mapping"),
        ("1: a", r"\b1\b"),
    ],
)
def test_refused_recipes(recipe: Any, content: Any, message: str) -> None:
    with pytest.raises(ZebraError, match=message) as refused:
        recipe(content)
    assert "recipe.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_problems_are_named_at_once(recipe: Any) -> None:
    with pytest.raises(
        ZebraError, match=r"train\.max_steps: .*; train\.length: .*|train\.length: .*; train\.max_steps: "
    ):
        recipe(changed(train={"max_steps": 0, "length": 0}))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match=r"absent\.yaml cannot be read: No such file"):
        read_recipe(tmp_path / "absent.yaml", AdaptRecipe)
    with pytest.raises(ZebraError, match="is a folder, a device or a pipe"):
        read_recipe(tmp_path, AdaptRecipe)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9")
    with pytest.raises(ZebraError, match=r"latin\.yaml is not valid YAML"):
        read_recipe(tmp_path / "latin.yaml", AdaptRecipe)


@pytest.mark.parametrize("value", ["2:33", "0,4:12", "GL:8", "08:8"])
def test_a_layout_needs_no_quotes(recipe: Any, value: str) -> None:
    """YAML 1.1 reads 2:33 as a number of base 60."""
    expected = str(Stripes.parse(value))
    assert recipe(PLAIN, f"stripes={value}").stripes == expected
    assert recipe(yaml.safe_dump(PLAIN) + f"stripes: {value}\n").stripes == expected


@pytest.mark.parametrize(
    ("value", "number"), [("5", 5), ("+5", 5), ("0", 0), ("1_000", 1000), ("123456789", 123456789)]
)
def test_whole_numbers(recipe: Any, value: str, number: int) -> None:
    assert recipe(PLAIN, f"train.seed={value}").train.seed == number
    assert type(recipe(PLAIN, f"train.seed={value}").train.seed) is int


@pytest.mark.parametrize("value", ["2024-13-01", "08"])
def test_what_is_no_date_and_no_octal_number_is_text(recipe: Any, value: str) -> None:
    assert recipe(PLAIN, f"run={value}").run == value
    assert recipe(yaml.safe_dump(PLAIN).replace("runs/x", value)).run == value


def test_a_rope_is_read_as_it_is_printed(recipe: Any) -> None:
    assert recipe().rope is None
    assert recipe(changed(rope=" YaRN:8.0 ")).rope == "yarn:8"
    assert recipe(changed(rope="none")).rope is None
    with pytest.raises(ZebraError, match=r"rope: a rope must be none, base:THETA.*got yarn:1"):
        recipe(PLAIN, "rope=yarn:1")


_BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 60))])
_MERGED = "\n".join(
    ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))]
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_BOMB, "with its aliases expanded it has more than 100,000 values"),
        (_MERGED, "with its aliases expanded it has more than 100,000 values"),
        ("a: &a [*a]", "with its aliases expanded it has more than 100,000 values"),
        ("a: " + "[" * 3000 + "]" * 3000, "it is nested too deeply"),
        ("# " + "x" * (1 << 20), "it has more than 1,048,576 characters"),
    ],
    ids=["aliases", "merged", "cycle", "deep", "long"],
)
def test_a_recipe_that_would_not_end_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ZebraError, match=f"is not valid YAML: {message}"):
        read_recipe(file, AdaptRecipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=1000000000000000000", r"train\.max_steps: an integer must be at most 2\^32"),
        (f"train.per_device_train_batch_size={10**30}", r"batch_size: an integer must be at most 2\^32"),
        ("train.per_device_train_batch_size=100000000", "less than or equal to 1048576"),
        ("lora={r: 1000000000}", r"lora\.r: .*less than or equal to 16384"),
    ],
)
def test_a_number_beyond_any_machine_is_refused(recipe: Any, override: str, message: str) -> None:
    with pytest.raises(ZebraError, match=message):
        recipe(PLAIN, override)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_recipe_is_a_file(tmp_path: Path, kind: str) -> None:
    """/dev/zero never ends, and a pipe without a writer never begins."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ZebraError, match="is a folder, a device or a pipe"):
        read_recipe(tmp_path / "pipe" if kind == "pipe" else "/dev/zero", AdaptRecipe)


@pytest.mark.parametrize("run", [adapt, tune, pretrain, study], ids=lambda run: run.__name__)
def test_a_training_takes_the_path_of_a_recipe(run: Callable[..., Any], tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", str(tmp_path / "nowhere.yaml")):
        with pytest.raises(ZebraError, match=r"the recipe .*nowhere.yaml cannot be read"):
            run(path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(PLAIN | {"nothing": 1}))
    with pytest.raises(ZebraError, match="unknown key nothing"):
        run(tmp_path / "recipe.yaml")
    with pytest.raises(ZebraError, match=r"a recipe must be a \w+Recipe or the path .* got a dict"):
        run(PLAIN)


def test_a_pattern_of_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zebra.data.documents._MOST_FILES", 3)
    for name in "abc":
        (tmp_path / name).write_text(name)
    assert len(find_files([str(tmp_path)])) == 3
    (tmp_path / "d").mkdir()
    for pattern in (f"{tmp_path}/**", str(tmp_path)):
        with pytest.raises(ZebraError, match=r"matches more than 3 files and folders. Name a folder with fewer"):
            find_files([pattern])
    for pattern in ("/**", "/", "/**/*.txt"):
        with pytest.raises(ZebraError, match="matches the whole file system"):
            find_files([pattern])


def test_files_of_a_recipe_are_those_of_tasks_too(tmp_path: Path) -> None:
    """A pipeline skipped an evaluation whose task, a YAML file, had changed."""
    (tmp_path / "task.yaml").write_text("task: mine")
    tasks = {"tasks": [str(tmp_path / "task.yaml"), "passkey", str(tmp_path)], "include": "more"}
    assert named_files({"tasks": tasks, "data": {"files": ["a"]}}) == [str(tmp_path / "task.yaml"), "more", "a"]

"""Names OWNER/NAME work like directories, from a cache in the layout of huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import STORIES, TEXT, Zebra, refused
from huggingface_hub import constants

import zebra as package
from zebra import ZebraError, hub
from zebra.model.checkpoint import read_local_attention
from zebra.pipeline.recipe import read_pipeline
from zebra.pipeline.run import run
from zebra.plan.decoder import read_decoder
from zebra.train.adapt import adapt
from zebra.train.recipe import AdaptRecipe

NAME, COMMIT = "nobody/stories", "c0ffee" * 6 + "c0ff"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's cache, of which `published` makes a repository; the working directory is empty."""
    hub._download.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "hub"
    hub._download.cache_clear()


def publish(cache: Path, source: Path, name: str = NAME) -> Path:
    """Links to blobs in the snapshot of a commit, which a branch names."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    for i, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        (folder / "blobs").mkdir(exist_ok=True)
        (folder / "blobs" / str(i)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / "blobs" / str(i))
    return snapshot


def test_a_name_is_what_the_directory_is(cache: Path, tmp_path: Path) -> None:
    package.convert(STORIES, tmp_path / "striped", "GLLL:129+4")
    publish(cache, tmp_path / "striped")
    assert read_local_attention(NAME).sinks == 4
    ids = torch.randint(3, 500, (1, 300))
    named, local = (package.load(path)(ids).logits for path in (NAME, tmp_path / "striped"))
    assert torch.equal(named, local)


def test_a_name_is_converted_exported_and_verified(cache: Path, tmp_path: Path) -> None:
    snapshot = publish(cache, STORIES)
    converted = package.convert(NAME, tmp_path / "out", "GLLL:9")
    assert not any(file.is_symlink() for file in converted.iterdir())
    assert json.loads((converted / "zebra.json").read_text())["source"] == NAME
    assert (converted / "model.safetensors").read_bytes() == (snapshot / "model.safetensors").read_bytes()
    assert all(check.passed for check in package.verify(converted, against=NAME))
    package.export(NAME, tmp_path / "mlx", to="mlx", stripes="GLLL:9")
    package.export(NAME, tmp_path / "stories.gguf", to="gguf", stripes="GLLL:9")


def test_the_commands_take_a_name(cache: Path, zebra: Zebra) -> None:
    publish(cache, STORIES)
    text = str(TEXT / "tinystories_test.txt")
    for command in (
        ("plan", NAME, "--length", 1024, "--json"),
        ("generate", NAME, "--prompt", "Once", "--max-new-tokens", 2),
        ("select", NAME, "--budget", 0.6, "--window", 32, "--length", 64, "--samples", 4, "--text", text),
        ("compare", NAME, text, "--length", 640, "--methods", "self-extend", "--windows", 1, "--samples", 1),
    ):
        done = zebra(*command)
        assert done.returncode == 0, done.stderr
    assert read_decoder(NAME).layers == 5


def test_a_recipe_takes_a_name(cache: Path) -> None:
    publish(cache, STORIES)
    train = {"length": 128, "max_steps": 1, "learning_rate": 1e-3}
    texts = {"files": [str(TEXT / "tinystories_test.txt")], "separator": "<|endoftext|>", "join": True}
    recipe: dict[str, Any] = {"run": "run", "model": NAME, "stripes": "GLLL:33", "train": train, "data": texts}
    adapt(AdaptRecipe.model_validate(recipe))
    assert json.loads(Path("run/model/zebra.json").read_text())["source"] == NAME


def test_a_pipeline_takes_a_name(cache: Path) -> None:
    publish(cache, STORIES)
    Path("pipeline.yaml").write_text(f"{{run: run, model: {NAME}, stages: {{convert: {{stripes: 'GLLL:33'}}}}}}")
    assert [stage["state"] for stage in run(read_pipeline("pipeline.yaml"))] == ["new"]
    assert [stage["state"] for stage in run(read_pipeline("pipeline.yaml"))] == ["done"]


def test_what_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of weights in several formats: safetensors, otherwise pickle, never the subfolders of other formats."""
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors", "tokenizer.model"]
    files += ["consolidated.safetensors", "consolidated.safetensors.index.json"]
    pickled = ["config.json", "pytorch_model.bin", "onnx/model.onnx"]
    nested = ["sub/config.json", "sub/model.safetensors", "config.json"]

    def downloaded(repository: list[str], **arguments: Any) -> set[str]:
        patterns: list[dict[str, Any]] = []

        def record(name: str, *, tqdm_class: Any, revision: str | None = None, **filters: Any) -> str:
            patterns.append(filters)
            assert tqdm_class(total=1, desc="bytes", unit="B", unit_scale=True).disable  # stderr is no terminal here
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
        hub._download.cache_clear()
        for name in repository:
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "snapshot" / name).touch()
        hub.hub_directory(NAME, **arguments)
        for name in repository:
            (tmp_path / "snapshot" / name).unlink()
        return {
            name for filters in patterns for name in huggingface_hub.utils.filter_repo_objects(repository, **filters)
        }

    assert downloaded(files) == {"config.json", "model.safetensors", "tokenizer.model"}
    assert downloaded(files, weights=False) == {"config.json", "tokenizer.model"}
    assert downloaded(pickled) == {"config.json", "pytorch_model.bin"}
    assert downloaded(nested, subfolder="sub", revision="v2") == {"sub/config.json", "sub/model.safetensors"}


def test_a_process_takes_one_version(cache: Path) -> None:
    snapshot = publish(cache, STORIES)
    assert hub.hub_directory(NAME) == snapshot
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    assert hub.hub_directory(NAME) == snapshot


def test_names_that_are_none(cache: Path, zebra: Zebra, tmp_path: Path) -> None:
    refused(zebra("convert", "nobody/nothing", tmp_path / "out", "--stripes", "GL:64"), "no directory nobody/nothing")
    refused(zebra("plan", "nobody/nothing", "--length", 64), "no directory nobody/nothing")
    refused(zebra("compare", "nobody/nothing", TEXT, "--length", 64), "nobody/nothing", "the hub or in its cache")
    with pytest.raises(ZebraError, match=r"there is no checkpoint at \./nobody/nothing"):
        package.load("./nobody/nothing")
    with pytest.raises(ZebraError, match=r"there is no checkpoint at \./nobody/nothing"):
        package.convert("./nobody/nothing", tmp_path / "out", "GL:64")
    (snapshot := publish(cache, STORIES) / "adapter_config.json").write_text("{}")
    with pytest.raises(ZebraError, match=f"{snapshot.parent} has both a full checkpoint and a peft adapter"):
        package.load(NAME)

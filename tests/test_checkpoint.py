"""Files of checkpoints that come from others: what they may name, what they may run, what a copy may touch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

import zebra
from zebra import ZebraError

IDS = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))


def rejected(match: str) -> pytest.RaisesExc[ZebraError]:
    return pytest.raises(ZebraError, match=match)


def set_fields(checkpoint: Path, **fields: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def digests(directory: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.rglob("*") if f.is_file()}


def sharded(directory: Path, *names: str) -> Path:
    """A tiny checkpoint whose tensors lie in turn in shards of these names."""
    tiny_model("llama").save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = {name: dict(list(tensors.items())[i :: len(names)]) for i, name in enumerate(names)}
    for name, part in shards.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, directory / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("names", [("a/w.safetensors", "b/w.safetensors"), ("a/w.safetensors",)])
@pytest.mark.parametrize("links", [True, False])
def test_shards_in_subfolders_are_shared_and_never_written(
    names: tuple[str, ...], links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(tmp_path / "source", *names)
    before, expected = digests(source), zebra.load(source)(IDS).logits
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    converted = zebra.convert(source, tmp_path / "out", "GL:64")
    assert digests(source) == before
    assert all((converted / name).samefile(source / name) == links for name in names)
    assert torch.equal(zebra.load(converted)(IDS).logits, expected)


@pytest.mark.parametrize("name", ["../w.safetensors", "{}/w.safetensors", "a/../../w.safetensors", "config.json"])
def test_an_index_names_shards_within_the_checkpoint(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    source = sharded(tmp_path / "source", "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((source / "w.safetensors").read_bytes())
    (outside / "w.safetensors").write_bytes((source / "w.safetensors").read_bytes())
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"w.safetensors"', json.dumps(name.format(outside))))
    before = digests(tmp_path)
    for act in (lambda: zebra.load(source), lambda: zebra.convert(source, tmp_path / "out", "GL:9")):
        with rejected(r"a shard is a \.safetensors file within the checkpoint's directory; got"):
            act()
    assert digests(tmp_path) == before


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_integers(kind: torch.dtype, file: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(kind)
    (tmp_path / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    with rejected(rf"{name} holds integers or 8-bit numbers, and config\.json has no quantization_config"):
        zebra.load(tmp_path)

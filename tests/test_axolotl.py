"""The plug-in of axolotl, by axolotl's own base class where it is installed, else by its published interface.

axolotl needs Python 3.12 and pins versions of its own, so the environment of the tests has none of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, STORIES
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import zebra
from zebra import ZebraError

IDS = torch.arange(3, 63)[None]


class PublishedInterface:
    """The methods of `axolotl.integrations.base.BasePlugin` 0.21 that the plug-in overrides, with their arguments."""

    def get_input_args(self) -> str | None:
        raise NotImplementedError

    def register(self, cfg: dict[str, Any]) -> None:
        raise NotImplementedError

    def post_model_build(self, cfg: Any, model: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the plug-in."""
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", PublishedInterface, raising=False)
    module = importlib.import_module("zebra.integrations.axolotl")
    yield module
    del sys.modules["zebra.integrations.axolotl"]


def recipe(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    return {"base_model": str(STORIES), "output_dir": str(tmp_path / "out"), "attn_implementation": "sdpa"} | keys


def built(plugin: Any, cfg: dict[str, Any]) -> Any:
    """The model in the order of axolotl: register, check, load, build."""
    one = plugin.ZebraPlugin()
    one.register(cfg)
    assert one.get_input_args() == "zebra.integrations.axolotl.ZebraArgs"
    cfg |= plugin.ZebraArgs(zebra=cfg.get("zebra")).model_dump()
    model = AutoModelForCausalLM.from_pretrained(cfg["base_model"], attn_implementation=cfg["attn_implementation"])
    one.post_model_build(cfg, model)
    return model


def test_its_methods_are_those_that_axolotl_calls(plugin: Any) -> None:
    base = plugin.ZebraPlugin.__base__
    for name, method in vars(plugin.ZebraPlugin).items():
        if inspect.isfunction(method):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(vars(base)[name]).parameters)


def test_the_entry_point_names_it(plugin: Any) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["axolotl.plugins"]
    module, _, name = points["zebra"].partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.ZebraPlugin


@pytest.mark.parametrize("keys", [{"stripes": "GLLL:9"}, {"stripes": "GLLL:9+2"}, {"self_extend": "4:12"}, {}])
@torch.no_grad()
def test_the_model_is_that_of_load(plugin: Any, keys: dict[str, str], tmp_path: Path) -> None:
    model, expected = built(plugin, recipe(tmp_path, zebra=keys)), zebra.load(STORIES, **keys)
    assert (type(model).__name__, model.config._attn_implementation) == (type(expected).__name__, "zebra")
    for positions in (torch.arange(60), torch.cat([torch.arange(25), torch.arange(35)])):
        arguments = {"position_ids": positions[None], "use_cache": False}
        torch.testing.assert_close(model(IDS, **arguments).logits, expected(IDS, **arguments).logits, rtol=0, atol=0)


def test_self_extend_beside_axolotls_own_attention_layers_is_refused(plugin: Any, tmp_path: Path) -> None:
    """axolotl 0.21 switches them on by itself where it trains an adapter."""
    cfg = recipe(tmp_path, zebra={"self_extend": "4:12"}, lora_qkv_kernel=True)
    with pytest.raises(ZebraError, match="Set lora_qkv_kernel: false, lora_o_kernel: false"):
        built(plugin, cfg)


def test_a_recipe_without_the_key_is_left_as_it_is(plugin: Any, tmp_path: Path) -> None:
    cfg = recipe(tmp_path)
    before = dict(cfg)
    assert built(plugin, cfg).config._attn_implementation == "sdpa"
    assert cfg == before | {"zebra": None}


def test_what_is_trained_is_saved_with_its_stripes(plugin: Any, tmp_path: Path) -> None:
    built(plugin, recipe(tmp_path, zebra={"stripes": "GLLL:9"})).save_pretrained(tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", attn_implementation="sdpa")
    with torch.no_grad():
        expected = zebra.load(STORIES, stripes="GLLL:9")(IDS).logits
        torch.testing.assert_close(trained(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [{"stripes": "GXLL:9"}, {"stripe": "GLLL:9"}, {"self_extend": "x"}, {"stripes": 9}])
def test_bad_keys_are_left_to_axolotls_checks(plugin: Any, keys: dict[str, Any], tmp_path: Path) -> None:
    cfg = recipe(tmp_path, zebra=keys)
    plugin.ZebraPlugin().register(cfg)
    assert cfg == recipe(tmp_path, zebra=keys)
    with pytest.raises(ValidationError, match=f"zebra.{next(iter(keys))}"):
        plugin.ZebraArgs(zebra=keys)


@pytest.mark.parametrize("value", ["GLLL:9", True, ["stripes"]])
def test_a_value_that_is_no_table_is_left_to_axolotls_checks(plugin: Any, value: object, tmp_path: Path) -> None:
    plugin.ZebraPlugin().register(recipe(tmp_path, zebra=value))
    with pytest.raises(ValidationError, match="zebra"):
        plugin.ZebraArgs(zebra=value)


def test_a_second_process_takes_the_conversion_of_the_first(plugin: Any, tmp_path: Path) -> None:
    keys = {"zebra": {"stripes": "GLLL:9"}, "base_model_config": str(STORIES)}
    first, second = (recipe(tmp_path, **keys) for _ in range(2))
    for cfg in (first, second, second):
        plugin.ZebraPlugin().register(cfg)
    assert first["base_model"] == second["base_model"] == str(tmp_path / "out" / "striped-base")
    assert "base_model_config" not in first  # where it is None, axolotl 0.21 fails in its checks
    with pytest.raises(ZebraError, match=r"as GLLL:9, but the recipe has .* as GL:9"):
        plugin.ZebraPlugin().register(recipe(tmp_path, zebra={"stripes": "GL:9"}))


def test_what_cannot_be_converted_is_refused(plugin: Any, tmp_path: Path) -> None:
    keys = {"stripes": "GLLL:9"}
    with pytest.raises(ZebraError, match="base_model_config"):
        plugin.ZebraPlugin().register(recipe(tmp_path, zebra=keys, base_model_config="other"))
    shutil.copytree(STORIES, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(ZebraError, match=r"config\.json"):
        plugin.ZebraPlugin().register(recipe(tmp_path, base_model=str(tmp_path / "broken"), zebra=keys))


def test_axolotl_itself_finds_it_and_checks_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plug-in manager, its entry points and the class that it makes of its own keys and ours."""
    base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
    config = importlib.import_module("axolotl.integrations.config")
    (tmp_path / "zebra_test-1.dist-info").mkdir()
    (tmp_path / "zebra_test-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zebra-test\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["axolotl.plugins"]
    (tmp_path / "zebra_test-1.dist-info" / "entry_points.txt").write_text(
        f"[axolotl.plugins]\nzebra = {points['zebra']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base.reset_plugin_entry_points_cache()
    manager = base.PluginManager.get_instance()
    assert "zebra.integrations.axolotl.ZebraPlugin" in manager.plugins
    _, checked = config.merge_input_args()
    data = {"datasets": [{"path": "x", "type": "completion"}], "base_model": "x", "learning_rate": 1e-4}
    data |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1}
    assert checked(**data, zebra={"stripes": "GLLL:9"}).zebra.stripes == "GLLL:9"
    with pytest.raises(ValidationError, match=r"zebra.stripes"):
        checked(**data, zebra={"stripes": "GXLL:9"})

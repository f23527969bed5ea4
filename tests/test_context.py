"""How long a text a model reads: by all fields of its config, in what loads, measures, trains and plans it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SHAPE, STORIES, set_fields
from transformers import AutoConfig

import zebra
from zebra import ZebraError
from zebra.evaluate.target import EvalTarget
from zebra.model.checkpoint import read_config
from zebra.model.context import context_length
from zebra.model.rope import changes_with_length
from zebra.model.self_extend import resolve_self_extend
from zebra.plan.decoder import decoder_from_config
from zebra.positions import SelfExtend
from zebra.stripes import GLOBAL, LOCAL
from zebra.train.recipe import CheckpointRecipe
from zebra.train.source import adapted_config


def yarn(factor: float | None, original: int, name: str = "rope_type") -> dict[str, Any]:
    return {name: "yarn", "factor": factor, "original_max_position_embeddings": original, "rope_theta": 1e4}


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
REACHES: dict[str, tuple[dict[str, Any], int]] = {
    "Mistral 0.3": ({"model_type": "mistral", "max_position_embeddings": 32768}, 32768),
    "Llama 3.1": ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3 | {"factor": 8.0}}, 131072),
    "Llama 3.2": ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3 | {"factor": 32.0}}, 131072),
    "llama3 by hand": ({"max_position_embeddings": 8192, "rope_scaling": LLAMA3 | {"factor": 4.0}}, 32768),
    "Qwen2.5 with YaRN": (
        {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": yarn(4.0, 32768, "type")},
        131072,
    ),
    "Qwen3 with YaRN": (
        {"model_type": "qwen3", "max_position_embeddings": 40960, "rope_scaling": yarn(4.0, 32768)},
        131072,
    ),
    "YaRN, no original": ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048),
    "YaRN, no factor": ({"max_position_embeddings": 512, "rope_parameters": yarn(None, 128)}, 512),
    "YaRN, trained further": ({"max_position_embeddings": 4096, "rope_parameters": yarn(4.0, 512)}, 4096),
    "DeepSeek V3": ({"max_position_embeddings": 163840, "rope_scaling": yarn(40.0, 4096, "type")}, 163840),
    "OLMo 3": (
        {
            "model_type": "olmo3",
            "max_position_embeddings": 65536,
            "rope_parameters": {GLOBAL: yarn(8.0, 8192), LOCAL: {"rope_type": "default", "rope_theta": 5e5}},
        },
        65536,
    ),
    "Gemma 3": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 131072,
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        131072,
    ),
    "Phi-3 at 128K": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
        131072,
    ),
    "longrope by hand": (
        {
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
        32768,
    ),
    "Vicuna at 16K": (
        {
            "max_position_embeddings": 4096,
            "max_sequence_length": 16384,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        16384,
    ),
    "deepseek-coder": ({"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    "InternLM 2": ({"max_position_embeddings": 32768, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 65536),
}


@pytest.mark.parametrize("name", REACHES)
def test_how_far_a_model_reaches_is_read_from_all_fields(name: str) -> None:
    """Published configs, in the form that they have on disk: the same for what loads a model and what plans it."""
    fields, reach = REACHES[name]
    fields = {"model_type": "llama", **SHAPE, **fields, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(**copy.deepcopy(fields))
    assert context_length(config) == reach
    assert context_length(type(config).from_dict(config.to_dict())) == reach
    assert decoder_from_config(fields, name=name).trained_length == reach
    assert decoder_from_config(config.to_dict(), name=name).trained_length == reach
    if not changes_with_length(config):
        setting = SelfExtend.parse(f"auto:{4 * reach}", reach)
        assert resolve_self_extend(f"auto:{4 * reach}", config) == setting
        assert context_length(config, setting) == setting.reach(reach) >= 4 * reach


def test_a_model_with_yarn_is_measured_as_far_as_it_reaches(stories: Path, recwarn: pytest.WarningsRecorder) -> None:
    set_fields(stories, rope_parameters=yarn(4.0, 512))
    target = EvalTarget(stories)
    target.check_length(2048, beyond=False)
    with pytest.raises(ZebraError, match=r"2,048 positions.*Use a shorter one, Self-Extend, or a checkpoint") as error:
        target.check_length(2049, beyond=False)
    assert "yarn" not in str(error.value)  # a remedy that would be refused too
    with pytest.raises(ZebraError, match="a rope such as yarn:8, Self-Extend"):
        EvalTarget(STORIES).check_length(2049, beyond=False)
    with pytest.raises(ZebraError, match="a larger factor of the rope"):
        EvalTarget(STORIES, rope="yarn:2").check_length(2049, beyond=False)
    zebra.generate(stories, "Once " * 600, max_new_tokens=1)
    assert not recwarn.list


def test_a_model_with_yarn_is_adapted_into_a_config_without_contradiction(stories: Path) -> None:
    set_fields(stories, rope_parameters=yarn(4.0, 512))
    read = read_config(stories)
    lengths = {}
    for length in (512, 1024, 3000):
        recipe = CheckpointRecipe.model_construct(
            model=str(stories), stripes=None, rope=None, train=SimpleNamespace(length=length)
        )
        lengths[length] = adapted_config(recipe, read).max_position_embeddings
    assert lengths == {512: 512, 1024: 2048, 3000: 3000}  # transformers warns of M = 1,024: it is not 4 x 512

"""What the tests share: tiny random checkpoints of every family, and a strict, offline, quiet machine."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT / "examples" / "stories260K"
TEXT = ROOT / "examples" / "text"

torch.set_num_threads(1)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Larger than the default of 0.02, so that attention is far from uniform and a wrong mask shows.
    "initializer_range": 0.3,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 8}}
    shape = SHAPE | own.get(family, {}) | changes
    return AutoConfig.for_model(family, **shape)


def tiny_model(family: str, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints(family, **changes)`: a tiny random checkpoint on disk, made once."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            tiny_model(family, **changes).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A copy of the real checkpoint that may be broken."""
    return Path(shutil.copytree(STORIES, tmp_path / "stories260K"))


@pytest.fixture
def zebra(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`zebra(*arguments)`: the command line in a process of its own."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zebra", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            **options,
        )

    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

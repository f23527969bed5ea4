"""A converted checkpoint in transformers 4.57: the logits of transformers 5, or an error; never others in silence."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import MEMBERS, ROOT, fitting, tiny_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import zebra
from zebra import ZebraError
from zebra.model.checkpoint import read_config, write_config

PYTHON = ROOT / ".venv-transformers4" / "bin" / "python"
ROPES = ("none", "yarn:8", "linear:8", "llama3:8", "base:5000000")
IDS = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(0))
READ = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file
assert transformers.__version__.startswith("4."), transformers.__version__
outcomes = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            logits = model(expected["ids"], use_cache=False).logits
    except Exception as error:
        outcomes[folder.name] = f"{type(error).__name__}: {error}"
        continue
    outcomes[folder.name] = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
print(json.dumps(outcomes))
"""


def as_transformers_4_wrote_it(checkpoint: Path) -> None:
    """The checkpoint's config.json with the older fields of the rope alone."""
    file = checkpoint / "config.json"
    fields = json.loads(file.read_text())
    del fields["rope_parameters"]
    file.write_text(json.dumps(fields | {"transformers_version": "4.57.6"}))


def test_the_older_fields_of_a_rope_change_nothing_in_this_transformers(tmp_path: Path) -> None:
    """Both are in config.json, and both are read."""
    for member in ("qwen3", "gemma3_text", "olmo2"):
        for rope in ROPES:
            source = tmp_path / f"{member}-{rope}"
            tiny_model(member).save_pretrained(source / "source")
            target = zebra.convert(source / "source", source / "out", fitting(member, "GLLL:9"), rope=rope)
            fields = json.loads((target / "config.json").read_text())
            config, parameters = AutoConfig.from_pretrained(target), fields["rope_parameters"]
            assert config.rope_parameters == parameters
            assert not hasattr(config, "rope_theta")
            write_config(config, source)
            assert json.loads((source / "config.json").read_text()) == fields
            # transformers 4 cannot say two bases for a model of this family, and stops at the text.
            assert isinstance(fields["rope_theta"], str) == ((member, rope) == ("olmo2", "base:5000000"))
            if member != "olmo2":  # transformers 5 reads the older base for its global layers alone
                as_transformers_4_wrote_it(target)
                assert read_config(target).rope_parameters == parameters


@pytest.mark.full
@pytest.mark.skipif(not PYTHON.exists(), reason="make test-full sets up transformers 4")
def test_transformers_4_reads_the_same_model_or_stops(tmp_path: Path) -> None:
    read = tmp_path / "read"
    for member in MEMBERS:
        source = tmp_path / "sources" / member
        tiny_model(member).save_pretrained(source)
        for rope in ROPES:
            target = read / f"{member} {rope}"
            try:
                zebra.convert(source, target, fitting(member, "GLLL:9"), rope=rope)
            except ZebraError:
                continue
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
                save_file({"ids": IDS, "logits": model(IDS).logits}, target / "expected.safetensors")
    done = subprocess.run([PYTHON, "-c", READ, read], capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    equal = {name for name, outcome in outcomes.items() if isinstance(outcome, float) and outcome < 1e-5}
    assert {
        name: outcome for name, outcome in outcomes.items() if name not in equal and isinstance(outcome, float)
    } == {}
    # It stops at families that it does not have, at one that ignores layer_types, and at two bases that it cannot say.
    unknown = {"llama", "mistral", "cwm", "qwen3_moe", "mellum", "granite_swa", "zebra_study", "qwen2_moe"}
    stopped = {name for name in outcomes if name.split()[0] in unknown} | {"olmo2 base:5000000", "olmo3 base:5000000"}
    assert outcomes.keys() - equal == stopped, {name: outcomes[name] for name in outcomes.keys() - equal ^ stopped}

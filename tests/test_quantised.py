"""Quantised checkpoints: served where transformers can load them, converted byte for byte, else one line that says why.

fp8 in blocks needs no package: on a CPU transformers dequantises it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, Zebra, adapt_recipe, refused, set_fields, tiny_model
from safetensors.torch import load_file, save_file

import zebra as library
from zebra import ZebraError
from zebra.plan.cost import Run
from zebra.plan.decoder import read_decoder
from zebra.plan.memory import memory
from zebra.train.source import read_source

IDS = torch.randint(3, 500, (1, 60), generator=torch.Generator().manual_seed(0))
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
_BLOCK = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 checkpoint whose linear weights are those of its fp8 twin, dequantised."""
    path = tmp_path_factory.mktemp("quantised") / "plain"
    model = tiny_model("llama", vocab_size=512, hidden_size=32, intermediate_size=48).to(torch.bfloat16)
    model.save_pretrained(path)
    for file in STORIES.glob("tok*"):
        shutil.copy(file, path)
    fp8, tensors = path.with_name("fp8"), load_file(path / "model.safetensors")
    shutil.copytree(path, fp8)
    quantised = {}
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
        scale = (blocks.abs().amax((1, 3)) / 448).log2().ceil().exp2()  # a power of 2: dequantised without rounding
        weight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        quantised[name] = weight.reshape(rows, columns)
        quantised[name.replace("weight", "weight_scale_inv")] = scale
        dequantised = weight.float() * scale[:, None, :, None]
        tensors[name] = dequantised.reshape(rows, columns).to(torch.bfloat16)
    save_file(tensors | quantised, fp8 / "model.safetensors", {"format": "pt"})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    set_fields(fp8, quantization_config=FP8)
    return path


@pytest.fixture
def fp8(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.with_name("fp8"), tmp_path / "fp8"))


@torch.no_grad()
def logits(path: Path, **options: Any) -> torch.Tensor:
    return library.load(path, **options)(IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_loaded_as_what_it_was_made_of(plain: Path, fp8: Path, dtype: torch.dtype) -> None:
    assert torch.equal(logits(fp8, dtype=dtype), logits(plain, dtype=dtype))


def test_a_conversion_leaves_its_tensors_byte_for_byte(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = library.convert(fp8, tmp_path / "striped", "GLLLL:9")
    assert (target / "model.safetensors").read_bytes() == (fp8 / "model.safetensors").read_bytes()
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"] == FP8
    assert config["model_type"] == "cwm"
    for dtype, allowed in {None: 1e-4, "float64": 1e-9, "bfloat16": 6e-2}.items():
        checks = library.verify(target, against=fp8, dtype=dtype)
        assert {check.tolerance for check in checks} == {allowed}
        assert all(check.passed for check in checks) or dtype == "bfloat16"  # random weights may round by more
    monkeypatch.setattr("zebra.model.quantization._stays_quantised", lambda config: True)
    with pytest.raises(
        ZebraError, match=r"is quantised \(fp8\) and can be checked only in bfloat16; got torch.float32"
    ):
        library.verify(target, against=fp8, dtype="float32")


def test_every_measurement_serves_it_and_training_says_what_to_do(zebra: Zebra, fp8: Path, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("Once upon a time, there was a dog. " * 20)
    assert zebra("generate", fp8, "--prompt", "Once", "--max-new-tokens", 4).returncode == 0
    assert zebra("generate", fp8, "--prompt", "Once", "--max-new-tokens", 4, "--dtype", "float32").returncode == 0
    assert zebra("evaluate", "perplexity", fp8, text, "--length", 64).returncode == 0
    with pytest.raises(ZebraError, match=r"is quantised \(fp8\).*Use the checkpoint before quantisation"):
        read_source(adapt_recipe(tmp_path / "run", model=str(fp8)))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed.tensors"),
        ({"quant_method": "nothing"}, "does not support the method"),
        ({"bits": 4}, "does not support the method"),
    ],
)
def test_what_cannot_be_loaded_here_is_one_line_that_names_what_is_missing(
    zebra: Zebra, fp8: Path, method: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bnb_4bit.is_bitsandbytes", "compressed_tensors.is_compressed_tensors", "gptq.is_optimum"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_{module}_available", lambda: False)
    set_fields(fp8, quantization_config=method)
    with pytest.raises(ZebraError, match=rf"is quantised \(.*\), and transformers cannot load it here: .*({reason})"):
        library.load(fp8)
    refused(zebra("generate", fp8, "--prompt", "Once"), "is quantised (")


@pytest.mark.parametrize("settings", ["fp8", [], 8])
def test_settings_that_are_no_object(zebra: Zebra, fp8: Path, settings: Any, tmp_path: Path) -> None:
    set_fields(fp8, quantization_config=settings)
    convert = ("convert", fp8, tmp_path / "out", "--stripes", "GL:9")
    for verb in (("generate", fp8, "--prompt", "Once"), convert, ("plan", fp8, "--length", 64)):
        refused(zebra(*verb), "quantization_config must be a JSON object; got", "Fix its config.json")


def test_quantised_weights_whose_config_does_not_say_so(fp8: Path) -> None:
    set_fields(fp8, quantization_config=None)
    with pytest.raises(ZebraError, match=r"proj\.weight holds integers or 8-bit numbers, .* no quantization_config"):
        library.load(fp8)
    file = fp8 / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "weight_scale_inv" not in name}
    packed = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
    for name in tensors.keys() - packed.keys():  # as GPTQ and AWQ store it
        packed[name.replace("weight", "qweight")] = torch.zeros(4, 32, dtype=torch.int32)
    save_file(packed, file, {"format": "pt"})
    with pytest.raises(ZebraError, match=r"proj\.qweight holds integers or 8-bit numbers, .* no quantization_config"):
        library.load(fp8)


def test_tensors_of_another_model_are_rejected(fp8: Path) -> None:
    file = fp8 / "model.safetensors"
    tensors = load_file(file)
    changes: dict[str, dict[str, torch.Tensor]] = {
        "no module for model.extra.weight": tensors | {"model.extra.weight": torch.ones(2)},
        "no tensor for model.norm": {name: one for name, one in tensors.items() if name != "model.norm.weight"},
        "different shapes of model.norm.weight": tensors | {"model.norm.weight": torch.ones(31)},
    }
    for text, changed in changes.items():
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ZebraError, match=text):
            library.load(fp8)


def test_a_plan_counts_the_bytes_that_are_stored(plain: Path, fp8: Path, zebra: Zebra) -> None:
    stored = {name: tensor.nbytes for name, tensor in load_file(fp8 / "model.safetensors").items()}
    run = Run(decoder=read_decoder(fp8), length=64, stripes=None)
    assert memory(run)["weights"] == sum(stored.values())
    assert memory(Run(decoder=read_decoder(plain), length=64, stripes=None))["weights"] > sum(stored.values())
    refused(zebra("plan", fp8 / "config.json", "--length", 64), "its size is known only from its safetensors files")


@pytest.mark.full
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_on_a_cpu(plain: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(source)
    target = library.convert(source, tmp_path / "striped", "GLLLL:9")
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert all(check.passed for check in library.verify(target, against=source))

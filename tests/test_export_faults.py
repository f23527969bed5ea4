"""Exports never drop anything silently: parts of a model, tokenizer or folder that an engine has no field for."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Zebra, refused, tiny_model
from safetensors.torch import load_file, save_file
from test_export import engine, folder, raw
from test_gguf import SIZES, original_tokenizer, source, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import zebra
from zebra import ZebraError
from zebra.exports.gguf_model import read_model
from zebra.exports.verify import verify_export

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = PLAIN | {"rope_type": "linear", "factor": 2.0}
EVERY = {"mlp_only_layers": [], "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("to", "member", "changes", "layout", "words"),
    [
        ("gguf", "llama", {"hidden_act": "gelu"}, "GL:9", "has the activation gelu, which llama.cpp's llama"),
        ("mlx", "llama", {"hidden_act": "gelu"}, "GL:9", "has the activation gelu, which mlx-lm's llama"),
        (
            "gguf",
            "gemma3_text",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": LINEAR}, "query_pre_attn_scalar": 16},
            "1,3:9",
            "a rope of local layers that is scaled",
        ),
        (
            "mlx",
            "gemma3_text",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": LINEAR}}
            | {"query_pre_attn_scalar": 16, "final_logit_softcapping": None},
            "1,3:9",
            "a rope of local layers that is scaled",
        ),
        (
            "mlx",
            "mellum",
            EVERY | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
            "1,3:9",
            "a linear rope",
        ),
        (
            "gguf",
            "cohere2",
            {"tie_word_embeddings": False},
            "3:9",
            "llama.cpp's cohere2 has no tensor for lm_head.weight",
        ),
    ],
)
def test_what_an_engine_cannot_say_of_a_model_is_refused(
    to: str, member: str, changes: dict[str, Any], layout: str, words: str, tmp_path: Path
) -> None:
    tiny_model(member, **(SIZES | changes)).save_pretrained(tmp_path / "folder")
    original_tokenizer("smollm").save_pretrained(tmp_path / "folder")
    target = tmp_path / ("x.gguf" if to == "gguf" else "x")
    with pytest.raises(ZebraError, match=words):
        zebra.export(tmp_path / "folder", target, to=to, stripes=layout)
    assert not target.exists()


def changed_tokenizer(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "tokenizer.json"
        state = json.loads(file.read_text())
        change(state)
        file.write_text(json.dumps(state))

    return apply


def unigram(path: Path) -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0, False))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)


def framed(state: Any) -> None:
    frame = processors.TemplateProcessing(single="<pad> <s> $A", special_tokens=[("<pad>", 3), ("<s>", 1)])
    state["post_processor"] = json.loads(frame.__getstate__())


def lowercase(state: Any) -> None:
    state["normalizer"] = json.loads(normalizers.Lowercase().__getstate__())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_tokenizer(lowercase), "applies Lowercase to a text, which llama.cpp does not support"),
        (changed_tokenizer(framed), "adds more to a text than bos_token and eos_token"),
        (changed_tokenizer(lambda state: state["model"].update(end_of_word_suffix="</w>")), "marks parts of words"),
        (
            changed_tokenizer(lambda state: state["model"].update(ignore_merges=True)),
            "has a pre-tokenizer that zebra cannot export",
        ),
        (unigram, "requires a BPE tokenizer"),
        (lambda path: (path / "tokenizer.json").unlink(), "the tokenizer of .* cannot be read"),
    ],
    ids=["lowercase", "framed", "suffix", "whole pieces", "unigram", "none"],
)
def test_what_a_tokenizer_does_besides_is_not_lost(change: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    change(path)
    with pytest.raises(ZebraError, match=words):
        zebra.export(path, tmp_path / "x.gguf", to="gguf", stripes="GL:9")
    assert not (tmp_path / "x.gguf").exists()


def test_a_gemma_like_tokenizer_is_written() -> None:
    """Its normalizer replaces spaces, so its pre-tokenizer's split at spaces has no effect."""
    from zebra.exports.gguf_tokenizer import tokenizer_metadata

    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "▁": 3, "a": 4, "▁a": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    metadata = tokenizer_metadata(tokenizer, 8, [2], "it", "")
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert metadata["tokenizer.ggml.tokens"][5:] == ["▁a", "[PAD6]", "[PAD7]"]


def test_a_folder_in_shards_is_the_same_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    template = (
        "{# “odd” \t ✓ 😀 \\n #}{% for m in messages %}{{ m['content'] | replace('\\u0000', '𝕏') }}\n{% endfor %}"
    )
    (path / "chat_template.jinja").write_text(template)
    zebra.export(path, tmp_path / "whole.gguf", to="gguf", stripes="GL:9")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    zebra.export(path, tmp_path / "parts.gguf", to="gguf", stripes="GL:9")
    assert raw(tmp_path / "parts.gguf") == raw(tmp_path / "whole.gguf")
    assert read_model(tmp_path / "parts.gguf").metadata["tokenizer.chat_template"] == template
    zebra.export(path, tmp_path / "mlx", to="mlx", stripes="GL:9")
    assert len(list((tmp_path / "mlx").glob("model-*.safetensors"))) == 2


def test_quantised_weights_and_targets_that_cannot_be_written_are_refused(tmp_path: Path, zebra: Zebra) -> None:
    path = folder(tmp_path / "folder")
    to = ("--to", "gguf", "--stripes", "GL:9")
    (tmp_path / "file").write_text("x")
    refused(zebra("export", path, tmp_path / "file" / "x.gguf", *to), "cannot be written: Not a directory")
    mlx = ("--to", "mlx", "--stripes", "GL:9")
    refused(zebra("export", path, tmp_path / "file" / "x", *mlx), "cannot be written: Not a directory")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused(zebra("export", path, tmp_path / "x.gguf", *to), "is quantised (fp8)", "before quantisation")
    refused(zebra("export", path, tmp_path / "x", *mlx), "is quantised (fp8)")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_a_readme_and_a_name_that_are_not_utf_8_are_no_traceback(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    (path / "README.md").write_bytes("Modèle\r\n".encode("latin-1"))
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le"))
    zebra.export(path, target, to="mlx", stripes="GL:9")
    text = (target / "README.md").read_text(encoding="utf-8")
    assert text.startswith("Mod\N{REPLACEMENT CHARACTER}le\n\n\n## Stripes: GL:9")
    assert "mod\N{REPLACEMENT CHARACTER}le" in text


def test_a_command_is_one_that_a_shell_reads(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    for to, name in (("gguf", "my model.gguf"), ("mlx", "my mlx"), ("vllm", "my vllm"), ("sglang", "my sglang")):
        done = zebra.export(path, tmp_path / name, to=to, stripes="GL:9")
        assert str(tmp_path / name) in shlex.split(done.command)
    stub = answering(tmp_path)
    with pytest.raises(ZebraError, match=r"vllm cannot run .*my vllm: it was asked"):
        verify_export(tmp_path / "my vllm", path, "vllm", python=stub)
    folder(tmp_path / "qwen", "qwen3")
    zebra.export(tmp_path / "qwen", tmp_path / "my qwen", to="vllm", stripes="GL:9")
    with pytest.raises(ZebraError, match="it was asked"):
        verify_export(tmp_path / "my qwen", tmp_path / "qwen", "vllm", python=stub)
    assert json.loads((tmp_path / "request.json").read_text())[0]["arguments"] == {"model_impl": "transformers"}


def answering(tmp_path: Path) -> str:
    """A fake interpreter of an engine that stores its request and runs nothing."""
    return engine(tmp_path, {"error": "it was asked"})


def test_what_was_not_written_for_an_engine_is_not_run_by_it(tmp_path: Path, zebra: Zebra) -> None:
    path, striped, mlx = folder(tmp_path / "folder"), tmp_path / "striped", tmp_path / "mlx"
    zebra("convert", path, striped, "--stripes", "GL:9")
    zebra("export", path, mlx, "--to", "mlx", "--stripes", "GL:9")

    def verify(target: Path, engine: str, *options: str) -> Any:
        done = zebra("verify", target, "--against", path, "--engine", engine, "--python", stub, *options)
        assert not (tmp_path / "request.json").exists()
        return done

    stub = answering(tmp_path)
    refused(verify(mlx, "vllm"), "was written for mlx, not for vllm")
    refused(verify(mlx, "gguf"), "gguf requires a file that ends in .gguf")
    refused(verify(tmp_path / "x.gguf", "mlx"), "mlx requires a folder")
    refused(verify(path, "mlx"), "zebra.json cannot be read", "Pass what `zebra export` wrote for the engine")
    refused(verify(striped, "vllm", "--dtype", "bfloat16"), "--dtype cannot be combined with --engine")
    refused(verify(striped, "vllm", "--device", "cuda"), "--device cannot be combined with --engine")
    for text in ("{", "[]"):
        (mlx / "zebra.json").write_text(text)
        refused(verify(mlx, "mlx"), "zebra.json cannot be read")


def test_the_way_by_a_gguf_file_is_named_where_that_is_read(tmp_path: Path) -> None:
    """zebra does not read GGUF files of gpt-oss and OLMo, so the advice must not lead to one."""
    for member, words in (("llama", "convert_hf_to_gguf.py"), ("olmo2", "Serve the folder with zebra")):
        path = folder(tmp_path / member, member)
        changed_tokenizer(lowercase)(path)
        with pytest.raises(ZebraError, match=f"applies Lowercase to a text.*{words}"):
            zebra.export(path, tmp_path / "x.gguf", to="gguf", stripes="LG:9")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZebraError, match=r"blk.1.ffn_up.weight has values beyond the range of float16"):
        zebra.export(path, tmp_path / "x.gguf", to="gguf", stripes="GL:9")
    assert not list(tmp_path.glob("*.gguf*"))
    zebra.export(path, tmp_path / "x.gguf", to="gguf", stripes="GL:9", dtype="bf16")


def test_a_gguf_file_becomes_a_folder_of_another_engine(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source())
    zebra.export(file, tmp_path / "mlx", to="mlx", stripes="GL:9")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("llama", 9)
    ids = torch.arange(3, 40)[None]
    done = zebra.export(file, tmp_path / "vllm", to="vllm", stripes="GL:9")
    expected = zebra.load(file, stripes="GL:9", dtype="float32")(ids).logits
    torch.testing.assert_close(zebra.load(done.target, dtype="float32")(ids).logits, expected)

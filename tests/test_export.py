"""Exports, without the engines: what is written is what was read, or a reason. tests/engines runs them."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, STORIES, Zebra, refused, tiny_model
from test_gguf import IDS, ORIGINAL_SPLITS, TEMPLATE, original_tokenizer, source, write

import zebra
from zebra import ZebraError
from zebra.engines import ENGINES, REFUSES, table
from zebra.exports import DTYPES, folders, gguf_folder
from zebra.exports.gguf_file import layout_of
from zebra.exports.gguf_folder import folder_model
from zebra.exports.gguf_model import GgufModel, GgufTensor, read_model, write_model
from zebra.exports.limits import period_of
from zebra.exports.llama_cpp import NO_SINK, TARGETS, with_stripes
from zebra.exports.verify import compare, verify_export
from zebra.gguf import config_fields, read_header
from zebra.model.routes import ROUTES
from zebra.stripes import Stripes

Checkpoints = Callable[..., Path]
Q4 = gguf.GGMLQuantizationType.Q4_1


def folder(path: Path, member: str = "llama", pre: str = "smollm", **changes: Any) -> Path:
    """A checkpoint's folder with a tokenizer."""
    model = tiny_model(member, vocab_size=320) if member == "olmo2" else source(member, **changes)
    model.save_pretrained(path)
    tokenizer = original_tokenizer(pre)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def test_only_gguf_files_need_the_package_gguf(tmp_path: Path) -> None:
    """Without it, folders for MLX and vLLM are written, and a GGUF file is one line."""
    code = """
import sys
sys.modules["gguf"] = None  # as if it were not installed
from zebra.cli import main
source, target = sys.argv[1:]
for to, name in ("mlx", "mlx"), ("vllm", "vllm"), ("gguf", "model.gguf"):
    sys.argv = ["zebra", "export", source, f"{target}/{name}", "--to", to, "--stripes", "GLLL:64"]
    try:
        main()
    except SystemExit as end:
        print("ENDED", to, end.code)
"""
    command = [sys.executable, "-c", code, str(STORIES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.findall(r"ENDED (\w+) (\d)", done.stdout) == [("mlx", "0"), ("vllm", "0"), ("gguf", "2")], done.stderr
    assert "Traceback" not in done.stderr
    assert "model.gguf needs the package gguf, not installed here" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlx", "vllm"}


def raw(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_a_gguf_file_gets_stripes_and_keeps_every_byte(tmp_path: Path, zebra: Zebra) -> None:
    file = write(tmp_path / "model.gguf", source(), kind=Q4, metadata={"llama.rope.scaling.factor": 2.0})
    done = zebra("export", file, tmp_path / "striped.gguf", "--to", "gguf", "--stripes", "0,3:9")
    assert done.returncode == 0, done.stderr
    assert "0,3:9. Run it:\n  llama-server --model" in done.stdout
    before, after = read_model(file), read_model(tmp_path / "striped.gguf")
    assert after.architecture == "granite_swa"
    assert after.own("attention.sliding_window_pattern") == [False, True, True, False, True]
    assert (after.own("attention.sliding_window"), after.own("logit_scale")) == (9, 1.0)
    assert layout_of(after) == Stripes.parse("GLL:9")
    ours, own = raw(tmp_path / "striped.gguf"), raw(file)
    assert own.items() <= ours.items()
    assert {*ours} - {*own} == {f"blk.{i}.attn_sinks.weight" for i in range(5)}
    assert np.frombuffer(ours["blk.2.attn_sinks.weight"], np.float32).tolist() == [NO_SINK] * 4
    for key, value in before.metadata.items():  # tokens, template, rope, all else
        assert after.metadata[key.replace("llama.", "granite_swa.", 1)] == value
        assert after.types[key.replace("llama.", "granite_swa.", 1)] == before.types[key]


def test_rows_of_a_qwen_2_are_moved_and_not_dequantised(tmp_path: Path) -> None:
    """Row r of a head's first half moves to 2 r, that of its second half to 2 r + 1; a head has 16 rows."""
    model = source("qwen2")
    model.config.head_dim = 16
    file = write(tmp_path / "model.gguf", model, "qwen2", kind=Q4)
    zebra.export(file, tmp_path / "striped.gguf", to="gguf", stripes="GL:9")
    before, after = read_model(file), read_model(tmp_path / "striped.gguf")
    assert after.architecture == "granite_swa"
    for name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_q.bias"):
        rows, moved = before.tensors[name].read(), after.tensors[name].read()
        for row in range(len(rows)):
            head, r = divmod(row, 16)
            assert np.array_equal(moved[16 * head + 2 * (r % 8) + r // 8], rows[row])
    for name in ("blk.1.attn_v.weight", "blk.1.attn_output.weight", "token_embd.weight"):
        assert np.array_equal(before.tensors[name].read(), after.tensors[name].read())


def test_key_heads_that_a_file_does_not_count_are_all(tmp_path: Path) -> None:
    """llama.cpp and zebra read such a file that way, but its export used to end in a TypeError."""
    model = source("qwen2", num_key_value_heads=4)
    model.config.head_dim = 16
    counted = read_model(write(tmp_path / "model.gguf", model, "qwen2"))
    uncounted = replace(counted, metadata=dict(counted.metadata))
    uncounted.metadata.pop("qwen2.attention.head_count_kv")
    rows = [
        with_stripes(each, Stripes.parse("GL:9")).tensors["blk.1.attn_k.weight"].read() for each in (counted, uncounted)
    ]
    assert np.array_equal(*rows)


def test_a_dense_qwen_3_is_one_expert(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source("qwen3"), "qwen3", kind=Q4)
    zebra.export(file, tmp_path / "striped.gguf", to="gguf", stripes="GL:9")
    before, after = read_model(file), read_model(tmp_path / "striped.gguf")
    assert after.architecture == "mellum"
    assert [after.own(f"expert_{name}") for name in ("count", "used_count", "feed_forward_length")] == [1, 1, 96]
    ours, own = raw(tmp_path / "striped.gguf"), raw(file)
    for part in ("gate", "up", "down"):
        assert ours[f"blk.3.ffn_{part}_exps.weight"] == own[f"blk.3.ffn_{part}.weight"]
        assert f"blk.3.ffn_{part}.weight" not in ours
    assert after.tensors["blk.3.ffn_up_exps.weight"].shape == (1, *before.tensors["blk.3.ffn_up.weight"].shape)
    assert ours["output.weight"] == own["token_embd.weight"]  # tied, and mellum reads a head of its own
    assert not np.frombuffer(ours["blk.3.ffn_gate_inp.weight"], np.float32).any()


@pytest.mark.parametrize(
    ("member", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0}
                | {"original_max_position_embeddings": 128}
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
                | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            },
        ),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("rope_parameters", {}).get("rope_type", "plain"),
)
def test_a_folder_as_a_file_is_the_same_model_to_transformers(
    member: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Without stripes the file has the family's own architecture, which transformers can read."""
    path = folder(tmp_path / "folder", member, **changes)
    model = zebra.load(path)
    written = folder_model(path, model, "f32")
    if member.startswith("gemma"):
        written.metadata[f"{written.architecture}.attention.sliding_window"] = model.config.sliding_window
    write_model(written, tmp_path / "model.gguf")
    back = zebra.load(tmp_path / "model.gguf")
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=2e-4)
    fields, config = config_fields(read_header(tmp_path / "model.gguf")), model.config
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert fields["max_position_embeddings"] == config.max_position_embeddings
    if "rope_parameters" in changes:
        assert fields["rope_parameters"]["rope_type"] == changes["rope_parameters"]["rope_type"]


def test_an_empty_list_is_left_out_of_a_file(tmp_path: Path) -> None:
    write_model(GgufModel("llama", {"tokenizer.ggml.merges": [], "llama.block_count": 1}, {}), tmp_path / "model.gguf")
    assert read_model(tmp_path / "model.gguf").metadata == {"llama.block_count": 1}


def test_a_file_without_an_architecture_is_one_line(tmp_path: Path) -> None:
    write_model(GgufModel("llama", {}, {}), file := tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ZebraError, match=r"model\.gguf has None"):
        read_model(file)


@pytest.mark.parametrize("pre", ORIGINAL_SPLITS)
def test_a_tokenizer_comes_back_as_it_was(pre: str, tmp_path: Path) -> None:
    from zebra.model.checkpoint import load_tokenizer

    path = folder(tmp_path / "folder", pre=pre)
    write_model(folder_model(path, zebra.load(path), "f16"), tmp_path / "model.gguf")
    back, own = load_tokenizer(tmp_path / "model.gguf"), load_tokenizer(path)
    assert back.chat_template == TEMPLATE
    for text in ("Chapter 1\n\n12. In 1984,    345 sheep", "don't WE'LL\r\n\r\n7", "½ ² 日本語 12 😀"):
        assert back(text).input_ids == own(text).input_ids


def test_a_sentencepiece_tokenizer_comes_back_as_it_was(tmp_path: Path) -> None:
    from zebra.model.checkpoint import load_tokenizer

    write_model(folder_model(STORIES, zebra.load(STORIES), "f32"), tmp_path / "model.gguf")
    back, own = load_tokenizer(tmp_path / "model.gguf"), load_tokenizer(STORIES)
    for text in ("Once upon a time, Lily & café 😀", "  two  spaces", (ROOT / "README.md").read_text()[:1500]):
        assert back(text).input_ids == own(text).input_ids


def test_every_token_that_ends_an_answer_has_a_field(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "folder")
    model = zebra.load(path)
    model.generation_config.eos_token_id = [2, 7, 5]
    write_model(folder_model(path, model, "f16"), tmp_path / "model.gguf")
    assert zebra.load(tmp_path / "model.gguf").generation_config.eos_token_id == [2, 7, 5]
    assert "end tokens" not in caplog.text
    model.generation_config.eos_token_id = [2, 7, 5, 9]
    folder_model(path, model, "f16")
    assert "llama.cpp has no field for the end tokens [9]" in caplog.text


def test_matrices_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    for dtype in DTYPES:
        zebra.export(path, tmp_path / f"{dtype}.gguf", to="gguf", stripes="GL:9", dtype=dtype)
        model = read_model(tmp_path / f"{dtype}.gguf")
        kinds = {tensor.kind.name for name, tensor in model.tensors.items() if len(tensor.shape) > 1}
        assert kinds == {dtype.upper()}
        assert {t.kind.name for t in model.tensors.values() if len(t.shape) == 1} == {"F32"}
    read = read_model(tmp_path / "q8_0.gguf").tensors["blk.0.ffn_up.weight"]
    values = gguf.dequantize(read.read(), read.kind)
    expected = zebra.load(path).state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    np.testing.assert_allclose(values, expected, atol=np.abs(expected).max() / 127)


def test_periods_have_the_global_layer_last() -> None:
    def period(layout: str, n: int) -> int:
        return period_of(Stripes.parse(layout).layer_types(n), "it")

    assert [period(layout, 7) for layout in ("LG:4", "LLG:4", "LLLG:4", "6:4", "G:4", "L:4")] == [2, 3, 4, 7, 1, 0]
    for layout in ("GL:4", "GLLL:4", "0,6:4"):
        with pytest.raises(
            ZebraError, match="a period whose last layer is global, such as LG or LLLG; the layers are GL"
        ):
            period(layout, 7)


def test_what_llama_cpp_cannot_run_is_refused(zebra: Zebra, tmp_path: Path, checkpoints: Checkpoints) -> None:
    path, file = folder(tmp_path / "folder"), write(tmp_path / "model.gguf", source())

    def export(checkpoint: Path, *options: str, target: str = "x.gguf") -> Any:
        return zebra("export", checkpoint, tmp_path / target, *options)

    to = ("--to", "gguf")
    refused(export(path, *to), "no stripes to export", "Give stripes, such as GLLL:512")
    refused(export(file, *to), "has no stripes", "zebra select")
    refused(export(path, *to, "--stripes", "GL:9+4"), "other engines do not support 4 sinks")
    refused(export(file, *to, "--stripes", "GL:9+4"), "sinks", "+4")
    refused(export(file, *to, "--stripes", "7:9"), "names layer 7")
    refused(export(file, *to, "--stripes", "GL:9", "--dtype", "f16"), "others copy the weights", "Leave out the dtype")
    refused(export(path, *to, "--stripes", "GL:9", target="out"), "a file that ends in .gguf", "Change the target")
    refused(export(path, "--to", "mlx", "--stripes", "GL:9"), "must be a folder")
    (tmp_path / "there.gguf").write_text("x")
    refused(export(path, *to, "--stripes", "GL:9", target="there.gguf"), "exists already")
    refused(export(checkpoints("qwen2_moe"), *to, "--stripes", "GL:9"), "no architecture with the tensors of qwen2_moe")
    for member, words in {
        "gemma2": "a query_pre_attn_scalar of 11 with a head_dim of 8",
        "mellum": "scaled or has another base",
        "granite_swa": "several bases",
    }.items():
        refused(export(checkpoints(member), *to, "--stripes", "1,3:9" if member == "mellum" else "GL:9"), words)
    refused(export(folder(tmp_path / "olmo", "olmo2"), *to, "--stripes", "GL:9"), "period whose last layer is global")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "model.gguf", "olmo", "there.gguf"]


def test_a_tokenizer_without_a_name_is_refused_with_the_way(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    state = json.loads((path / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "Whitespace"}
    (path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(
        ZebraError, match=r"has a pre-tokenizer that zebra cannot export.* convert_hf_to_gguf.py, and export that"
    ):
        zebra.export(path, tmp_path / "x.gguf", to="gguf", stripes="GL:9")


def test_a_folder_for_mlx_shares_the_weights(tmp_path: Path, zebra: Zebra) -> None:
    path = folder(tmp_path / "folder")
    (tmp_path / "mlx").mkdir()  # an empty folder may be there, as for `convert`
    done = zebra("export", path, tmp_path / "mlx", "--to", "mlx", "--stripes", "GL:9")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["sliding_window"], config["rope_theta"], config["rope_scaling"]) == (9, 1e4, None)
    assert config["layer_types"][:2] == ["full_attention", "sliding_attention"]
    assert (tmp_path / "mlx" / "model.safetensors").samefile(path / "model.safetensors")
    assert "mlx_lm.generate --model" in done.stdout
    readme = (tmp_path / "mlx" / "README.md").read_text()
    assert "mlx_lm.generate --model" in readme
    assert "transformers would run every layer with full attention" in readme
    tiny_model("smollm3", no_rope_layers=[1, 1, 1, 0, 1]).save_pretrained(tmp_path / "smollm3")
    done = zebra("export", tmp_path / "smollm3", tmp_path / "smollm3-mlx", "--to", "mlx", "--stripes", "GL:9")
    assert done.returncode == 0, done.stderr
    assert "full attention" not in (tmp_path / "smollm3-mlx" / "README.md").read_text()
    config = json.loads((tmp_path / "smollm3-mlx" / "config.json").read_text())
    assert (config["model_type"], config["no_rope_layers"]) == ("smollm3", [1, 1, 1, 0, 1])
    refused(zebra("generate", tmp_path / "mlx", "--prompt", "a"), "exported for MLX", f"Use its source instead: {path}")
    refused(zebra("export", path, tmp_path / "all", "--to", "mlx", "--stripes", "L:9"), "needs a global layer")


def test_a_folder_for_vllm_says_its_command(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder", "qwen3")
    (path / "README.md").write_text("---\nlicense: x\n---\nA card.\n")
    done = zebra.export(path, tmp_path / "vllm", to="vllm", stripes="GL:9")
    assert done.command == f"vllm serve {tmp_path / 'vllm'} --model-impl transformers"
    readme = (tmp_path / "vllm" / "README.md").read_text()
    assert readme.startswith("---\nlicense: x\n---\nA card.\n")
    assert done.command in readme
    assert json.loads((tmp_path / "vllm" / "config.json").read_text())["max_window_layers"] == 0
    assert zebra.load(tmp_path / "vllm").config.layer_types[1] == "sliding_attention"
    done = zebra.export(tmp_path / "vllm", tmp_path / "again", to="vllm", stripes="GL:7")
    assert (tmp_path / "again" / "README.md").read_text() == (
        f"---\nlicense: x\n---\nA card.\n\n## Stripes: {done.layout}\n\nWritten by `zebra export --to vllm`. "
        f"It is a stock checkpoint, for transformers too.\n\n    {done.command}\n"
    )
    done = zebra.export(path, tmp_path / "sglang", to="sglang", stripes="GL:9")
    assert json.loads((tmp_path / "sglang" / "config.json").read_text())["sliding_window"] == 8
    assert "not run" in (tmp_path / "sglang" / "README.md").read_text()
    for use in (zebra.load, lambda it: zebra.export(it, tmp_path / "other", to="vllm")):
        with pytest.raises(ZebraError, match=r"exported for SGLang, .* one key smaller than in GL:9"):
            use(tmp_path / "sglang")


def test_a_conversion_warns_where_an_engine_would_be_wrong(
    checkpoints: Checkpoints, tmp_path: Path, zebra: Zebra
) -> None:
    source = checkpoints("qwen2_moe")
    done = zebra("convert", source, tmp_path / "striped", "--stripes", "GL:9")
    assert "vLLM would run this qwen2_moe wrongly, without an error" in done.stderr
    done = zebra("export", source, tmp_path / "vllm", "--to", "vllm", "--stripes", "GL:9")
    assert "--model-impl transformers" in done.stdout
    done = zebra("convert", checkpoints("qwen3"), tmp_path / "qwen3", "--stripes", "GL:9")
    assert "MLX would run this qwen3 wrongly, without an error: with full attention" in done.stderr


def engine(tmp_path: Path, answer: dict[str, Any]) -> str:
    """A fake interpreter of an engine's environment, which answers every request."""
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\ncat > {tmp_path}/request.json\ncat {tmp_path}/answer.json\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return str(file)


@pytest.mark.parametrize("layout", ["GL:9", None], ids=["striped", "full"])
def test_an_engine_that_ignores_the_window_fails(layout: str | None, tmp_path: Path, zebra: Zebra) -> None:
    from zebra import load

    path, target = folder(tmp_path / "folder"), tmp_path / "model.gguf"
    zebra("export", path, target, "--to", "gguf", "--stripes", "GL:9", "--dtype", "f32")
    answer: dict[str, Any] = {"engine": "an engine 1.0", "error": "no such architecture"}
    options = ("--against", path, "--engine", "gguf", "--python", engine(tmp_path, answer))
    refused(zebra("verify", target, *options), "gguf cannot run", "no such architecture")
    request = json.loads((tmp_path / "request.json").read_text())[0]
    assert [len(prompt) for prompt in request["prompts"]] == [2, 9 + 4 + 16]
    model = load(path, stripes=layout)
    answer = {"engine": "an engine 1.0", "tokens": [], "logprobs": []}
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        for _ in range(request["new_tokens"]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        answer["tokens"].append(ids[0, len(prompt) :].tolist())
        answer["logprobs"].append([{str(i): row[i].item() for i in row.topk(5).indices.tolist()} for row in rows])
    answer["texts"] = [original_tokenizer("smollm")(text).input_ids for text in request["texts"]]
    engine(tmp_path, answer)
    done = zebra("verify", target, *options, "--json")
    passed = {check["name"]: check["passed"] for check in json.loads(done.stdout)["checks"]}
    right = layout is not None
    assert passed == {
        "short, window 9": True,
        "short, greedy": True,
        "long, window 9": right,
        "long, greedy": passed["long, greedy"],
        "tokenizer": True,
    }
    assert done.returncode == (0 if right else 1)


def test_an_engine_without_a_number_fails() -> None:
    """A NaN among the log-probabilities used to be ignored."""
    difference, _ = compare(tiny_model("llama"), [1, 2], [3, 4], [{"3": -4.0}, {"4": float("nan")}])
    assert not difference <= 1e9


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, zebra: Zebra) -> None:
    path, target = folder(tmp_path / "folder"), tmp_path / "model.gguf"
    zebra("export", path, target, "--to", "gguf", "--stripes", "GL:9")
    options = ("--against", path, "--engine", "gguf")
    refused(zebra("verify", target, *options), "No module named 'xllamacpp'", "docs/engines.md")
    refused(zebra("verify", target, *options, "--python", tmp_path / "no"), "there is no Python at")
    for program in ("true", "cat"):
        refused(zebra("verify", target, *options, "--python", shutil.which(program)), "gguf gave no answer")
    refused(zebra("verify", target, "--engine", "gguf"), "Name it with --against")
    refused(zebra("verify", target, *options, "--rope", "yarn:2"), "--rope cannot be combined with --engine")
    refused(zebra("verify", path, "--against", path, "--python", "x"), "--engine")
    with pytest.raises(ZebraError, match="larger than the window of 9; got 5"):
        verify_export(target, path, "gguf", length=5)


def test_the_table_agrees_with_what_is_exported() -> None:
    targets = {route.target for route in ROUTES if route.target}
    assert {*ENGINES} == targets
    for family, row in ENGINES.items():
        assert {*row} == {"llama.cpp", "MLX", "vLLM"}
        assert (row["llama.cpp"].verdict == REFUSES) == (family not in gguf_folder.FAMILIES)
        known = folders.MLX.get(family)
        assert (row["MLX"].verdict == REFUSES) == (known is None or family == "gpt_oss")
        assert all(support.reason for support in row.values() if support.verdict == REFUSES)
    assert {family.architecture for family in gguf_folder.FAMILIES.values()} <= {*TARGETS}


def test_the_engine_table_is_the_codes() -> None:
    """`python -m zebra.engines` prints it."""
    for page in ("families", "engines"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        written = re.search(r"<!-- engines -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
        assert written is not None
        assert written.group(1) == table()


def test_a_scaled_rope_of_a_qwen_3_is_refused() -> None:
    """llama.cpp's mellum scales the rope of global layers alone."""
    tensor = GgufTensor.of(np.zeros((2, 4)))
    metadata = {"qwen3.block_count": 2, "qwen3.embedding_length": 4, "qwen3.feed_forward_length": 2}
    model = GgufModel("qwen3", metadata | {"qwen3.rope.scaling.type": "yarn"}, {"token_embd.weight": tensor})
    with pytest.raises(ZebraError, match="scales only that of global layers"):
        with_stripes(model, Stripes.parse("GL:9"))

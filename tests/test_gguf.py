"""GGUF files, written here by llama.cpp's package: what is read equals the checkpoint that they were made of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from conftest import STORIES, TEXT, Zebra, adapt_recipe, losses, refused, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import zebra
from zebra import ZebraError
from zebra.gguf import ARCHITECTURES, config_fields, read_header
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.gguf import as_directory
from zebra.model.load import load
from zebra.plan.decoder import read_decoder
from zebra.train.adapt import adapt

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "head_dim": 16}
IDS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0))
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
SAMPLES = [
    "Chapter 1\n\n12. In 1984,    345 sheep",
    "don't WE'LL\r\n\r\n7",
    "    return 42\n        7",
    "½ ² Ⅻ 日本語 12 😀",
]
GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT])
ORIGINAL_SPLITS = {"gpt-2": GPT2_SPLIT, "smollm": DIGITS} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    + most
                    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, most in {"llama-bpe": "{1,3}", "qwen2": ""}.items()
}
"""The pre-tokenizers of the original tokenizer.json of GPT-2, SmolLM, Llama 3 and Qwen 2."""


def original_tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that was trained with a split."""
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = ORIGINAL_SPLITS[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=318,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


ORDER = {"llama": "permuted", "gemma2": "norms", "gemma3": "norms"}


def write(
    path: Path,
    model: Any,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "smollm",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A model as llama.cpp's converter writes it: queries and keys of a Llama permuted, norms of a Gemma plus 1."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _write_tokenizer(writer, original_tokenizer(pre), pre)
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    for key, value in (metadata or {}).items():  # also in place of what is there
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.ARRAY))
    for name, tensor in _tensors(model, architecture).items():
        plain = tensor.ndim == 1 or "norm" in name
        used = gguf.GGMLQuantizationType.F32 if plain else kind
        writer.add_tensor(name, gguf.quantize(tensor, used), raw_dtype=used)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    padding = [f"[PAD{i}]" for i in range(len(tokens), 320)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4) + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    config, kind = model.config, next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if name.endswith("gate_up_proj"):
            layer = name.split(".")[2]
            tensors[f"blk.{layer}.ffn_gate_exps.weight"], tensors[f"blk.{layer}.ffn_up_exps.weight"] = np.split(
                array, 2, 1
            )
            continue
        stem, dot, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, ".", "weight")
        if ORDER.get(architecture) == "permuted" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = (
                array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        if ORDER.get(architecture) == "norms" and "norm" in name:
            array = array + 1
        tensors[names.get_name(stem) + dot + suffix] = np.ascontiguousarray(array)
    return tensors


FAMILIES = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3moe", {"mlp_only_layers": [], "moe_intermediate_size": 32, "decoder_sparse_step": 1}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "final_logit_softcapping": None, "layer_types": None, "sliding_window": 11},
    ),
}


def source(member: str = "llama", **changes: Any) -> Any:
    sizes = {name: value for name, value in (SIZES | FAMILIES[member][1] | changes).items() if value is not None}
    sizes |= {
        name: None
        for name in ("final_logit_softcapping", "layer_types")
        if name in FAMILIES[member][1] and FAMILIES[member][1][name] is None
    }
    model = tiny_model(member, **sizes)
    with torch.no_grad():  # norms that are all one would hide that they are swapped
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.normal_(
                    0.0 if "gemma" in member else 1.0, 0.1, generator=torch.Generator().manual_seed(len(name))
                )
    return model


@pytest.mark.parametrize("member", FAMILIES)
def test_a_float32_file_is_the_checkpoint_that_it_was_made_of(member: str, tmp_path: Path) -> None:
    model = source(member)
    if member.startswith("qwen2"):
        model.config.head_dim = 16
    file = write(tmp_path / "model.gguf", model, FAMILIES[member][0])
    loaded = zebra.load(file)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        if "gemma" in member and "norm" in name:  # plus 1, minus 1
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=2e-7)
        else:
            assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=2e-4)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps


def test_every_architecture_is_tried() -> None:
    assert {architecture for architecture, _ in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        (gguf.GGMLQuantizationType.F16, torch.float16, 0.0),
        (gguf.GGMLQuantizationType.BF16, torch.bfloat16, 0.0),
        (gguf.GGMLQuantizationType.Q8_0, torch.bfloat16, 0.5 / 127 + 2**-8),
        (gguf.GGMLQuantizationType.Q4_1, torch.bfloat16, 1 / 15 + 2**-8),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_quantised_weights_are_what_their_blocks_stand_for(
    kind: gguf.GGMLQuantizationType, dtype: torch.dtype, error: float, tmp_path: Path
) -> None:
    model = source()
    file = write(tmp_path / "model.gguf", model, kind=kind)
    loaded = zebra.load(file)
    assert loaded.dtype == dtype
    state = loaded.state_dict()
    for tensor in gguf.GGUFReader(file).tensors:  # those that have the same order in both
        if tensor.name.endswith("ffn_down.weight"):
            name = f"model.layers.{tensor.name.split('.')[1]}.mlp.down_proj.weight"
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(state[name], values.to(dtype))
    for name, original in model.state_dict().items():
        if original.ndim == 2:
            rounded = original if error else original.to(dtype)
            blocks = rounded.reshape(-1, 32)
            bound = error * blocks.abs().amax(1, keepdim=True)
            assert ((state[name].float().reshape(-1, 32) - blocks.float()).abs() <= bound + 1e-6).all(), name


@pytest.mark.parametrize("pre", ORIGINAL_SPLITS)
def test_the_tokenizer_is_the_original_one(pre: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source(), pre=pre)
    original, tokenizer = original_tokenizer(pre), load_tokenizer(file, read_config(file))
    for text in SAMPLES:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<s>x</s>").input_ids[0] == 1
    tokens = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert tokens == ["<s>", "</s>", "<pad>", "<unk>"]
    assert tokenizer.chat_template == TEMPLATE


def test_a_split_that_nobody_knows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_directory(write(tmp_path / "model.gguf", source(), pre="smollm", metadata={"llama.logit_scale": 0.5}))
    assert "llama.logit_scale = 0.5 is ignored" in caplog.text
    assert "has the pre-tokenizer" not in caplog.text
    with mock.patch.dict(ORIGINAL_SPLITS, {"viking": DIGITS}):
        as_directory(write(tmp_path / "other.gguf", source(), pre="viking"))
    assert "has the pre-tokenizer 'viking'" in caplog.text


def test_a_conversion_is_a_plain_checkpoint(zebra: Zebra, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source(), metadata={"tokenizer.ggml.eot_token_id": 7})
    done = zebra("convert", file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM, full, layers GGGGG" in done.stdout
    assert "48 F32, written as float32" in done.stderr
    assert len(done.stderr.splitlines()) == 1  # no bar, nothing of transformers
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-6, 1e4)
    assert json.loads((tmp_path / "out" / "zebra.json").read_text())["source"] == str(file)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.generation_config.eos_token_id == [2, 7]
    assert (plain.generation_config.bos_token_id, plain.generation_config.pad_token_id) == (1, 3)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain(IDS).logits, source()(IDS).logits, rtol=1e-4, atol=2e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE

    done = zebra("convert", file, tmp_path / "striped", "--stripes", "GL:9", "--rope", "yarn:2")
    assert "CwmForCausalLM, GL:9, layers GLGLG" in done.stdout
    assert done.stderr == ""  # weights of the cache, linked
    assert (tmp_path / "striped" / "model.safetensors").samefile(tmp_path / "out" / "model.safetensors")
    refused(zebra("convert", tmp_path / "out", tmp_path / "other"), "got neither", "Give stripes or a rope")
    done = zebra("convert", tmp_path / "out", tmp_path / "other", "--rope", "yarn:2")
    assert "LlamaForCausalLM, full" in done.stdout


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_what_lies_beside_a_file_is_neither_read_nor_run(zebra: Zebra, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source())
    alone = load(file).state_dict()
    (tmp_path / "beside").mkdir()
    file = Path(shutil.copy(file, tmp_path / "beside"))
    executed = tmp_path / "executed"
    (file.parent / "own.py").write_text(f"open({str(executed)!r}, 'w')\nOwn = None\n")
    fields = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(fields))
    (file.parent / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model(source(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(file.parent)
    done = zebra("generate", file, "--prompt", "Once", "--max-new-tokens", 2, input="y\ny\ny\n")
    assert done.returncode == 0, done.stderr
    assert not executed.exists()
    beside = load(file).state_dict()
    assert alone.keys() == beside.keys()
    assert all(torch.equal(tensor, beside[name]) for name, tensor in alone.items())


def test_every_verb_takes_a_file(zebra: Zebra, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SAMPLES * 40))
    zebra("convert", file, tmp_path / "striped", "--stripes", "GL:9")
    length = ("--length", 64)
    for arguments, answer in (
        (("plan", file, *length), "GLLL:512"),
        (("verify", tmp_path / "striped", "--against", file), "equal"),
        (("evaluate", "perplexity", file, text, *length), file.name),
        (("generate", file, "--chat", "--prompt", "Hi", "--max-new-tokens", 3), ""),
        (
            (
                "select",
                file,
                "--budget",
                3,
                "--window",
                9,
                *length,
                "--text",
                text,
                "--samples",
                4,
                "--out",
                tmp_path / "s",
            ),
            "layout",
        ),
    ):
        done = zebra(*arguments)
        assert done.returncode == 0, done.stderr
        assert answer in done.stdout, done.stdout


@pytest.mark.full
def test_a_file_is_trained_as_its_conversion_is(zebra: Zebra, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", source(bos_token_id=1))
    zebra("convert", file, tmp_path / "plain")
    for lora in (None, {"r": 2}):
        shared = {"train__length": 64, "train__max_steps": 2, "train__save_steps": 2, "evaluate": None, "lora": lora}
        values = [
            losses(adapt(adapt_recipe(tmp_path / f"{name}{bool(lora)}", model=str(model), **shared)))
            for name, model in (("a", file), ("b", tmp_path / "plain"))
        ]
        assert values[0] == values[1] != []
    assert load_tokenizer(tmp_path / "aFalse" / "model").chat_template == TEMPLATE
    pipeline = {"run": "pipe", "model": str(file), "stages": {"convert": {"stripes": "GL:9"}}}
    (tmp_path / "pipe.yaml").write_text(json.dumps(pipeline))
    done = zebra("run", tmp_path / "pipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


FAULTS: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "empty": (lambda file: b"", ("not a GGUF file", "Copy it again")),
    "another format": (lambda file: b"PK" + file, ("not a GGUF file", "Copy it again")),
    "another version": (lambda file: file[:4] + b"\x09" + file[5:], ("version 9",)),
    "a cut header": (lambda file: file[:5000], ("damaged", "Copy it again")),
    "a cut tensor": (lambda file: file[:-300], ("truncated", "output.weight ends beyond", "Copy it again")),
    "many pairs": (lambda file: file[:16] + b"\xff" * 8 + file[24:], ("damaged",)),
    "a long string": (lambda file: file[:24] + b"\xff" * 8 + file[32:], ("damaged",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_rejected_in_one_line(fault: str, zebra: Zebra, tmp_path: Path) -> None:
    damage, words = FAULTS[fault]
    file = write(tmp_path / "model.gguf", source())
    file.write_bytes(damage(file.read_bytes()))
    refused(zebra("convert", file, tmp_path / "out"), str(file), *words)


REJECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "arch.gguf": ({"general.architecture": "rwkv7"}, ("architecture 'rwkv7'", "llama, qwen2", "original checkpoint")),
    "adapter.gguf": ({"general.type": "adapter"}, ("of type 'adapter'",)),
    "model-00001-of-00003.gguf": ({}, ("one of several parts", "llama-gguf-split --merge")),
    "split.gguf": ({"split.count": 3}, ("one of 3 parts",)),
    "layers.gguf": ({"llama.block_count": [5, 6]}, ("num_hidden_layers as one number for all layers",)),
    "text.gguf": ({"llama.attention.head_count": "4"}, ("num_attention_heads as one number for all layers",)),
    "theta.gguf": ({"llama.rope.freq_base": "1e4"}, ("rope.freq_base as one number for all layers",)),
    "parts.gguf": ({"split.count": "x"}, ("one of x parts",)),
    "alignment.gguf": ({"general.alignment": 0}, ("damaged: an alignment of 0",)),
    "tokenizer.gguf": ({"tokenizer.ggml.model": "bert"}, ("tokenizer of", "cannot be read", "original checkpoint")),
    "merges.gguf": ({"tokenizer.ggml.merges": [1, 2]}, ("tokenizer of", "cannot be read: AttributeError")),
    "rotated.gguf": ({"llama.rope.dimension_count": 8}, ("partial RoPE",)),
    "rope.gguf": ({"llama.rope.scaling.type": "longrope"}, ("rope type 'longrope'",)),
    "biased.gguf": ({"llama.block_count": 4}, ("has 195,264 weights", "of its sizes has 164,416")),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_not_one_known_model_is_rejected(name: str, zebra: Zebra, tmp_path: Path) -> None:
    metadata, words = REJECTED[name]
    file = write(tmp_path / name, source(), metadata=metadata)
    refused(zebra("generate", file, "--prompt", "x"), name, *words)


def test_the_remedy_of_what_is_absent(zebra: Zebra, tmp_path: Path) -> None:
    refused(zebra("generate", tmp_path / "no.gguf", "--prompt", "x"), "there is no file")
    file = write(tmp_path / "model.gguf", source())
    refused(zebra("generate", tmp_path, "--prompt", "x"), "no config.json", f"the GGUF file itself: {file}")
    with mock.patch.dict(sys.modules, {"gguf": None}):
        refused(zebra("generate", file, "--prompt", "x"), "package gguf", "pip install '.[gguf]'")
    assert read_decoder(file).num_parameters == source().num_parameters()


def test_the_rope_is_what_the_file_says(tmp_path: Path) -> None:
    def rope(**arguments: Any) -> dict[str, Any]:
        return config_fields(read_header(write(tmp_path / "model.gguf", source(), **arguments)))["rope_parameters"]

    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope(metadata=linear) == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn |= {"llama.rope.scaling.original_context_length": 128}
    assert rope(metadata=yarn)["original_max_position_embeddings"] == 128
    # Llama 3.1's factors are a tensor, computed here by transformers itself.
    model = source(max_position_embeddings=16384)
    expected = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model.config.rope_parameters = expected
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": (plain / inverse).numpy()}
    assert rope(metadata={"llama.rope.freq_base": 5e5}, tensors=factors) == expected
    loaded = zebra.load(tmp_path / "model.gguf")
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, inverse)
    for wrong in (np.linspace(1, 3, 8), np.zeros(8), np.full(8, np.inf), np.ones(7)):
        with pytest.raises(ZebraError, match="is not the rope of Llama"):
            rope(tensors={"rope_freqs.weight": wrong.astype(np.float32)})
    file = tmp_path / "model.gguf"  # cut within the factors
    file.write_bytes(file.read_bytes()[: read_header(file).tensors["rope_freqs.weight"].start + 4])
    with pytest.raises(ZebraError, match="is not the rope of Llama"):
        config_fields(read_header(file))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_original_tokens(prefix: bool, tmp_path: Path) -> None:
    state = json.loads((STORIES / "tokenizer.json").read_text())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    model, original = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    with mock.patch(
        f"{__name__}._write_tokenizer", lambda writer, *_: _write_sentencepiece(writer, tokens, state, prefix)
    ):
        file = write(tmp_path / "stories.gguf", model)
    tokenizer = load_tokenizer(file, read_config(file))
    for text in (
        *SAMPLES[:3],
        " Once  upon\n a time",
        "Lily & café 😀",
        (TEXT / "tinystories_test.txt").read_text()[:5000],
    ):
        expected = original(text).input_ids
        if not prefix:  # what stands behind the space that the original adds
            text, expected = "\n" + text, original("\n" + text).input_ids
            expected.remove(original.convert_tokens_to_ids("▁"))
        assert tokenizer(text).input_ids == expected, text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id == 1


def _write_sentencepiece(writer: gguf.GGUFWriter, tokens: list[str], state: dict[str, Any], prefix: bool) -> None:
    ranks = {"".join(merge): -float(i) for i, merge in enumerate(state["merges"])}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
    kinds = [6 if token.startswith("<0x") else 1 for token in tokens]
    writer.add_token_types([2, 3, 3, *kinds[3:]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if not prefix:  # without a word, there is one
        writer.add_add_space_prefix(False)

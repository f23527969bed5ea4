"""`generate`: the tokens of transformers, streamed pieces that join to the text, seeds, and a bounded cache."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import STORIES, TEXT, Zebra, refused
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, StaticCache

import zebra
from zebra.data.encoding import Encoder, encode_batches
from zebra.data.haystack import Haystack, PromptTokenizer
from zebra.data.qa import QAExample
from zebra.decoding import Decoding
from zebra.evaluate.prompts import Prompts
from zebra.generation import Generated
from zebra.model.cache import StripedCache
from zebra.text_writer import TextWriter

ONCE = "Once upon a time, there was"
ASSISTS_ITSELF_IN_CHUNKS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
"""Transformers 5.17 fails too where a model that assists itself reads its prompt in chunks."""


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zebra.convert(STORIES, tmp_path_factory.mktemp("striped") / "model", "GLLL:129")


@pytest.fixture(scope="module")
def model(striped: Path) -> Any:
    return zebra.load(striped)


@pytest.fixture(scope="module")
def long() -> str:
    """A prompt beyond the window, within the 512 positions that the model was trained for."""
    return (TEXT / "tinystories_test.txt").read_text()[:600]


def by_transformers(path: Path, tokenizer: Any, prompt: str, **options: Any) -> tuple[int, ...]:
    """The new tokens of plain transformers, by its own attention and its own cache."""
    plain: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = DynamicCache(config=plain.config)
    output = plain.generate(**inputs, past_key_values=cache, **options)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("chunk", [None, pytest.param(1, marks=pytest.mark.full), 7, 64, 10_000])
def test_greedy_tokens_equal_transformers(
    model: Any, striped: Path, tokenizer: Any, long: str, chunk: int | None
) -> None:
    expected = by_transformers(striped, tokenizer, long, max_new_tokens=60, do_sample=False)
    generated = zebra.generate(model, long, max_new_tokens=60, prefill_chunk=chunk)
    assert generated.tokens == expected
    assert generated.prompt_tokens > 129
    assert 0 < generated.seconds_to_first_token < generated.seconds
    assert generated.tokens_per_second is not None


def test_a_prompt_has_no_end_of_text_behind_it(ending_stories: Path, tokenizer: Any) -> None:
    """With a tokenizer that appends an end token: prompts have none, and `append_eos` adds no second one."""
    ending, texts = AutoTokenizer.from_pretrained(ending_stories), [ONCE, f"{ONCE}</s>"]
    assert ending(ONCE)["input_ids"] == [*tokenizer(ONCE)["input_ids"], 2]
    options: dict[str, Any] = {"max_new_tokens": 8}
    assert zebra.generate(ending_stories, ONCE, **options).tokens == zebra.generate(STORIES, ONCE, **options).tokens
    example = QAExample("one", 1, ONCE, "Who ran?", ("the dog",))
    assert Prompts(ending).fitting(example, None).ids == Prompts(tokenizer).fitting(example, None).ids
    documents = [np.array(ids) for ids in ending(texts)["input_ids"]]
    with_end, without = (Haystack.of_documents(documents, PromptTokenizer(one)) for one in (ending, tokenizer))
    assert with_end.tokens.tolist().count(2) == 1  # that of the text itself
    assert without.tokens.tolist().count(2) == 3
    for one, appended in ((ending, True), (tokenizer, True), (ending, False)):
        (batch,) = encode_batches([texts], Encoder.of(one, append_eos=appended), 1)
        ends = [np.count_nonzero(part == 2) for part in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])]
        assert ends == ([1, 1] if one is tokenizer else [1, 2])


@pytest.mark.parametrize("chunk", [None, 7])
def test_beams_equal_transformers(model: Any, striped: Path, tokenizer: Any, long: str, chunk: int | None) -> None:
    expected = by_transformers(striped, tokenizer, long, max_new_tokens=40, do_sample=False, num_beams=3)
    pieces: list[str] = []
    generated = zebra.generate(model, long, max_new_tokens=40, num_beams=3, prefill_chunk=chunk, on_text=pieces.append)
    assert generated.tokens == expected
    assert "".join(pieces) == generated.text


def test_draws_equal_transformers_and_depend_on_the_seed_alone(
    model: Any, striped: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    cuts = {"temperature": 0.9, "top_p": 0.95, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}
    torch.manual_seed(5)
    expected = by_transformers(striped, tokenizer, ONCE, max_new_tokens=50, do_sample=True, **cuts)
    before, _ = torch.get_rng_state(), capfd.readouterr()
    generated = zebra.generate(model, ONCE, max_new_tokens=50, seed=5, **cuts)
    assert generated.tokens == expected
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert zebra.generate(model, ONCE, max_new_tokens=50, seed=5, **cuts).tokens == generated.tokens
    assert zebra.generate(model, ONCE, max_new_tokens=50, seed=6, **cuts).tokens != generated.tokens
    assert capfd.readouterr().err == ""  # transformers writes nothing of its own


def test_draws_of_two_threads_are_those_of_each_alone(model: Any) -> None:
    options: Any = {"max_new_tokens": 20, "temperature": 0.9, "seed": 5}
    alone, before, texts = zebra.generate(model, ONCE, **options), torch.get_rng_state(), []
    other = threading.Thread(target=lambda: texts.append(zebra.generate(model, ONCE, **options)))

    def meanwhile(piece: str) -> None:
        if other.ident is None:
            other.start()
            other.join(0.3)

    texts.append(zebra.generate(model, ONCE, on_text=meanwhile, **options))
    other.join()
    assert [text.tokens for text in texts] == [alone.tokens] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_the_checkpoints_defaults_but_its_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """generation_config.json is ignored, except for its end tokens."""
    expected = zebra.generate(model, ONCE, max_new_tokens=60)
    recommends = copy.deepcopy(model.generation_config)
    recommends.do_sample, recommends.temperature, recommends.top_k, recommends.num_beams = True, 3.0, 5, 2
    recommends.repetition_penalty = 2.0
    monkeypatch.setattr(model, "generation_config", recommends)
    assert zebra.generate(model, ONCE, max_new_tokens=60).tokens == expected.tokens
    recommends.eos_token_id = expected.tokens[9]
    generated = zebra.generate(model, ONCE)
    assert generated.tokens == expected.tokens[: expected.tokens.index(expected.tokens[9]) + 1]
    assert generated.ended == "end"


def test_a_pure_draw_is_not_cut(model: Any, tokenizer: Any) -> None:
    """transformers would sample from the top 50 tokens by default; at a high temperature others must come too."""
    logits = model(**tokenizer(ONCE, return_tensors="pt")).logits[0, -1]
    likeliest = set(logits.topk(50).indices.tolist())
    drawn = {zebra.generate(model, ONCE, max_new_tokens=1, temperature=50.0, seed=i).tokens[0] for i in range(8)}
    assert drawn - likeliest


def test_how_it_ended(model: Any) -> None:
    assert zebra.generate(model, ONCE, max_new_tokens=1).ended == "length"
    generated = zebra.generate(model, ONCE, max_new_tokens=60, stop=("zebra", "in the p"))
    assert generated.ended == "stop"
    assert generated.text.endswith("in the p")
    at_last = zebra.generate(model, ONCE, max_new_tokens=len(generated.tokens), stop=("in the p",))
    assert at_last.ended == "stop"
    half_in_the_prompt = zebra.generate(model, ONCE, max_new_tokens=9, stop=(ONCE[-4:] + generated.text[:2],))
    assert (half_in_the_prompt.ended, len(half_in_the_prompt.tokens)) == ("length", 9)


def test_the_pieces_join_to_the_text_and_it_to_the_whole(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    generated = zebra.generate(model, ONCE, max_new_tokens=100, on_text=pieces.append)
    assert len(pieces) > 60
    assert "".join(pieces) == generated.text
    whole = tokenizer.decode([*tokenizer(ONCE).input_ids, *generated.tokens], skip_special_tokens=True)
    assert ONCE + generated.text == whole
    assert generated.text.startswith(" ")  # the tokenizer would drop it at the beginning of a text


@pytest.mark.parametrize(
    "text",
    [
        *("Tom\n  and\n\n Lily", "caf\u00e9 \u732b \U0001f993\U0001f993!", " a", "\u00e9\u732b", "x\n \ny"),
        "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u9577\u3044",
    ],
)
def test_characters_come_whole(tokenizer: Any, text: str) -> None:
    """Also behind line breaks, and where one character is several tokens."""
    prompt, both = (tokenizer(part).input_ids for part in (ONCE, ONCE + text))
    assert both[: len(prompt)] == prompt
    pieces: list[str] = []
    writer = TextWriter(tokenizer, pieces.append)
    writer.put(torch.tensor([prompt]))
    for token in both[len(prompt) :]:
        writer.put(torch.tensor([token]))
    writer.end()
    assert "".join(pieces) == writer.text == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_characters_end_in_no_error(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        writer = TextWriter(tokenizer)
        for size in (5, 1, 1, 3, 20):
            writer.put(torch.randint(0, 512, (size,), generator=generator))
        writer.end()
        assert writer.text


def test_half_a_character_is_written_at_the_end(tokenizer: Any) -> None:
    writer = TextWriter(tokenizer)
    writer.put(torch.tensor([tokenizer(ONCE).input_ids]))
    for token in tokenizer("\u732b").input_ids[-3:-1]:
        writer.put(torch.tensor([token]))
    assert writer.text == ""
    writer.end()
    assert "\ufffd" in writer.text


def test_the_cache_stays_bounded(model: Any, long: str) -> None:
    """Local layers hold a window, whatever the chunks; the two global layers hold all."""
    token = 2 * 4 * 8 * 4  # bytes of one key and value: 4 heads of 8 float32 numbers
    for chunk in (None, 7, 64):
        generated = zebra.generate(model, long, max_new_tokens=40, prefill_chunk=chunk)
        held = generated.prompt_tokens + len(generated.tokens) - 1
        assert generated.cache_bytes is not None
        assert 2 * held * token <= generated.cache_bytes <= (1.25 * 2 * held + 2 * 3 * 128) * token
    plain = AutoModelForCausalLM.from_pretrained(STORIES)
    assert zebra.generate(plain, ONCE, max_new_tokens=2).cache_bytes is None


def test_a_checkpoint_is_loaded_with_what_is_given(striped: Path, model: Any) -> None:
    one = zebra.generate(STORIES, ONCE, max_new_tokens=30, stripes="GLLL:129", dtype="float32", device="cpu")
    assert one.tokens == zebra.generate(model, ONCE, max_new_tokens=30).tokens
    assert isinstance(one, Generated)
    with pytest.raises(zebra.ZebraError, match="stripes, dtype must be set when a model is loaded"):
        zebra.generate(model, ONCE, stripes="GL:9", dtype="float32")


def test_a_model_without_a_checkpoint_needs_a_tokenizer(checkpoints: Callable[..., Path], tokenizer: Any) -> None:
    loaded = zebra.load(checkpoints("llama", vocab_size=512), stripes="GL:9")
    with pytest.raises(zebra.ZebraError, match="tokenizer"):
        zebra.generate(loaded, ONCE)
    assert len(zebra.generate(loaded, ONCE, tokenizer=tokenizer, max_new_tokens=5).tokens) <= 5
    loaded.name_or_path = ""
    with pytest.raises(zebra.ZebraError, match="Pass tokenizer="):
        zebra.generate(loaded, ONCE)


def test_a_chat_template_is_used_where_there_is_one(model: Any) -> None:
    own = AutoTokenizer.from_pretrained(STORIES)
    with pytest.raises(zebra.ZebraError, match="no chat template"):
        zebra.generate(model, ONCE, tokenizer=own, chat=True)
    own.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} said{% endfor %}"
    generated = zebra.generate(model, ONCE, tokenizer=own, chat=True, max_new_tokens=20)
    assert generated.tokens == zebra.generate(model, ONCE + " said", max_new_tokens=20).tokens


def test_a_text_beyond_the_trained_length_is_warned_of_once(model: Any, long: str) -> None:
    with pytest.warns(UserWarning, match=r"exceed the 512 positions .* yarn:8") as warned:
        zebra.generate(model, long * 2, max_new_tokens=5)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zebra.generate(STORIES, long * 2, max_new_tokens=5, rope="yarn:8", device="cpu")
        zebra.generate(STORIES, long * 2, max_new_tokens=5, rope="base:5000000", device="cpu")


def test_a_text_beyond_the_reach_of_self_extend_is_warned_of_before_and_once(
    long: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(UserWarning, match=r"exceed the 512 .* with Self-Extend 1:7") as warned:
        generated = zebra.generate(STORIES, long * 2, max_new_tokens=5, self_extend="1:7", device="cpu")
    assert [f"auto:{generated.prompt_tokens + 5}." in str(one.message) for one in warned] == [True]
    ready = zebra.load(STORIES, self_extend="2:128")
    with pytest.warns(
        UserWarning, match=r"up to 890 new tokens exceed the 896 .* Self-Extend 2:128.* auto:898\."
    ) as warned:
        zebra.generate(ready, ONCE, max_new_tokens=890, stop=("Lily",))
    assert (len(warned), caplog.messages) == (1, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zebra.generate(ready, ONCE, max_new_tokens=888, stop=("Lily",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 up; got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer from 1 up; got 0"),
        ({"num_beams": 0}, "num_beams must be an integer from 1 up; got 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be an integer from 1 up; got 0"),
        ({"temperature": -0.1}, "temperature must be 0 or a number from 1e-06 up; got -0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be a number from 0 to 1; got 1.1"),
        ({"temperature": 1.0, "min_p": -1.0}, "min_p must be a number from 0 to 1; got -1.0"),
        ({"top_p": 0.9, "top_k": 5}, "top_p, top_k filter the tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 1e-06 up; got 0.0"),
        ({"temperature": 1e-40}, "temperature must be 0 or a number from 1e-06 up; got 1e-40"),
        ({"temperature": float("inf")}, "got inf"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be a number from 1e-06 up; got 1e-40"),
        ({"stop": ("",)}, "stop string"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer from 1 up; got 1.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer from 1 up; got '5'"),
        ({"num_beams": None}, "num_beams must be an integer from 1 up; got None"),
        ({"seed": 2**64}, "seed must be an integer from 0 to 18,446,744,073,709,551,615; got 18446744073709551616"),
        ({"seed": True}, "seed must be an integer from 0 to 18,446,744,073,709,551,615; got True"),
        ({"prefill_chunk": 2.5}, "prefill_chunk must be an integer from 1 up; got 2.5"),
        ({"temperature": "0.8"}, "temperature must be 0 or a number from 1e-06 up; got '0.8'"),
    ],
)
def test_what_transformers_cannot_decode_is_rejected_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zebra.ZebraError, match=re.escape(message)):
        Decoding(**options)


def test_several_prompts_are_no_prompt(model: Any) -> None:
    with pytest.raises(zebra.ZebraError, match=r"the prompt must be a string; got a list\. Pass one text per call"):
        zebra.generate(model, [ONCE, ONCE])


def test_an_interrupt_leaves_the_text_so_far_and_the_callers_state(model: Any) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 10:
            raise KeyboardInterrupt

    before, hooks = torch.get_rng_state(), len(model._forward_hooks)
    with pytest.raises(KeyboardInterrupt):
        zebra.generate(model, ONCE, prefill_chunk=2, temperature=1.0, on_text=interrupt)
    assert len(pieces) == 10
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model._forward_hooks) == hooks


def test_the_command_writes_the_text_and_nothing_else(zebra: Zebra, striped: Path, tmp_path: Path, model: Any) -> None:
    from zebra import generate

    expected = generate(model, ONCE, max_new_tokens=60)
    done = zebra("generate", striped, "--prompt", ONCE, "--max-new-tokens", 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.text
    assert "60 new tokens" in done.stderr
    assert "first token after" in done.stderr
    (tmp_path / "prompt.txt").write_text(ONCE)
    for source, options in ((tmp_path / "prompt.txt", {}), ("-", {"input": ONCE})):
        done = zebra("generate", striped, "--file", source, "--max-new-tokens", 60, "--prefill-chunk", 3, **options)
        assert (done.returncode, done.stdout) == (0, expected.text)

    done = zebra("generate", striped, "--prompt", ONCE, "--max-new-tokens", 60, "--num-beams", 2, "--json")
    output = json.loads(done.stdout)
    assert output["text"] == generate(model, ONCE, max_new_tokens=60, num_beams=2).text
    assert output["new_tokens"] == len(output["tokens"]) == 60
    assert output["decoding"]["seed"] == 0
    assert output["seconds_to_first_token"] > 0
    assert {"prompt_tokens", "tokens_per_second", "cache_bytes", "ended", "versions"} <= set(output)


def test_the_command_warns_in_one_line(zebra: Zebra, striped: Path) -> None:
    done = zebra("generate", striped, "--prompt", ONCE, "--max-new-tokens", 600, "--stop", "Lily")
    assert done.returncode == 0
    assert done.stdout.endswith("Lily")
    assert [line[:7] for line in done.stderr.splitlines()] == ["zebra: ", "8 token"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "got neither"),
        (("--prompt", "a", "--file", "b"), "got both"),
        (("--prompt", ""), "the prompt is empty"),
        (("--file", "none"), "No such file"),
        (("--file", "latin"), "not UTF-8 at byte 3"),
        (("--file", "pipe"), "is a folder, a device or a pipe"),
        (("--file", "/dev/zero"), "is a folder, a device or a pipe"),
        (("--prompt", "a", "--temperature", "-1"), "greater than or equal to 0"),
        (("--prompt", "a", "--rope", "dynamic:2"), "a rope of type dynamic"),
        (("--prompt", "a\udcffb"), "unpaired surrogate"),
        (("--prompt", "a", "--seed", str(10**30)), "seed must be an integer"),
        (("--prompt", "a", "--device", "meta"), "device 'meta' is not available"),
        (("--prompt", "a", "--chat"), "no chat template"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_bad_prompts_are_refused(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zebra: Zebra
) -> None:
    """Before the model is loaded."""
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("zebra.model.load_options.load", None)
    refused(zebra("generate", STORIES, *arguments, cwd=tmp_path), says)


def test_ctrl_c_leaves_the_text_so_far(striped: Path) -> None:
    command = [sys.executable, "-m", "zebra", "generate", str(striped), "--prompt", ONCE, "--max-new-tokens", "100000"]
    running = subprocess.Popen(
        [*command, "--temperature", "30", "--stop", "never there"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout is not None
    first = running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    rest, warned = running.communicate(timeout=60)
    assert running.returncode == 130
    assert len(first + rest) >= 1
    assert b"interrupted" in warned
    assert b"Traceback" not in warned


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
@pytest.mark.parametrize("chunk", [None, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 64)), 7])
def test_a_padded_batch_in_chunks_equals_transformers(
    model: Any, striped: Path, long: str, options: dict[str, Any], chunk: int | None
) -> None:
    """By `generate` of transformers itself, with the bounded cache and with a static one."""
    padding = AutoTokenizer.from_pretrained(STORIES, padding_side="left")
    batch = padding([long, long[40:140], ONCE], return_tensors="pt", padding=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(striped, attn_implementation="eager")
    common: dict[str, Any] = {**batch, "max_new_tokens": 20, "do_sample": False}
    expected = plain.generate(**common, **{name: value for name, value in options.items() if name == "num_beams"})
    assert torch.equal(model.generate(**common, **options, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize(("implementation", "cls"), [("hybrid", StripedCache), ("static", StaticCache)])
@pytest.mark.parametrize("options", [{"max_new_tokens": 2}, {"generation_config": GenerationConfig(max_new_tokens=2)}])
def test_the_cache_that_a_checkpoint_asks_for(
    model: Any, options: dict[str, Any], implementation: str, cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's generation_config.json has "hybrid", the default of an older transformers."""
    monkeypatch.setattr(model.generation_config, "cache_implementation", implementation)
    output = model.generate(torch.tensor([[1, 2, 3]]), **options, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, cls)


@pytest.mark.parametrize("chunk", [None, 7])
def test_assisted_decoding_equals_transformers(
    model: Any, striped: Path, tokenizer: Any, long: str, chunk: int | None
) -> None:
    expected = by_transformers(striped, tokenizer, long, max_new_tokens=30, do_sample=False)
    inputs = tokenizer(long, return_tensors="pt")
    dense = zebra.load(STORIES)
    helpers: list[dict[str, Any]] = [{"assistant_model": dense}, {"prompt_lookup_num_tokens": 3}]
    if chunk is None or ASSISTS_ITSELF_IN_CHUNKS:
        helpers.append({"assistant_model": model})
    for helper in helpers:
        more = {"prefill_chunk_size": chunk, "max_new_tokens": 30, "do_sample": False}
        assert tuple(model.generate(**inputs, **helper, **more)[0, inputs["input_ids"].shape[1] :].tolist()) == expected


def test_stop_strings_reach_no_kernel(model: Any, tokenizer: Any) -> None:
    """transformers passes the tokenizer of its stop strings on to every layer."""
    inputs = tokenizer(ONCE, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, stop_strings=["in the p"], tokenizer=tokenizer)
    assert tokenizer.decode(output[0]).endswith("in the p")

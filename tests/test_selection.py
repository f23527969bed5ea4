"""Layer selection: it finds a planted layer, resumes after a kill, and rejects budgets that leave no choice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORIES, TEXT, Zebra, refused, tiny_model
from transformers import AutoTokenizer

import zebra
from zebra import ZebraError
from zebra.compare.methods import choose_methods, standard_methods
from zebra.data.corpus import Corpus
from zebra.data.instructions import make_instructions
from zebra.data.needles import SampleGenerator
from zebra.decoding import Decoding
from zebra.evaluate.calibration import SHARE, CalibrationBatch, batches_of, long_range, task_sequences, text_sequences
from zebra.evaluate.losses import Losses, selection_folder
from zebra.evaluate.retrieval import evaluate_retrieval
from zebra.evaluate.search import greedy, once, strides
from zebra.evaluate.selection import select
from zebra.evaluate.target import EvalTarget
from zebra.model.layerwise import Layerwise
from zebra.model.loss import head_of, token_losses
from zebra.plan.budget import layers_within
from zebra.plan.cost import Run, flops
from zebra.plan.decoder import read_decoder
from zebra.plan.memory import kv_bytes
from zebra.report import write_report
from zebra.results import read_results
from zebra.stripes import Stripes

WINDOW, LENGTH, VALUES = 8, 48, 8
QUESTION, FIRST_VALUE = 12, 13


def planted(tmp_path: Path, layers: tuple[int, ...], depth: int = 6) -> Any:
    """A Llama in which only `layers` carry a value from where it stands to where it is asked for; the others are noise.

    A value's embedding has a mark (dimension 0) and which it is (1 to 8); the question's a mark of its own (9). In a
    planted layer the question's query meets the value's key in the dimension whose rope hardly turns, the head copies
    which it is into dimensions 10 to 17, and the head of the model reads them there.
    """
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 24}
    model = tiny_model("llama", **sizes, num_hidden_layers=depth, initializer_range=0.02)
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, :18], embedding[:, 18:] = 0, torch.randn(24, 14)
        for v in range(VALUES):
            embedding[FIRST_VALUE + v] = 0
            embedding[FIRST_VALUE + v, [0, 1 + v]] = 2.0
            head[FIRST_VALUE + v] = 0
            head[FIRST_VALUE + v, 10 + v] = 1.0
        embedding[QUESTION] = 0
        embedding[QUESTION, 9] = 2.0
        for i in layers:
            attention = model.model.layers[i].self_attn
            for map_ in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                map_.weight.zero_()
            attention.q_proj.weight[7, 9] = attention.k_proj.weight[7, 0] = 4.0  # the slowest of 8 planes of head 0
            for v in range(VALUES):
                attention.v_proj.weight[v, 1 + v] = attention.o_proj.weight[10 + v, v] = 2.0
    model.save_pretrained(tmp_path / "planted")
    return zebra.load(tmp_path / "planted")


def questions(rows: int = 12) -> list[CalibrationBatch]:
    """A value early, noise, the question and its answer, which is what is scored."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, QUESTION, (rows, LENGTH))
    value = FIRST_VALUE + rng.integers(0, VALUES, rows)
    ids[np.arange(rows), rng.integers(1, LENGTH - 3 * WINDOW, rows)] = value
    ids[:, -2], ids[:, -1] = QUESTION, value
    at = np.zeros(ids.shape, dtype=bool)
    at[:, -1] = True
    return batches_of(list(zip(ids, at, strict=True)), seed=0)


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("order", [greedy, once])
def test_the_one_planted_layer_is_found(order: Any, layer: int, tmp_path: Path) -> None:
    losses = Losses(planted(tmp_path, (layer,)), questions(), WINDOW)
    expected = "L" * layer + "G" + "L" * (5 - layer)
    assert order(losses, "GGGGGG", 1) == expected
    losses.measure("GGGGGG", ["GGGGGG", expected, "LLLLLL"], held_out=True)
    source, chosen, none = (losses.sums(kinds, held_out=True)[0].mean() for kinds in ("GGGGGG", expected, "LLLLLL"))
    assert chosen < source + 0.1 < none - 1


def test_of_two_layers_that_do_the_same_greedy_keeps_one(tmp_path: Path) -> None:
    losses = Losses(planted(tmp_path, (1, 4)), questions(), WINDOW)
    chosen = greedy(losses, "GGGGGG", 1)
    assert chosen in ("LGLLLL", "LLLLGL")
    losses.measure("GGGGGG", ["GGGGGG", "LLLLLL"])
    alone = [losses.mean("GLGGGG"), losses.mean("GGGGLG")]
    assert max(alone) < losses.mean("GGGGGG") + 0.5 < losses.mean("LLLLLL") - 0.5


def test_losses_are_those_of_whole_forwards(tmp_path: Path) -> None:
    """The prefix, the batches and the sums against one naive forward of each row under each layout."""
    model, parts = planted(tmp_path, (2,)), questions()
    losses, head = Losses(model, parts, WINDOW), head_of(model)
    greedy(losses, "GGGGGG", 3)
    assert len(losses.candidates) == 6 + 5 + 4
    for kinds in losses.candidates:
        stripes = Stripes(WINDOW, global_layers=tuple(i for i, kind in enumerate(kinds) if kind == "G"))
        striped = zebra.load(tmp_path / "planted", stripes=stripes)
        sums = []
        for part in (part for part in parts if not part.held_out):
            for ids, at in zip(*part.tensors("cpu"), strict=True):
                with torch.no_grad():
                    hidden = striped.get_decoder()(ids[None], use_cache=False).last_hidden_state
                sums.append(token_losses(hidden, head, ids[None])[0, at].sum().item())
        assert losses.sums(kinds)[0] == pytest.approx(sums, rel=1e-5)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts = planted(tmp_path, (2,)), questions()
    whole = Losses(model, parts, WINDOW, folder=tmp_path)
    chosen = greedy(whole, "GGGGGG", 2)
    lines = (tmp_path / "losses.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "losses.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:20])  # killed while it wrote
    again = Losses(model, parts, WINDOW, folder=tmp_path)
    assert greedy(again, "GGGGGG", 2) == chosen
    assert (tmp_path / "losses.jsonl").read_bytes().splitlines(keepends=True) == lines
    for name in ("states", "resume"):
        monkeypatch.setattr(Layerwise, name, lambda *_: 1 / 0)
    known = Losses(model, parts, WINDOW, folder=tmp_path)
    assert greedy(known, "GGGGGG", 3).count("G") == 3
    assert known.mean(chosen) == whole.mean(chosen)
    (tmp_path / "losses.jsonl").write_bytes(b"{}\n")
    with pytest.raises(ZebraError, match="line 1 is not a loss"):
        Losses(model, parts, WINDOW, folder=tmp_path)


def test_the_stride_at_every_offset() -> None:
    assert strides("GGGGGGGG", 4) == ["GLGLGLGL", "LGLGLGLG"]
    assert strides("GGGGGGG", 2) == ["GLLLGLL", "LGLLLGL", "LLGLLLG", "LLLGLLL", "GLLLLGL", "GLLLLLG"]
    assert strides("GGGGG", 2) == ["GLLGL", "LGLLG", "LLGLL", "GLLLG"]
    assert strides("GGGGG", 1) == ["GLLLL", "LGLLL", "LLGLL", "LLLGL", "LLLLG"]
    assert strides("GGG", 2) == ["GLG", "LGL"]
    assert strides("LGLGLG", 2) == ["LGLLLG", "LLLGLL"]  # of a source with local layers, over its global ones


@pytest.mark.parametrize("prefix", [[], [1]], ids=["plain", "bos"])
def test_long_range_tokens_are_those_that_gain_most(prefix: list[int]) -> None:
    """Against a naive loop: each token behind the piece that ends with it, and the whole row."""
    model, window, length = zebra.load(STORIES), 16, 60
    ids = torch.tensor([AutoTokenizer.from_pretrained(STORIES).encode("Once there was a dog. " * 20)[:length]])
    ids = torch.cat([ids, ids.flip(1)])
    ids[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)
    scored = long_range(model, ids, window, prefix)
    assert scored.sum(dim=1).tolist() == [int(SHARE * (length - window))] * 2
    assert not scored[:, :window].any()

    def loss(row: torch.Tensor, t: int, start: int) -> float:
        with torch.no_grad():
            piece = torch.cat([row[: len(prefix)], row[start + len(prefix) : t]])
            return torch.nn.functional.cross_entropy(model(piece[None]).logits[0, -1:], row[t : t + 1]).item()

    for row, at in zip(ids, scored, strict=True):
        starts = {t: min((t - window // 2) // 8 * 8, length - window) for t in range(window, length)}
        starts |= dict.fromkeys(range(length - window // 2, length), length - window)
        gain = {t: loss(row, t, start) - loss(row, t, 0) for t, start in starts.items()}
        least = min(gain[t] for t in gain if at[t])
        assert least >= max(gain[t] for t in gain if not at[t]) - 1e-4


def test_answers_of_tasks_are_scored_and_stand_a_window_behind_their_evidence() -> None:
    needles = SampleGenerator(AutoTokenizer.from_pretrained(STORIES))
    rows = task_sequences(needles, ["passkey", "lookup"], length=300, window=64, samples=8, seed=1)
    for i, (ids, at) in enumerate(rows):
        assert not at[:300].any()
        assert at[300:].all()
        (sample,) = needles.samples(
            *(["passkey", "lookup"][i % 2],), length=300, depth=(1 - 64 / 300) * (i // 2) / 3, seed=1 + i
        )
        assert ids.tolist() == [*sample.ids, *sample.answers[0].ids]
    assert [len(part.ids) for part in batches_of(rows, 0) if part.held_out] in ([2], [1, 1])


def run(at: int | None) -> Run:
    return Run(decoder=read_decoder("llama-3.1-8b"), stripes=None, length=at or 8192)


def test_a_budget_of_cost_is_the_most_layers_that_meet_it() -> None:
    which = range(32)

    def striped(count: int, at: int) -> Run:
        return Run(
            decoder=read_decoder("llama-3.1-8b"), stripes=Stripes(1024, global_layers=tuple(range(count))), length=at
        )

    for text, at, cost, limit in (
        ("flops:0.95", 8192, lambda r: sum(flops(r).values()), 0.95 * sum(flops(run(None)).values())),
        ("cache:4GiB@131072", 131072, kv_bytes, 4 * 2**30),
    ):
        count = layers_within(text, which, Stripes(1024, pattern="L"), run)
        assert cost(striped(count, at)) <= limit < cost(striped(count + 1, at))
    assert layers_within("8", which, Stripes(1024, pattern="L"), run) == 8
    assert layers_within("0.25", which, Stripes(1024, pattern="L"), run) == 8
    assert layers_within("0.3", range(5), Stripes(1024, pattern="L"), run) == 1


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("0", "a share must be between 0 and 1"),
        ("-1", "a budget must be a number"),
        ("32", "must keep 1 to 31 of this model's 32 global layers; a budget of 32"),
        ("40", "must keep 1 to 31 of this model's 32 global layers; a budget of 40"),
        ("0.01", "a budget of 0.01 keeps 0"),
        ("1.0", "a share must be between 0 and 1"),
        ("half", "a budget must be a number"),
        ("8@4096", "a budget must be a number"),
        ("flops:2", "a share must be between"),
        ("flops:0.01", "a budget must be between the costs"),
        ("cache:1MiB", "a budget must be between the costs"),
        ("cache:1TiB", "a budget must be between the costs"),
        ("cache:4XB", "memory must be a positive number"),
    ],
)
def test_a_budget_that_leaves_no_choice_is_refused(budget: str, why: str) -> None:
    with pytest.raises(ZebraError, match=why):
        layers_within(budget, range(32), Stripes(1024, pattern="L"), run)


TEXTS = [str(TEXT / "tinystories_test.txt")]
ARGUMENTS: dict[str, Any] = {"window": 32, "length": 160, "samples": 4, "text": TEXTS}


@pytest.mark.full
def test_a_killed_selection_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = ARGUMENTS | {"samples": 12, "length": 300}
    code = "import torch\nfrom zebra.evaluate.selection import select\ntorch.set_num_threads(1)\n"  # as here
    code += f"select({str(STORIES)!r}, 2, work='work', **{kwargs!r})"
    losses = tmp_path / "work" / "losses.jsonl"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and (not losses.exists() or losses.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
    before = losses.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") >= 3
    assert not (tmp_path / "work" / "results.jsonl").exists()
    resumed = select(STORIES, 2, work=tmp_path / "work", **kwargs)
    whole = select(STORIES, 2, **kwargs)
    assert resumed == whole
    assert read_results(tmp_path / "work" / "results.jsonl") == whole.results
    after = losses.read_bytes()
    assert after.startswith(before)
    lines = [json.loads(line) for line in after.splitlines()]
    assert len({(line["layout"], line["batch"]) for line in lines}) == len(lines)
    monkeypatch.setattr(Layerwise, "states", lambda *_: 1 / 0)  # another order needs nothing new
    assert select(STORIES, 2, work=tmp_path / "work", order="once", **kwargs).stripes.window == 32


def test_sequences_of_text_begin_as_the_tokenizer_begins_texts() -> None:
    """One document whose own beginning counts, and windows within it; without a prefix they are those of the text."""
    document = np.array([99, *range(23)])
    corpus = Corpus(document, np.array([0, len(document)]))
    (first, _), (second, _), (third, _) = text_sequences(corpus, 8, 3, (99,))
    assert [ids.tolist() for ids in (first, second, third)] == [
        [99, *range(7)],
        [99, *range(7, 14)],
        [99, *range(14, 21)],
    ]
    assert [ids.tolist() for ids, _ in text_sequences(corpus, 8, 3)] == [*document.reshape(3, 8).tolist()]
    plain = select(STORIES, "0.4", seed=3, bos=False, **ARGUMENTS)
    assert {row.task for row in plain.results if row.task.startswith("selection-greedy")} == {"selection-greedy-text"}


def test_rows_and_page_of_a_selection(tmp_path: Path) -> None:
    selection = select(STORIES, "0.4", seed=3, run="a", **ARGUMENTS)
    by_task = {name: [row for row in selection.results if row.task == f"selection-{name}-text-bos"] for name in KINDS}
    assert {name: len(rows) for name, rows in by_task.items()} == KINDS
    assert {row.length for row in selection.results} == {160}
    assert {row.n for row in by_task["candidate"]} == {3 * int(SHARE * 128)}
    (chosen,) = by_task["greedy"]
    assert chosen.layout == str(selection.stripes)
    assert str(Stripes.parse(chosen.layout).layer_types(5)).count("full") == 2
    write_report(
        [*selection.results, *select(STORIES, 1, order="once", run="b", **ARGUMENTS).results], tmp_path / "page.html"
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("sequences that took no part in the choice") == 2 + 1  # twice as a title, once in the prose
    assert (tmp_path / "page-selection-2.svg").is_file()
    assert "Other results" not in page
    write_report(by_task["candidate"], tmp_path / "part.html")
    assert "Other results" in (tmp_path / "part.html").read_text()


KINDS = {"source": 3, "candidate": 5 + 4 + 3, "greedy": 1, "once": 1, "stride": 4, "local": 1}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"budget": "0"}, "a share must be between 0 and 1"),
    ({"budget": "5"}, "must keep 1 to 4 of this model's 5 global layers; a budget of 5"),
    ({"budget": "cache:1GiB"}, "a budget must be between the costs"),
    ({"order": "best"}, "order must be greedy or once; got 'best'"),
    ({"text": []}, r"got neither\. Give text= or tasks="),
    ({"text": [], "tasks": ["haystack"]}, "the task must be one of passkey"),
    ({"text": ["nowhere.txt"]}, r"nowhere\.txt"),
    ({"samples": 3}, "at least 4 samples"),
    ({"samples": 10**6}, r"must have 1,000,000 sequences of 160 tokens in its documents"),
    ({"window": 160}, "a window of 160"),
    ({"window": "150+10"}, "a window of 150 with 10 sinks"),
    ({"window": 0}, "an integer from 1"),
    ({"length": 600}, "600 tokens exceeds the 512 positions"),
    ({"text": [], "tasks": ["passkey"], "length": 40}, "passkey requires a length of at least"),
    ({"device": "moon"}, "device 'moon' is not available"),
    ({"dtype": "int4"}, "dtype must be one of"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_bad_input_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvalTarget, "load", None)
    kwargs = ARGUMENTS | changes
    with pytest.raises(ZebraError, match=why):
        select(STORIES, kwargs.pop("budget", 2), work=tmp_path / "work", **kwargs)
    assert not (tmp_path / "work").exists()


def test_one_text_and_one_task_are_not_their_letters() -> None:
    """In all that measure; of a checkpoint that is not loaded."""
    kwargs = {"window": 32, "length": 160, "samples": 4, "check_only": True}
    assert select(STORIES, 2, text=TEXTS[0], **kwargs) == select(STORIES, 2, text=TEXTS[:1], **kwargs)
    assert select(STORIES, 2, tasks="passkey", **kwargs) == select(STORIES, 2, tasks=["passkey"], **kwargs)
    one, several = (
        evaluate_retrieval(STORIES, tasks=tasks, haystack=text, lengths=[160], samples=4, check_only=True)
        for tasks, text in (("passkey", TEXTS[0]), (["passkey"], TEXTS[:1]))
    )
    assert one == several
    with pytest.raises(ZebraError, match=r"the methods at this length are .* got window"):
        choose_methods(standard_methods(512, 160, "GL:32"), "window")
    assert Decoding(stop="##").stop == ("##",)
    with pytest.raises(ZebraError, match=r"the kinds must be among .* got lists"):
        next(make_instructions([], kinds="lists"))


def test_records_have_their_text_in_a_field(tmp_path: Path) -> None:
    """The same sequences as from text files."""
    corpora, records = [Path(text).read_text(encoding="utf-8") for text in TEXTS], tmp_path / "texts.jsonl"
    records.write_text("".join(json.dumps({"story": text}) + "\n" for text in corpora), encoding="utf-8")
    works = [tmp_path / name for name in ("texts", "records")]
    for work, text in zip(works, ({"text": TEXTS}, {"text": str(records), "field": "story"}), strict=True):
        select(STORIES, 4, work=work, order="once", **ARGUMENTS | text)
    plain, from_records = (json.loads((work / "inputs.json").read_text())["sequences"] for work in works)
    assert from_records == plain


def test_a_model_whose_layers_have_fixed_kinds_is_refused(checkpoints: Any) -> None:
    with pytest.raises(ZebraError, match="each layer must keep its kind"):
        select(checkpoints("gemma3_text"), 1, **ARGUMENTS)
    with pytest.raises(ZebraError, match="at least 2 global layers; this model has 1"):
        select(checkpoints("gemma2", layer_types=["full_attention"] + ["sliding_attention"] * 4), 1, **ARGUMENTS)


def test_sinks_under_alibi_are_refused(checkpoints: Any, tokenizer: Any) -> None:
    source = checkpoints("zebra_study", position_embedding="alibi", vocab_size=512)
    tokenizer.save_pretrained(source)
    with pytest.raises(ZebraError, match=r"sinks are not supported with ALiBi, .* got L:32\+4"):
        select(source, 1, **ARGUMENTS | {"window": "32+4"})


def test_a_folder_keeps_to_its_inputs(tmp_path: Path) -> None:
    work = tmp_path / "work"
    select(STORIES, 4, work=work, order="once", **ARGUMENTS)
    with pytest.raises(ZebraError, match="was created with other inputs: sequences and window changed since"):
        select(STORIES, 4, work=work, order="once", **ARGUMENTS | {"window": 40, "length": 161})
    with (
        selection_folder(work, json.loads((work / "inputs.json").read_text())),
        pytest.raises(ZebraError, match="another process is using"),
    ):
        select(STORIES, 4, work=work, **ARGUMENTS)
    (work / "inputs.json").write_text("[")
    with pytest.raises(ZebraError, match="is damaged"):
        select(STORIES, 4, work=work, **ARGUMENTS)
    (work / "inputs.json").unlink()
    with pytest.raises(ZebraError, match="is not a selection"):
        select(STORIES, 4, work=work, **ARGUMENTS)


COMMON = ("--window", 32, "--length", 160, "--samples", 4, "--text", TEXTS[0])


def test_the_verb(tmp_path: Path, zebra: Zebra) -> None:
    work = tmp_path / "selection"
    done = zebra("select", STORIES, "--budget", 2, *COMMON, "-o", work, "--convert", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    chosen = json.loads(done.stdout)
    assert chosen["converted"]["layers"].count("G") == 2
    layout = Stripes.of(json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"], 32)
    assert chosen["layout"] == chosen["converted"]["layout"] == str(layout)
    assert [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()] == chosen["results"]
    assert (work / "report-selection-1.svg").is_file()
    cost = "12 candidates in 3 rounds, about 10 passes over 3 sequences"
    assert f"2 of 5 layers stay global, greedy: {cost}" in done.stderr
    assert "one pass takes" in done.stderr

    done = zebra("select", STORIES, "--budget", 2, *COMMON, "-o", work)
    assert (done.returncode, "one pass takes" in done.stderr) == (0, False)
    assert "measured, greedy" in done.stdout
    assert f"layout {layout}" in done.stdout

    again = tmp_path / "full-decode"
    done = zebra("select", STORIES, "--budget", 2, *COMMON, "-o", work, "--convert", again, "--full-decode")
    assert f"{layout}, full decode" in done.stdout
    assert json.loads((again / "zebra.json").read_text())["full_decode"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (COMMON, ("Missing option '--budget'",)),
        (("--budget", 9, *COMMON), ("must keep 1 to 4", "9")),
        (("--budget", 2, *COMMON, "--window", "many"), ("got 'L:many'",)),
        (("--budget", 2, *COMMON, "--convert", STORIES), ("must be different directories",)),
        (("--budget", 2, *COMMON, "--full-decode"), ("--full-decode requires --convert",)),
        (("--budget", 2, *COMMON, "--field", "body"), ("a field applies only to files of records", "'body'")),
        (("--budget", 2, *COMMON[:-2], "--task", "passkey", "--field", "body"), ("--field requires --text",)),
    ],
)
def test_a_refusal_is_one_line(
    arguments: tuple[object, ...], words: tuple[str, ...], tmp_path: Path, zebra: Zebra
) -> None:
    refused(zebra("select", STORIES, *arguments, "-o", tmp_path / "out"), *words)
    assert not list(tmp_path.glob("out*"))


def test_local_layers_have_their_window_and_sinks_and_stay_local(tmp_path: Path) -> None:
    zebra.convert(STORIES, tmp_path / "striped", "GL:40")
    selection = select(tmp_path / "striped", 2, **ARGUMENTS)
    kinds = selection.stripes.layer_types(5)
    assert kinds.count("full_attention") == 2
    assert {kinds[1], kinds[3]} == {"sliding_attention"}
    assert selection.stripes.window == 32
    candidates = [row for row in selection.results if row.metric == "rise"]
    assert {row.layout for row in candidates} == {"2,4:32", "GLLL:32", "0,2:32"}
    (source,) = [row for row in selection.results if row.metric == "loss"]
    assert source.layout == "GL:32"
    with_sinks = select(STORIES, 2, order="once", **ARGUMENTS | {"window": "32+4"})
    assert (with_sinks.stripes.window, with_sinks.stripes.sinks) == (32, 4)
    assert all(row.layout.endswith(":32+4") for row in with_sinks.results if row.metric == "rise")
    with pytest.raises(ZebraError, match="must keep 1 to 2 of this model's 3 global layers; a budget of 3"):
        select(tmp_path / "striped", 3, **ARGUMENTS)

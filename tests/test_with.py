"""`zebra with`: attention "zebra" in the processes of another tool's command, which stays as it is in all else."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, STORIES, Zebra, refused
from transformers import AutoTokenizer

import zebra as package
from zebra.evaluate.scoring import log_likelihoods
from zebra.integrations.command import ENTRY_POINT, environment, resolved

SOURCE = Path(package.__file__).parent.parent


def with_zebra(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process of its own, with the modules of this checkout."""
    variables = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "zebra", "with", "--", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=variables | {"OMP_NUM_THREADS": "1"}, **options)


def test_a_launchers_processes_have_the_attention_and_all_else_passes_through(tmp_path: Path) -> None:
    script = tmp_path / "launch.py"
    script.write_text(f"""
import os, subprocess, sys
if "child" not in sys.argv:
    print(sys.argv[1:], sys.stdin.read(), "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ, flush=True)
    sys.exit(subprocess.call([sys.executable, __file__, "child"]))
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(STORIES)!r}, attn_implementation="zebra")
print(model.config._attn_implementation, model.dummy_inputs["input_ids"].shape[0])
model(**model.dummy_inputs)
sys.exit(7)
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        done = with_zebra(script, "-x", "--name", "a b", "--", "--help", input="of stdin")
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == ["['-x', '--name', 'a b', '--', '--help'] of stdin False", "zebra 3"]


def test_a_signal_reaches_the_command_itself(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text("""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print(os.getpid(), flush=True)
time.sleep(60)
""")
    words = [sys.executable, "-m", "zebra", "with", "--", str(script)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}
    ) as one:
        assert one.stdout is not None
        assert int(one.stdout.readline()) == one.pid
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == 42


def test_nothing_is_registered_without_it() -> None:
    """The entry point lies in a folder that no Python searches by itself."""
    assert not [path for path in sys.path if Path(path) == ENTRY_POINT]
    assert [entry.name for entry in ENTRY_POINT.iterdir()] == ["zebra_with-1.dist-info"]


def test_the_environment_is_the_users_with_one_more_folder() -> None:
    assert environment({"A": "b"}) == {"A": "b", "PYTHONPATH": str(ENTRY_POINT)}
    both = environment({"PYTHONPATH": "/mine"})["PYTHONPATH"]
    assert both == f"{ENTRY_POINT}{os.pathsep}/mine"


def test_a_command_of_the_same_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts, other = tmp_path / "scripts", tmp_path / "other"
    for folder in (scripts, other):
        folder.mkdir()
        for name in ("tool", folder.name):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", str(other))
    assert resolved(["tool", "-x"]) == [str(scripts / "tool"), "-x"]
    assert resolved(["other"]) == [str(other / "other")]
    assert resolved(["-m", "tool"]) == [sys.executable, "-m", "tool"]


def test_what_cannot_be_run_is_refused(zebra: Zebra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(zebra("with", "--", "no-such-tool"), "no-such-tool", "PATH")
    refused(zebra("with", "--", "nothing.py"), "nothing.py", "not a file")
    refused(zebra("with"), "command")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x00")
    broken.chmod(0o755)
    refused(zebra("with", broken), "broken", "cannot be executed")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    refused(zebra("with", sys.executable), "TORCH_DEVICE_BACKEND_AUTOLOAD")


TASK = """
task: next-word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{word}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""


@pytest.fixture
def striped(tmp_path: Path) -> Path:
    """The real tiny checkpoint with local layers of 9 keys, so that another attention gives other numbers."""
    return package.convert(STORIES, tmp_path / "striped", "GLLL:9")


@pytest.fixture
def stories() -> list[str]:
    return (ROOT / "examples" / "text" / "tinystories_test.txt").read_text().split("<|endoftext|>")[:6]


@pytest.mark.full
def test_lm_eval_gives_the_numbers_of_python(striped: Path, stories: list[str], tmp_path: Path) -> None:
    words = [story.split(" ")[:60] for story in stories]
    rows = [{"prompt": " ".join(some[:-1]), "word": f" {some[-1]}"} for some in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next-word.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    done = with_zebra(
        *("lm_eval", "run", "--model", "hf", "--tasks", "next-word", "--include_path", tmp_path / "tasks"),
        *("--model_args", f"pretrained={striped},attn_implementation=zebra,dtype=float32"),
        *("--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / "results.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("results*.json")
    tokenizer = AutoTokenizer.from_pretrained(striped)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    wholes = [tokenizer(row["prompt"] + row["word"])["input_ids"] for row in rows]
    ends = [[whole[len(prompt) :]] for prompt, whole in zip(prompts, wholes, strict=True)]
    with torch.no_grad():
        likelihoods = log_likelihoods(package.load(striped), prompts, ends)
    perplexity = math.exp(-sum(one for (one,) in likelihoods) / len(rows))
    actual = json.loads(file.read_text())["results"]["next-word"]["perplexity,none"]
    assert actual == pytest.approx(perplexity, rel=1e-6)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated", "ignore:`is_gradient_checkpointing`")
def test_trl_sft_gives_the_losses_of_python(striped: Path, stories: list[str], tmp_path: Path) -> None:
    """Through accelerate's launcher, which starts a process of its own; packed by best fit, as flash attention is."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    (tmp_path / "data").mkdir()
    rows = "\n".join(json.dumps({"text": story.strip()}) for story in stories)
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    settings = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "max_length": 96}
    settings |= {"learning_rate": 1e-3, "report_to": "none", "bf16": False, "use_cpu": True, "packing": True}
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    where = "--model_name_or_path", striped, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out"
    attention = "--attn_implementation", "zebra", "--dtype", "float32", "--save_steps", 3
    done = with_zebra("trl", "sft", *where, *attention, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    data = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["train"]
    model = package.load(striped, dtype="float32")
    trainer = SFTTrainer(model, SFTConfig(output_dir=str(tmp_path / "python"), **settings), train_dataset=data)
    trainer.train()
    losses = [[log["loss"] for log in logs if "loss" in log] for logs in (history, trainer.state.log_history)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

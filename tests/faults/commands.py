"""The commands that are broken, on inputs as small as they get."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from conftest import STORIES, TEXT

from faults.harness import Command

SEPARATOR = "<|endoftext|>"
_TEXTS: dict[str, Any] = {"files": ["../inputs/text.txt"], "separator": SEPARATOR, "join": True}
_TRAIN: dict[str, Any] = {"length": 64, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1}
_WORDS = ("dog", "cat", "bird", "boy")


def write_inputs(folder: Path) -> None:
    """A checkpoint, texts, conversations and recipes."""
    folder.mkdir()
    (folder / "stories").symlink_to(os.path.relpath(STORIES, folder))
    texts = (TEXT / "tinystories_test.txt").read_text().split(SEPARATOR)
    (folder / "text.txt").write_text(SEPARATOR.join(texts[:12]))
    (folder / "few.txt").write_text(SEPARATOR.join(texts[12:16]))
    lines = [{"prompt": f"What does the {a} see, {b}?", "completion": f"A {b}."} for a in _WORDS for b in _WORDS]
    (folder / "short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, recipe in recipes().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def recipes() -> dict[str, dict[str, Any]]:
    """A recipe for each verb that takes one."""
    evaluate = _TEXTS | {"files": ["../inputs/few.txt"], "length": 64}
    adapt = {"model": "../inputs/stories", "stripes": "GLLL:33", "data": _TEXTS, "train": _TRAIN, "evaluate": evaluate}
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    pretrain = {
        "model": llama | {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "tokenizer": {"vocab_size": 300},
        "data": _TEXTS | {"held_out": 0.2},
        "train": _TRAIN,
        "evaluate": {"length": 64, "join": True},
    }
    tune = {
        "model": "../inputs/stories",
        "stripes": "GLLL:33",
        "chat_template": "plain",
        "data": {"files": ["../inputs/short.jsonl"], "held_out": 0.25},
        "train": _TRAIN,
        "evaluate": {},
    }
    study = {"model_type": "zebra_study", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "adapt": {"run": "run"} | adapt,
        "pretrain": {"run": "run"} | pretrain,
        "tune": {"run": "run"} | tune,
        "study": {
            "run": "run",
            "recipe": pretrain | {"model": study | {"sliding_window": 8}, "train": _TRAIN | {"max_steps": 1}},
            "cells": [{"attention": "grouped", "position": "rotary", "group": 2}],
        },
        "run": {
            "run": "run",
            "model": "../inputs/stories",
            "stages": {
                "convert": {"stripes": "GLLL:33"},
                "adapt": {"data": _TEXTS, "train": _TRAIN | {"max_steps": 1}, "evaluate": evaluate},
                "evaluate": {
                    "perplexity": {"text": ["../inputs/few.txt"], "separator": SEPARATOR, "join": True, "lengths": [64]}
                },
                "report": {},
            },
        },
    }


def commands() -> dict[str, Command]:
    """Each command by its name."""
    stories, text = "../inputs/stories", "../inputs/text.txt"
    joined = ("--separator", SEPARATOR)
    listed = [
        Command("convert", ("convert", stories, "out", "--stripes", "GLLL:33"), 30, done_is_refused=True),
        Command("adapt", ("adapt", "../inputs/adapt.yaml"), 35),
        Command("tune", ("tune", "../inputs/tune.yaml"), 20),
        Command("pretrain", ("pretrain", "../inputs/pretrain.yaml"), 40),
        Command("run", ("run", "../inputs/run.yaml"), 12),
        Command("study", ("study", "../inputs/study.yaml"), 3),
        Command("data", ("data", "instructions", text, *joined, "--kind", "writing", "-o", "out/long.jsonl"), 20),
        Command(
            "compare",
            (
                *("compare", stories, text, "--length", "128", "--methods", "stripes", "--task", "passkey"),
                *("--budget-minutes", "0", "--depth", "0.5", "--samples", "1", "--out", "out"),
            ),
            4,
        ),
        Command(
            "select",
            (
                *("select", stories, "--budget", "2", "--window", "8", "--length", "64", "--text", text),
                *("--samples", "4", *joined, "--out", "out"),
            ),
            21,
        ),
        Command(
            "export",
            ("export", stories, "out/stories.gguf", "--to", "gguf", "--stripes", "GLLL:33"),
            15,
            done_is_refused=True,
        ),
    ]
    return {command.name: command for command in listed}

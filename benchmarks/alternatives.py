"""Perplexity by position of what needs no training: rotary scaling by the host, on the demo's checkpoint and text.

python benchmarks/alternatives.py        writes rows to benchmarks/results/alternatives.jsonl
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

import zebra.model.attention  # noqa: F401  registers "zebra"
from zebra import records
from zebra.evaluate.perplexity import as_rows, perplexity, read_text
from zebra.model.checkpoint import load_tokenizer
from zebra.model.hosts import best_device, device_name
from zebra.train.recipe import AdaptRecipe, read_recipe

ROOT = Path(__file__).parent.parent
FACTOR = 8.0
SCALINGS = {
    "linear interpolation": {"rope_type": "linear", "factor": FACTOR},
    "dynamic NTK": {"rope_type": "dynamic", "factor": 1.0},  # stretches by length / 512, here 8
    "YaRN": {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": 512},
}


def main() -> None:
    recipe = read_recipe(ROOT / "recipes" / "demo.yaml", AdaptRecipe)
    asked = recipe.evaluate
    assert asked is not None
    rows = []
    for name, scaling in SCALINGS.items():
        config = AutoConfig.from_pretrained(recipe.model)
        text = read_text(asked.files, load_tokenizer(recipe.model, config), separator=asked.separator)
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling}
        model = AutoModelForCausalLM.from_pretrained(recipe.model, config=config, attn_implementation="zebra")
        scores = perplexity(model.to(best_device()), text.joined(asked.length), length=asked.length)
        common = {"run": "alternatives", "model": f"stories260K, {name}", "layout": "dense"}
        rows += as_rows(scores, asked.length, asked.convention, seed=0, device=device_name(model.device), **common)
    records.write(ROOT / "benchmarks" / "results" / "alternatives.jsonl", rows)
    for row in rows:
        print(f"{row.model:40} {row.position_from:>6,}-{row.position_to:<6,} {row.value:10,.2f}")


if __name__ == "__main__":
    main()

"""Our retrieval tasks for lm-evaluation-harness, as configurations of its `ConfigurableTask`.

The harness works on text, so a prompt may miss the requested number of tokens by a few, which merge across joints.
`zebra.evaluate.retrieval` is exact. Use these tasks to compare with other tasks of the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zebra.data.haystack import PromptTokenizer, share_contained, share_preferred
from zebra.data.needles import SampleGenerator
from zebra.data.questions import TASKS, WITHOUT_DEPTH
from zebra.errors import ZebraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "zebra-"
LIKELIHOOD = "-likelihood"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The depths of the evidence, used in turn."""
_SAMPLES = 100


def retrieval_tasks() -> list[str]:
    """The names of our tasks: `zebra-TASK` is scored by generation, `zebra-TASK-likelihood` by likelihood."""
    return [f"{PREFIX}{task}{score}" for task in TASKS for score in ("", LIKELIHOOD)]


def check_retrieval_task(name: str, lengths: Sequence[int]) -> None:
    """Reject a name that is not in `retrieval_tasks`, and any task without a length."""
    if name not in retrieval_tasks():
        raise ZebraError(f"zebra's tasks are {', '.join(retrieval_tasks())}; got {name!r}. Choose among them.")
    if not lengths:
        raise ZebraError(f"{name} requires lengths for its texts; got none. Give --length, comma-separated.")


def configuration(
    name: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None, seed: int
) -> dict[str, Any]:
    """The harness's configuration of one of our tasks at a length."""
    task = name.removeprefix(PREFIX).removesuffix(LIKELIHOOD)
    needles, pieces = SampleGenerator(tokenizer), PromptTokenizer(tokenizer)
    depths = [None] if task in WITHOUT_DEPTH else DEPTHS
    samples = [
        needles.samples(task, length=length, depth=depths[i % len(depths)], seed=seed * _SAMPLES + i)[0]
        for i in range(min(limit or _SAMPLES, _SAMPLES))
    ]
    items = [
        {
            "prompt": pieces.decode(sample.ids),
            "right": 0,
            "answers": [answer.text for answer in sample.answers],
            "choices": [one.text for one in (*sample.answers, *sample.distractors)],
        }
        for sample in samples
    ]

    def dataset(**metadata: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(items)}

    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "",
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "right",
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    if name.endswith(LIKELIHOOD):
        choice = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        return config | choice | {"process_results": _share_preferred}
    stop = {"until": [], "do_sample": False, "max_gen_toks": max(sample.max_answer_tokens for sample in samples)}
    generation = {"output_type": "generate_until", "generation_kwargs": stop}
    return config | generation | {"process_results": _share_generated}


def _share_generated(item: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"accuracy": share_contained(results[0], item["answers"])}


def _share_preferred(item: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    return {"accuracy": share_preferred([value for value, _ in results], len(item["answers"]))}

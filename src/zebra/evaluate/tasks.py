"""Our retrieval as tasks of the harness, made here and now, in configurations that its `ConfigurableTask` takes.

The harness works on text, so that a prompt has as many tokens as was asked but for the few that merge across joints:
`zebra.evaluate.retrieval` is exact. What is compared with other tasks of the harness, or run elsewhere, is better here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zebra.data.haystack import PromptTokenizer, contains_answer
from zebra.data.needles import Sample, SampleGenerator
from zebra.data.questions import TASKS, WITHOUT_DEPTH
from zebra.errors import ZebraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "zebra-"
LIKELIHOOD = "-likelihood"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the evidence stands, in turn."""
_SAMPLES = 100


def own_tasks() -> list[str]:
    """The names of our retrieval tasks: each by generation, and with `-likelihood` behind it by likelihood."""
    return [f"{OWN}{task}{score}" for task in TASKS for score in ("", LIKELIHOOD)]


def check_own(name: str, lengths: Sequence[int]) -> None:
    """Refuse a name that is not among ours, or one without a length."""
    if name not in own_tasks():
        raise ZebraError(f"our tasks are {', '.join(own_tasks())}; got {name!r}. Choose among them.")
    if not lengths:
        raise ZebraError(f"{name} makes texts of a length. Give --length, several with commas.")


def configuration(
    name: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None, seed: int
) -> dict[str, Any]:
    """One of our tasks at a length, as the harness's configuration."""
    task = name.removeprefix(OWN).removesuffix(LIKELIHOOD)
    needles, depths = SampleGenerator(tokenizer), [None] if task in WITHOUT_DEPTH else DEPTHS
    samples = [
        needles.samples(task, length=length, depth=depths[i % len(depths)], seed=seed * _SAMPLES + i)[0]
        for i in range(min(limit or _SAMPLES, _SAMPLES))
    ]
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "",
        "custom_dataset": _dataset(samples, PromptTokenizer(tokenizer)),
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "right",
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    if name.endswith(LIKELIHOOD):
        return config | {"output_type": "multiple_choice", "doc_to_choice": "choices", "process_results": _preferred}
    stop = {"until": [], "do_sample": False, "max_gen_toks": max(sample.max_answer_tokens for sample in samples)}
    return config | {"output_type": "generate_until", "generation_kwargs": stop, "process_results": _said}


def _dataset(samples: Sequence[Sample], writer: PromptTokenizer) -> Callable[..., Any]:
    def make(**metadata: Any) -> Any:
        from datasets import Dataset

        return {
            "test": Dataset.from_list(
                [
                    {
                        "prompt": writer.decode(sample.ids),
                        "right": 0,
                        "answers": [answer.text for answer in sample.answers],
                        "choices": [one.text for one in (*sample.answers, *sample.distractors)],
                    }
                    for sample in samples
                ]
            )
        }

    return make


def _said(item: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"accuracy": sum(contains_answer(results[0], answer) for answer in item["answers"]) / len(item["answers"])}


def _preferred(item: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    right = len(item["answers"])
    best_wrong = max(value for value, _ in results[right:])
    return {"accuracy": sum(value > best_wrong for value, _ in results[:right]) / right}

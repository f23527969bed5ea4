"""A loaded model in the form that lm-evaluation-harness takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.chat_template import apply_chat_template
from zebra.data.encoding import Affixes
from zebra.evaluate.scoring import BATCH_TOKENS, padded
from zebra.progress import console


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None, batch_size: int
) -> Any:
    """Wrap a model in the harness's class for transformers, without progress bars if stderr is not a terminal.

    The stock class takes tokens that a tokenizer appends to every text (EOS) as part of the prompt, and drops as many
    tokens of the answer.
    """
    from lm_eval.models.huggingface import HFLM

    suffix = [*Affixes.of(tokenizer).suffix]

    class LanguageModel(HFLM):
        def tok_encode(self, string: str, *args: Any, left_truncate_len: int | None = None, **kwargs: Any) -> Any:
            ids = super().tok_encode(string, *args, **kwargs)
            ids = ids[: -len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: Sequence[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            return padded(rows, self.device, side=padding_side)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or not console.is_terminal)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm or not console.is_terminal)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm or not console.is_terminal)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> Any:
            return render_chat(tokenizer, chat_history, add_generation_prompt)

    model.generation_config.prefill_chunk_size = BATCH_TOKENS
    return LanguageModel(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, history: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> Any:
    """Render a chat history as text; without a generation prompt, the last message is left open to be continued."""
    return apply_chat_template(
        tokenizer,
        history,
        source=tokenizer.name_or_path,
        remedy="Leave chat out.",
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )

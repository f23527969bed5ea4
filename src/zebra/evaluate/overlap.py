"""Overlap of a text with reference answers: ROUGE and token F1, by rouge-score, which the extra `tasks` installs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zebra.data.qa import words
from zebra.errors import missing_package

ROUGE = ("rouge1", "rouge2", "rougeL")
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and ideographs."""
_ALONE = re.compile(f"[{_SPACELESS}]")
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class Overlap:
    """ROUGE and token F1 of a text against its best reference, each between 0 and 1.

        F1 = 2 P R / (P + R),   P, R: the shares of the text's and of the reference's words that the other has too

    ROUGE splits words as its authors' script does, without stemming, but keeps letters beyond ASCII, which the script
    drops. SQuAD's F1 compares single words after SQuAD's normalisation, so it is ROUGE-1 over those words. In both,
    each character of a script without spaces is a word.

    Raises:
        ZebraError: rouge-score is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score import rouge_scorer, tokenizers
        except ImportError:
            raise missing_package(
                "scoring generated text (but not scoring by likelihood)", "rouge-score", "tasks"
            ) from None

        class Words(tokenizers.Tokenizer):
            def tokenize(self, text: str) -> list[str]:
                return _WORD.findall(text.lower())

        class Squad(tokenizers.Tokenizer):
            def tokenize(self, text: str) -> list[str]:
                return words(_ALONE.sub(r" \g<0> ", text))

        self._rouge = rouge_scorer.RougeScorer(list(ROUGE), tokenizer=Words())
        self._squad = rouge_scorer.RougeScorer(["rouge1"], tokenizer=Squad())

    def __call__(self, text: str, references: Sequence[str]) -> dict[str, float]:
        """The scores by metric: rouge1, rouge2, rougeL, f1."""
        best = self._rouge.score_multi(list(references), text)
        single = self._squad.score_multi(list(references), text)
        return {name: float(best[name].fmeasure) for name in ROUGE} | {"f1": float(single["rouge1"].fmeasure)}

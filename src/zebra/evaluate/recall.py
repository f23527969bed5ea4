"""The perplexity of values that a document looks up, by the distance to where it stated them.

    document      .. 83715: 20466. .. 51920: 77301. .. | Look up the key 83715 again. 83715: 20466. ..
                            |<------------------------ distance ------------------------>|

    perplexity(bucket) = exp(mean of the losses of the values' tokens whose distance lies in the bucket)

A value is a random number. A model that guesses has a perplexity near the number of possible tokens, such as 10 if a
token is one digit. A model that looks values up has 1.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel

from zebra.data.recall import RecallGenerator
from zebra.evaluate.perplexity import FIRST_EDGE, Score, bucket_scores, edges, evaluating, sequence_losses
from zebra.progress import bar


def recall_by_distance(
    model: PreTrainedModel,
    generator: RecallGenerator,
    *,
    length: int,
    documents: int,
    first_bucket: int = FIRST_EDGE,
    seed: int = 0,
) -> list[Score]:
    """The perplexity of values that documents of `length` tokens look up: for each bucket of distances, then for all.

    Args:
        documents: how many are drawn; their seeds differ from all that `RecallDataset` uses.
        first_bucket: the end of the first bucket of distances; each further bucket ends at twice the distance.

    Raises:
        ZebraError: as `sequence_losses`; a tokenizer that cannot write enough keys.
    """
    bounds = edges(length, first=first_bucket)
    sums = np.zeros((len(bounds) - 1, documents))
    counts = np.zeros_like(sums)
    with evaluating(model), bar("recall", documents, "documents") as advance:
        for i in range(documents):
            ids, answers = generator.lookups(length, Random(f"measured {seed} {length} {i}"))
            losses = sequence_losses(model, torch.tensor([ids], device=model.device))[0]
            for answer in answers:
                bucket = np.searchsorted(bounds, answer.distance, side="right") - 1
                sums[bucket, i] += losses[answer.start : answer.end].sum()
                counts[bucket, i] += answer.end - answer.start
            advance(1)
    return bucket_scores(bounds, sums, counts, seed)

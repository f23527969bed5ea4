"""Muon for the matrices of a model and AdamW for the rest, as one optimiser for the Trainer.

    M = μ M + (1 - μ) G,    D = μ M + (1 - μ) G                                       Nesterov's momentum, μ = 0.95
    W = W - lr (0.2 √max(rows, columns) NS(D) + wd W)                                 NS(D) ≈ U Vᵀ of D = U S Vᵀ

Every direction of a matrix gets a step of the same size, on average as large as AdamW's, so both use the recipe's
learning rate (Moonshot, arXiv 2502.16982). torch's `Muon` updates the matrices, AdamW embeddings, head and vectors.
Vectors have no weight decay, as in the Trainer's AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers in one, with the parameter groups and the states of both."""

    def __init__(self, model: PreTrainedModel, *, lr: float, betas: tuple[float, float], weight_decay: float):
        matrices, rest = split(model)
        tables, vectors = ([one for one in rest if (one.ndim > 1) is is_table] for is_table in (True, False))
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                lr=lr,
                betas=betas,
            ),
        )
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": lr})
        # The parts' own groups, so that the learning rate that a scheduler writes is the one they read.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both optimisers."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both; this makes new group objects, so `param_groups` is built again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def split(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """The trained parameters: the matrices (m, n) of the layers, and the rest, of any shape."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(parameter) for end in (*tables, model.get_output_embeddings()) for parameter in end.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in ends]
    chosen = set(map(id, matrices))
    return matrices, [parameter for parameter in trained if id(parameter) not in chosen]


def muon() -> type[MuonWithAdamW]:
    """The factory that the Trainer expects of an optimiser that takes the whole model."""
    return MuonWithAdamW

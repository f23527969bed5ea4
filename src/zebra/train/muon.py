"""Muon for the matrices of a model, AdamW for the rest, as one optimiser of the Trainer's.

    M = μ M + (1 - μ) G,    D = μ M + (1 - μ) G                                       Nesterov's momentum, μ = 0.95
    W = W - lr (0.2 √max(rows, columns) NS(D) + wd W)                                 NS(D) ≈ U Vᵀ of D = U S Vᵀ

Every direction of a matrix gets a step of the same size, and one that is as large as AdamW's in the mean, so both take
the recipe's learning rate (Moonshot, arXiv 2502.16982). The matrices are torch's own `Muon`; embeddings, the head and
vectors are AdamW's. Vectors do not decay, as under the Trainer's AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers in one: their groups in a row, their states side by side."""

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
        # The parts' own groups: what a schedule writes there is what they read.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The states of both; their groups are new objects then."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def split(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """What is trained: the matrices (m, n) inside the layers, and the rest, of any shape."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(parameter) for end in (*tables, model.get_output_embeddings()) for parameter in end.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in ends]
    chosen = set(map(id, matrices))
    return matrices, [parameter for parameter in trained if id(parameter) not in chosen]


def muon() -> type[MuonWithAdamW]:
    """What the Trainer takes for an optimiser that wants the whole model."""
    return MuonWithAdamW

"""The laws of docs/architecture.md over families and kernels.

Two families in float32 by the tiled kernel and the table here; every family, bfloat16 and the formula's kernel too in
`make test-full`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_MEMBER, FAMILIES, MEMBERS, checkpoint_activations, fitting, in_parts, logits, some, tokens
from torch import Tensor

import zebra
from zebra import kernels

WINDOW = 9
LAYOUT = f"GLLL:{WINDOW}"
# bfloat16 rounds every layer's sum: what is allowed there is what two kernels differ by, not what a bug would. It is
# compared in the norm, as one entry of a random model may round far off.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)]
EXPERTS = [member for member in EVERY_MEMBER if "num_experts_per_tok" in MEMBERS[member]]
ONLY_EAGER = ("gemma2", "granite_swa", "gpt_oss")
"""Those whose scores are capped or share their softmax with a sink, which transformers' sdpa does not know."""
KERNELS = [pytest.param("reference", marks=pytest.mark.full), "banded", "table"]
NOT_EXTENDED = ("cohere2",)
"""Whose global layers have no rope."""
EXTENDED = pytest.mark.parametrize("setting", [None, "3:7"], ids=["stripes", "self-extend"])
"""The law holds for stripes alone, and with Self-Extend in the global layers."""

pytestmark = [
    pytest.mark.parametrize("family", some(EVERY_MEMBER, *FAMILIES)),
    pytest.mark.parametrize("kernel", KERNELS),
    pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"]),
]


@pytest.fixture(autouse=True)
def _by_kernel(kernel: str) -> Iterator[None]:
    """Every attention in the test runs by one kernel, or by the table's choice."""
    with contextlib.nullcontext() if kernel == "table" else kernels.only(kernel):
        yield


@pytest.fixture
def setting() -> str | None:
    """Of Self-Extend; a law that holds under it parametrizes this."""
    return None


@pytest.fixture
def model(family: str, dtype: torch.dtype, setting: str | None, checkpoints: Callable[..., Path]) -> Any:
    if setting and family in NOT_EXTENDED:
        pytest.skip("its global layers have no rope")
    if dtype is torch.bfloat16 and family in EXPERTS:
        pytest.skip("a router sends tokens to other experts with bfloat16's rounding")
    return zebra.load(checkpoints(family), stripes=fitting(family, LAYOUT), self_extend=setting, dtype=dtype)


def agree(output: Tensor, expected: Tensor) -> None:
    assert output.shape == expected.shape
    norm = torch.linalg.vector_norm if output.dtype is torch.bfloat16 else torch.amax
    difference = (norm((output - expected).abs()) / norm(expected.abs())).item()
    assert difference <= TOLERANCE[output.dtype], difference


def differ(output: Tensor, expected: Tensor) -> None:
    difference = ((output - expected).abs().max() / expected.abs().max()).item()
    assert difference > 10 * TOLERANCE[torch.float32], f"{difference}: the test would not see a difference"


def test_law_1_a_window_as_long_as_the_text_is_global(model: Any, family: str, dtype: Any, checkpoints: Any) -> None:
    full = zebra.load(checkpoints(family), dtype=dtype)
    agree(logits(model, tokens(2, WINDOW)), logits(full, tokens(2, WINDOW)))
    longer = tokens(2, WINDOW + 1)
    agree(logits(model, longer)[:, :WINDOW], logits(full, longer)[:, :WINDOW])
    differ(logits(model, longer)[:, WINDOW].float(), logits(full, longer)[:, WINDOW].float())


def test_law_1_a_neighbour_window_as_long_as_the_text_is_the_plain_model(
    family: str, dtype: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    if family in NOT_EXTENDED or (dtype is torch.bfloat16 and family in EXPERTS):
        pytest.skip("as in the fixture")
    arguments: dict[str, Any] = {"stripes": fitting(family, LAYOUT), "dtype": dtype}
    plain = zebra.load(checkpoints(family), **arguments)
    extended = zebra.load(checkpoints(family), self_extend="4:12", **arguments)
    agree(logits(extended, tokens(2, 12)), logits(plain, tokens(2, 12)))
    agree(logits(extended, tokens(2, 40))[:, :12], logits(plain, tokens(2, 40))[:, :12])
    differ(logits(extended, tokens(2, 40)).float(), logits(plain, tokens(2, 40)).float())


@EXTENDED
@pytest.mark.parametrize(
    "parts",
    [[40], [1] * 40, [7] * 6, [13, 1, 1, 20, 5], [WINDOW] * 5],
    ids=["whole", "one by one", "by 7", "mixed", "by the window"],
)
def test_law_2_prefill_in_chunks_and_token_by_token(model: Any, parts: list[int]) -> None:
    ids = tokens(2, 40)
    agree(in_parts(model, ids, parts), logits(model, ids))


@EXTENDED
@pytest.mark.parametrize("side", ["left", "right"])
def test_law_3_a_padded_batch_gives_each_row_what_it_gets_alone(model: Any, side: str) -> None:
    lengths = (31, 17, 4)
    ids = tokens(3, 31)
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        real = slice(31 - length, 31) if side == "left" else slice(0, length)
        batch[row, real], mask[row, real] = ids[row, :length], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    assert together.isfinite().all()
    for row, length in enumerate(lengths):
        agree(together[row, mask[row].bool()], logits(model, ids[row : row + 1, :length])[0])


@EXTENDED
def test_law_3_a_left_padded_batch_generates_what_each_row_does_alone(model: Any, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16:
        pytest.skip("greedy tokens of a random model flip with bfloat16's rounding")
    ids = tokens(2, 25)
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :12], mask[1, :12] = 0, 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **arguments)
    for row, start in ((0, 0), (1, 12)):
        alone = model.generate(batch[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **arguments)
        assert together[row, start:].tolist() == alone[0].tolist()


@EXTENDED
@pytest.mark.parametrize("use_cache", [False, True])
def test_law_3_packed_documents_get_what_each_gets_alone(model: Any, use_cache: bool) -> None:
    lengths = (23, 1, 14, 2)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=use_cache)
    for part, document in zip(packed.split(lengths, dim=1), ids.split(lengths, dim=1), strict=True):
        agree(part, logits(model, document))


@EXTENDED
def test_law_3_packed_documents_stay_apart_under_training(model: Any) -> None:
    """Gradients of one document's loss do not reach another's embeddings, also with gradient checkpointing."""
    lengths = (20, 15)
    ids = tokens(1, 35)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    checkpoint_activations(model)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    out[:, :20].square().sum().backward()
    assert embedded.grad[:, :20].abs().sum() > 0
    assert embedded.grad[:, 20:].abs().sum() == 0
    embedded.grad = None
    out = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    out[:, 20:].square().sum().backward()
    assert embedded.grad[:, :20].abs().sum() == 0


@EXTENDED
def test_law_4_gradients_equal_the_formula_through_a_whole_model(model: Any, dtype: torch.dtype) -> None:
    """In bfloat16 a kernel's error against float32 may be twice that of the formula in bfloat16."""
    ids = tokens(2, 40)

    def gradient(of: Any) -> Tensor:
        of.zero_grad()
        of(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in of.parameters()])

    with kernels.only("reference"):
        truth = gradient(copy.deepcopy(model).float())
        rounding = (gradient(model) - truth).norm()
    allowed = TOLERANCE[dtype] * truth.norm() if dtype is torch.float32 else 2 * rounding
    assert (gradient(model) - truth).norm() <= allowed


def test_law_5_plain_transformers_loads_what_we_save(
    model: Any, tmp_path: Path, dtype: torch.dtype, family: str, checkpoints: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    zebra.convert(checkpoints(family), tmp_path / "converted", fitting(family, LAYOUT))
    model.save_pretrained(tmp_path / "saved")
    ids = tokens(2, 40)
    for path in (tmp_path / "converted", tmp_path / "saved"):
        for implementation in ("eager",) if family in ONLY_EAGER else ("sdpa", "eager"):
            plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=implementation)
            assert type(plain).__module__.startswith("transformers.models.")
            agree(logits(plain, ids), logits(model, ids))


@pytest.mark.parametrize("how", ["beams", "prompt lookup", "chunked prefill", "static", "sampled", "no cache"])
def test_generate_equals_plain_transformers(
    model: Any, how: str, dtype: torch.dtype, family: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    if dtype is torch.bfloat16:
        pytest.skip("greedy tokens of a random model flip with bfloat16's rounding")
    from transformers import AutoModelForCausalLM

    zebra.convert(checkpoints(family), tmp_path / "converted", fitting(family, LAYOUT))
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", attn_implementation="eager" if family in ONLY_EAGER else "sdpa"
    )
    arguments: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    arguments |= {
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "chunked prefill": {"prefill_chunk_size": 7},
        "static": {"cache_implementation": "static"},
        "sampled": {"do_sample": True},
        "no cache": {"use_cache": False},
    }[how]
    ids = tokens(1, 30)
    mask = torch.ones_like(ids)
    outputs = []
    for either in (model, plain):
        torch.manual_seed(3)
        outputs.append(either.generate(ids, attention_mask=mask, **arguments).tolist())
    assert outputs[0] == outputs[1]

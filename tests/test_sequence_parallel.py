"""A sequence that is split over processes has the loss and the gradients of one process."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import EVERY_MEMBER, checkpoint_activations, fitting
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zebra
import zebra.study.model  # registers its family
from zebra import Stripes, ZebraError
from zebra.kernels import Mask, attend
from zebra.model.loss import head_of, summed_loss, token_losses, without_logits
from zebra.model.self_extend import SelfExtendAttention
from zebra.model.sequence_parallel import attention, ring, set_sequence_parallel, shard_batch
from zebra.plan.cost import Run, pairs_by_kind
from zebra.plan.decoder import read_decoder
from zebra.plan.parallel import Parallel, busiest, exchanged_bytes, received_bytes, split_memory
from zebra.shards import Shards
from zebra.stripes import GLOBAL, LOCAL
from zebra.train import lora
from zebra.train.parallel import shard_weights
from zebra.train.recipe import Lora
from zebra.train.recipe import Parallel as Weights
from zebra.train.step_memory import saved_storages

PROCESSES = 4
SMALL = {"num_hidden_layers": 3, "initializer_range": 0.1, "vocab_size": 100}
"""Random weights of deep models turn float32's rounding into more than 1e-6. 100 rows are even shards."""


Folders = dict[tuple[str, bool], str]
"""Checkpoints by member of a family, and whether they have ALiBi."""


class Case(NamedTuple):
    """A model, and the batch that it reads."""

    stripes: str
    tokens: int
    member: str = "llama"
    batch: str = "plain"
    how: str = ""
    self_extend: str | None = None


CASES = {
    "a length that divides": Case("GLL:5", 32),
    "an odd length": Case("GL:5", 31, "qwen3"),
    "a window over several shards": Case("GL:13", 29),
    "a window of one, and fewer tokens than processes": Case("GL:1", 3),
    "packed": Case("GL:9", 30, batch="packed"),
    "padding on the left": Case("GL:9", 30, batch="left"),
    "sinks": Case("GL:3+2", 31),
    "sinks of packed documents": Case("GL:3+3", 40, batch="packed"),
    "Self-Extend of packed documents": Case("GL:5", 40, batch="packed", self_extend="2:6"),
    "sinks under Self-Extend of packed documents": Case("GL:3+3", 40, batch="packed", self_extend="2:6"),
    "checkpointing": Case("GL:5", 30, how="checkpointing"),
    "a ring": Case("GLL:5", 32, how="ring"),
    "a ring of packed documents": Case("GL:9", 31, "qwen3", batch="packed", how="ring"),
    "a ring behind padding, checkpointing": Case("GL:3+2", 30, batch="left", how="ring, checkpointing"),
    "low-rank updates": Case("GL:5", 30, how="lora"),
    "sharded weights": Case("GL:5", 30, how="sharded"),
    "copies of sharded weights": Case("GL:5", 30, how="sharded in two"),
}
MORE = {
    "sharded weights, checkpointing": Case("GL:5", 30, how="sharded, checkpointing"),
    "sharded low-rank updates": Case("GL:5", 30, how="sharded lora"),
    "packed by offsets": Case("GL:9", 30, batch="offsets"),
    "padding on the right": Case("GL:9", 30, batch="right"),
    "sinks that begin next door": Case("GL:4+6", 22),
    "sinks behind padding": Case("GL:3+2", 30, batch="left"),
    "ALiBi": Case("GL:5", 30, "zebra_study", how="alibi"),
    "Self-Extend": Case("GL:5", 30, self_extend="2:6"),
    "Self-Extend behind padding": Case("GL:5", 30, batch="left", self_extend="2:6"),
    "sinks under Self-Extend": Case("GL:3+2", 31, self_extend="2:6"),
    "sinks under Self-Extend behind padding": Case("GL:3+2", 30, batch="left", self_extend="2:6"),
    "Self-Extend, packed by offsets": Case("GL:5", 30, batch="offsets", self_extend="2:6"),
    "a ring, packed by offsets": Case("GL:9", 30, batch="offsets", how="ring"),
    "a ring, padding on the right": Case("GL:9", 30, batch="right", how="ring"),
    "a ring of fewer tokens than processes": Case("GL:1", 3, how="ring"),
    "a ring under low-rank updates": Case("GL:5", 30, how="ring, lora"),
    "a ring under sharded weights": Case("GL:5", 30, how="sharded, ring, checkpointing"),
} | {
    f"{member}, {batch}, {how}": Case(fitting(member, "GL:7"), 37, member, batch, how)
    for member in EVERY_MEMBER
    for batch, how in (("plain", ""), ("packed", ""), ("plain", "ring"))
}


def batch_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.tokens)
    ids = torch.randint(3, 97, (2, case.tokens), generator=generator)
    batch, index = {"input_ids": ids, "labels": ids.clone()}, torch.arange(case.tokens)
    if case.batch == "packed":  # documents begin elsewhere in each sequence, one of them on a shard's border
        starts = torch.tensor([[7, 8, 20], [10, 15, 28]])
        batch["position_ids"] = torch.stack([index - _last_start(index, row) for row in starts])
    elif case.batch == "offsets":
        ends = torch.tensor([0, 11, 14, 30, 33, 60], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch["position_ids"] = torch.stack([index, index])
    elif case.batch in ("left", "right"):
        real = index < case.tokens - torch.tensor([[0], [11]])
        batch["attention_mask"] = (real.flip(1) if case.batch == "left" else real).long()
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def _last_start(index: Tensor, starts: Tensor) -> Tensor:
    return torch.where(index[:, None] >= starts, starts, 0).amax(dim=1)


def model_of(case: Case, folders: Folders) -> Any:
    path = folders[case.member, case.how == "alibi"]
    model = zebra.load(path, stripes=case.stripes, self_extend=case.self_extend, dtype=torch.float32)
    if "checkpointing" in case.how:
        checkpoint_activations(model)
    return model


def trained_model_of(model: Any, case: Case) -> Any:
    if "lora" in case.how:
        model = lora.wrap(model, Lora(r=2), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradients of A
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    if case.how.startswith("sharded") and dist.is_initialized():
        shard_weights(model, weights_shared(case), "cpu")
    return model


def weights_shared(case: Case) -> Weights:
    return Weights(shard=2, sequence=1 if case.how == "sharded in two" else 2)


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch.pop("labels")
    outputs = model(**batch, **without_logits())
    loss = summed_loss(outputs.hidden_states[-1], head_of(model), labels)
    of_tokens = token_losses(outputs.hidden_states[-1].detach(), head_of(model), labels)
    loss.backward()
    gradients = {name: whole_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "of tokens": of_tokens} | gradients


def whole_tensor(tensor: Any) -> Tensor:
    """Of FSDP2's gradient all of it: the mean over processes, so that a sum over those of a sequence is the sum."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Received(TorchDispatchMode):
    """The bytes that each all-to-all brings, and those of weights gathered and gradients reduced."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.bytes: list[int] = []
        self.weights = self.gradients = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if "all_to_all_single" in name:
            states, incoming = args[:2]
            others = sum(incoming) - incoming[self.rank]
            self.bytes.append(others * math.prod(states.shape[1:]) * states.element_size())
        elif "allgather_base" in name:
            self.weights += args[0].nbytes - args[1].nbytes
        elif "reduce_scatter_base" in name:
            self.gradients += args[1].nbytes - args[0].nbytes
        elif "allreduce" in name:  # in a ring of two, one half in and then the other
            self.gradients += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **kwargs or {})


@contextmanager
def counted_pairs() -> Iterator[list[int]]:
    """The (query, key) pairs of each call of attention, over all sequences of the batch."""
    counts: list[int] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        j = torch.arange(k.shape[2])
        visible = mask.visible(j[k.shape[2] - q.shape[2] :], j)
        counts.append(int(visible.expand(len(q), -1, -1, -1).sum()))
        return attend(q, k, v, mask, **kwargs)

    with mock.patch.object(attention, "attend", counting), mock.patch.object(ring, "attend", counting):
        yield counts


class Live(TorchDispatchMode):
    """The bytes of the storages that operators returned and that live, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        for tensor in tree_leaves(results):
            if type(tensor) is Tensor and (storage := tensor.untyped_storage())._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return results

    def free(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.bytes -= size


def shards_held(group: dist.ProcessGroup, by_ring: bool) -> float:
    """The most that attention of a global layer holds at a time, forward and backward, in a shard's keys and values."""
    states = torch.randn(3, 1, 2, 1024, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = attention.SequenceParallelAttention(group, None, by_ring)
    query, key, value = states
    with Live() as live:
        out, _ = layer.attend(torch.nn.Module(), None, query, key, value, Mask())
        out.sum().backward()
    return live.peak / (key.numel() * 8)


def share(rank: int, folder: str, folders: Folders, cases: dict[str, Case]) -> None:
    """One of the processes: each case by all of them, and by each half of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results: dict[tuple[str, int], Any] = {}
    for group in (dist.group.WORLD, halves[rank // 2]):
        assert group is not None
        for name, by_ring in LIVE.items():
            results[name, dist.get_world_size(group)] = shards_held(group, by_ring)
    for name, case in cases.items():
        for group in (dist.group.WORLD, halves[rank // 2]):
            assert group is not None
            size = dist.get_world_size(group)
            model = model_of(case, folders)
            set_sequence_parallel(model, group, ring="ring" in case.how)
            received = Received(dist.get_rank(group))
            with received, saved_storages(model) as saved, counted_pairs() as counts:
                shard = shard_batch(batch_of(case), dist.get_rank(group), size)
                trained = trained_model_of(model, case)
                result: dict[str, Any] = loss_and_gradients(trained, shard)
            of_tokens = result.pop("of tokens")
            for tensor in result.values():
                dist.all_reduce(tensor, group=group)
            own = [p.to_local() if isinstance(p, DTensor) else p for p in trained.parameters()]
            results[name, size] = result | {
                "of tokens": of_tokens,
                "bytes": received.bytes,
                "gathered": {"weights": received.weights, "gradients": received.gradients},
                "saved": sum(saved.values()),
                "pairs": counts,
                "weights": sum(p.numel() * p.element_size() for p in own),
            }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


Outcomes = dict[tuple[str, int], list[Any]]
LIVE = {"held by a gather": False, "held by a ring": True}


def run_processes(folder: Path, folders: Folders, cases: dict[str, Case]) -> Outcomes:
    """By case and number of processes what each process returned."""
    preloaded = ["zebra.model.sequence_parallel", "transformers.models.llama.modeling_llama", "pytest"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)  # imported once for all of them
    arguments = (str(folder), folders, cases)
    multiprocessing.start_processes(share, arguments, nprocs=PROCESSES, start_method="forkserver")
    of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    names = (*cases, *LIVE)
    return {
        (name, size): [results[name, size] for results in of_ranks[:size]] for name in names for size in (2, PROCESSES)
    }


@pytest.fixture(scope="module")
def folders(checkpoints: Callable[..., Path]) -> Folders:
    return {(member, False): str(checkpoints(member, **SMALL)) for member in ("llama", "qwen3")}


@pytest.fixture(scope="module")
def outcomes(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_processes(tmp_path_factory.mktemp("processes"), folders, CASES)


def check(case: Case, folders: Folders, of_processes: list[dict[str, Any]]) -> None:
    expected = loss_and_gradients(trained_model_of(model_of(case, folders), case), batch_of(case))
    of_tokens, size = expected.pop("of tokens"), len(of_processes)
    shards = Shards(case.tokens, size)
    whole = math.sqrt(sum(tensor.square().sum().item() for tensor in expected.values()))
    for rank, result in enumerate(of_processes):
        assert expected.keys() <= result.keys()
        errors = {name: (result[name] - tensor).norm().item() for name, tensor in expected.items()}
        assert math.sqrt(sum(error**2 for error in errors.values())) <= 1e-6 * whole
        for name, tensor in expected.items():
            assert errors[name] <= 1e-5 * max(tensor.norm(), 1e-2 * whole), name
        padded = pad(of_tokens[:, 1:], (0, shards.padded - case.tokens + 1), value=float("nan"))
        own = torch.cat([padded[:, held.start : held.stop] for held in shards.held(rank)], dim=1)
        torch.testing.assert_close(result["of tokens"][:, 1:], own, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [2, PROCESSES])
@pytest.mark.parametrize("name", CASES)
def test_processes_compute_what_one_does(name: str, size: int, folders: Folders, outcomes: Outcomes) -> None:
    check(CASES[name], folders, outcomes[name, size])


@pytest.mark.full
def test_more_cases_and_every_family(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folders = {(member, False): str(checkpoints(member, initializer_range=0.1)) for member in EVERY_MEMBER}
    folders["zebra_study", True] = str(checkpoints("zebra_study", position_embedding="alibi", **SMALL))
    outcomes = run_processes(tmp_path, folders, MORE)
    for name, case in MORE.items():
        for size in (2, PROCESSES):
            check(case, folders, outcomes[name, size])


# What crosses


@pytest.mark.parametrize("size", [2, PROCESSES])
@pytest.mark.parametrize("name", CASES)
def test_collectives_carry_the_bytes_that_are_planned(
    name: str, size: int, folders: Folders, outcomes: Outcomes
) -> None:
    """Each layer's all-to-all in the forward, then the gradients' in the backward; with checkpointing a third."""
    case = CASES[name]
    decoder = read_decoder(folders[case.member, case.how == "alibi"])
    run = Run(decoder=decoder, stripes=Stripes.parse(case.stripes), length=case.tokens, batch=2, dtype="float32")
    if case.batch != "plain" and run.stripes and run.stripes.sinks:
        pytest.skip("what sinks of documents cost depends on where they begin")
    kinds, again, by_ring = decoder.kinds(run.stripes), "checkpointing" in case.how, "ring" in case.how
    planned = {kind: exchanged_bytes(run, kind, size) for kind in kinds}
    of_processes = [result["bytes"] for result in outcomes[name, size]]
    calls = 1 + (run.stripes is not None and run.stripes.sinks > 0)
    # A layer with sinks has two of them. Each takes its gradients back; a ring carries its keys once more as well.
    per_layer = [(size - 1 if by_ring else 1) if kind == GLOBAL else calls for kind in kinds]
    ring_calls = by_ring * (size - 1) * kinds.count(GLOBAL)
    for rank, received in enumerate(of_processes):
        assert len(received) == sum(per_layer) * (2 + again) + ring_calls
        forward = iter(received)
        for kind, count in zip(kinds, per_layer, strict=True):
            assert sum(next(forward) for _ in range(count)) == planned[kind][rank][0]
        passes = {kind: 1 + again + (by_ring and kind == GLOBAL) for kind in kinds}
        assert sum(received) == sum(passes[kind] * planned[kind][rank][0] + planned[kind][rank][1] for kind in kinds)
    training = replace(run, phase="train", checkpointing=again)
    planned_total = received_bytes(training, Parallel(sequence=size, ring=by_ring))
    planned_total.pop("gradients, copies")  # the processes of this test reduce none but those of sharded weights
    assert max(map(sum, of_processes)) == sum(planned_total.values())


@pytest.mark.parametrize("size", [2, PROCESSES])
@pytest.mark.parametrize("name", ["a length that divides", "a ring"])
def test_all_processes_have_as_many_pairs(name: str, size: int, folders: Folders, outcomes: Outcomes) -> None:
    """Every pair is computed once, and no process has more than the plan's busiest: in a global layer 1/P of them."""
    case = CASES[name]
    decoder = read_decoder(folders[case.member, False])
    run = Run(decoder=decoder, stripes=Stripes.parse(case.stripes), length=case.tokens, batch=2, phase="train")
    of_processes = [result["pairs"] for result in outcomes[name, size]]
    assert sum(map(sum, of_processes)) == sum(pairs_by_kind(run).values())
    planned = pairs_by_kind(busiest(run, size))
    assert max(map(sum, of_processes)) == sum(planned.values())
    of_global = [sum(counts[: size if "ring" in case.how else 2]) for counts in of_processes]  # the first layer's calls
    assert of_global == [planned[GLOBAL]] * size
    assert planned[GLOBAL] * size == pairs_by_kind(run)[GLOBAL]


@pytest.mark.parametrize("size", [2, PROCESSES])
@pytest.mark.parametrize("name", ["a length that divides", "a ring"])
def test_a_process_saves_its_shard_and_what_it_gathers(
    name: str, size: int, folders: Folders, outcomes: Outcomes
) -> None:
    """The activations that one keeps are those of n tokens, and the gathered keys and values of each layer."""
    case = CASES[name]
    decoder = read_decoder(folders[case.member, False])
    length, stripes = Shards(case.tokens, size).length, Stripes.parse(case.stripes)
    model = model_of(case, folders)
    with saved_storages(model) as saved:
        loss_and_gradients(model, {name: tensor[:, :length] for name, tensor in batch_of(case).items()})
    run = Run(decoder=decoder, stripes=stripes, length=case.tokens, batch=2, dtype="float32", phase="train")
    by_ring = "ring" in case.how
    planned = split_memory(run, Parallel(sequence=size, ring=by_ring))
    shard = planned["outputs joined"] // (2 if by_ring else 3) // decoder.query_width * 2 * decoder.kv_width
    fetched = planned["keys and values fetched"] - (2 * shard if by_ring else 0)  # a ring holds two, and saves none
    of_layers = [exchanged_bytes(run, kind, size) for kind in decoder.kinds(stripes) if not by_ring or kind == LOCAL]
    assert fetched == max(sum(got for got, _ in layers) for layers in zip(*of_layers, strict=True))
    most = max(result["saved"] for result in outcomes[name, size])
    assert most == pytest.approx(sum(saved.values()) + fetched + planned["outputs joined"], rel=0.02)


def planned_shards(size: int, by_ring: bool) -> float:
    """What the plan has of one global layer's keys, values and their gradients, in a shard's keys and values."""
    decoder = replace(read_decoder("llama-2-7b"), layers=1)
    run = Run(decoder=decoder, stripes=None, length=size * 1024, dtype="float32", phase="train", checkpointing=True)
    parts = split_memory(run, Parallel(sequence=size, ring=by_ring))
    planned = parts["keys and values fetched"] + parts["gradients of keys and values"]
    return planned / (1024 * 2 * decoder.kv_width * 4)


def test_a_ring_holds_as_much_however_many_processes_pass_it(outcomes: Outcomes) -> None:
    """A gather holds the keys and values of all. A ring of two passes none on while it computes; of more it does."""
    (gather, more), (by_ring, by_more) = ([max(outcomes[name, size]) for size in (2, PROCESSES)] for name in LIVE)
    assert by_more - by_ring < 3
    assert by_more < more
    # Beside a shard's own queries, keys, values, output, their gradients and copies the plan has all of it.
    planned = [planned_shards(size, by_ring) for by_ring in LIVE.values() for size in (2, PROCESSES)]
    assert more - gather == pytest.approx(planned[1] - planned[0], rel=0.05)
    for held, shards in zip((gather, more, by_ring, by_more), planned, strict=True):
        assert shards < held < shards + 7


SHARDED = [name for name, case in CASES.items() if case.how.startswith("sharded")]


@pytest.mark.parametrize("name", SHARDED)
def test_sharding_shards(name: str, folders: Folders, outcomes: Outcomes) -> None:
    """Under FSDP2 a process holds its part of the weights, and those that share them hold all of them once."""
    case = CASES[name]
    shards = 2 * weights_shared(case).sequence
    whole = sum(p.numel() * p.element_size() for p in trained_model_of(model_of(case, folders), case).parameters())
    of_processes = [result["weights"] for result in outcomes[name, PROCESSES]]
    assert sum(of_processes) == whole * PROCESSES // shards
    assert max(of_processes) < 1.1 * whole / shards
    assert outcomes["packed", PROCESSES][0]["weights"] >= whole * (case.how != "sharded lora")


@pytest.mark.parametrize("name", [name for name in SHARDED if "low-rank" not in name])
def test_weights_and_gradients_are_the_bytes_that_are_planned(name: str, folders: Folders, outcomes: Outcomes) -> None:
    """A layer's weights twice in a step, also where it is computed again; embeddings and the head once."""
    case, shared = CASES[name], weights_shared(CASES[name])
    decoder = read_decoder(folders[case.member, False])
    run = Run(decoder=decoder, stripes=None, length=case.tokens, batch=2, dtype="float32", phase="train")
    data = PROCESSES // (shared.shard * shared.sequence)
    planned = received_bytes(run, Parallel(data=data, shard=shared.shard, sequence=shared.sequence))
    for result in outcomes[name, PROCESSES]:
        assert result["gathered"]["weights"] == planned["weights"]
        assert result["gathered"]["gradients"] == planned["gradients"] + planned.get("gradients, copies", 0)


def test_padding_has_no_position_beyond_those_of_the_text() -> None:
    """A table of learned positions may end with the text, whose length need not divide."""
    batch = {"input_ids": torch.zeros(2, 32, dtype=torch.long)}
    at = torch.cat([shard_batch(batch, rank, 3)["position_ids"] for rank in range(3)], dim=1)
    assert sorted(at[0].tolist()) == [*range(32), 31, 31, 31, 31]


def test_every_process_has_the_positions_of_padding() -> None:
    """Padding may have any positions, so a process cannot derive them from its own chunks."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "position_ids": positions}
    for rank in range(2):
        assert shard_batch(batch, rank, 2)["sequence_positions"].tolist() == positions.tolist()


# One process


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of one process, which holds both chunks of a sequence."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def test_self_extend_reads_the_positions_of_packed_documents(folders: Folders, alone: dist.ProcessGroup) -> None:
    """Others, as far apart within a document, would give the same scores, but for the rounding of larger angles."""
    model = zebra.load(folders["llama", False], stripes="GL:5", self_extend="2:6")
    set_sequence_parallel(model, alone)
    batch = {name: tensor for name, tensor in batch_of(CASES["packed"]).items() if name != "labels"}
    with mock.patch.object(SelfExtendAttention, "attend", autospec=True, side_effect=SelfExtendAttention.attend) as own:
        model(**shard_batch(batch, 0, 1), use_cache=False)
    first, second = (call.args[2] for call in own.call_args_list[:2])
    assert torch.equal(first, batch["position_ids"][:, : first.shape[1]])
    assert torch.equal(second, batch["position_ids"])


def test_what_cannot_be_split_is_rejected(folders: Folders, alone: dist.ProcessGroup) -> None:
    path = folders["llama", False]
    model = zebra.load(path, stripes="GL:5")
    set_sequence_parallel(model, alone)
    with pytest.raises(ZebraError, match="use_cache=False"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    extended = zebra.load(path, stripes="GL:5", self_extend="2:6")
    for _ in range(2):  # the second time its layers are wrapped
        with pytest.raises(ZebraError, match=r"not support Self-Extend, .* Remove parallel.ring"):
            set_sequence_parallel(extended, alone, ring=True)
        set_sequence_parallel(extended, alone)
    with pytest.raises(ZebraError, match="fixed frequencies"):
        set_sequence_parallel(zebra.load(path, rope="dynamic:4"), alone)

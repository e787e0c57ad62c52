"""Map datasets: every sample exactly once whatever happens, with and without worker processes."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from supple.core.job.ledger import prove
from supple.core.job.order import Position
from supple.core.spec import SpecError
from supple.train.data.loader import Loader, make_loader
from tests.examples import examples
from tests.train.histories import Abandon, Commit, Happening, Resize, Run, Tear, happenings


class Numbers(Dataset[Any]):
    """Sample i is (i, i*i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index * index


def loader_of(dataset: Any, **options: Any) -> Loader:
    loader = make_loader(dataset, **{"epochs": 1, "shuffle": True, "seed": 3, **options})
    loader.place(loader.position, 0, 1, 8, 4)
    return loader


def fed(loader: Loader) -> list[Any]:
    return [micro.data for micro in loader.feed()]


def ids(loader: Loader) -> list[list[int | str]]:
    return [list(micro.ids) for micro in loader.feed()]


# --- exactly once --------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=examples(60))
@given(
    st.integers(1, 90),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 7),
    st.booleans(),
    happenings(6),
)
def test_every_sample_of_every_epoch_is_used_once_in_any_history(
    size: int,
    epochs: int,
    num_ranks: int,
    batch: int,
    micro: int,
    shuffle: bool,
    history: list[Happening],
) -> None:
    def make() -> Loader:
        return make_loader(Numbers(size), epochs=epochs, shuffle=shuffle, seed=5)

    run = Run(make, num_ranks=num_ranks, global_batch_size=batch, micro_batch_size=micro)
    report = prove(run.play(history).records, expected=range(size), num_epochs=epochs)
    assert report.is_exact, str(report)
    assert report.samples_seen == size * epochs
    assert run.loaders[0].samples_done == run.loaders[0].samples_total == size * epochs


ROUGH: list[Happening] = [
    Commit(2),
    Abandon(1),
    Resize((1, 0), 1, 7),
    Commit(1),
    Tear(0, dies=False),
    Tear(1, dies=True),
    Resize((0,), 0, 9),
    Commit(2),
]


@pytest.mark.slow
def test_worker_processes_lose_and_double_nothing_in_a_rough_history() -> None:
    def make() -> Loader:
        return make_loader(Numbers(120), epochs=2, shuffle=True, seed=5, num_loader_processes=1)

    run = Run(make, num_ranks=2).play(ROUGH)
    report = prove(run.records, expected=range(120), num_epochs=2)
    assert report.is_exact, str(report)
    for _, _, (index, square) in run.data:
        assert torch.equal(index * index, square)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_data_handed_out_is_that_of_the_samples_named(num_workers: int) -> None:
    loader = loader_of(Numbers(30), epochs=2, num_loader_processes=num_workers)
    num_steps = 0
    while not loader.done:
        for micro in loader.feed():
            assert micro.data[0].tolist() == list(micro.ids)
            assert micro.num_samples == len(micro.ids)
        loader.commit([])
        num_steps += 1
    assert num_steps == 8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_feeding_again_without_a_commit_gives_the_same_samples(num_workers: int) -> None:
    loader = loader_of(Numbers(50), num_loader_processes=num_workers)
    first = ids(loader)
    assert ids(loader) == first
    next(iter(loader.feed()))  # half a step
    assert ids(loader) == first
    loader.place(loader.position, 0, 1, 8, 4)
    assert ids(loader) == first
    loader.commit([])
    second = ids(loader)
    assert {*second[0], *second[1]}.isdisjoint({*first[0], *first[1]})


def test_ranks_cut_one_batch_into_contiguous_shares() -> None:
    alone = loader_of(Numbers(50))
    alone.place(alone.position, 0, 1, 11, 99)
    together = []
    for rank in range(4):
        alone_part = loader_of(Numbers(50))
        alone_part.place(alone_part.position, rank, 4, 11, 2)
        together.append([index for part in ids(alone_part) for index in part])
    assert [len(part) for part in together] == [3, 3, 3, 2]
    assert [index for part in together for index in part] == ids(alone)[0]


def test_the_last_batch_of_an_epoch_is_what_is_left() -> None:
    loader = loader_of(Numbers(11))
    assert loader.planned_samples == 8
    loader.commit([])
    assert loader.planned_samples == 3
    assert [len(part) for part in ids(loader)] == [3]
    loader.commit([])
    assert (loader.done, loader.planned_samples, fed(loader)) == (True, 0, [])


def test_a_batch_larger_than_the_dataset_is_one_step_an_epoch() -> None:
    loader = loader_of(Numbers(5), epochs=2)
    loader.place(loader.position, 0, 1, 64, 64)
    assert loader.planned_samples == 5
    loader.commit([])
    assert loader.epoch == 1


def test_a_rank_without_a_share_is_handed_nothing() -> None:
    for num_workers in (0, 1):
        loader = loader_of(Numbers(9), num_loader_processes=num_workers)
        loader.place(loader.position, 2, 3, 2, 2)
        num_steps = 0
        while not loader.done:
            assert ids(loader) == []
            loader.commit([])
            num_steps += 1
        assert num_steps == 5


def test_orders_differ_between_epochs_and_not_between_ranks() -> None:
    loader = loader_of(Numbers(8), epochs=2)
    first = ids(loader)
    loader.commit([])
    assert ids(loader) != first
    other = loader_of(Numbers(8), epochs=2)
    assert ids(other) == first


# --- reproducible mode ---------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Random augmentation from each generator that scripts use."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


def fed_by_shard(num_workers: int, num_ranks: int, history: list[Happening]) -> dict:
    def make() -> Loader:
        return make_loader(
            Noisy(), epochs=2, shuffle=True, seed=1, num_loader_processes=num_workers
        )

    run = Run(make, num_ranks=num_ranks, num_logical_shards=5).play(history)
    return {(step, shard): data.tolist() for step, shard, data in run.data}


@pytest.mark.slow
def test_logical_shards_get_the_same_data_from_any_ranks_in_any_history() -> None:
    reference = fed_by_shard(0, 1, [])
    assert len(reference) == 2 * 3 * 5
    assert len({tuple(row) for data in reference.values() for row in data}) == 42
    for num_ranks in (2, 3, 5):
        assert fed_by_shard(0, num_ranks, []) == reference
    assert fed_by_shard(0, 3, [Abandon(1), Commit(1), Resize((2, 0), 1, 8)]) == reference


@pytest.mark.slow
def test_logical_shards_get_the_same_data_from_worker_processes() -> None:
    assert fed_by_shard(1, 2, [Commit(2), Abandon(1)]) == fed_by_shard(0, 1, [])


def test_switching_to_logical_shards_drops_what_was_fetched_for_micro_batches() -> None:
    loader = loader_of(Numbers(40), num_loader_processes=1)
    plain = [index for part in ids(loader) for index in part]
    shards = list(loader.feed_shards(3))
    assert [micro.shard_id for micro in shards] == [0, 1, 2]
    assert [micro.num_samples for micro in shards] == [3, 3, 2]
    assert [index for micro in shards for index in micro.ids] == plain
    assert [index for micro in shards for index in micro.data[0].tolist()] == plain


# --- worker processes ----------------------------------------------------------------------------


class Pids(Numbers):
    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def test_worker_processes_live_through_every_placement() -> None:
    loader = loader_of(Pids(400), num_loader_processes=1)
    seen: set[int] = set()
    for world_size in (1, 3, 2, 6, 1):
        loader.place(loader.position, 0, world_size, 24, 4)
        for micro in loader.feed():
            seen.update(micro.data[1].tolist())
        loader.commit([])
    assert len(seen) == 1
    assert os.getpid() not in seen


class Broken(Numbers):
    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 6:
            raise RuntimeError("sample 6 is not readable")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_dataset_is_raised_where_its_batch_is_due(num_workers: int) -> None:
    loader = loader_of(Broken(16), shuffle=False, num_loader_processes=num_workers)
    feed = loader.feed()
    assert next(feed).ids == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="sample 6 is not readable"):
        next(feed)


def test_worker_processes_end_with_the_last_step() -> None:
    loader = loader_of(Pids(8), num_loader_processes=1)
    (pid,) = {int(pid) for data in fed(loader) for pid in data[1]}
    assert pid in {child.pid for child in multiprocessing.active_children()}
    loader.commit([])
    assert loader.done
    assert pid not in {child.pid for child in multiprocessing.active_children()}


# --- how samples become a batch ------------------------------------------------------------------


class Plain(Dataset[Any]):
    """A tensor dataset whose samples are fetched one by one."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Many(Plain):
    """The same, in one call for a whole batch."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("samples are to be taken together")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.inner[index] for index in indices]


def test_every_way_of_fetching_gives_the_same_batches() -> None:
    tensors = TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(20))
    expected = fed(loader_of(Plain(tensors)))
    for dataset in (tensors, Many(tensors)):
        for mine, theirs in zip(fed(loader_of(dataset)), expected, strict=True):
            assert isinstance(mine, list)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_collate_fn_gets_the_samples_of_a_micro_batch(num_workers: int) -> None:
    loader = loader_of(Numbers(8), shuffle=False, collate_fn=list, num_loader_processes=num_workers)
    assert fed(loader)[0] == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_collate_fn_is_called_for_tensor_datasets_too() -> None:
    loader = loader_of(TensorDataset(torch.arange(8)), shuffle=False, collate_fn=len)
    assert fed(loader) == [4, 4]


class Pair(NamedTuple):
    x: Any
    note: Any


def test_every_tensor_of_a_batch_is_brought_to_the_device() -> None:
    def collate(samples: list[Any]) -> Any:
        tensor = torch.tensor([sample[0] for sample in samples])
        return {"pair": Pair(tensor, "text"), "rest": [tensor, (tensor,)], "more": 7}

    loader = loader_of(Numbers(8), collate_fn=collate, device=torch.device("meta"))
    batch = fed(loader)[0]
    assert isinstance(batch["pair"], Pair)
    assert batch["pair"].note == "text"
    assert batch["more"] == 7
    found = [batch["pair"].x, batch["rest"][0], batch["rest"][1][0]]
    assert {tensor.device.type for tensor in found} == {"meta"}


# --- refusals ------------------------------------------------------------------------------------


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


def numbers() -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "dataset list is empty"),
        (TensorDataset(torch.zeros(0, 3)), "dataset TensorDataset is empty"),
        (NoLength(), "NoLength without __len__"),
        (7, "int without __len__ and __getitem__"),
        (None, "NoneType without __len__ and __getitem__"),
        (DataLoader(Numbers(4)), "a DataLoader was given to job.batches"),
        ([Numbers(4), Numbers(5)], "ConcatDataset"),
        ([numbers, Numbers(5)], "number 1 is a Numbers, not an iterable shard"),
        (numbers(), "shard 0 is a generator, which can be read only once"),
        ([numbers, numbers()], "shard 1 is a generator, which can be read only once"),
    ],
)
def test_a_dataset_that_cannot_be_batched_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loader_of(dataset)


@pytest.mark.parametrize(("batch", "micro"), [(0, 4), (-3, 4), (8, 0)])
def test_batches_of_nothing_are_refused(batch: int, micro: int) -> None:
    loader = loader_of(Numbers(8))
    with pytest.raises(SpecError, match=f"global batch of {batch} samples"):
        loader.place(loader.position, 0, 1, batch, micro)


def test_a_position_of_a_longer_dataset_is_refused() -> None:
    loader = loader_of(Numbers(8))
    with pytest.raises(SpecError, match="from sample 9 of an epoch, but the dataset has 8"):
        loader.place(Position(offset=9), 0, 1, 8, 8)

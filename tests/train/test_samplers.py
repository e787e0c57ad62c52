"""Samplers, weights, batch samplers and drop_last: each index once in its own sense."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from supple.core.job.ledger import prove
from supple.core.job.order import SampleOrder
from supple.core.spec import SpecError
from supple.train.data.listed import ListedOrder
from supple.train.data.loader import Loader, make_loader
from tests.examples import examples
from tests.train.histories import Abandon, Commit, Happening, Resize, Run, happenings

SIZE = 37


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stateful(Sampler[int]):
    """Draws from generators of its own, whose state goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.numpy, self.python = np.random.default_rng(7), random.Random(7)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.python.randint(3, 30)):
            yield int(self.numpy.integers(SIZE))


class Unseeded(Sampler[int]):
    """Draws from the generators of the process, like many scripts' samplers, without a length."""

    def __iter__(self) -> Iterator[int]:
        yield from np.random.permutation(20).tolist()
        yield random.randrange(SIZE)
        yield from torch.randperm(5).tolist()


class ByEpoch(Sampler[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch, SIZE, 2 + self.epoch))


SAMPLERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [5, 3, 3, 8, 0, 36],
    "sequential": lambda: SequentialSampler(Numbers()),
    "random": lambda: RandomSampler(Numbers(), generator=torch.Generator().manual_seed(4)),
    "replacing": lambda: RandomSampler(Numbers(), replacement=True, num_samples=50),
    "subset": lambda: SubsetRandomSampler(range(0, SIZE, 3)),
    "weighted": lambda: WeightedRandomSampler([1.0, 0.0, 5.0] * 12 + [1.0], 40),
    "stateful": Stateful,
    "unseeded": Unseeded,
    "by epoch": ByEpoch,
}
BATCH_SAMPLERS: dict[str, Callable[[], Any]] = {
    "cut": lambda: BatchSampler(Unseeded(), 4, drop_last=False),
    "of lengths": lambda: [[0], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9], [36]],
    "stateful": lambda: BatchSampler(Stateful(), 5, drop_last=True),
}


def order_of(sampler: Any, *, batches: bool = False, seed: int = 3) -> ListedOrder:
    return ListedOrder(sampler, seed=seed, num_samples=SIZE, gives_batches=batches)


def listed(order: ListedOrder, epoch: int) -> list[int]:
    return order.indices(epoch, 0, order.size(epoch)).tolist()


def loader_of(dataset: Any = None, **options: Any) -> Loader:
    given = {"epochs": 1, "shuffle": False, "seed": 3}
    given |= {key: options.pop(key) for key in [*given, "collate_fn"] if key in options}
    processes = options.pop("num_workers", 0)
    loader = make_loader(
        Numbers() if dataset is None else dataset,
        **given,
        batch_size=options.pop("batch_size", None),
        num_loader_processes=processes,
        options=options,  # type: ignore[arg-type]
    )
    loader.place(loader.position, 0, 1, 8, 4)
    return loader


# -- once, in its own sense ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLERS)
@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), happenings(6))
def test_every_index_of_a_sampler_is_used_once_in_any_history(
    kind: str, epochs: int, num_ranks: int, batch: int, history: list[Happening]
) -> None:
    def make() -> Loader:
        options: Any = {"sampler": SAMPLERS[kind]()}
        return make_loader(Numbers(), epochs=epochs, shuffle=False, seed=3, options=options)

    alone = order_of(SAMPLERS[kind]())
    wanted = [listed(alone, epoch) for epoch in range(epochs)]
    run = Run(make, num_ranks=num_ranks, global_batch_size=batch).play(history)
    report = prove(run.records, expected=lambda epoch: wanted[epoch], num_epochs=epochs)
    assert report.is_exact, str(report)
    assert report.samples_seen == sum(map(len, wanted)) == run.loaders[0].samples_done
    assert run.loaders[0].samples_total == run.loaders[0].samples_done


@pytest.mark.slow
@pytest.mark.parametrize("kind", BATCH_SAMPLERS)
@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), happenings(6))
def test_every_batch_of_a_batch_sampler_is_one_step_in_any_history(
    kind: str, epochs: int, num_ranks: int, history: list[Happening]
) -> None:
    def make() -> Loader:
        options: Any = {"batch_sampler": BATCH_SAMPLERS[kind]()}
        return make_loader(Numbers(), epochs=epochs, shuffle=False, seed=3, options=options)

    alone = order_of(BATCH_SAMPLERS[kind](), batches=True)
    wanted = [listed(alone, epoch) for epoch in range(epochs)]
    run = Run(make, num_ranks=num_ranks).play(history)
    report = prove(run.records, expected=lambda epoch: wanted[epoch], num_epochs=epochs)
    assert report.is_exact, str(report)
    ends = [alone.ends(epoch) for epoch in range(epochs)]
    assert report.num_steps == sum(0 if cuts is None else len(cuts) for cuts in ends)
    assert run.loaders[0].samples_done == sum(map(len, wanted))


@pytest.mark.slow
@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), happenings(6))
def test_drop_last_leaves_out_less_than_a_batch_of_each_epoch_in_any_history(
    size: int, epochs: int, num_ranks: int, batch: int, history: list[Happening]
) -> None:
    def make() -> Loader:
        options: Any = {"drop_last": True}
        return make_loader(Numbers(size), epochs=epochs, shuffle=True, seed=3, options=options)

    run = Run(make, num_ranks=num_ranks, global_batch_size=batch).play(history)
    report = prove(run.records, expected=range(size), num_epochs=epochs)
    assert not report.doubled and not report.unknown
    assert report.samples_seen == run.loaders[0].samples_done == run.loaders[0].samples_total
    sizes = {batch, *(happening.global_batch_size for happening in resizes(history))}
    for epoch in report.epochs:
        assert len(epoch.lost) < max(sizes)
    if len(sizes) == 1:
        whole = size // min(batch, size) * min(batch, size)
        order = SampleOrder(dataset_size=size, seed=3, shuffle=True)

        def kept(epoch: int) -> list[int]:
            return order.indices(epoch, 0, whole).tolist()

        assert prove(run.records, expected=kept, num_epochs=epochs).is_exact


def resizes(history: list[Happening]) -> list[Resize]:
    return [happening for happening in history if isinstance(happening, Resize)]


ROUGH: list[Happening] = [Commit(2), Abandon(1), Resize((1, 0), 1, 7), Commit(3), Abandon(2)]


@pytest.mark.slow
def test_processes_fetch_what_a_sampler_gives_and_drop_what_is_left() -> None:
    def make() -> Loader:
        options: Any = {"sampler": Stateful(), "drop_last": True}
        return make_loader(
            Numbers(), epochs=6, shuffle=False, seed=3, num_loader_processes=1, options=options
        )

    run = Run(make, num_ranks=2, global_batch_size=3).play(ROUGH)
    alone = order_of(Stateful())
    wanted = [listed(alone, epoch) for epoch in range(6)]
    report = prove(run.records, expected=lambda epoch: wanted[epoch], num_epochs=6)
    assert not report.doubled and not report.unknown
    assert all(len(epoch.lost) < 7 for epoch in report.epochs)
    assert report.samples_seen == run.loaders[0].samples_done


class Counted(Numbers):
    """Counts its samples over processes."""

    def __init__(self) -> None:
        super().__init__(19)
        self.fetched = torch.zeros(19, dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> int:
        self.fetched[index] += 1
        return index


def test_what_is_fetched_ahead_over_a_dropped_batch_is_not_fetched_again() -> None:
    data = Counted()
    loader = loader_of(data, drop_last=True, epochs=3, num_workers=1)
    while not loader.done:
        list(loader.feed())
        loader.commit([])
    assert data.fetched.tolist() == [3] * 16 + [0] * 3


# -- the same list everywhere --------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_worker_that_begins_in_a_later_epoch_has_the_same_list(kind: str) -> None:
    old = order_of(SAMPLERS[kind]())
    lists = [listed(old, epoch) for epoch in range(4)]
    np.random.seed(99)
    torch.manual_seed(99)
    random.seed(99)
    joined = order_of(SAMPLERS[kind]())
    assert listed(joined, 3) == lists[3]
    assert joined.fingerprint(3) == old.fingerprint(3)
    if kind not in ("list", "sequential"):
        assert lists[0] != lists[1]


@pytest.mark.parametrize("kind", ["random", "weighted", "unseeded"])
def test_the_seed_and_that_of_the_samplers_generator_change_the_list(kind: str) -> None:
    lists = [listed(order_of(SAMPLERS[kind](), seed=seed), 0) for seed in (3, 3, 4)]
    assert lists[0] == lists[1] != lists[2]
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    own = [listed(order_of(RandomSampler(Numbers(), generator=g)), 0) for g in generators]
    assert own[0] == listed(order_of(SAMPLERS["random"]()), 0)
    assert own[0] != own[1]
    assert [generator.initial_seed() for generator in generators] == [4, 5]


def test_listing_leaves_the_generators_of_the_process_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = float(torch.rand(())), float(np.random.rand()), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    listed(order_of(Unseeded()), 2)
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == expected


def test_a_sampler_is_iterated_once_for_each_epoch_and_its_old_lists_are_freed() -> None:
    class Counting(Stateful):
        iterated = 0

        def __iter__(self) -> Iterator[int]:
            self.iterated += 1
            return super().__iter__()

    sampler = Counting()
    order = order_of(sampler)
    for epoch in range(5):
        for _ in range(3):
            listed(order, epoch)
        order.forget_before(epoch)
    assert sampler.iterated == 5


def test_weights_are_those_of_torchs_sampler() -> None:
    """The share of each sample is that of its weight, with replacement."""
    loader = loader_of(weights=[0.0] * 30 + [1.0] * 5 + [3.0, 0.0], epochs=80, drop_last=True)
    loader.place(loader.position, 0, 1, SIZE, SIZE)
    seen: list[int] = []
    while not loader.done:
        seen += [int(index) for micro in loader.feed() for index in micro.ids]
        loader.commit([])
    counts = np.bincount(seen, minlength=SIZE)
    assert len(seen) == 80 * SIZE and counts[:30].sum() == counts[36] == 0
    assert counts[35] / counts.sum() == pytest.approx(3 / 8, abs=0.03)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["list", "sequential", "by epoch"])
def test_batches_are_those_of_a_plain_loader_on_the_same_indices(
    kind: str, drop_last: bool
) -> None:
    sampler = SAMPLERS[kind]()
    loader = loader_of(sampler=sampler, epochs=2, drop_last=drop_last)
    loader.place(loader.position, 0, 1, 4, 4)
    for epoch in range(2):
        other = SAMPLERS[kind]()
        if kind == "by epoch":
            other.set_epoch(epoch)
        for expected in DataLoader(Numbers(), batch_size=4, sampler=other, drop_last=drop_last):  # type: ignore[arg-type]
            assert loader.epoch == epoch
            (data,) = [micro.data for micro in loader.feed()]
            assert torch.equal(data, expected)
            loader.commit([])
    assert loader.done


# -- workers that read differently ---------------------------------------------------------------


def test_ranks_with_other_lists_are_found_before_a_step_is_applied() -> None:
    same = [loader_of(sampler=Stateful()) for _ in range(3)]
    summed = [sum(column) for column in zip(*(loader.stats() for loader in same), strict=True)]
    for loader in same:
        loader.check(summed)
    other = loader_of(sampler=[0, 1, 2])
    odd = [one + two for one, two in zip(same[0].stats(), other.stats(), strict=True)]
    for loader in (same[0], other):
        with pytest.raises(SpecError, match="workers read their data in different orders"):
            loader.check(odd)


def test_ranks_with_datasets_of_other_lengths_are_found() -> None:
    mine, other = loader_of(Numbers(30)), loader_of(Numbers(31))
    odd = [one + two for one, two in zip(mine.stats(), other.stats(), strict=True)]
    with pytest.raises(SpecError, match="epoch 0, which has 30 samples on this one"):
        mine.check(odd)


# -- refusals ------------------------------------------------------------------------------------


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": DistributedSampler(Numbers(), 2, 0)}, "the job divides every global batch"),
        (
            {"batch_sampler": BatchSampler(DistributedSampler(Numbers(), 2, 0), 4, False)},
            "the job divides every global batch",
        ),
        ({"sampler": iter([1, 2])}, "can be read only once"),
        ({"sampler": 3}, "was given a int, which is not iterable"),
        ({"sampler": []}, "gave no index in epoch 0"),
        ({"sampler": [0, 37]}, "gave index 37 in epoch 0, but the dataset has 37 samples"),
        ({"sampler": [0, -1]}, "gave index -1"),
        ({"sampler": ["a"]}, "gave 'a' in epoch 0: each index must be a whole number"),
        ({"sampler": [0, 1.5]}, "each index must be a whole number"),
        ({"sampler": [[1, 2]]}, "one that gives lists of them is a batch_sampler"),
        ({"batch_sampler": [1, 2]}, "the batch_sampler gave 1 in epoch 0"),
        ({"batch_sampler": [[1], []]}, r"the batch_sampler gave \[\] in epoch 0"),
        ({"weights": [1.0] * 36}, "has 36 weights for 37 samples"),
        ({"weights": [0.0] * 37}, "one must be above 0"),
        ({"weights": [float("nan")] * 37}, "finite and at least 0"),
        ({"weights": "heavy"}, "not a list of numbers"),
        ({"drop_last": True, "batch_size": 38}, "no batch would be full"),
        ({"drop_last": True, "batch_size": 7, "sampler": [1, 2]}, "with 2 samples in an epoch"),
    ],
)
def test_an_order_that_cannot_be_read_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        next(iter(loader_of(**options).feed()))


@pytest.mark.slow
def test_a_sampler_that_does_not_end_is_refused() -> None:
    with pytest.raises(SpecError, match="gave more than 10,000,000 items for one epoch"):
        next(iter(loader_of(sampler=Endless()).feed()))


def test_a_dataset_without_a_length_needs_a_sampler_only() -> None:
    class NoLength:
        def __getitem__(self, index: int) -> int:
            return index

    loader = loader_of(NoLength(), sampler=[100, 200])
    assert [micro.ids for micro in loader.feed()] == [[100, 200]]


def test_a_run_does_not_go_on_within_a_batch_of_another_batch_sampler() -> None:
    loader = loader_of(batch_sampler=[[0, 1], [2, 3, 4]], epochs=2)
    list(loader.feed())
    loader.commit([])
    other = loader_of(batch_sampler=[[0, 1, 2], [3, 4]], epochs=2)
    with pytest.raises(SpecError, match="no batch of the batch sampler begins there"):
        other.place(loader.position, 0, 1, 8, 4)

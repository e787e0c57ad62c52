"""Iterable shards: every sample exactly once, lengths unknown, whatever happens."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from supple.core.job.ledger import prove, shard_ids
from supple.core.job.order import ShardPosition
from supple.core.spec import SpecError
from supple.train.data.loader import Loader, make_loader
from supple.train.data.shards import ShardLoader
from tests.examples import examples
from tests.train.histories import Abandon, Commit, Happening, Resize, Run, Tear, happenings


class Lines:
    """A shard that counts how often it was opened and how many samples were read from it."""

    def __init__(self, shard: int, length: int) -> None:
        self.shard, self.length = shard, length
        self.num_opened = self.num_read = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.num_opened += 1
        for number in range(self.length):
            self.num_read += 1
            yield self.shard, number


class Sized(Lines):
    def __len__(self) -> int:
        return self.length


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


def shards(*lengths: int) -> list[Lines]:
    return [Lines(shard, length) for shard, length in enumerate(lengths)]


def loader_of(data: Any, batch: int = 4, micro: int = 4, **options: Any) -> Loader:
    loader = make_loader(data, **{"epochs": 1, "shuffle": False, "seed": 3, **options})
    loader.place(loader.position, 0, 1, batch, micro)
    return loader


def step(loader: Loader) -> list[str]:
    """One committed step of a rank that is alone: the samples it used."""
    used = [str(name) for micro in loader.feed() for name in micro.ids]
    loader.commit(loader.stats())
    return used


# --- exactly once --------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=examples(80))
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(any),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 7),
    st.booleans(),
    happenings(6),
)
def test_every_sample_of_every_shard_is_used_once_in_any_history(
    lengths: list[int],
    epochs: int,
    num_ranks: int,
    batch: int,
    micro: int,
    shuffle: bool,
    history: list[Happening],
) -> None:
    def make() -> Loader:
        return make_loader(shards(*lengths), epochs=epochs, shuffle=shuffle, seed=5)

    run = Run(make, num_ranks=num_ranks, global_batch_size=batch, micro_batch_size=micro)
    report = prove(run.play(history).records, expected=shard_ids(lengths), num_epochs=epochs)
    assert report.is_exact, str(report)
    assert report.samples_seen == epochs * sum(lengths)
    assert run.loaders[0].samples_done == epochs * sum(lengths)


def test_the_data_handed_out_is_that_of_the_samples_named() -> None:
    def make() -> Loader:
        return make_loader(shards(13, 0, 40, 7), epochs=2, shuffle=True, seed=1, collate_fn=list)

    history: list[Happening] = [Commit(2), Abandon(1), Resize((1, 0), 1, 9), Tear(1, dies=True)]
    run = Run(make, num_ranks=2).play(history)
    named = [name for record in run.records if record["kind"] == "read" for name in record["ids"]]
    used = {f"{shard}:{number}" for _, _, data in run.data for shard, number in data}
    assert used == set(named) == set(shard_ids([13, 0, 40, 7]))


def test_a_batch_stays_whole_while_fewer_shards_than_ranks_have_samples_left() -> None:
    run = Run(lambda: loader_of(shards(40, 2)), num_ranks=3, global_batch_size=6)
    sizes = []
    while not run.done:
        before = run.loaders[0].samples_done
        run.step()
        sizes.append(run.loaders[0].samples_done - before)
    # Shard 1 has only two of the three samples that are its reader's share of the first step.
    assert sizes == [5, 6, 6, 6, 6, 6, 6, 1]


def test_the_last_micro_batch_is_known_without_knowing_the_length() -> None:
    loader = loader_of(shards(6), batch=9, micro=3)
    parts = list(loader.feed())
    assert [(part.num_samples, part.is_last) for part in parts] == [(3, False), (3, True)]


def test_the_epoch_ends_with_the_step_that_uses_the_last_sample() -> None:
    loader = loader_of(shards(4, 4), epochs=2)
    assert step(loader) == ["0:0", "0:1", "0:2", "0:3"]
    assert loader.epoch == 0
    assert step(loader) == ["1:0", "1:1", "1:2", "1:3"]
    assert loader.epoch == 1
    assert step(loader) == ["0:0", "0:1", "0:2", "0:3"]
    step(loader)
    assert (loader.done, loader.planned_samples, list(loader.feed())) == (True, 0, [])


def test_empty_shards_never_make_a_step_of_nothing() -> None:
    loader = loader_of(shards(0, 4, 0, 0, 4, 0))
    assert step(loader) == ["1:0", "1:1", "1:2", "1:3"]
    assert step(loader) == ["4:0", "4:1", "4:2", "4:3"]
    assert loader.done


def test_shuffle_changes_which_shards_come_first_from_epoch_to_epoch() -> None:
    def order(epoch: int) -> list[str]:
        loader = loader_of(shards(*[1] * 20), epochs=9, shuffle=True)
        start = ShardPosition.start(20).to_json() | {"epoch": epoch}
        loader.place(ShardPosition.from_json(start), 0, 1, 20, 20)
        return step(loader)

    assert sorted(order(0)) == sorted(shard_ids([1] * 20))
    assert len({tuple(order(epoch)) for epoch in range(8)}) == 8


# --- what is read, and when ----------------------------------------------------------------------


def test_an_abandoned_step_is_read_again_from_memory() -> None:
    (lines,) = data = shards(20)
    loader = loader_of(data)
    step(loader)
    first = [list(part.ids) for part in loader.feed()]
    read = lines.num_read
    loader.place(loader.position, 0, 1, 4, 4)
    assert [list(part.ids) for part in loader.feed()] == first
    assert (lines.num_read, lines.num_opened) == (read, 1)


def test_a_survivor_keeps_its_shards_open_through_a_resize() -> None:
    data = shards(30, 30, 30)
    loader = loader_of(data)
    loader.place(loader.position, 0, 2, 8, 4)
    taken = list(loader.feed())
    other = loader_of(shards(30, 30, 30))
    other.place(other.position, 1, 2, 8, 4)
    list(other.feed())
    summed = [a + b for a, b in zip(loader.stats(), other.stats(), strict=True)]
    loader.commit(summed)
    loader.place(loader.position, 0, 3, 8, 4)
    list(loader.feed())
    assert [part.num_samples for part in taken] == [4]
    assert [lines.num_opened for lines in data] == [1, 0, 0]


def test_shards_are_opened_one_after_another() -> None:
    data = shards(10, 10, 10)
    loader = loader_of(data)
    list(loader.feed())
    assert [lines.num_opened for lines in data] == [1, 0, 0]
    assert data[0].num_read == 5


def test_a_worker_that_joins_reads_on_where_the_shard_was_left() -> None:
    loader = loader_of(shards(20))
    step(loader)
    joiner = loader_of(shards(20))
    sent = loader.position.to_json()
    joiner.place(ShardPosition.from_json(sent), 0, 1, 4, 4)
    assert step(joiner) == ["0:4", "0:5", "0:6", "0:7"]


# --- what a shard can be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [lambda: iter(range(5)), lambda: range(5)],
        [Stream(), Stream()],
        (Lines(0, 5), Lines(0, 5)),
    ],
)
def test_iterables_and_functions_that_return_one_are_shards(data: Any) -> None:
    loader = loader_of(data, batch=100, micro=100)
    assert isinstance(loader, ShardLoader)
    assert step(loader) == shard_ids([5, 5])
    assert loader.done


@pytest.mark.parametrize("data", [Stream(), Lines(0, 5), lambda: range(5)])
def test_a_single_iterable_is_one_shard(data: Any) -> None:
    assert step(loader_of(data, batch=9)) == shard_ids([5])


def test_samples_are_collated_and_brought_to_the_device() -> None:
    (part,) = loader_of(shards(4)).feed()
    assert [column.tolist() for column in part.data] == [[0, 0, 0, 0], [0, 1, 2, 3]]
    (part,) = loader_of(shards(4), device=torch.device("meta")).feed()
    assert {column.device.type for column in part.data} == {"meta"}


def test_the_total_is_unknown_until_an_epoch_was_finished() -> None:
    loader = loader_of(shards(6), epochs=5)
    assert loader.samples_total is None
    step(loader)
    assert loader.samples_total is None
    step(loader)
    assert (loader.epoch, loader.samples_done, loader.samples_total) == (1, 6, 30)


def test_the_total_is_known_where_all_shards_have_a_length() -> None:
    assert loader_of([Sized(0, 6), Sized(1, 2)], epochs=5).samples_total == 40
    assert loader_of([Sized(0, 6), Lines(1, 2)], epochs=5).samples_total is None


# --- refusals ------------------------------------------------------------------------------------


def test_shards_without_a_single_sample_are_refused() -> None:
    with pytest.raises(SpecError, match="none of the 3 shards has a sample in epoch 0"):
        step(loader_of(shards(0, 0, 0)))


def test_a_function_that_returns_the_same_iterator_again_is_refused() -> None:
    once = iter(range(4))
    loader = loader_of([lambda: once], epochs=2)
    step(loader)
    with pytest.raises(SpecError, match=r"in epoch 1\. .*each starts anew"):
        step(loader)


def test_a_function_that_returns_no_iterable_is_refused() -> None:
    with pytest.raises(SpecError, match="function given as shard 0 returned a int"):
        step(loader_of([lambda: 5]))


def test_a_shard_that_became_shorter_is_refused() -> None:
    loader = loader_of(shards(9))
    step(loader)
    shrunk = loader_of(shards(3))
    shrunk.place(loader.position, 0, 1, 4, 4)
    with pytest.raises(SpecError, match="at sample 4, but had only 3 when it was opened again"):
        step(shrunk)


def test_a_position_of_other_shards_is_refused() -> None:
    loader = loader_of(shards(9, 9))
    with pytest.raises(SpecError, match="in 3 shards, but there are 2"):
        loader.place(ShardPosition.start(3), 0, 1, 4, 4)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: make_loader(shards(4), epochs=1, shuffle=True, seed=0, num_loader_processes=2),
            "workers=2",
        ),
        (lambda: loader_of(shards(4)).feed_shards(8), "8 logical shards"),
        (lambda: loader_of(shards(4), batch=0), "global batch of 0"),
    ],
)
def test_what_shards_cannot_do_is_refused(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        use()

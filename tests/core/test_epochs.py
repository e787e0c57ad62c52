"""Epochs cut into global batches: with the last short one dropped, or at a sampler's own places."""

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.job.epochs import Epochs, Order
from supple.core.job.order import Position, SampleOrder
from tests.examples import examples

exact = settings(max_examples=examples(80))


def plain(size: int) -> SampleOrder:
    return SampleOrder(dataset_size=size, seed=1, shuffle=False)


@dataclass
class Cut:
    """Epochs of other lengths, cut at places of their own."""

    batches: list[list[int]]
    seed: int = 0

    def size(self, epoch: int) -> int:
        return sum(self.batches[epoch])

    def indices(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop)

    def ends(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.cumsum(self.batches[epoch])


def walk(epochs: Epochs, batch: int) -> list[tuple[int, int, int]]:
    """(epoch, start, stop) of every step, and the counts checked at each of them."""
    steps: list[tuple[int, int, int]] = []
    position, done = Position(), 0
    total = epochs.samples_total(position, batch)
    while (at := epochs.next_step(position, batch)).epoch < epochs.num_epochs:
        start, stop = epochs.bounds(at, batch)
        assert epochs.samples_done(position) == epochs.samples_done(at) == done
        steps.append((at.epoch, start, stop))
        position = epochs.after(at, batch)
        done += stop - start
        if not isinstance(epochs.order, Cut):
            assert epochs.samples_total(position, batch) == total
    assert epochs.samples_done(at) == epochs.samples_total(at, batch) == done
    return steps


@exact
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3))
def test_without_its_last_short_batch_an_epoch_has_full_ones_only(
    size: int, batch: int, num_epochs: int
) -> None:
    full = min(batch, size)
    steps = walk(Epochs(order=plain(size), num_epochs=num_epochs, drop_last=True), batch)
    assert [stop - start for _, start, stop in steps] == [full] * (size // full) * num_epochs
    assert [epoch for epoch, _, _ in steps] == sorted(list(range(num_epochs)) * (size // full))


@exact
@given(st.integers(1, 60), st.integers(1, 4), st.lists(st.integers(1, 20), min_size=1, max_size=50))
def test_the_batch_size_of_a_step_decides_whether_what_is_left_is_dropped(
    size: int, num_epochs: int, batches: list[int]
) -> None:
    """At any change of the batch size all batches are full, and less than one is left out."""
    epochs = Epochs(order=plain(size), num_epochs=num_epochs, drop_last=True)
    position, used = Position(), 0
    for batch in batches:
        at = epochs.next_step(position, batch)
        if at.epoch > position.epoch:
            assert at == Position(epoch=position.epoch + 1, samples_before=used)
            assert size - position.offset < batch
        assert epochs.next_step(at, batch) == at
        if at.epoch == num_epochs:
            assert epochs.samples_total(at, batch) == used
            return
        start, stop = epochs.bounds(at, batch)
        assert start == at.offset
        assert stop - start == min(batch, size)
        position = epochs.after(at, batch)
        used += stop - start
        assert epochs.samples_done(position) == used <= epochs.samples_total(position, batch)


@exact
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_own_cuts_decide_the_steps_whatever_the_batch_size(batches: list[list[int]]) -> None:
    epochs = Epochs(order=Cut(batches), num_epochs=len(batches))
    assert [stop - start for _, start, stop in walk(epochs, 4)] == list(chain(*batches))
    assert walk(epochs, 1) == walk(epochs, 99)


def test_own_cuts_are_ignored_on_request() -> None:
    order: Order = Cut([[3, 4]])
    epochs = Epochs(order=order, num_epochs=1, has_own_cuts=False)
    assert epochs.bounds(Position(), 5) == (0, 5)


def test_a_position_of_an_earlier_version_counts_whole_epochs() -> None:
    epochs = Epochs(order=plain(10), num_epochs=5)
    old = Position.from_json({"epoch": 3, "offset": 4})
    assert old.samples_before is None
    assert epochs.counted(old) == replace(old, samples_before=30)
    assert epochs.samples_done(old) == 34
    assert epochs.counted(Position(epoch=1, samples_before=7)).samples_before == 7


@pytest.mark.parametrize("batch", [3, 100])
def test_an_epoch_of_one_batch_is_never_dropped_whole(batch: int) -> None:
    epochs = Epochs(order=plain(3), num_epochs=2, drop_last=True)
    assert len(walk(epochs, batch)) == 2

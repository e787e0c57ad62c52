"""Which rank reads what: permutations, shares and shards, checked as arithmetic."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.job.order import (
    Position,
    SampleOrder,
    ShardPosition,
    advance,
    advance_shards,
    assign_shards,
    batch_bounds,
    micro_batches,
    mix,
    rank_shards,
    share,
)
from tests.examples import examples

exact = settings(max_examples=examples(80))


def whole_epoch(size: int, *, seed: int = 7, epoch: int = 0, shuffle: bool = True) -> list[int]:
    order = SampleOrder(dataset_size=size, seed=seed, shuffle=shuffle)
    return order.indices(epoch, 0, size).tolist()


# --- the order of a map dataset ----------------------------------------------------------------


@exact
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 10**9))
def test_an_epoch_holds_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(whole_epoch(size, seed=seed, epoch=epoch)) == list(range(size))


@pytest.mark.slow
@exact
@given(st.integers(1, 500), st.integers(0, 9), st.data())
def test_any_part_of_an_epoch_is_the_same_as_that_part_of_the_whole(
    size: int, epoch: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    part = SampleOrder(dataset_size=size, seed=7, shuffle=True).indices(epoch, start, stop)
    assert part.tolist() == whole_epoch(size, epoch=epoch)[start:stop]
    assert part.dtype == np.int64


def test_the_order_of_a_seed_never_changes() -> None:
    """A checkpoint of any version must go on in the same order: these values are for ever."""
    assert whole_epoch(12, seed=0) == [3, 8, 7, 10, 1, 5, 9, 11, 2, 6, 4, 0]
    order = SampleOrder(dataset_size=50_000, seed=42, shuffle=True)
    assert order.indices(3, 49_995, 50_000).tolist() == [3119, 18281, 5528, 22954, 12763]
    assert mix(1, 2, 3) == 7702586659592502839


def test_mixing_one_number_is_splitmix64() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of the published generator, seed 0


@pytest.mark.parametrize("size", [1, 2, 10, 1797, 10**6 + 3, 2**61 + 1])
def test_the_order_is_that_of_whole_number_arithmetic(size: int) -> None:
    """64-bit arrays wrap around and shift as Python's unbounded integers modulo 2**64 do."""
    side = math.isqrt(size - 1) + 1

    def permuted(place: int) -> int:
        left, right = divmod(place, side)
        for turn in range(8):
            mixed = right ^ mix(5, 2, turn)
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, (left + ((mixed >> 32) * side >> 32)) % side
        return left * side + right

    order = SampleOrder(dataset_size=size, seed=5, shuffle=True)
    start = max(0, size - 40)
    for place, index in enumerate(order.indices(2, start, size).tolist(), start=start):
        expected = permuted(place)
        while expected >= size:
            expected = permuted(expected)
        assert index == expected


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [whole_epoch(100, seed=seed, epoch=epoch) for seed in range(20) for epoch in range(20)]
    assert len({tuple(order) for order in orders}) == 400


def test_without_shuffle_the_order_is_that_of_the_dataset_in_every_epoch() -> None:
    for epoch in range(3):
        assert whole_epoch(10, epoch=epoch, shuffle=False) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 37, 100])
def test_every_sample_is_about_equally_often_at_every_place(size: int) -> None:
    num_epochs = 4000
    counts = np.zeros((size, size))
    for epoch in range(num_epochs):
        counts[np.arange(size), whole_epoch(size, epoch=epoch)] += 1
    mean = num_epochs / size
    chi_square = ((counts - mean) ** 2 / mean).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_in_the_dataset_are_not_neighbours_in_the_order() -> None:
    order = np.array(whole_epoch(10_000))
    together = np.abs(np.diff(order)) == 1
    assert together.sum() < 15  # 2 are expected of a random order


def test_a_dataset_too_large_to_list_is_read_anywhere() -> None:
    size = 2**61
    order = SampleOrder(dataset_size=size, seed=1, shuffle=True)
    for start in (0, size // 2, size - 1000):
        indices = order.indices(0, start, start + 1000)
        assert len(set(indices.tolist())) == 1000
        assert indices.min() >= 0
        assert indices.max() < size


def test_an_order_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="order of 0 samples"):
        SampleOrder(dataset_size=0, seed=0, shuffle=True)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_places_outside_of_the_epoch_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"places {start} to {stop} of an epoch of 10"):
        SampleOrder(dataset_size=10, seed=0, shuffle=False).indices(0, start, stop)


# --- cutting a batch ---------------------------------------------------------------------------


@exact
@given(st.integers(0, 5000), st.integers(1, 300))
def test_shares_follow_one_another_and_differ_by_at_most_one(batch: int, world: int) -> None:
    parts = [share(batch, world, rank) for rank in range(world)]
    end = 0
    for offset, size in parts:
        assert offset == end
        end += size
    assert end == batch
    sizes = [size for _, size in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("batch", "world", "rank"), [(-1, 2, 0), (8, 2, 2), (8, 2, -1), (8, 0, 0)])
def test_a_share_of_nobody_is_refused(batch: int, world: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {world}"):
        share(batch, world, rank)


@exact
@given(st.integers(0, 3000), st.integers(1, 400))
def test_micro_batches_are_as_few_as_the_limit_allows_and_balanced(size: int, limit: int) -> None:
    sizes = micro_batches(size, limit)
    assert sum(sizes) == size
    assert len(sizes) == -(-size // limit)
    if sizes:
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1


def test_micro_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="micro-batches of 0"):
        micro_batches(8, 0)


@exact
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 40))
def test_logical_shards_are_cut_the_same_for_any_number_of_ranks(
    batch: int, num_shards: int, world: int
) -> None:
    alone = rank_shards(batch, num_shards, 1, 0)
    together = [cut for rank in range(world) for cut in rank_shards(batch, num_shards, world, rank)]
    assert together == list(alone)
    assert sum(size for _, _, size in alone) == batch
    assert all(size for _, _, size in alone)


# --- positions ---------------------------------------------------------------------------------


@exact
@given(st.integers(1, 200), st.lists(st.integers(1, 250), min_size=1, max_size=400))
def test_batches_of_any_sizes_follow_one_another_within_their_epochs(
    dataset_size: int, batch_sizes: list[int]
) -> None:
    position = Position()
    for batch_size in batch_sizes:
        start, stop = batch_bounds(position, dataset_size, batch_size)
        after = advance(position, dataset_size, batch_size)
        assert start == position.offset
        assert 1 <= stop - start <= batch_size
        if stop == dataset_size:
            epoch = position.epoch + 1
            assert after == Position(epoch=epoch, samples_before=epoch * dataset_size)
        else:
            assert stop - start == batch_size
            assert after == replace(position, offset=stop)
        position = after


@pytest.mark.parametrize(("offset", "batch"), [(0, 0), (10, 4), (-1, 4)])
def test_a_batch_of_nothing_or_from_nowhere_is_refused(offset: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch of {batch} from place {offset} of 10"):
        batch_bounds(Position(offset=offset), 10, batch)


def test_positions_survive_json() -> None:
    position = Position(epoch=3, offset=17)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position
    shards = ShardPosition(
        epoch=1, offsets=(3, 0), ended=(True, False), owners=(1, -1), samples_before=12
    )
    assert ShardPosition.from_json(json.loads(json.dumps(shards.to_json()))) == shards


# --- iterable shards ---------------------------------------------------------------------------


@st.composite
def shard_positions(draw: st.DrawFn) -> ShardPosition:
    num = draw(st.integers(1, 12))

    def each(values: st.SearchStrategy) -> tuple:
        return tuple(draw(st.lists(values, min_size=num, max_size=num)))

    return ShardPosition(
        offsets=each(st.integers(0, 5)), ended=each(st.booleans()), owners=each(st.integers(-1, 7))
    )


@pytest.mark.slow
@exact
@given(shard_positions(), st.integers(1, 9))
def test_every_shard_with_samples_left_has_exactly_one_owner(
    position: ShardPosition, world: int
) -> None:
    assignment = assign_shards(position, world)
    assert len(assignment) == world
    live = [shard for shard, ended in enumerate(position.ended) if not ended]
    assert sorted(shard for shards in assignment for shard in shards) == live


@pytest.mark.slow
@exact
@given(shard_positions(), st.integers(1, 9))
def test_no_rank_is_idle_while_another_has_two_shards(position: ShardPosition, world: int) -> None:
    counts = [len(shards) for shards in assign_shards(position, world)]
    assert min(counts) > 0 or max(counts) <= 1


@pytest.mark.slow
@exact
@given(shard_positions(), st.integers(1, 9))
def test_a_shard_leaves_its_owner_only_for_a_rank_that_had_none(
    position: ShardPosition, world: int
) -> None:
    for rank, shards in enumerate(assign_shards(position, world)):
        came = [shard for shard in shards if 0 <= position.owners[shard] < world]
        moved = [shard for shard in came if position.owners[shard] != rank]
        assert len(moved) <= 1
        if moved:
            assert list(shards) == moved


@pytest.mark.slow
@exact
@given(shard_positions(), st.integers(1, 9))
def test_an_assignment_stays_while_no_shard_ends(position: ShardPosition, world: int) -> None:
    if all(position.ended):
        return
    before = assign_shards(position, world)
    num = len(position.offsets)
    after = advance_shards(position, [1] * num, [False] * num, before)
    assert assign_shards(after, world) == before


def test_an_idle_rank_is_given_the_shard_read_least() -> None:
    position = ShardPosition(
        offsets=(9, 4, 0, 7), ended=(False,) * 4, owners=(0, 0, 0, 1), samples_before=0
    )
    assert assign_shards(position, 3) == ((0, 1), (3,), (2,))


def test_untouched_shards_are_dealt_evenly() -> None:
    assert assign_shards(ShardPosition.start(7), 3) == ((0, 3, 6), (1, 4), (2, 5))


def test_ranks_beyond_the_number_of_shards_have_none() -> None:
    assert assign_shards(ShardPosition.start(2), 4) == ((0,), (1,), (), ())


def test_a_step_moves_what_was_used_and_marks_what_ended() -> None:
    start = ShardPosition.start(3)
    after = advance_shards(start, [4, 0, 2], [False, False, True], assign_shards(start, 2))
    assert after.offsets == (4, 0, 2)
    assert after.ended == (False, False, True)
    assert after.owners == (0, 1, 0)
    assert after.samples_done == 6


def test_an_epoch_is_over_when_every_shard_has_ended() -> None:
    position = ShardPosition(
        epoch=2, offsets=(5, 3), ended=(True, False), owners=(0, 1), samples_before=100
    )
    after = advance_shards(position, [0, 1], [False, True], ((), (1,)))
    assert after == ShardPosition(
        epoch=3, offsets=(0, 0), ended=(False, False), owners=(-1, -1), samples_before=109
    )
    assert after.samples_done == 109

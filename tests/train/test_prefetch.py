"""Fetching ahead in worker processes: in order, replaceable at any moment, and ended in time."""

import gc
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from supple.train.data.prefetch import Fetching, Prefetcher, Source, Task


class Numbers(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


class Gated(Dataset[Any]):
    """Counts what it gives, and waits at sample 100 until the gate is opened."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.reached, self.gate = context.Event(), context.Event()
        self.given = torch.zeros(200, dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> int:
        if index == 100:
            self.reached.set()
            assert self.gate.wait(timeout=60)
        self.given[index] += 1
        return index


class GatedTogether(Gated):
    """The same, giving all samples of a batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


def task(*indices: int) -> Task:
    return Task(indices=indices, seed=None)


def prefetcher(
    dataset: Any, num_workers: int = 1, collate: Callable | None = None, **options: Any
) -> Prefetcher:
    source = Source(dataset=dataset, collate_fn=collate)
    return Prefetcher(source, Fetching(num_processes=num_workers, **options))


def test_results_come_in_the_order_of_the_tasks() -> None:
    fetching = prefetcher(Numbers(), num_workers=2)
    fetching.restart(iter([task(index, index + 1) for index in range(20)]))
    for index in range(20):
        done, data = fetching.next()
        assert done.indices == (index, index + 1)
        assert data.tolist() == [index, index + 1]


@pytest.mark.parametrize(("kind", "waited_for"), [(Gated, [100]), (GatedTogether, [100, 101])])
def test_a_new_plan_waits_for_one_fetch_and_not_for_all_that_was_asked_for(
    kind: type[Gated], waited_for: list[int]
) -> None:
    dataset = kind()
    fetching = prefetcher(dataset)
    fetching.restart(iter([task(0, 1), task(100, 101), task(102, 103), task(104, 105)]))
    assert fetching.next()[1].tolist() == [0, 1]
    assert dataset.reached.wait(timeout=60)
    fetching.restart(iter([task(2, 3)]))
    dataset.gate.set()
    assert fetching.next()[1].tolist() == [2, 3]
    assert dataset.given.nonzero().flatten().tolist() == [0, 1, 2, 3, *waited_for]


@pytest.mark.slow
def test_nothing_of_an_old_plan_is_handed_out() -> None:
    fetching = prefetcher(Numbers(), num_workers=2)
    for plan in range(30):
        fetching.restart(task(1000 * plan + number) for number in count())
        for number in range(plan % 4):
            assert fetching.next()[1].tolist() == [1000 * plan + number]


def test_steps_without_a_task_are_passed_over() -> None:
    fetching = prefetcher(Numbers())
    fetching.restart(iter([None, None, task(1), None, task(2)]))
    assert [fetching.next()[0].indices for _ in range(2)] == [(1,), (2,)]


def test_a_plan_that_ran_out_can_be_followed_by_another() -> None:
    fetching = prefetcher(Numbers())
    for plan in range(3):
        fetching.restart(iter([task(plan)]))
        assert fetching.next()[1].tolist() == [plan]


def test_a_sample_that_is_none_is_a_sample() -> None:
    fetching = prefetcher([None, None], collate=lambda samples: None)
    fetching.restart(iter([task(0, 1)]))
    assert fetching.next() == (task(0, 1), None)


def test_the_task_after_one_that_failed_is_still_in_its_place() -> None:
    fetching = prefetcher([0, 1, 2])
    fetching.restart(iter([task(0), task(9), task(2)]))
    assert fetching.next()[1].tolist() == [0]
    with pytest.raises(IndexError):
        fetching.next()
    done, data = fetching.next()
    assert (done.indices, data.tolist()) == ((2,), [2])


def test_the_random_generators_follow_the_seed_of_the_task() -> None:
    class Random(Dataset[Any]):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(())

    tasks = [Task(indices=[0, 1], seed=seed) for seed in (5, 6, 5)]
    fetching = prefetcher(Random(), num_workers=2)
    fetching.restart(iter(tasks))
    first, second, again = [fetching.next()[1].tolist() for _ in range(3)]
    assert first == again
    assert first != second


def test_fetching_here_without_a_seed_leaves_the_generators_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fetching = prefetcher(Numbers())
    fetching.restart(iter([Task(indices=[0], seed=9)]))
    fetching.next()
    Source(dataset=[1, 2]).fetch(task(0, 1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_the_processes_end_when_nobody_holds_the_prefetcher(in_a_cycle: bool) -> None:
    fetching: Prefetcher | None = prefetcher(Numbers())
    assert fetching is not None
    fetching.restart(task(number) for number in count())
    before = {child.pid for child in multiprocessing.active_children()}
    fetching.next()
    started = {child.pid for child in multiprocessing.active_children()} - before
    assert len(started) == 1
    if in_a_cycle:
        fetching.itself = fetching  # type: ignore[attr-defined]
    fetching = None
    gc.collect()
    assert started.isdisjoint({child.pid for child in multiprocessing.active_children()})


def test_a_closed_prefetcher_starts_again_when_it_is_needed() -> None:
    fetching = prefetcher(Numbers())
    fetching.restart(task(number) for number in count())
    fetching.next()
    fetching.close()
    fetching.restart(iter([task(7)]))
    assert fetching.next()[1].tolist() == [7]


_PARENT = """
import multiprocessing, time
from itertools import count
from supple.train.data.prefetch import Fetching, Prefetcher, Source, Task
class Stuck:
    def __getitem__(self, index):
        time.sleep(3600 if index else 0)
        return index
fetching = Prefetcher(Source(dataset=Stuck()), Fetching(num_processes=2))
fetching.restart(Task(indices=(number,), seed=None) for number in count())
fetching.next()
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_processes_of_a_killed_worker_end_with_it_whatever_they_do() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # Nobody may ever reap what it leaves: gone, or a zombie that holds nothing open.
    while any(child.is_running() and child.status() != "zombie" for child in children):
        pass  # pytest's time-out ends a wait in vain

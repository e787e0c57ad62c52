"""Loaders driven through a history of steps, failures and resizes, without processes or groups.

The harness plays what `Job` and the controller do: it sums the statistics of all ranks, lets a step
commit everywhere, nowhere or on some, forms the next generation from the newest position and writes
the ledger. `supple.core.job.ledger.prove` then says whether every sample was used exactly once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hypothesis import strategies as st

from supple.train.data.loader import Loader


@dataclass(frozen=True)
class Commit:
    """Steps that go well."""

    num_steps: int = 1


@dataclass(frozen=True)
class Abandon:
    """A step that fails for everybody; each rank had taken up to `num_taken` micro-batches."""

    num_taken: int = 99


@dataclass(frozen=True)
class Tear:
    """A step that committed on rank `committer` alone when another failed. Where the committer
    `dies`, nobody knows any more that it had."""

    committer: int
    dies: bool


@dataclass(frozen=True)
class Resize:
    """The next generation: these of the ranks stay, in this order, and so many join."""

    order: tuple[int, ...]
    num_joining: int
    global_batch_size: int


Happening = Commit | Abandon | Tear | Resize


def happenings(max_ranks: int) -> st.SearchStrategy[list[Happening]]:
    """Histories to start from; the run is brought to its end after them."""
    survivors = st.permutations(range(max_ranks)).flatmap(
        lambda order: st.integers(0, max_ranks).map(lambda count: tuple(order[:count]))
    )
    one = st.one_of(
        st.builds(Commit, st.integers(1, 5)),
        st.builds(Abandon, st.integers(0, 3)),
        st.builds(Tear, st.integers(0, max_ranks - 1), st.booleans()),
        st.builds(Resize, survivors, st.integers(0, 3), st.integers(1, 17)),
    )
    return st.lists(one, max_size=12)


class Run:
    """A job without a model. `records` is its ledger."""

    def __init__(
        self,
        make: Callable[[], Loader],
        *,
        num_ranks: int = 1,
        global_batch_size: int = 8,
        micro_batch_size: int = 3,
        num_logical_shards: int | None = None,
        max_ranks: int = 6,
    ) -> None:
        self._make = make
        self._batch = global_batch_size
        self._micro = micro_batch_size
        self._num_logical_shards = num_logical_shards
        self._max_ranks = max_ranks
        self.records: list[dict[str, Any]] = []
        self.data: list[Any] = []
        """What was fed to every committed step: (step, shard, data) or (step, rank, data)."""
        self.generation = 0
        self.loaders: list[Loader] = [make() for _ in range(num_ranks)]
        self.steps = [0] * num_ranks
        self._form()

    @property
    def done(self) -> bool:
        return all(loader.done for loader in self.loaders)

    def play(self, history: list[Happening]) -> "Run":
        """Everything that happens, and then every step that is left."""
        for happening in history:
            if self.done:
                break
            self.happen(happening)
        while not self.done:
            self.step()
        self.records.append({"kind": "end", "step": max(self.steps)})
        return self

    def happen(self, happening: Happening) -> None:
        match happening:
            case Commit(num_steps):
                for _ in range(num_steps):
                    if not self.done:
                        self.step()
            case Abandon(num_taken):
                self._feed(num_taken)
                self._form()
            case Tear(committer, dies):
                committer %= len(self.loaders)
                summed, _ = self._feed()
                self.loaders[committer].commit(summed)
                self.steps[committer] += 1
                if dies:
                    self._replace([r for r in range(len(self.loaders)) if r != committer], 0)
                else:
                    self._form()
            case Resize(order, num_joining, batch):
                self._batch = batch
                self._replace([rank for rank in order if rank < len(self.loaders)], num_joining)

    def step(self) -> None:
        summed, fed = self._feed()
        planned = {loader.planned_samples for loader in self.loaders}
        assert len(planned) == 1
        num_samples = sum(micro.num_samples for _, micro in fed)
        assert 1 <= num_samples <= planned.pop()
        self.data += [
            (self.steps[0], micro.shard_id if self._num_logical_shards else rank, micro.data)
            for rank, micro in fed
        ]
        for rank, loader in enumerate(self.loaders):
            loader.commit(summed)
            self.steps[rank] += 1
        assert len({json.dumps(loader.position.to_json()) for loader in self.loaders}) == 1

    def _feed(self, num_taken: int | None = None) -> tuple[list[float], list[Any]]:
        """Every rank takes its micro-batches (or some): summed statistics, and what was taken."""
        fed = []
        for rank, loader in enumerate(self.loaders):
            feed = (
                loader.feed()
                if self._num_logical_shards is None
                else loader.feed_shards(self._num_logical_shards)
            )
            taken = list(islice(feed, num_taken))
            fed += [(rank, micro) for micro in taken]
            for micro in taken:
                assert len(micro.ids) == micro.num_samples
                if self._num_logical_shards is None:
                    assert 1 <= micro.num_samples <= self._micro
                self.records.append(
                    {
                        "kind": "read",
                        "generation": self.generation,
                        "step": self.steps[rank],
                        "epoch": loader.epoch,
                        "rank": rank,
                        "ids": list(micro.ids),
                    }
                )
            if num_taken is None and taken:
                assert [micro.is_last for micro in taken] == [False] * (len(taken) - 1) + [True]
        stats = [loader.stats() for loader in self.loaders]
        assert [len(own) for own in stats] == [loader.num_stats for loader in self.loaders]
        return [sum(column) for column in zip(*stats, strict=True)], fed

    def _replace(self, staying: list[int], num_joining: int) -> None:
        if not staying:
            staying = [0]
        num_joining = min(num_joining, self._max_ranks - len(staying))
        self.loaders = [self.loaders[rank] for rank in staying]
        self.steps = [self.steps[rank] for rank in staying]
        for _ in range(num_joining):
            joiner = self._make()
            # A joiner rehearses one step before it is let in.
            joiner.place(joiner.position, 0, 2, self._batch, self._micro)
            next(iter(joiner.feed()), None)
            self.loaders.append(joiner)
            self.steps.append(-1)
        self._form()

    def _form(self) -> None:
        """The next generation: all take the position of whoever has committed the most."""
        self.generation += 1
        newest = max(range(len(self.steps)), key=lambda rank: self.steps[rank])
        step, source = self.steps[newest], self.loaders[newest].position
        sent = json.dumps(source.to_json())
        self.steps = [step] * len(self.loaders)
        for rank, loader in enumerate(self.loaders):
            position = type(source).from_json(json.loads(sent))
            loader.place(position, rank, len(self.loaders), self._batch, self._micro)
        self.records.append(
            {"kind": "generation", "generation": self.generation, "start_step": step}
        )

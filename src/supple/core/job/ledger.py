"""Prove from the workers' records that every sample was used exactly once.

Each worker appends a `read` record for every micro-batch *before* its step can commit
(`supple.train.ledger`): generation, step, epoch, rank, and the samples that were used. These
records are a proof, even if workers were lost:

1. A step commits through one collective of all members of one generation; if it finished for any
   member, every member had contributed, so every member had written its reads.
2. The next generation begins at the highest step committed anywhere. So a step that was abandoned
   in a generation, or undone by going back to a checkpoint, is begun again by a later one. Hence
   step s was committed by the largest generation that began at or before s, and by no other.
3. The first step of a generation is its lowest read. A `generation` record also states it; the two
   must agree.

The samples used are therefore the reads of each step s < end in the generation that s belongs to.
Other reads are void. Counted over an epoch, every expected sample must be there once: none means it
was lost, more than one means it was used repeatedly. The proof does not depend on how batches were
cut, so it shares no arithmetic with `supple.core.job.order`.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SampleId = int | str
"""An index into a map dataset, or "shard:number"."""
_NUM_SHOWN = 5


class LedgerError(ValueError):
    """Records that allow no proof, because they are incomplete or contradictory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """Number of uses in one epoch, and the samples that were not used exactly once."""

    epoch: int
    samples_seen: int
    """Number of uses: a sample used twice counts twice."""
    lost: tuple[SampleId, ...]
    doubled: tuple[SampleId, ...]
    unknown: tuple[SampleId, ...]
    """Used, but not among the expected samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """Samples that the run used, by epoch. Numbers are totals over `epochs`."""

    num_steps: int
    num_generations: int
    """Generations that committed a step."""
    num_void_reads: int
    """Number of samples read for steps that were abandoned or undone."""
    epochs: tuple[EpochReport, ...]

    @property
    def samples_seen(self) -> int:
        return sum(epoch.samples_seen for epoch in self.epochs)

    @property
    def lost(self) -> int:
        return sum(len(epoch.lost) for epoch in self.epochs)

    @property
    def doubled(self) -> int:
        return sum(len(epoch.doubled) for epoch in self.epochs)

    @property
    def unknown(self) -> int:
        return sum(len(epoch.unknown) for epoch in self.epochs)

    @property
    def is_exact(self) -> bool:
        """Whether every expected sample of every epoch was used exactly once, and no others."""
        return not (self.lost or self.doubled or self.unknown)

    def __str__(self) -> str:
        head = (
            f"{self.samples_seen} samples in {self.num_steps} steps, {len(self.epochs)} epochs and "
            f"{self.num_generations} generations; {self.num_void_reads} read again: "
        )
        if self.is_exact:
            return head + "every sample exactly once"
        found = [
            f"epoch {report.epoch} {what} {len(samples)} ({_some(samples)})"
            for report in self.epochs
            for what, samples in (
                ("lost", report.lost),
                ("doubled", report.doubled),
                ("used unknown", report.unknown),
            )
            if samples
        ]
        return head + "; ".join(found)


def prove(
    records: Iterable[Mapping[str, Any]],
    *,
    expected: Iterable[SampleId] | Callable[[int], Iterable[SampleId]],
    num_epochs: int | None = None,
) -> LedgerReport:
    """Compare the samples that the run used with `expected`, the samples of one epoch.

    `records` are those of all workers and of the controller, in any order: `read`, `generation`
    (generation, start_step), `gap` (step, file, error: from that step on a file could not be
    written) and `end` (step: how many were committed); others are ignored.
    The first `num_epochs` epochs must be complete (default: all but the last that was begun); a
    later one, which the run ended within, may lack samples but not repeat any. For a map dataset
    `expected` is `range(dataset_size)`. With a sampler it is a function of the epoch: its samples,
    each as often as the sampler gives it.

    Raises `LedgerError` where the records allow no proof.
    """
    reads: list[Mapping[str, Any]] = []
    begun: dict[int, int] = {}
    gaps: list[Mapping[str, Any]] = []
    ends: list[int] = []
    for record in records:
        kind = record.get("kind")
        if kind == "read":
            reads.append(record)
        elif kind == "generation":
            _note_start(begun, int(record["generation"]), int(record["start_step"]))
        elif kind == "gap":
            gaps.append(record)
        elif kind == "end":
            ends.append(int(record["step"]))
    _refuse_incomplete(gaps, ends)
    num_steps = max(ends)
    begun = _starts(reads, begun)
    used, by_generation, num_void = _committed(reads, begun, num_steps)
    same = None if callable(expected) else Counter(expected)
    num_complete = max(used, default=0) if num_epochs is None else num_epochs
    last = max([num_complete - 1, *used])
    return LedgerReport(
        num_steps=num_steps,
        num_generations=len(by_generation),
        num_void_reads=num_void,
        epochs=tuple(
            _report(
                epoch,
                used.get(epoch, Counter()),
                Counter(expected(epoch)) if callable(expected) else same or Counter(),
                is_complete=epoch < num_complete,
            )
            for epoch in range(last + 1)
        ),
    )


def _refuse_incomplete(gaps: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> None:
    if gaps:
        first = min(gaps, key=lambda gap: int(gap["step"]))
        raise LedgerError(
            f"the ledger is incomplete from step {first['step']} on: {first['file']} could not be "
            f"written ({first['error']}). Training continued, and the samples it used then are "
            "unknown. Make room, and run with --ledger again."
        )
    if not ends:
        raise LedgerError(
            "the ledger has no end: no record states how many steps were committed. Let the run "
            "finish, or stop it so that it can save, before using its ledger as a proof."
        )


def shard_ids(lengths: Sequence[int]) -> list[str]:
    """Return the ledger's names of the samples of iterable shards of these lengths."""
    return [f"{shard}:{number}" for shard, size in enumerate(lengths) for number in range(size)]


def _note_start(begun: dict[int, int], generation: int, step: int) -> None:
    if begun.setdefault(generation, step) != step:
        raise LedgerError(
            f"generation {generation} began at step {begun[generation]} and at step {step}: it can "
            "begin only once. Ledgers of two runs were mixed; give the files of one."
        )


def _starts(reads: Sequence[Mapping[str, Any]], begun: Mapping[int, int]) -> dict[int, int]:
    """First step of each generation: from its record, else from its first read."""
    first: dict[int, int] = {}
    for read in reads:
        generation, step = int(read["generation"]), int(read["step"])
        first[generation] = min(first.get(generation, step), step)
    for generation, step in first.items():
        if step != begun.get(generation, step):
            raise LedgerError(
                f"generation {generation} began at step {begun[generation]}, but its first read is "
                f"for step {step}. A generation reads from its first step on: records are missing, "
                "or those of two runs were mixed."
            )
    return {**first, **begun}


def _committed(
    reads: Sequence[Mapping[str, Any]], begun: Mapping[int, int], num_steps: int
) -> tuple[dict[int, Counter[SampleId]], set[int], int]:
    """Return the uses of each sample by epoch, the generations that committed, and the number of
    void reads."""
    # A generation owns the steps from its start up to the lowest start of any later one.
    generations = sorted(begun)
    owners: list[tuple[int, int]] = []
    below = num_steps
    for generation in reversed(generations):
        if begun[generation] < below:
            owners.append((begun[generation], generation))
            below = begun[generation]
    owners.reverse()
    starts = [start for start, _ in owners]
    used: dict[int, Counter[SampleId]] = defaultdict(Counter)
    committing: set[int] = set()
    num_void = 0
    for read in reads:
        step, generation = int(read["step"]), int(read["generation"])
        place = bisect_right(starts, step) - 1
        if step < num_steps and owners[place][1] == generation:
            used[int(read["epoch"])].update(read["ids"])
            committing.add(generation)
        else:
            num_void += len(read["ids"])
    return used, committing, num_void


def _report(
    epoch: int, uses: Counter[SampleId], wanted: Counter[SampleId], *, is_complete: bool
) -> EpochReport:
    return EpochReport(
        epoch=epoch,
        samples_seen=uses.total(),
        lost=_in_order(wanted - uses) if is_complete else (),
        doubled=_in_order(
            sample for sample, times in uses.items() if times > max(1, wanted[sample])
        ),
        unknown=_in_order(uses.keys() - wanted.keys()),
    )


def _in_order(samples: Iterable[SampleId]) -> tuple[SampleId, ...]:
    return tuple(sorted(samples, key=lambda sample: (isinstance(sample, str), sample)))


def _some(samples: Sequence[SampleId]) -> str:
    more = ", …" if len(samples) > _NUM_SHOWN else ""
    return ", ".join(str(sample) for sample in samples[:_NUM_SHOWN]) + more

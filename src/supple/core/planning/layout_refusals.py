"""Messages for counts without a layout: the reason, and what would give one."""

from collections.abc import Sequence

from supple.core.layouts.candidates import (
    LayoutSpace,
    degrees,
    describe,
    layouts_for,
    planned_in_words,
)
from supple.core.layouts.memory import memory_parts, num_parameters
from supple.core.layouts.model import LayoutRun, Model, Transformer
from supple.core.spec import Limits
from supple.core.types import Infeasible, Plan
from supple.core.words import in_digits, in_words


def none_fits(space: LayoutSpace, limits: Limits, counts: Sequence[int], batch: int) -> Infeasible:
    """Explain why none of `counts` has a layout for the script's batch."""
    tried = [
        LayoutRun(
            model=space.model,
            layout=layout,
            micro_batch_size=1,
            num_micro_batches=batch // layout.dp_degree,
            recompute=recompute,
        )
        for count in counts
        for layout, recompute in layouts_for(space, count, batch)
        if recompute
    ]
    if not tried:
        return Infeasible(
            asked=f"a layout of {' or '.join(map(str, counts))} accelerators",
            numbers=f"the batch is {batch} sequence{'s' * (batch > 1)}",
            rule=_what_divides(space, batch),
            advice=_another_batch(space, batch, counts).strip() or "Request another count.",
        )
    least = min(tried, key=lambda run: memory_parts(run, space.optimizer).total)
    parts = memory_parts(least, space.optimizer)
    return Infeasible(
        asked=f"a layout of at most {counts[-1]} accelerators",
        numbers=f"{in_digits(_num_parameters(space.model) / 1e9)} billion parameters: the least is "
        f"{_gigabytes(parts.total)} an accelerator, as {describe(least.layout)} recomputed, of "
        f"which {_gigabytes(parts.states)} are states and {_gigabytes(parts.activations)} "
        f"activations; each has {_gigabytes(space.memory_bytes)}",
        rule="the fullest accelerator of a layout must fit, and replicas must divide the batch of "
        f"{batch} sequences",
        advice=_advice(space.model, limits, kept=parts.activations > parts.states),
    )


def _advice(model: Model, limits: Limits, *, kept: bool) -> str:
    """Advice for a job that does not fit. `kept`: activations take more than states."""
    options = ["accelerators with more memory"]
    if limits.max_workers is not None:
        options.append("more of them")
    if not kept:
        options.append("a batch that more replicas divide")
    if isinstance(model, Transformer):
        if kept and model.stores_scores:
            options.append("an attention that keeps no scores")
        options.append("shorter sequences" if kept else "an optimizer that keeps less")
    *others, last = options
    return f"Take {', '.join(others)} or {last}." if others else f"Take {last}."


def left_out(
    space: LayoutSpace, rows: Sequence[int], without: Sequence[int], batches: Sequence[int]
) -> str:
    """Sentences about the counts without a row for any of `batches`, above the fewest of `rows`;
    empty for none. On smaller counts the job does not fit."""
    beyond = [count for count in without if count > rows[0]]
    undivided = [
        count
        for count in beyond
        if not any(True for batch in batches for _ in layouts_for(space, count, batch))
    ]
    full = [count for count in beyond if count not in undivided]
    last = rows[-1] if not (undivided and full) else max(beyond)
    text = ""
    if undivided:
        another = _another_batch(space, batches[0], undivided)
        text += f" {_named(undivided, last)} left out: {_what_divides(space, batches[0])}.{another}"
    if full:
        text += f" {_named(full, last)} left out: no layout of them fits into the memory."
    return text


def ran_unexpectedly(space: LayoutSpace, rows: Sequence[Plan]) -> str:
    """Sentences about measured rows that were not expected to fit."""
    return "".join(
        f" {planned_in_words(row)} ran, though {_gigabytes(row.memory_bytes.high)} were expected "
        f"of {_gigabytes(space.memory_bytes)}."
        for row in rows
        if row.memory_bytes.high > space.memory_bytes
    )


def _named(counts: Sequence[int], last: int) -> str:
    """Name counts in words, as "Counts above N" where all are above the last of the table."""
    if len(counts) == 1:
        return f"{in_words(counts[0])} {'is' if counts[0] == 1 else 'are'}"
    if counts[0] > last:
        return f"Counts above {last} are"
    return f"{', '.join(map(str, counts[:-1]))} and {in_words(counts[-1])} are"


def _what_divides(space: LayoutSpace, batch: int) -> str:
    replicas = f"replicas must divide the batch of {batch}"
    if isinstance(space.model, Transformer):
        return f"{replicas}, tensor ranks the heads and stages the layers"
    return replicas


def _another_batch(space: LayoutSpace, batch: int, counts: Sequence[int]) -> str:
    """A sentence with the nearest batch that the replicas of most of `counts` divide; empty where
    it differs by more than a factor of two."""
    replicas = {count: {dp for _, _, dp in degrees(space, count)} for count in counts}
    near = {
        multiple * dp
        for dps in replicas.values()
        for dp in dps
        for multiple in (batch // dp, batch // dp + 1)
        if batch <= 2 * multiple * dp <= 4 * batch
    }

    def served(size: int) -> list[int]:
        return [count for count, dps in replicas.items() if any(size % dp == 0 for dp in dps)]

    best = max(near, key=lambda size: (len(served(size)), -abs(size - batch), size), default=0)
    if not best:
        return ""
    some = served(best)
    which = "them" if len(some) == len(counts) else ", ".join(map(str, some))
    return f" A batch of {best} has layouts of {which}."


def _num_parameters(model: Model) -> int:
    if isinstance(model, Transformer):
        return num_parameters(model)
    return sum(layer.num_parameters for layer in model)


def _gigabytes(count: float) -> str:
    return f"{in_digits(count / 1e9)} GB"

"""Handle a lost worker: find the cause, replace it with back-off, or fail the job.

Two counters, each reset by success. Strikes: consecutive generations that broke with no committed
step between (a bad step, a bad network). Failed starts: consecutive attempts whose new worker was
lost within a few steps (a bad machine). Beyond --max-failures a job continues with the workers it
has and retries with exponential back-off; with fewer than MIN it fails.
"""

from supple.core.job.endings import conclude
from supple.core.job.membership import JobState, Phase, Turn
from supple.core.job.roster import ordinal
from supple.core.types import LossCause, StopWorker, WorkerId, WorkerStatus
from supple.core.words import in_words

BACK_OFF_S = 30.0
"""Wait before the first delayed replacement, in s."""
BACK_OFF_DOUBLINGS = 7
"""Largest number of doublings of that wait: about one hour."""
PROVEN_STEPS = 3
"""Committed steps after which a new worker counts as started."""

_CAUSE: dict[LossCause, str] = {
    "raised": "raised in the script",
    "refused": "refused the checkpoint",
    "died": "died",
    "silent": "fell silent",
    "stuck": "held the others up",
    "preempted": "was taken by its platform",
    "start_failed": "failed to start",
}


def advance(turn: Turn, worker_id: WorkerId, committed: int) -> None:
    """Record that a member has committed `committed` steps in total."""
    if committed > turn.job.step:
        progress = committed > turn.job.struck_step
        turn.set(step=committed, strikes=0 if progress else turn.job.strikes)
    view = turn.workers.views[worker_id]
    joined = view.joined_step
    if not view.proven and joined is not None and committed - joined >= PROVEN_STEPS:
        turn.update_view(worker_id, proven=True)
        turn.set(failed_starts=0)


def lose(turn: Turn, worker_id: WorkerId, cause: LossCause, detail: str, step: int = -1) -> None:
    """Record the loss of a worker in any phase. A worker whose script raised is kept, because it
    holds the state of `step`, until a running generation holds that state too."""
    state = turn.state
    view = state.workers[worker_id]
    if cause == "raised" and step >= 0:
        turn.update_view(worker_id, status=WorkerStatus.RAISED, step=step, left_at=None)
        advance(turn, worker_id, step)
    else:
        turn.forget(worker_id)
    if cause in ("raised", "refused"):  # the training function ended, the process still runs
        turn.set(detail=detail)
        if step < 0:
            turn.act(StopWorker, worker_id=worker_id, reason=_CAUSE[cause])
    if cause == "refused":  # it would be refused again
        turn.set(restore=None, restore_step=-1)
        conclude(turn, "failed", "the checkpoint was refused")
    if view.finished or view.status is WorkerStatus.RAISED:
        return
    text = f"{worker_id} {_CAUSE[cause]}" + (f": {in_short(detail)}" if detail else "")
    at_rest = state.phase in (Phase.WAITING, Phase.SAVING)
    broke = view.status is WorkerStatus.MEMBER and worker_id in state.members and not at_rest
    if broke:
        others = len(turn.state.members) - turn.workers.num("present") > 1
        turn.set(why=("recover", f"{state.why[1]}, {text}" if others else text))
        turn.abort()
    if cause == "preempted":
        return
    if not broke:
        turn.decide("keep", turn.workers.num("present"), f"{text} ({view.status.value})")
    if cause == "raised":
        _count_script_error(turn, worker_id, broke=broke)
    if turn.state.verdict is not None:
        return
    if not view.proven and ordinal(worker_id) >= state.attempt_from:
        turn.set(failed_starts=state.failed_starts + 1, attempt_from=state.num_started)
    if broke:
        strike(turn)
    _back_off(turn)


def _count_script_error(turn: Turn, worker_id: WorkerId, *, broke: bool) -> None:
    """Fail the job if the script would raise again at the next attempt."""
    state, limit = turn.state, max(1, turn.state.spec.max_failures)
    if state.generation == 0:
        conclude(turn, "failed", "the script failed before the first step")
    elif broke:
        again = state.step <= state.raised_step
        turn.set(
            raised=state.raised | {worker_id},
            num_raised=state.num_raised + 1 if again else 1,
            raised_step=max(state.step, state.raised_step),
        )
        at = f"after step {state.step}"
        raised = turn.state.raised
        everyone = len(raised) >= len(state.members) and raised.issuperset(state.members)
        if not state.ending and everyone:
            conclude(turn, "failed", f"the script raised on every worker {at}")
        elif not state.ending and turn.state.num_raised >= limit:
            times = "once" if limit == 1 else f"{limit} times"
            allowed = f"(--max-failures {state.spec.max_failures})"
            conclude(turn, "failed", f"the script raised {times} {at} {allowed}")


def strike(turn: Turn) -> None:
    """Count a broken generation, once each; the next committed step resets the counter."""
    state = turn.job
    if state.struck_generation != state.generation:
        turn.set(
            strikes=state.strikes + 1,
            struck_generation=state.generation,
            struck_step=max(state.struck_step, state.step),
        )


def _back_off(turn: Turn) -> None:
    """Delay the next replacement if the last ones were lost in a row."""
    state, limit = turn.state, turn.state.spec.max_failures
    excess = max(state.failed_starts, state.strikes) - limit
    if excess <= 0 or turn.now < state.retry_at:
        return
    wait_s = BACK_OFF_S * 2.0 ** min(excess - 1, BACK_OFF_DOUBLINGS)
    turn.set(retry_at=turn.now + wait_s)
    left = turn.workers.num("joinable")
    reason = f"{_in_a_row(state)}; going on with {in_words(left)}, the next "
    turn.decide("keep", left, f"{reason}attempt to replace it in {wait_s:g} s")


def is_hopeless(turn: Turn) -> bool:
    """Fail the job, and return True, if workers are lost repeatedly without progress and too few
    are left, or if collectives fail repeatedly although no worker was lost."""
    state = turn.state
    if max(state.failed_starts, state.strikes) <= state.spec.max_failures:
        return False
    if not state.has_enough:
        left, least = state.workers.num("joinable"), state.spec.min_workers
        conclude(turn, "failed", f"{_in_a_row(state)}; {in_words(left)} left, MIN is {least}")
    elif state.strikes > state.spec.max_failures and len(state.members) == (
        state.workers.num("present")
    ):
        reason = (
            f"{_in_a_row(state)}, though no worker was lost ({state.why[1]}): check that the "
            "workers' nodes can reach each other"
        )
        conclude(turn, "failed", reason)
    return turn.state.verdict is not None


def _in_a_row(state: JobState) -> str:
    limit = f"(--max-failures {state.spec.max_failures})"
    if state.strikes >= state.failed_starts:
        return f"{state.strikes} generations in a row broke without a committed step {limit}"
    return (
        f"{state.failed_starts} new workers in a row were lost within {PROVEN_STEPS} steps {limit}"
    )


def in_short(text: str) -> str:
    """The last non-empty line: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""

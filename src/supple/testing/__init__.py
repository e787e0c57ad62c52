"""Simulated workers and fault scripts, for tests without processes, torch or a real clock.

`ScriptedBackend` is a `Backend` of simulated workers that follow the worker's side of the protocol.
A controller drives it, or `ScriptedJob`, which uses `core/job/lifecycle.py`. Simulated workers fail
as real ones do: messages cross, a collective succeeds on some members and fails on others,
processes die or freeze in any state. A violation of the protocol raises `ProtocolViolation`, with
the history that led to it.

    faults = FaultScript().kill(rank=1, step=3).resize(to=4, at=10.0)
    job = ScriptedJob(spec, faults=faults, num_steps=100)
    job.run(lambda: job.outcome is not None)
"""

from supple.testing.backend import ROUND_S, ScriptedBackend
from supple.testing.faults import FakeClock, Fault, FaultScript
from supple.testing.job import ScriptedJob
from supple.testing.workers import (
    ProtocolViolation,
    SimulatedWorker,
    Stage,
    TrainedState,
    World,
)

__all__ = [
    "ROUND_S",
    "FakeClock",
    "Fault",
    "FaultScript",
    "ProtocolViolation",
    "ScriptedBackend",
    "ScriptedJob",
    "SimulatedWorker",
    "Stage",
    "TrainedState",
    "World",
]

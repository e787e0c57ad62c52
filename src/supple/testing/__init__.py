"""A world of workers in memory, for tests of what drives them: no process, no torch, no clock.

`ScriptedBackend` is a `Backend` of simulated workers that keep their side of the protocol, for a
controller or for `ScriptedJob`, which lets `core/job/lifecycle.py` drive them. What real workers
may do, these may do as well: messages cross, a collective succeeds on some members and fails on
others, processes die or freeze in any state. What must never happen raises `ProtocolViolation`,
with the history that led there.

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

"""A world of workers in memory, for tests of what drives them: no process, no torch, no clock.

`ScriptedBackend` simulates workers that keep their side of the protocol, and lets
`supple.core.lifecycle` drive them. What real workers may do, these may do as well: messages cross,
a collective succeeds on some members and fails on others, processes die or freeze in any state.
What must never happen raises `ProtocolViolation`, with the history that led there.

    faults = FaultScript().kill(rank=1, step=3).resize(to=4, at=10.0)
    backend = ScriptedBackend(spec, faults=faults, num_steps=100)
    backend.run(lambda: backend.outcome is not None)
"""

from supple.testing.backend import ROUND_S, ScriptedBackend
from supple.testing.faults import FakeClock, Fault, FaultScript
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
    "SimulatedWorker",
    "Stage",
    "TrainedState",
    "World",
]

"""Runs a training function on several processes, each with a real `Job` and the real group, steered
in the controller's place: without Ray, a run of three workers and two resizes takes a second.

A resize happens at a known step: every worker holds its first sample of that step until it has
heard of the next generation.
"""

import faulthandler
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks.parity_plain import Plain
from supple.core.spec import TrainSpec
from supple.core.types import (
    AnnounceGeneration,
    FormGroup,
    GroupFormed,
    JobId,
    StopWorker,
    WorkerId,
    WorkerReady,
    WorkerStopped,
)
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Elastic, Identity, LeaveLoop
from supple.train.generation.rendezvous import Address, Rendezvous
from supple.train.job import Job
from supple.train.start.seeding import seed_everything

_LIMIT_S = 300.0
_FORK = multiprocessing.get_context("fork")
_rendezvous: list[Address] = []
"""The rendezvous of all runs, once it has started."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training function left: on one worker, or in plain PyTorch."""

    params: list[torch.Tensor] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    """Tensors of what was given to `job.keep`."""
    reads: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(step, rank, samples) of every micro-batch."""
    error: str = ""
    """The type and text of what it raised."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A generation: its members, and the step in which the next one is announced."""

    members: tuple[str, ...]
    until: int | None = None


def sizes(stages: Sequence[Stage], step: int) -> int:
    """Return the number of workers at a step."""
    for stage in stages:
        if stage.until is None or step <= stage.until:
            return len(stage.members)
    raise ValueError(f"no stage has step {step}")


def run_plain(train: Callable[[Any], None], **options: Any) -> Outcome:
    """Train in plain PyTorch, in a process of its own."""
    return _in_process(lambda: _plain(train, options))


def initial(train: Callable[[Any], None]) -> Outcome:
    """The state before the first step."""
    return _in_process(lambda: _plain(train, {"max_steps": 0}))


def run_workers(
    name: str, train: Callable[[Any], None], stages: Sequence[Stage], **spec: Any
) -> list[Outcome]:
    """Train on worker processes through all stages; return what each of the last members has, with
    the first the reads of those that left. If a worker raises, its outcome alone is returned."""
    cast = _Cast(name, train, stages, spec)
    try:
        return cast.play()
    except _Raised as raised:
        return [raised.outcome]
    finally:
        cast.close()


@dataclass(frozen=True, slots=True)
class _Held:
    """A worker is in the step in which a generation ends."""

    generation: int


def warm_up() -> None:
    """Import here what each worker would import by itself: torch.compile takes seconds."""
    torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.zeros(1, 1))


class _Raised(Exception):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class _Cast:
    """The workers of one run, by name."""

    def __init__(
        self, name: str, train: Callable[[Any], None], stages: Sequence[Stage], spec: dict[str, Any]
    ) -> None:
        if not _rendezvous:
            _rendezvous.append(_start_rendezvous())
        self._job = JobId(f"{name}-{os.urandom(4).hex()}")
        self._spec = TrainSpec(**({"name": name, "script": "", "max_workers": 8} | spec))
        self._train, self._stages = train, stages
        self._pipes: dict[str, Connection] = {}
        self._processes: list[Any] = []
        self._seen: list[tuple[str, Any]] = []

    def play(self) -> list[Outcome]:
        for number, stage in enumerate(self._stages, start=1):
            new = [name for name in stage.members if name not in self._pipes]
            for name in new:
                self._start(name)
            for name in new:
                self._await(name, WorkerReady)
            if number > 1:
                self._leave(number, self._stages[number - 2], stage)
            members = tuple(WorkerId(name) for name in stage.members)
            for name in stage.members:
                self._post(
                    name, FormGroup, number, members=members, global_batch_size=None, restore=None
                )
            for name in stage.members:
                self._await(name, GroupFormed, number)
        last = self._stages[-1].members
        left = [name for stage in self._stages for name in stage.members if name not in last]
        reads = [self._await(name, Outcome).reads for name in dict.fromkeys(left)]
        first, *others = [self._await(name, Outcome) for name in last]
        return [
            replace(first, reads=[*first.reads, *(read for of in reads for read in of)]),
            *others,
        ]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _leave(self, number: int, before: Stage, after: Stage) -> None:
        """End the generation before `number`, in the step in which it holds its workers."""
        self._await(before.members[0], _Held, number - 1)
        for name in before.members:
            self._post(name, AnnounceGeneration, number, members=())
        for name in before.members:
            self._await(name, WorkerStopped, number - 1)
            if name not in after.members:
                self._post(name, StopWorker, number, worker_id=WorkerId(name), reason="resize")

    def _start(self, name: str) -> None:
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=self._work, args=(name, theirs))
        process.start()
        theirs.close()
        self._pipes[name] = ours
        self._processes.append(process)

    def _post(self, name: str, kind: Any, generation: int, **fields: Any) -> None:
        self._pipes[name].send(kind(job_id=self._job, generation=generation, **fields))

    def _await(self, name: str, kind: type[Any], generation: int | None = None) -> Any:
        """The first event of this kind (and generation) of a worker. Raises `_Raised`."""
        at = 0
        while True:
            for who, event in self._seen[at:]:
                if isinstance(event, Outcome) and event.error:
                    raise _Raised(event)
                is_new = generation in (None, getattr(event, "generation", None))
                if who == name and isinstance(event, kind) and is_new:
                    return event
            at = len(self._seen)
            ready = wait(list(self._pipes.values()), _LIMIT_S)
            if not ready:
                raise TimeoutError(f"{self._spec.name}: no {kind.__name__} of {name}")
            for who, pipe in list(self._pipes.items()):
                if pipe in ready:
                    try:
                        self._seen.append((who, pickle.loads(pipe.recv_bytes())))
                    except EOFError:
                        del self._pipes[who]

    # -- in a worker's process ---------------------------------------------------------------

    def _work(self, name: str, pipe: Connection) -> None:
        faulthandler.dump_traceback_later(_LIMIT_S - 5)
        mailbox, lock = Mailbox(), threading.Lock()

        def send(event: Any) -> None:
            with lock:
                pipe.send_bytes(pickle.dumps(event))

        tape = _Tape({at: stage.until for at, stage in enumerate(self._stages, start=1)}, send)

        def obey() -> None:
            while True:
                action = pipe.recv()
                mailbox.post(action)
                if isinstance(action, AnnounceGeneration | StopWorker):
                    tape.release(action.generation)

        def tell() -> None:
            while True:
                for event in mailbox.collect(_LIMIT_S)[0]:
                    send(event)

        for target in (obey, tell):
            threading.Thread(target=target, daemon=True).start()
        identity = Identity(
            job_id=self._job,
            worker_id=WorkerId(name),
            node_id="n",
            host="127.0.0.1",
            rendezvous=_rendezvous[0],
        )
        elastic = Elastic(
            identity=identity, mailbox=mailbox, rehearsal_size=len(self._stages[0].members)
        )
        job = Job(self._spec, elastic=elastic, ledger=tape)  # type: ignore[arg-type]
        try:
            seed_everything(0)
            self._train(job)
            job.leave_loop()
        except LeaveLoop:
            send(Outcome(reads=tape.reads))
            os._exit(0)
        except BaseException as error:
            send(Outcome(error=f"{type(error).__name__}: {error}"))
            os._exit(0)
        send(_outcome(job.holder.state.model, job.holder.state.kept, tape.reads))
        os._exit(0)


def _start_rendezvous() -> Address:
    """Start it in a process of its own: this one is forked, so it must not have threads."""
    ours, theirs = _FORK.Pipe()

    def serve() -> None:
        listening = Rendezvous("127.0.0.1")
        theirs.send(tuple(listening.address))
        threading.Event().wait()

    _FORK.Process(target=serve, daemon=True).start()
    return Address(*ours.recv())


class _Tape:
    """In a ledger's place: notes what is read, and holds the worker where a stage ends."""

    def __init__(self, until: dict[int, int | None], send: Callable[[Any], None]) -> None:
        self.reads: list[tuple[int, int, list[int]]] = []
        self._send = send
        self._until = until
        self._released = {generation: threading.Event() for generation in until}

    def read(self, generation: int, step: int, epoch: int, rank: int, ids: Sequence[Any]) -> None:
        self.reads.append((step, rank, [int(one) for one in ids]))
        if step != self._until.get(generation):
            return
        self._send(_Held(generation))
        if not self._released[generation].wait(_LIMIT_S):
            raise TimeoutError(f"nobody announced a generation after {generation}")

    def release(self, generation: int) -> None:
        """A generation was announced: all before it may go on."""
        for number, event in self._released.items():
            if number < generation:
                event.set()


def _plain(train: Callable[[Any], None], options: dict[str, Any]) -> Outcome:
    plain = Plain(**options)
    seed_everything(0)
    train(plain)
    return _outcome(plain.whole, plain.kept, [])


def _outcome(model: torch.nn.Module, kept: Mapping[str, Any], reads: list[Any]) -> Outcome:
    values = [value for thing in kept.values() for value in thing.state_dict().values()]
    return Outcome(
        params=[param.detach().clone() for param in model.parameters()],
        buffers=[buffer.detach().clone() for buffer in model.buffers()],
        kept=[value.detach().clone() for value in values if isinstance(value, torch.Tensor)],
        reads=reads,
    )


def _in_process(work: Callable[[], Outcome]) -> Outcome:
    ours, theirs = _FORK.Pipe()

    def answer() -> None:
        try:
            theirs.send_bytes(pickle.dumps(work()))
        except BaseException as error:
            theirs.send_bytes(pickle.dumps(Outcome(error=f"{type(error).__name__}: {error}")))
        os._exit(0)

    process = _FORK.Process(target=answer)
    process.start()
    theirs.close()
    try:
        return pickle.loads(ours.recv_bytes())
    finally:
        process.join()

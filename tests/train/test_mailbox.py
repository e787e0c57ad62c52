"""The two queues between a training loop and its controller."""

import threading

import pytest

from supple.core.types import (
    AbortGeneration,
    AnnounceGeneration,
    Event,
    FormGroup,
    JobId,
    KillWorker,
    Progress,
    SaveCheckpoint,
    StopWorker,
    WorkerFinished,
    WorkerId,
)
from supple.train.generation.mailbox import Mailbox

JOB, ME = JobId("job"), WorkerId("w1")


def form(generation: int) -> FormGroup:
    return FormGroup(
        job_id=JOB, generation=generation, members=(ME,), global_batch_size=None, restore=None
    )


def finished(step: int) -> WorkerFinished:
    return WorkerFinished(job_id=JOB, generation=1, worker_id=ME, step=step)


def progress(step: int) -> Progress:
    return Progress(
        generation=1,
        step=step,
        epoch=0,
        num_epochs=1,
        samples_done=8 * step,
        samples_total=None,
        num_workers=1,
        global_batch_size=8,
        lr=0.1,
        step_time_s=0.1,
        forward_time_s=0.0,
        backward_time_s=0.0,
        optimizer_time_s=0.0,
        sync_time_s=0.0,
        micro_batch_size=1,
        num_accumulation_steps=1,
        largest_micro_batch=1,
        num_nodes=1,
        most_per_node=1,
        data_time_s=0.0,
        noise_scale=None,
        efficiency=None,
        base_batch_size=8,
        base_lr=0.1,
        optimizer="SGD",
        gradient_bytes=4,
    )


def test_commands_are_taken_in_the_order_they_were_posted() -> None:
    mailbox = Mailbox()
    save = SaveCheckpoint(job_id=JOB, generation=1, worker_id=ME)
    stop = StopWorker(job_id=JOB, generation=1, worker_id=ME, reason="test")
    posted = [form(1), save, form(2), stop]
    for action in posted:
        mailbox.post(action)
    assert [mailbox.next_command() for _ in posted] == posted


def test_a_look_for_a_command_to_save_leaves_the_others_in_their_order() -> None:
    mailbox = Mailbox()
    save = SaveCheckpoint(job_id=JOB, generation=1, worker_id=ME)
    posted = [form(2), save, form(3)]
    for action in posted:
        mailbox.post(action)
    assert mailbox.take_save() is None
    assert mailbox.next_command() == form(2)
    assert mailbox.take_save() == save
    assert mailbox.next_command() == form(3)


def test_only_a_command_to_save_can_be_taken_by_another_thread() -> None:
    mailbox = Mailbox()
    assert mailbox.take_save() is None
    mailbox.post(form(1))
    assert mailbox.take_save() is None
    assert mailbox.next_command() == form(1)
    save = SaveCheckpoint(job_id=JOB, generation=1, worker_id=ME)
    mailbox.post(save)
    assert mailbox.take_save() == save
    assert mailbox.take_save() is None


def test_an_announcement_is_heard_without_taking_a_command_and_never_unheard() -> None:
    mailbox = Mailbox()
    assert not mailbox.heard_of_next(3)
    for generation in (5, 4):
        mailbox.post(AnnounceGeneration(job_id=JOB, generation=generation, members=(ME,)))
    assert mailbox.heard_of_next(4)
    assert not mailbox.heard_of_next(5)


def test_an_abort_holds_for_its_generation_and_all_before_it() -> None:
    mailbox = Mailbox()
    for generation in (5, 3):
        mailbox.post(AbortGeneration(job_id=JOB, generation=generation, members=(ME,)))
    assert [mailbox.is_aborted(generation) for generation in (4, 5, 6)] == [True, True, False]


def test_a_worker_told_to_stop_abandons_any_collective() -> None:
    mailbox = Mailbox()
    mailbox.post(StopWorker(job_id=JOB, generation=0, worker_id=ME, reason="test"))
    assert mailbox.is_aborted(99)


def test_every_event_is_collected_once_and_in_order_while_others_emit() -> None:
    mailbox = Mailbox()
    events = [finished(step) for step in range(200)]

    def emit() -> None:
        for event in events:
            mailbox.emit(event)

    thread = threading.Thread(target=emit)
    thread.start()
    found: list[Event] = []
    while len(found) < len(events):
        found += mailbox.collect(1.0)[0]
    thread.join()
    assert found == events
    assert mailbox.collect(0.0) == ([], None)


def test_an_event_ends_the_wait_at_once() -> None:
    mailbox = Mailbox()
    waiting = threading.Event()
    found: list[Event] = []

    def collect() -> None:
        waiting.set()
        found.extend(mailbox.collect(600.0)[0])

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    assert waiting.wait(30)
    mailbox.emit(finished(1))
    thread.join(30)
    assert found == [finished(1)]


def test_events_that_are_there_already_are_not_waited_for() -> None:
    mailbox = Mailbox()
    mailbox.emit(finished(1))
    found: list[Event] = []
    thread = threading.Thread(target=lambda: found.extend(mailbox.collect(600.0)[0]), daemon=True)
    thread.start()
    thread.join(30)
    assert found == [finished(1)]


def test_the_newest_progress_is_collected_once() -> None:
    mailbox = Mailbox()
    newest = progress(8)
    mailbox.publish(progress(7))
    mailbox.publish(newest)
    assert mailbox.collect(0.0) == ([], newest)
    assert mailbox.collect(0.0) == ([], None)


def test_what_is_not_for_workers_is_our_bug() -> None:
    with pytest.raises(TypeError, match="our bug: a worker was sent KillWorker"):
        Mailbox().post(KillWorker(job_id=JOB, generation=0, worker_id=ME, reason="test"))

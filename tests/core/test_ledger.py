"""The prover believes exact records, and names what is lost, doubled or missing in others."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.job.ledger import LedgerError, LedgerReport, prove, shard_ids
from tests.examples import examples

Record = dict


def read(generation: int, step: int, rank: int, ids: list, *, epoch: int = 0) -> Record:
    return {
        "kind": "read",
        "generation": generation,
        "step": step,
        "epoch": epoch,
        "rank": rank,
        "ids": ids,
    }


def begin(generation: int, start_step: int) -> Record:
    return {"kind": "generation", "generation": generation, "start_step": start_step}


def end(step: int) -> Record:
    return {"kind": "end", "step": step}


def two_generations() -> list[Record]:
    """Ten samples: two steps of two ranks, then one of three, after an abandoned one."""
    return [
        begin(1, 0),
        read(1, 0, 0, [0, 1]),
        read(1, 0, 1, [2, 3]),
        read(1, 1, 0, [4, 5]),
        read(1, 1, 1, [6, 7]),
        read(1, 2, 0, [8]),  # rank 1 died here: step 2 was abandoned
        begin(2, 2),
        read(2, 2, 0, [8]),
        read(2, 2, 1, [9]),
        end(3),
    ]


def proved(records: list[Record], *, size: int = 10, num_epochs: int = 1) -> LedgerReport:
    return prove(records, expected=range(size), num_epochs=num_epochs)


def test_a_history_that_used_every_sample_once_is_exact() -> None:
    report = proved(two_generations())
    assert report.is_exact
    assert report.samples_seen == 10
    assert (report.num_steps, report.num_generations, report.num_void_reads) == (3, 2, 1)
    assert str(report) == (
        "10 samples in 3 steps, 1 epochs and 2 generations; 1 read again: every sample exactly once"
    )


def test_lines_in_any_order_prove_the_same() -> None:
    records = two_generations()
    assert proved(records[::-1]) == proved(records)


def test_records_survive_json_lines_and_foreign_lines_are_ignored() -> None:
    lines = [json.dumps(record) for record in [*two_generations(), {"kind": "note"}]]
    assert proved([json.loads(line) for line in lines]).is_exact


@pytest.mark.parametrize("line", [1, 2, 3, 4, 7, 8])
def test_a_read_that_is_missing_is_a_loss(line: int) -> None:
    records = two_generations()
    missing = records.pop(line)
    report = proved(records)
    assert report.epochs[0].lost == tuple(missing["ids"])
    assert (report.doubled, report.is_exact) == (0, False)


def test_a_sample_fed_in_place_of_another_is_a_loss_and_a_double() -> None:
    records = two_generations()
    records[3] = read(1, 1, 0, [4, 3])
    report = proved(records)
    assert report.epochs[0].lost == (5,)
    assert report.epochs[0].doubled == (3,)
    assert "epoch 0 lost 1 (5); epoch 0 doubled 1 (3)" in str(report)


def test_a_sample_fed_by_two_ranks_in_one_step_is_doubled() -> None:
    records = [*two_generations(), read(2, 2, 2, [9])]
    assert proved(records).epochs[0].doubled == (9,)


def test_a_sample_fed_again_in_a_later_step_is_doubled() -> None:
    records = [record for record in two_generations() if record["kind"] != "end"]
    report = proved([*records, read(2, 3, 0, [0]), end(4)])
    assert report.epochs[0].doubled == (0,)


def test_an_index_beyond_the_dataset_is_unknown() -> None:
    report = proved([begin(1, 0), read(1, 0, 0, [0, 1, 2]), end(1)], size=2)
    assert report.epochs[0].unknown == (2,)
    assert (report.unknown, report.is_exact) == (1, False)


def test_a_step_that_was_committed_is_not_voided_by_the_next_generation() -> None:
    """Rank 1 died after the reduction: rank 0 committed step 1, and generation 2 begins at 2."""
    records = [
        begin(1, 0),
        read(1, 0, 0, [0]),
        read(1, 0, 1, [1]),
        read(1, 1, 0, [2]),
        read(1, 1, 1, [3]),
        begin(2, 2),
        read(2, 2, 0, [4, 5]),
        end(3),
    ]
    assert proved(records, size=6).is_exact


def test_going_back_to_a_checkpoint_voids_the_steps_after_it() -> None:
    records = [
        begin(1, 0),
        *(read(1, step, 0, [step]) for step in range(4)),
        begin(2, 4),
        read(2, 4, 0, [4]),
        begin(3, 2),
        *(read(3, step, 0, [2 * step - 2, 2 * step - 1]) for step in range(2, 4)),  # larger batches
        end(4),
    ]
    report = proved(records, size=6)
    assert report.is_exact
    assert report.num_void_reads == 3
    assert report.num_generations == 2


def test_a_generation_that_never_read_takes_no_step_from_others() -> None:
    records = [
        begin(1, 0),
        read(1, 0, 0, [0]),
        begin(2, 1),
        begin(3, 1),
        read(3, 1, 0, [1]),
        end(2),
    ]
    assert proved(records, size=2).is_exact


def test_where_a_generation_began_is_known_from_its_reads_alone() -> None:
    reads_only = [record for record in two_generations() if record["kind"] != "generation"]
    assert proved(reads_only) == proved(two_generations())


def test_what_was_read_for_steps_after_the_end_is_void() -> None:
    records = [begin(1, 0), read(1, 0, 0, [0, 1]), read(1, 1, 0, [0]), end(1)]
    report = proved(records, size=2)
    assert report.is_exact
    assert report.num_void_reads == 1


def test_every_epoch_is_counted_by_itself() -> None:
    records = [
        begin(1, 0),
        read(1, 0, 0, [0, 1], epoch=0),
        read(1, 1, 0, [1, 1], epoch=1),
        end(2),
    ]
    report = proved(records, size=2, num_epochs=2)
    assert [epoch.doubled for epoch in report.epochs] == [(), (1,)]
    assert [epoch.lost for epoch in report.epochs] == [(), (0,)]


def test_an_epoch_the_run_never_reached_is_lost_entirely() -> None:
    report = proved([begin(1, 0), read(1, 0, 0, [0, 1]), end(1)], size=2, num_epochs=2)
    assert report.epochs[1].lost == (0, 1)


def test_the_epoch_a_run_was_stopped_in_may_lack_samples_but_not_repeat_any() -> None:
    records = [begin(1, 0), read(1, 0, 0, [0, 1]), read(1, 1, 0, [1], epoch=1), end(2)]
    assert proved(records, size=2).is_exact
    again = [*records[:-1], read(1, 2, 0, [1], epoch=1), end(3)]
    assert proved(again, size=2).epochs[1].doubled == (1,)


def test_each_epoch_may_have_its_own_samples_and_a_sample_its_own_number_of_uses() -> None:
    wanted = [[0, 1, 1], [2, 2]]
    records = [
        begin(1, 0),
        read(1, 0, 0, [1, 1]),
        read(1, 1, 0, [0]),
        read(1, 2, 0, [2, 2], epoch=1),
        end(3),
    ]
    assert prove(records, expected=lambda epoch: wanted[epoch], num_epochs=2).is_exact
    wanted = [[0, 1], [2, 2, 2]]
    report = prove(records, expected=lambda epoch: wanted[epoch], num_epochs=2)
    assert [epoch.doubled for epoch in report.epochs] == [(1,), ()]
    assert [epoch.lost for epoch in report.epochs] == [(), (2,)]


def test_samples_of_shards_are_proved_by_name() -> None:
    records = [begin(1, 0), read(1, 0, 0, ["0:0", "0:1"]), read(1, 0, 1, ["1:0", "1:0"]), end(1)]
    report = prove(records, expected=shard_ids([2, 0, 1]), num_epochs=1)
    assert report.epochs[0].doubled == ("1:0",)
    assert report.epochs[0].lost == ("2:0",)
    assert report.epochs[0].unknown == ("1:0",)


def test_records_without_an_end_prove_nothing() -> None:
    with pytest.raises(LedgerError, match="no end"):
        proved(two_generations()[:-1])


def test_a_generation_that_began_twice_proves_nothing() -> None:
    with pytest.raises(LedgerError, match="generation 2 began at step 2 and at step 5"):
        proved([*two_generations(), begin(2, 5)])


@pytest.mark.parametrize("start", [0, 5])
def test_a_generation_that_did_not_read_from_its_start_proves_nothing(start: int) -> None:
    records = [record for record in two_generations() if record != begin(2, 2)]
    with pytest.raises(LedgerError, match=f"began at step {start}, but its first read"):
        proved([*records, begin(2, start)])


@settings(max_examples=examples(60))
@given(st.integers(1, 30), st.lists(st.booleans(), max_size=60), st.data())
def test_any_planted_loss_or_double_is_found(
    size: int, aborts: list[bool], data: st.DataObject
) -> None:
    """One sample a step, some steps first abandoned; then one committed read is changed."""
    records, generation = [begin(1, 0)], 1
    for step in range(size):
        if step < len(aborts) and aborts[step]:
            records.append(read(generation, step, 0, [step]))
            generation += 1
            records.append(begin(generation, step))
        records.append(read(generation, step, 0, [step]))
    records.append(end(size))
    assert proved(records, size=size).is_exact

    spoiled = data.draw(st.integers(0, size - 1))
    wrong = data.draw(st.integers(0, size - 1).filter(lambda other: other != spoiled or size == 1))
    committed = [r for r in records if r["kind"] == "read" and r["step"] == spoiled][-1]
    committed["ids"] = [spoiled, spoiled] if size == 1 else [wrong]
    report = proved(records, size=size)
    assert report.epochs[0].doubled == ((spoiled,) if size == 1 else (wrong,))
    assert report.epochs[0].lost == (() if size == 1 else (spoiled,))

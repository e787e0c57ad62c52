"""A busy machine, and what was assumed, are said in a line of a plan of a measured script."""

from dataclasses import replace

import pytest

from supple.core.planning.circumstances import assumed, busy, most_measured, repeats_apart
from tests.core.test_advisor import MEASURED

MOST = max(step.num_workers for step in MEASURED.steps)


def test_an_idle_machine_is_not_mentioned() -> None:
    assert busy(replace(MEASURED, num_cores=64, used_cores=2.0)) == ""
    assert busy(replace(MEASURED, num_cores=MOST, used_cores=0.2)) == ""


def test_other_processes_that_leave_too_few_cores_are() -> None:
    told = busy(replace(MEASURED, num_cores=MOST, used_cores=1.5))
    assert told.startswith(f"Busy machine: other processes used 1.5 of its {MOST} cores.")
    assert f"Nothing beyond the {MOST} workers measured is recommended" in told


def test_two_measurements_of_the_same_that_differ_are_too() -> None:
    first = MEASURED.steps[0]
    again = replace(first, step_time_s=2.5 * first.step_time_s)
    found = replace(MEASURED, steps=(*MEASURED.steps, again), num_cores=64)
    assert repeats_apart(found) == pytest.approx(2.5)
    assert "two measurements of the same differ by a factor of 2.5" in busy(found)


def test_the_most_measured_is_the_largest_count() -> None:
    assert most_measured(MEASURED) == MOST


def told(*, given: int | None = None, link: str | None = None, most: int = 8) -> str:
    return assumed(
        workers_per_node=given, interconnect=link, cores=2, link="ethernet-25", most=most
    )


def test_nodes_and_links_that_were_not_given_are_named_with_their_options() -> None:
    assert told() == (
        "Assumed: nodes of 2 workers, as many as this machine has cores (--workers-per-node), "
        "ethernet-25 between nodes (--interconnect)."
    )
    assert told(given=4) == "Assumed: ethernet-25 between nodes (--interconnect)."
    assert "--interconnect" not in told(link="efa-400")


def test_a_table_within_a_node_and_one_of_which_all_was_given_assume_nothing() -> None:
    assert told(most=2) == "" and told(given=8) == "" and told(given=4, link="efa-400") == ""

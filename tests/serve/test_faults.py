"""How much of a fault is told to whom, and how often."""

import importlib
import logging

import pytest

from supple.serve.models.faults import FaultLog, ModelFault, places, raised, user_traceback
from supple.serve.protocol.refusal import Refused, refuse
from supple.testing.faults import FakeClock


def test_a_line_a_second_is_written_and_says_how_many_were_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    log = FaultLog(logging.getLogger("faults of the test"), now=clock.now)
    fault = ModelFault("for the author", for_client="for the caller", where="where it was")
    numbers = [log.number(fault)]
    for _ in range(2):
        clock.advance(0.25)
        log.number(fault)
    clock.advance(0.5)
    numbers.append(log.number(fault))
    clock.advance(1.0)
    numbers.append(log.number(fault))
    assert [len(number) for number in numbers] == [8, 8, 8] and len({*numbers}) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"error {numbers[0]}: where it was",
        f"error {numbers[1]}: where it was (2 before it were not written)",
        f"error {numbers[2]}: where it was",
    ]


def test_a_fault_that_says_no_more_is_told_to_everybody_alike() -> None:
    fault = ModelFault("the words")
    assert (str(fault), fault.for_client, fault.where) == ("the words",) * 3
    fault = ModelFault("the words", for_client="less")
    assert (str(fault), fault.for_client, fault.where) == ("the words", "less", "less")


def deep(turns: int) -> None:
    if turns == 0:
        refuse("in the package")
    deep(turns - 1)


def test_the_authors_own_lines_are_told_the_last_of_them_and_none_of_this_package() -> None:
    with pytest.raises(Refused) as error:
        deep(20)
    found = places(error.value).split(" < ")
    assert found[0] == "Refused" and len(found) == 1 + 8
    assert all(place.endswith(" in deep") and __file__ in place for place in found[1:])
    text = user_traceback(error.value)
    assert "protocol.py" not in text and text.endswith("in the package")


def test_of_an_import_that_fails_no_line_of_pythons_own_is_told() -> None:
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module("not_there.at_all")
    fault = raised("it cannot be imported", error.value)
    assert "<frozen importlib" not in str(fault) + fault.where
    assert str(fault).startswith("it cannot be imported:\n")
    assert fault.for_client == "the model failed on this request"

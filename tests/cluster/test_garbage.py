"""The garbage collector looks seldom while a job runs, and as ever afterwards."""

import gc

import pytest

from supple.control.garbage import rare_collections


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_there_is_looked_at_again_afterwards_and_as_often_as_before(fails: bool) -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        with rare_collections():
            assert gc.get_freeze_count() > frozen
            assert gc.get_threshold()[0] > before[0]
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)

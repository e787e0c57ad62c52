"""A script's errors, told as its author wants them."""

import pytest
import torch

from supple.train.script import memory_advice, user_traceback


def raised(act) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()
    return caught.value


def test_memory_that_ran_out_comes_with_half_the_micro_batch() -> None:
    error = raised(lambda: torch.zeros(10**9, 10**6))
    assert "micro_batch_size=32" in memory_advice(error, 64)
    assert "One sample does not fit" in memory_advice(error, 1)
    assert "The model alone" in memory_advice(error, 0)


def test_an_accelerators_error_is_known_by_its_name() -> None:
    assert "micro_batch_size=4" in memory_advice(torch.OutOfMemoryError("CUDA out of memory"), 8)
    assert "micro_batch_size=4" in memory_advice(MemoryError(), 8)


def test_another_error_gets_no_advice_about_memory() -> None:
    assert memory_advice(ValueError("shapes differ"), 64) == ""
    assert memory_advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 64) == ""


def test_a_traceback_has_the_scripts_frames_and_the_message() -> None:
    def in_the_script() -> None:
        raise KeyError("label")

    told = user_traceback(raised(in_the_script))
    assert "in in_the_script" in told
    assert told.endswith("KeyError: 'label'")

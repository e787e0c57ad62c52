"""What a new version is refused for before a replica is touched; tried here, not in an actor."""

import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own
    from supple.cluster.services.replica import Deployment
    from supple.cluster.services.trial import _Trial

SOURCE = """
import numpy as np

class Model:
    inputs = {{"x": "float32[2]"}}
    outputs = {{"y": "float32[2]"}}
    {said}

    def predict(self, batch):
        return {answer}
"""


@pytest.fixture
def numbers(tmp_path: Path) -> Deployment:
    return version(tmp_path / "numbers.py", "batch")


@pytest.fixture
def nan(tmp_path: Path) -> Deployment:
    return version(tmp_path / "nan.py", "batch * np.nan")


def version(path: Path, answer: str, said: str = "") -> Deployment:
    path.write_text(SOURCE.format(answer=answer, said=said))
    return Deployment(target=f"{path}:Model", name="m", source=path.read_bytes())


def test_nan_on_zeros_is_refused_where_the_version_that_runs_answers_with_numbers(
    numbers: Deployment, nan: Deployment
) -> None:
    why = _Trial().why_not(nan, numbers)
    assert why is not None and "2 of 2 values that are NaN or infinite" in why
    assert why.endswith("The running version answers them with numbers.")


def test_nan_on_zeros_is_taken_where_the_version_that_runs_has_it_too(
    numbers: Deployment, nan: Deployment
) -> None:
    assert _Trial().why_not(nan, nan) is None
    assert _Trial().why_not(numbers, nan) is None
    assert _Trial().why_not(numbers, numbers) is None


def test_nan_on_zeros_is_taken_of_a_class_for_which_it_is_an_answer(
    tmp_path: Path, numbers: Deployment
) -> None:
    says_so = version(tmp_path / "says_so.py", "batch * np.nan", "allow_nan = True")
    assert _Trial().why_not(says_so, numbers) is None


def test_nan_on_zeros_is_taken_where_the_version_that_runs_cannot_be_loaded_any_more(
    tmp_path: Path, nan: Deployment
) -> None:
    assert _Trial().why_not(nan, version(tmp_path / "broken.py", "batch", "1 / 0")) is None

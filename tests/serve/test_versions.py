"""A version of a model is what its file was when it was deployed, and is rehearsed before it
serves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supple.serve.models.model import ModelFault, ServedModel, load_model

SOURCE = """
class Model:
    inputs = {"x": "float32[2]"}
    def load(self, weights=None):
        self.weights = weights
    def predict(self, batch):
        if (batch < 0).any():
            raise ValueError("negative")
        return batch * 2
"""


def test_a_model_is_made_of_the_source_it_is_handed_whatever_the_file_holds(
    tmp_path: Path,
) -> None:
    file = tmp_path / "app.py"
    file.write_text("this is no Python")
    model = load_model(f"{file}:Model", source=SOURCE.encode())
    assert (model.predict({"x": np.ones((1, 2), np.float32)})["output"] == 2).all()
    with pytest.raises(ModelFault) as fault:
        model.predict({"x": -np.ones((1, 2), np.float32)})
    assert 'raise ValueError("negative")' in str(fault.value), "its own lines, not the file's"


def test_weights_can_be_taken_back_to_none(tmp_path: Path) -> None:
    model = load_model(f"{tmp_path}/app.py:Model", source=SOURCE.encode(), weights="some")
    assert model.user.weights == "some"
    assert model.renewed(None).user.weights is None


class Divides:
    inputs = {"x": "float32[1]"}  # noqa: RUF012

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(self, batch: Any) -> Any:
        self.rows.append(len(batch))
        with np.errstate(invalid="ignore"):
            return batch / batch


def test_zeros_that_have_no_answer_are_no_fault_in_a_rehearsal_but_in_a_request() -> None:
    model = ServedModel(Divides(), name="m")
    model.rehearse(2)
    with pytest.raises(ModelFault, match="NaN"):
        model.predict({"x": np.zeros((1, 1), np.float32)})


def test_a_rehearsal_of_more_rows_than_the_model_takes_or_of_inputs_it_does_not_tell_is_none() -> (
    None
):
    user = Divides()
    model = ServedModel(user, name="m")
    model.max_batch = 1
    model.rehearse(2)
    user.inputs = {"x": "float32[1]", "text": "bytes[]"}
    ServedModel(user, name="m").rehearse(1)
    assert user.rows == []


def test_a_rehearsal_finds_an_answer_whose_rows_are_not_the_batchs() -> None:
    class Constant:
        inputs = {"x": "float32[1]"}  # noqa: RUF012

        def predict(self, batch: Any) -> Any:
            return np.zeros((1, 3), np.float32)

    model = ServedModel(Constant(), name="m")
    model.rehearse(1)
    with pytest.raises(ModelFault, match="batch of 2"):
        model.rehearse(2)

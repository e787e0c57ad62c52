"""The user's class: found, loaded, and every fault of it said in words."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supple.core.spec import SpecError
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel, check_target, declared, load_model
from supple.serve.models.tensor_spec import parse_tensor
from supple.serve.protocol.refusal import Refused


class Doubles:
    inputs = {"x": "float32[2]"}  # noqa: RUF012
    max_batch = 8

    def predict(self, batch: Any) -> Any:
        return batch * 2


class Answers:
    """Answers whatever it is told to."""

    outputs = {"y": "float32[1]"}  # noqa: RUF012

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def predict(self, batch: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def rows(count: int) -> dict[str, Any]:
    return {"x": np.ones((count, 2), dtype=np.float32)}


def served(user: Any) -> ServedModel:
    return ServedModel(user, name="m")


def test_one_input_is_handed_as_an_array() -> None:
    answer = served(Doubles()).predict(rows(3))
    assert answer["output"].tolist() == [[2.0, 2.0]] * 3


def test_several_inputs_are_handed_by_name() -> None:
    class Adds:
        inputs = {"a": "int64[]", "b": "int64[]"}  # noqa: RUF012
        outputs = {"sum": "int64[]"}  # noqa: RUF012

        def predict(self, batch: dict[str, Any]) -> Any:
            return batch["a"] + batch["b"]

    column = np.asarray([1, 2])
    assert served(Adds()).predict({"a": column, "b": column})["sum"].tolist() == [2, 4]


def test_a_predict_that_names_torch_is_handed_tensors_it_may_write_to() -> None:
    class Writes:
        def predict(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.add_(1)

    read_only = np.frombuffer(b"\0" * 8, dtype=np.float32).reshape(1, 2)
    assert served(Writes()).predict({"x": read_only})["output"].tolist() == [[1.0, 1.0]]
    assert read_only.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"z": np.ones((1, 2), np.float32)}, "the model takes x; the request has z"),
        ({"x": np.ones((1, 3), np.float32)}, "input 'x' is FP32[1, 3]; the model takes FP32[n, 2]"),
        ({"x": np.ones((1, 2))}, "is FP64[1, 2]; the model takes FP32[n, 2]"),
        (rows(9), "9 rows in one request; the model takes 1 to 8"),
        (rows(0), "0 rows"),
    ],
)
def test_a_request_the_model_does_not_take_is_refused(inputs: Any, told: str) -> None:
    with pytest.raises(Refused) as refusal:
        served(Doubles()).check(inputs)
    assert told in str(refusal.value) and refusal.value.status == 400


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (np.ones((3, 1), np.float32), "shape [3, 1] for a batch of 2"),
        (np.float32(1), "shape [] for a batch of 2"),
        (np.ones((2, 2), np.float32), "the class declares FP32[n, 1]"),
        (np.ones((2, 1)), "float64[2, 1]; the class declares FP32[n, 1]"),
        ({"z": np.ones((2, 1), np.float32)}, "returned z; the class declares y"),
        (np.asarray([[1.0], [np.nan]], np.float32), "1 of 2 values that are NaN or infinite"),
        (np.ones((2, 1), np.complex64), "complex64, which the protocol cannot carry"),
        (None, "shape [] for a batch of 2"),
        ([None, None], "object"),
        (ValueError("no such digit"), "ValueError: no such digit"),
    ],
)
def test_a_wrong_answer_is_a_fault_told_with_its_numbers(answer: Any, told: str) -> None:
    with pytest.raises(ModelFault) as fault:
        served(Answers(answer)).predict(rows(2))
    assert told in str(fault.value)


def test_nan_is_an_answer_where_the_class_says_so() -> None:
    user = Answers(np.full((2, 1), np.nan, np.float32))
    user.allow_nan = True  # type: ignore[attr-defined]
    assert np.isnan(served(user).predict(rows(2))["y"]).all()


@pytest.mark.parametrize("name", ["SystemExit", "asyncio.CancelledError", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["__init__", "load"])
def test_a_model_that_ends_its_process_while_it_is_made_is_at_fault(
    tmp_path: Path, name: str, where: str
) -> None:
    method = f"def {where}(self): raise {name}('the end')"
    predict = "def predict(self, batch): return batch"
    app = written(tmp_path, f"import asyncio\nclass Model:\n    {method}\n    {predict}\n")
    with pytest.raises(ModelFault, match="the end"):
        load_model(f"{app}:Model")


def test_a_model_that_ends_its_process_when_it_is_made_anew_is_at_fault() -> None:
    class Once:
        made = 0

        def __init__(self) -> None:
            Once.made += 1
            if Once.made > 1:
                raise SystemExit("the end")

        def predict(self, batch: Any) -> Any:
            return batch

    with pytest.raises(ModelFault, match="the end"):
        ServedModel(Once(), name="m").renewed(None)


def test_the_traceback_shows_the_users_lines_only(tmp_path: Path) -> None:
    app = written(tmp_path, "class Model:\n    def predict(self, batch):\n        return 1 / 0\n")
    with pytest.raises(ModelFault) as fault:
        load_model(f"{app}:Model").predict(rows(1))
    assert "app.py" in str(fault.value) and "serve/models/model.py" not in str(fault.value)


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("", "app.py", "names no class"),
        ("", "other.py:Model", "does not exist"),
        ("class Model", "app.py:Model", "not valid Python: line 1"),
        ("class Models: ...", "app.py:Model", "no class Model. Did you mean app.py:Models?"),
        ("class Model: ...", "app.py:Model", "has no predict(self, batch)"),
    ],
)
def test_a_target_is_refused_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, told: str
) -> None:
    written(tmp_path, source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as refusal:
        check_target(target)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        ("raise OSError('no weights')", ModelFault, "OSError: no weights"),
        ("self.max_batch = 0", SpecError, "max_batch of Model is 0"),
        ("self.inputs = ['x']", SpecError, "inputs of Model must be a dict"),
        ("self.inputs = {'x': 'floaty[3]'}", SpecError, "inputs['x'] of Model is 'floaty[3]'"),
    ],
)
def test_a_model_that_cannot_be_made_says_why(
    tmp_path: Path, body: str, error: type[Exception], told: str
) -> None:
    source = f"class Model:\n  def __init__(self):\n    {body}\n  def predict(self, batch): ..."
    with pytest.raises(error) as raised:
        load_model(f"{written(tmp_path, source)}:Model")
    assert told in str(raised.value)


def test_a_load_that_raises_is_told_with_its_traceback(tmp_path: Path) -> None:
    source = """
        class Model:
            def load(self):
                raise FileNotFoundError("weights.pt")

            def predict(self, batch): ...
    """
    with pytest.raises(ModelFault, match=r"load\(\) of Model raised(?s:.*)weights.pt"):
        load_model(f"{written(tmp_path, source)}:Model")


def test_a_tensor_is_written_as_dtype_and_row_shape() -> None:
    assert parse_tensor("float32[3, -1]", what="x") == (np.dtype(np.float32), (3, -1))
    assert parse_tensor("bytes[]", what="x") == (np.dtype(object), ())


def written(folder: Path, source: str) -> Path:
    path = folder / "app.py"
    path.write_text(textwrap.dedent(source))
    return path


def test_what_a_class_declares_is_read_without_running_it(tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.write_text(
        "raise SystemExit\nclass Model:\n    retry_safe: bool = False\n    other = 3\n"
        "    def predict(self, batch): ...\n"
    )
    target = f"{file}:Model"
    assert declared(target, "retry_safe", True) is False
    assert declared(target, "other", None) == 3
    assert declared(target, "absent", "default") == "default"

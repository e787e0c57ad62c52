"""A program saved by torch.export is served as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supple.core.spec import SpecError
from supple.serve.models.model import check_target, load_model

# torch's own exporter and loader
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Adds(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        return a + b, (a * b).sum(1)


def saved(folder: Path, rows: int, *, dynamic: bool) -> str:
    example = (torch.ones(rows, 3), torch.ones(rows, 3))
    batch = {0: torch.export.Dim("batch")}
    shapes = {"a": batch, "b": batch} if dynamic else None
    path = str(folder / "adds.pt2")
    torch.export.save(torch.export.export(Adds(), example, dynamic_shapes=shapes), path)
    return path


@pytest.mark.slow
def test_a_saved_program_says_its_inputs_and_answers_any_batch(tmp_path: Path) -> None:
    path = saved(tmp_path, 2, dynamic=True)
    assert check_target(path) == (path, "")
    model = load_model(path)
    assert model.name == "adds" and model.max_batch == 64
    assert [str(spec) for spec in model.inputs] == ["FP32[n, 3]", "FP32[n, 3]"]
    a, b = (np.full((5, 3), value, np.float32) for value in (2, 3))
    outputs = model.predict({"b": b, "a": a})
    assert (outputs["output"] == 5).all() and outputs["output_1"].tolist() == [18.0] * 5


@pytest.mark.slow
def test_a_program_for_one_row_is_served_row_by_row(tmp_path: Path) -> None:
    assert load_model(saved(tmp_path, 1, dynamic=False)).max_batch == 1


@pytest.mark.slow
def test_a_program_for_one_batch_size_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"exactly 4 rows. Export with dynamic_shapes"):
        load_model(saved(tmp_path, 4, dynamic=False))


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(SpecError, match="is not a program of this torch"):
        load_model(str(path))

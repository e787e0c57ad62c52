"""A model by its sizes in a TOML file: which table, which keys, and what a value may be."""

from pathlib import Path
from typing import Any

import pytest

from supple.core.spec import SpecError
from supple.inputs.model_file import ModelTable, read_model, table_of


def table(**values: Any) -> ModelTable:
    return ModelTable("m.toml [train]", values)


@pytest.mark.parametrize("value", [True, False, 1.5, "1.5", "nan", "", [1], None, {"a": 1}])
def test_a_whole_number_is_none_of_these(value: Any) -> None:
    with pytest.raises(SpecError, match=r"\[train\]: layers is .*: give a whole number"):
        table(layers=value).whole("layers")


@pytest.mark.parametrize(("value", "whole"), [(32, 32), ("4K", 4_000), ("1.5K", 1_500), ("7", 7)])
def test_a_whole_number_is_written_as_one_or_as_an_amount(value: Any, whole: int) -> None:
    assert table(layers=value).whole("layers") == whole


@pytest.mark.parametrize("value", [True, "1", [1.0]])
def test_a_number_is_none_of_these(value: Any) -> None:
    with pytest.raises(SpecError, match=r"lr is .*: give a number"):
        table(lr=value).number("lr")


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
def test_a_word_is_none_of_these(value: Any) -> None:
    with pytest.raises(SpecError, match=r"optimizer is .*: give a word in quotes"):
        table(optimizer=value).text("optimizer")


def test_a_key_that_is_not_there_has_the_default() -> None:
    assert table().whole("seq", 2048) == 2048
    assert table().number("prompt", 500.0) == 500.0
    assert table().text("attention", "flash") == "flash"
    assert (table().whole("seq"), table().number("lr"), table().text("activated")) == (None,) * 3


def test_a_file_is_read_whatever_wrote_it_and_a_name_chooses_among_its_tables(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(b'\xef\xbb\xbf[serve]\r\nparameters = "8B"\r\n')
    assert table_of(path, "") == table_of(path, "serve") == "serve"
    assert read_model(path, "serve").values == {"parameters": "8B"}
    with pytest.raises(SpecError, match=r"\[train\] was requested, and the file has \[serve\]"):
        table_of(path, "train")

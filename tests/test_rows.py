"""CSV files that users hand over: every cell is read where it stands, or refused with its line."""

from pathlib import Path

import pytest

from supple.core.spec import SpecError
from supple.inputs.rows import Row, parse_gigabytes, read_rows


def rows(folder: Path, text: str | bytes) -> list[Row]:
    path = folder / "ran.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(path, ("a", "b"), what="--measured", besides="nothing more")


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(SpecError) as told:
        rows(folder, text)
    return str(told.value)


def test_lines_are_counted_as_an_editor_does_over_blank_lines_and_quoted_newlines(
    tmp_path: Path,
) -> None:
    found = rows(tmp_path, '\n a ,b,note\n\n1,2,"two\nlines"\n  \n,,\n3,4,\n')
    assert [row.where.rpartition(" ")[2] for row in found] == ["4", "8"]
    assert [row.number("b") for row in found] == [2.0, 4.0]


@pytest.mark.parametrize("cells", ["1,2,3", "1", "1,2,,3", '1,"2'])
def test_a_row_with_a_cell_too_many_or_too_few_is_refused_with_its_line(
    tmp_path: Path, cells: str
) -> None:
    told = refused(tmp_path, f"a,b\n5,6\n\n{cells}\n")
    assert "ran.csv, line 4: " in told
    assert "header 2" in told or "Check its quotes" in told


def test_empty_cells_at_the_end_as_spreadsheets_write_them_are_no_cells(tmp_path: Path) -> None:
    for text in ("a,b,,\n1,2,,,\n", "a,b,\n1,2\n"):
        (row,) = rows(tmp_path, text)
        assert dict(row.cells) == {"a": "1", "b": "2"}


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    assert "more than one column b: " in refused(tmp_path, "a,b,b\n1,2,3\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n\n", "has a header and no rows"),
        ("", "is empty: it needs a, b, and nothing more"),
        ("\n,,\n", "is empty"),
        ("a,c\n1,2\n", "has no column b: it needs a, b"),
        ("a;b\n1;2\n", "Separate the columns with commas."),
        ("a,b\n1,é\n".encode("latin-1"), "not text in UTF-8"),
    ],
)
def test_a_file_without_rows_or_columns_is_told_which_of_both(
    tmp_path: Path, text: str | bytes, told: str
) -> None:
    assert told in refused(tmp_path, text)


def test_a_file_that_cannot_be_opened_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot be read: Is a directory\. Give a CSV file"):
        read_rows(tmp_path, ("a",), what="--measured", besides="nothing more")


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("fast", "a is 'fast': not a number, such as 1250 or 0.5. Correct the line, or delete it."),
        ('"1,5"', "a is '1,5': not a number"),
        ("-1", "a is -1: it must be positive and finite. Correct"),
        ("inf", "a is inf: it must be positive and finite"),
        ("nan", "a is nan: it must be positive and finite"),
        ("1e300", "a is 1e300: it must be at most 1,000,000,000,000,000"),
        ("", "a is empty. Fill it in, or delete the line."),
    ],
)
def test_a_cell_that_is_no_number_is_told_with_line_column_text_and_remedy(
    tmp_path: Path, cell: str, told: str
) -> None:
    (row,) = rows(tmp_path, f"a,b\n{cell},2\n")
    with pytest.raises(SpecError) as error:
        row.number("a")
    assert str(error.value).startswith(f"--measured {tmp_path / 'ran.csv'}, line 2: {told}")


def test_columns_are_named_in_any_case(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "A,B\n8,2\n")
    assert (row.number("a"), row.number("b")) == (8.0, 2.0)
    assert "more than one column a" in refused(tmp_path, "a,A,b\n1,2,3\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80", 80e9), ("80GB", 80e9), ("0.5 gb", 5e8), (" 80 GiB", 80 * 2**30), ("8e1", 80e9)],
)
def test_gigabytes_are_read_with_and_without_their_unit(text: str, size: float) -> None:
    assert parse_gigabytes(text, what="--memory") == size


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("80TB", "--memory is '80TB': not a number of gigabytes. Give one such as 80, 80GB or"),
        ("", "--memory is '': not a number"),
        ("-1GB", "--memory is -1GB: it must be above 0 and at most 10,000 GB"),
        ("nan", "--memory is nan: it must be above 0"),
        ("9.9e3GiB", "--memory is 9.9e3GiB: it must be above 0 and at most 10,000 GB"),
    ],
)
def test_what_is_no_memory_of_an_accelerator_is_refused(text: str, told: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_gigabytes(text, what="--memory")
    assert str(error.value).startswith(told)


def test_a_count_is_a_whole_number_however_it_is_written(tmp_path: Path) -> None:
    one, half, many = rows(tmp_path, "a,b\n8.0,1\n2.5,1\n70000,1\n")
    assert one.count("a") == 8
    with pytest.raises(SpecError, match=r"line 3: a is 2\.5: it must be a whole number"):
        half.count("a")
    with pytest.raises(SpecError, match=r"line 4: a is 70000: it must be at most 65,536"):
        many.count("a")

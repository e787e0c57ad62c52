"""Traces of arrivals: read as they come, or refused with their line."""

from pathlib import Path

import pytest

from supple.core.spec import SpecError
from supple.inputs.arrivals import read_trace


def test_a_trace_may_be_bare_numbers_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "bare.csv").write_text("7.5\n5\n\n6\n")
    assert read_trace(tmp_path / "bare.csv").tolist() == [0.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no request"),
        ("arrival_s\n", "no request"),
        ("time\n1\n", "none is arrival_s"),
        ("\ufeffarrival_s\n1\n\nsoon\n", "line 4: 'soon'"),
        ("arrival_s\n1\nnan\n", "line 3: 'nan'"),
        ("a,arrival_s\n1\n", "line 2: ''"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SpecError, match=said):
        read_trace(tmp_path / "bad.csv")


def test_bytes_that_are_no_text_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SpecError, match="it is no CSV in UTF-8"):
        read_trace(tmp_path / "bytes.csv")

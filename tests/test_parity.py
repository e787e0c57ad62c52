"""The README's comparison with plain PyTorch is what the command prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_two_workers_equal_plain_pytorch_bit_for_bit_as_the_readme_shows() -> None:
    command = [sys.executable, "benchmarks/parity.py", "--script", "mlp"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed, shown = (
        re.sub(r"\d\.\de[-+]\d\d", "#", text)
        for text in (ran.stdout.strip(), (ROOT / "README.md").read_text(encoding="utf-8"))
    )
    assert printed.endswith("half-batches:  equal, bit for bit")
    assert printed in shown

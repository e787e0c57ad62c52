"""The law of the design, enforced: core decides and touches nothing; nobody imports upwards."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
SOURCES = sorted((SOURCE / "supple").rglob("*.py"))
CORE = sorted((SOURCE / "supple" / "core").rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in CORE
]

ALLOWED = {
    *("abc", "bisect", "collections", "copy", "dataclasses", "decimal", "difflib", "enum"),
    *(
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "ipaddress",
        "itertools",
        "json",
        "math",
        "numbers",
    ),
    *("operator", "re", "statistics", "string", "struct", "textwrap", "types", "typing"),
    *("numpy", "scipy", "immutables", "supple"),
}
"""What core may import; one more pure module of the standard library may be added."""
TOUCHES = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
SEEDED = {"Generator", "default_rng", "Philox", "PCG64", "SeedSequence", "BitGenerator"}
"""Of `numpy.random`: what draws from a state that it was handed."""
FILES = {
    *("numpy.load", "numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.memmap"),
    *("numpy.fromfile", "numpy.loadtxt", "numpy.savetxt", "numpy.genfromtxt", "numpy.fromregex"),
    *("numpy.DataSource", "numpy.lib.npyio", "numpy.lib.format", "scipy.io", "scipy.datasets"),
}
"""Of numpy and scipy: what opens files."""
WRITES = {"tofile"}
"""The same of an array's methods."""
HEAVY = {"torch", "ray", "matplotlib", "rich", "typer", "tensorboard"}


def impurities(source: str) -> list[str]:
    """What in `source` reaches outside: a module, a built-in, or of numpy its hidden random state
    and its files."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases):
                names = [f"{module}.{alias.name}" for alias in aliases]
            case ast.Attribute():
                full = re.sub(r"^np\b", "numpy", ast.unparse(node))
                drawn = full.startswith("numpy.random.")
                names = [full] if drawn or full in FILES or node.attr in WRITES else []
            case ast.Call(func=function, args=[], keywords=[]) if "default_rng" in ast.unparse(
                function
            ):
                found.append(f"line {node.lineno}: default_rng() without a seed")
                continue
            case ast.Name(id=name) if name in TOUCHES:
                found.append(f"line {node.lineno}: {name}")
                continue
            case _:
                continue
        found += [f"line {node.lineno}: {name}" for name in names if not is_pure(name)]
    return found


def is_pure(name: str) -> bool:
    """May core use what has this full name?"""
    if (
        any(f"{name}.".startswith(f"{file}.") for file in FILES)
        or name.rpartition(".")[2] in WRITES
    ):
        return False
    if name == "numpy.random" or name.startswith("numpy.random."):
        return name.removeprefix("numpy.random").removeprefix(".").partition(".")[0] in SEEDED
    return name.partition(".")[0] in ALLOWED


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_of_core_reaches_no_clock_file_thread_or_hidden_randomness(path: Path) -> None:
    assert impurities(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "def f():\n    import torch",
        "from datetime import datetime",
        "import os.path",
        "import random",
        "open('x')",
        "def f():\n    print(1)",
        "import numpy as np\nnp.random.rand()",
        "import numpy as np\nnp.random.default_rng()",
        "from numpy.random import default_rng\ndefault_rng()",
        "from numpy.random import rand",
        "from numpy import random",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.save('x', [1])",
        "import numpy\nnumpy.fromfile('x')",
        "import numpy as np\nnp.memmap('x')",
        "import numpy as np\nnp.savetxt('x', [1])",
        "import numpy as np\nnp.loadtxt('x')",
        "import numpy as np\nread = np.genfromtxt",
        "import numpy as np\nnp.lib.format.open_memmap('x')",
        "import numpy as np\nnp.ones(3).tofile('x')",
        "from numpy import load",
        "from numpy.lib.npyio import DataSource",
        "import scipy.io",
        "from scipy import io",
    ],
)
def test_the_walk_finds_what_it_is_for(source: str) -> None:
    assert len(impurities(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.random.default_rng(3)",
        "import numpy as np\nnp.frombuffer(b'12345678')",
        "import math\nfrom json import dumps",
        "from scipy import optimize",
        "load.save()",
    ],
)
def test_the_walk_lets_pure_code_be(source: str) -> None:
    assert impurities(source) == []


def test_importing_supple_and_all_of_core_loads_neither_torch_nor_ray() -> None:
    probe = (
        "import importlib, sys\n"
        f"for module in {['supple', *MODULES]}:\n"
        "    importlib.import_module(module)\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"    assert not loaded & {HEAVY}, (module, loaded & {HEAVY})"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_folder_with_python_files_is_a_package_which_the_import_contract_sees() -> None:
    folders = {path.parent for path in SOURCES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_layers_of_the_import_contract_leave_no_file_or_folder_out() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [found for found in contracts["contracts"] if found["type"] == "layers"]
    assert contracts["root_package"] == "supple"
    assert [found["containers"] for found in layers] == [["supple"], ["supple.core"]]
    for found in layers:
        assert found["exhaustive"] and "exhaustive_ignores" not in found
        assert "ignore_imports" not in found


def test_the_import_contract_holds() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout

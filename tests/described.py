"""Models described in a TOML file, for tests of `supple plan model.toml`."""

import tempfile
from pathlib import Path

from supple.inputs.model_file import SERVE, TRAIN


def toml(table: str, values: dict[str, str]) -> str:
    """A file's text: numbers bare, all else in quotes."""

    def written(value: str) -> str:
        try:
            float(value)
        except ValueError:
            return f'"{value}"'
        return value if "e" not in value or "." in value else f"{float(value)!r}"

    lines = [f"{key} = {written(value)}" for key, value in values.items()]
    return "\n".join([f"[{table}]", *lines, ""])


def split(table: str, arguments: str) -> tuple[dict[str, str], list[str]]:
    """The keys of the table among `--key value` arguments (the last one counts), and the rest."""
    keys = {"train": TRAIN, "serve": SERVE}[table]
    words, values, rest = arguments.split(), dict[str, str](), list[str]()
    while words:
        word = words.pop(0)
        key = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and key in keys:
            values[key] = words.pop(0)
        else:
            rest.append(word)
    return values, rest


def described(table: str, arguments: str) -> list[str]:
    """Arguments of `supple`: a plan for a file with the keys of the table among `arguments`, and
    the others as options. Help and subjects of their own stay what they are."""
    values, rest = split(table, arguments)
    if not values:
        return ["plan", *rest]
    folder = Path(tempfile.mkdtemp())
    path = folder / "model.toml"
    path.write_text(toml(table, values))
    return ["plan", str(path), *rest]

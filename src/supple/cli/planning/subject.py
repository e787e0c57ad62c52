"""What `supple plan` is asked about, by its name, and which options it takes for that."""

import ast
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar, final

from supple.cli.errors import file_of
from supple.core.spec import SpecError
from supple.train.start.script import Start


class Kind(Enum):
    """A kind of subject, and what it is called."""

    SCRIPT = "a script, measured here"
    MEMORY = "the memory of a script on an accelerator that is not here (--memory alone)"
    ELSEWHERE = "a script on an accelerator that is not here (--accelerator)"
    TRAINED = "a transformer to train, [train] of a .toml"
    LANGUAGE_MODEL = "a language model to serve, [serve] of a .toml or a config.json"
    SERVED = "a model to serve, FILE:CLASS or a .pt2"
    RUNS = "finished runs, a .csv"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked, as it was typed; None for what was not."""

    subject: str
    arguments: tuple[str, ...] | None
    max_workers: str | None
    deadline: str | None
    budget: str | None
    price: str | None
    interconnect: str | None
    local_link: str | None
    workers_per_node: str | None
    accelerator: str | None
    memory_size: str | None
    optimizer: str | None
    batch: str | None
    lr_rule: str | None
    measure_workers: str | None
    measured: Path | None
    history: Path | None
    probes: Path | None
    counts: str | None
    batch_size: str | None
    slo: str | None
    rate: float | None
    itl: str | None
    lengths: str | None
    again: bool | None
    plot: Path | None
    as_json: bool
    verbose: bool


_S, _A, _E, _T, _L, _M, _R = (
    Kind.SCRIPT,
    Kind.MEMORY,
    Kind.ELSEWHERE,
    Kind.TRAINED,
    Kind.LANGUAGE_MODEL,
    Kind.SERVED,
    Kind.RUNS,
)
_FOR: dict[str, tuple[Kind, ...]] = {
    "arguments": (_S, _A, _E),
    "max_workers": (_S, _E, _T, _L, _M),
    "deadline": (_S, _E, _T, _R),
    "budget": (_S, _E, _T, _R),
    "price": (_S, _E, _T, _L, _M, _R),
    "plot": (_S, _E, _T, _L, _M, _R),
    "interconnect": (_S, _E, _T),
    "local_link": (_E, _T),
    "workers_per_node": (_S, _E, _T, _L),
    "accelerator": (_E, _T, _L),
    "memory_size": (_A, _E, _T),
    "optimizer": (_A, _E),
    "batch": (_S, _E, _T),
    "lr_rule": (_S,),
    "measure_workers": (_S,),
    "measured": (_T, _L),
    "history": (_S, _E, _T, _R),
    "probes": (_S, _E, _T),
    "counts": (_R,),
    "batch_size": (_R,),
    "slo": (_M,),
    "rate": (_L, _M),
    "itl": (_L,),
    "lengths": (_M,),
    "again": (_M,),
}
"""The kinds that an option means something for."""
_FLAGS = {"memory_size": "--memory", "arguments": "--"}
T = TypeVar("T")


def otherwise(value: T | None, default: T) -> T:
    """`value`, or `default` where none was given. An empty text was given."""
    return default if value is None else value


def kind_of(question: Question) -> tuple[Kind, str, str]:
    """The kind of the subject, its path, and the function, class or table in it ("" for the one
    there is). Raises `SpecError` for options that mean nothing for it."""
    path, colon, name = question.subject.rpartition(":")
    if not colon or not name.isidentifier():  # a colon of the path itself
        path, name = question.subject, ""
    path, _ = file_of(path)
    kind = _kind(question, path, name)
    for option, kinds in _FOR.items():
        if getattr(question, option) is not None and kind not in kinds:
            flag = _FLAGS.get(option, "--" + option.replace("_", "-"))
            raise SpecError(
                f"{flag} was given, and {question.subject} is {kind.value}: {flag} is for "
                f"{'; or for '.join(each.value for each in kinds)}. Leave it out."
            )
    return kind, path, name


def start_of(question: Question) -> Start:
    """How the script that is the subject is started."""
    path, colon, name = question.subject.rpartition(":")
    _, module = file_of(path if colon and name.isidentifier() else question.subject)
    return Start(arguments=question.arguments or (), module=module)


def _kind(question: Question, path: str, name: str) -> Kind:
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        if name:
            raise SpecError(f"{path}:{name}: finished runs have no parts. Give {path} alone.")
        return Kind.RUNS
    if suffix in (".toml", ".json"):
        return Kind.LANGUAGE_MODEL if _table(path, name) == "serve" else Kind.TRAINED
    if suffix == ".pt2" or (name and _is_class(path, name)):
        return Kind.SERVED
    if question.accelerator is not None:
        return Kind.ELSEWHERE
    return Kind.SCRIPT if question.memory_size is None else Kind.MEMORY


def _table(path: str, name: str) -> str:
    from supple.inputs.model_file import table_of

    return table_of(Path(path), name)


def _is_class(path: str, name: str) -> bool:
    """Whether what the file defines last by this name is a class; where it defines nothing of this
    name, or cannot be read, whether the name is written as one."""
    try:
        body = ast.parse(Path(path).read_bytes()).body if Path(path).is_file() else []
    except (OSError, ValueError, SyntaxError):
        body = []
    for node in reversed(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return isinstance(node, ast.ClassDef)
    return name[:1].isupper()

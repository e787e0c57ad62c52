"""The user's model: found, loaded, and every answer of it checked before it is sent.

A model is a class with `load()` and `predict(batch)`; with `load(weights=None)` its weights can be
swapped while it serves. `batch` is one array, or a dict of arrays by input name if the class names
several inputs; rows are the first dim. It is handed torch tensors if `predict` is annotated with
`torch.Tensor`, numpy arrays otherwise. What it may say of itself:

    inputs = {"pixels": "float32[64]"}    # one row: dtype and shape, -1 for any length
    outputs = {"digit": "int64[]"}        # checked if given
    max_batch = 32                        # rows of one call, default 64
    allow_nan = True                      # NaN and infinity are answers, not faults
    retry_safe = False                    # a request may not be computed or sent twice

Where the rows of an output differ in length, it is declared with a -1 and returned as a list, a
tensor for each row.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from supple.core.spec import SpecError
from supple.serve.models.answers import AnswerCheck, Outputs
from supple.serve.models.faults import ModelFault, raised, user_traceback
from supple.serve.models.tensor_spec import specs
from supple.serve.protocol.rest import DATATYPES, Array, refuse
from supple.serve.streams import Leaving, in_this_thread

_MODULE = "supple_user_model"
_DEFAULT_MAX_BATCH = 64


def check_target(target: str) -> tuple[str, str]:
    """`"app.py:Model"` as (path, class), read without running it; the path of a saved program
    as (path, ""). Raises `SpecError`."""
    if target.lower().endswith(".pt2"):
        if Path(target).is_file():
            return target, ""
        what = "is no ordinary file" if Path(target).exists() else "does not exist"
        raise SpecError(f"the saved program {target} {what}. Give another.")
    path, class_name = split_target(target)
    if not class_name.isidentifier():
        raise SpecError(
            f"{target or repr(target)} names no class. Give FILE:CLASS, as in app.py:Model, or a "
            "saved .pt2."
        )
    advice = "Give FILE:CLASS, as in app.py:Model."
    try:
        source = Path(path).read_bytes() if path and Path(path).is_file() else None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"the file {path} cannot be read: {why}. {advice}") from None
    if source is None:
        what = "is a folder" if path and Path(path).is_dir() else "does not exist"
        raise SpecError(f"the file {path or repr(path)} {what}. {advice}")
    try:
        tree = ast.parse(source, filename=path)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        why = error.msg if isinstance(error, SyntaxError) else error
        raise SpecError(f"{path} is not valid Python: {where}{why}.") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    if class_name in imported:
        return path, class_name
    if class_name not in classes:
        near = difflib.get_close_matches(class_name, classes, n=1) or list(classes)[:1]
        hint = f" Did you mean {path}:{near[0]}?" if near else ""
        raise SpecError(f"{path} has no class {class_name}.{hint}")
    node = classes[class_name]
    methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)}
    if not node.bases and "predict" not in methods:
        raise SpecError(f"{class_name} in {path} has no predict(self, batch), which answers.")
    return path, class_name


def split_target(target: str) -> tuple[str, str]:
    """`"app.py:Model"` as (path, class); the class is empty where none is named."""
    path, colon, class_name = target.rpartition(":")
    return (path, class_name) if colon else (target, "")


def declared(target: str, attribute: str, default: Any) -> Any:
    """The literal value the class of `target` gives `attribute`, read without running it; `default`
    if it gives none in its own body. Raises `SpecError` as `check_target` does."""
    path, class_name = check_target(target)
    tree = ast.parse(Path(path).read_bytes()) if class_name else ast.Module([], [])
    bodies = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    for statement in (statement for body in bodies for statement in body):
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ) if name == attribute:
                return value
            case _:
                pass
    return default


def load_model(
    target: str,
    *,
    name: str | None = None,
    weights: str | None = None,
    source: bytes | None = None,
) -> "ServedModel":
    """The model of `target`, imported and loaded: its `load()`, or `load(weights)`, has returned.
    `source` is what its file was when it was read; None: the file is read now.

    Raises `SpecError` for what a check without running would refuse, and `ModelFault`, with the
    user's own traceback, for what the code does when it is run.
    """
    path, class_name = check_target(target) if source is None else split_target(target)
    if not class_name:
        from supple.serve.models.program import SavedProgram

        return ServedModel(SavedProgram(path), name=name or Path(path).stem, weights=weights)
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = importlib.util.spec_from_file_location(_MODULE, path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[_MODULE] = module
    text = Path(path).read_bytes() if source is None else source
    # So that tracebacks show these lines, whatever is in the file by then.
    lines = text.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[path] = (len(text), None, lines, path)
    try:
        exec(compile(text, path, "exec"), module.__dict__)
        user: Any = getattr(module, class_name)()
    except BaseException as error:
        raise ModelFault(f"{target} could not be made:\n{user_traceback(error)}") from None
    return ServedModel(user, name=name or Path(path).stem, weights=weights)


@final
class ServedModel:
    """A loaded model behind checks. Not thread-safe: one `predict` at a time."""

    def __init__(self, user: Any, *, name: str, weights: str | None = None) -> None:
        """Read what `user` says of itself and call its `load()`, if it has one; `load(weights)` if
        weights are named."""
        self.name = name
        self.user = user
        what = type(user).__name__
        self.inputs = tuple(specs(user, "inputs", what))
        self.outputs = tuple(specs(user, "outputs", what))
        self.max_batch = int(getattr(user, "max_batch", _DEFAULT_MAX_BATCH))
        self.retry_safe = bool(getattr(user, "retry_safe", True))
        self._answers = AnswerCheck(self.outputs, allow_nan=bool(getattr(user, "allow_nan", False)))
        self._predict: Callable[[Any], Any] = _method(user, "predict", what)
        self._by_name = {spec.name: spec for spec in self.inputs}
        self._as_torch = _wants_torch(self._predict)
        if self.max_batch < 1:
            raise SpecError(f"max_batch of {what} is {self.max_batch}; it must be at least 1.")
        load = getattr(user, "load", None)
        arguments = () if weights is None else (weights,)
        if arguments and (load is None or not inspect.signature(load).parameters):
            raise SpecError(
                f"weights {weights} were named, and load() of {what} takes none. Write "
                "load(self, weights=None)."
            )
        if load is not None:
            try:
                load(*arguments)
            except BaseException as error:
                raise ModelFault(f"load() of {what} raised:\n{user_traceback(error)}") from None

    def renewed(self, weights: str | None) -> "ServedModel":
        """The same class loaded anew, with other weights or with none named; this one is left as it
        is. Raises `ModelFault` if it cannot be, or if it would take other inputs."""
        try:
            user = type(self.user)()
        except BaseException as error:
            raise ModelFault(f"could not be made anew:\n{user_traceback(error)}") from None
        fresh = ServedModel(user, name=self.name, weights=weights)
        if (fresh.inputs, fresh.outputs) != (self.inputs, self.outputs):
            raise ModelFault(f"with the weights {weights} the model declares other tensors")
        return fresh

    @property
    def streams(self) -> bool:
        """Whether the model has `stream(batch)`, which yields parts of one answer."""
        return callable(getattr(self.user, "stream", None))

    def check(self, inputs: Mapping[str, Array]) -> int:
        """The rows of a request; `Refused` (400) for one the model does not take."""
        if self.inputs:
            if inputs.keys() != self._by_name.keys():
                refuse(
                    f"the model takes {', '.join(self._by_name)}; the request has "
                    f"{', '.join(inputs)}"[:400]
                )
            for name, array in inputs.items():
                spec = self._by_name[name]
                if not spec.admits(array):
                    have = f"{DATATYPES[array.dtype.newbyteorder('=')]}{list(array.shape)}"
                    refuse(f"input {name!r} is {have}; the model takes {spec}")
        rows = {array.shape[0] for array in inputs.values()}
        if len(rows) != 1:
            refuse(f"the inputs differ in rows, their first dim: {sorted(rows)}")
        (count,) = rows
        if not 1 <= count <= self.max_batch:
            refuse(f"{count} rows in one request; the model takes 1 to {self.max_batch}")
        return count

    @property
    def shares(self) -> bool:
        """Whether requests may share a batch. Those of a model that declares an output of any
        length may once it has answered with a list of rows; one tensor for all rows is as long as
        the longest needs, so that a request's answer would depend on its neighbours'."""
        return self._answers.shares

    def predict(self, inputs: Mapping[str, Array]) -> Outputs:
        """The model's answer to a checked request, itself checked: as many rows as went in, types
        the protocol has, finite numbers. Raises `ModelFault`."""
        (answer,) = self.answers(inputs, [next(iter(inputs.values())).shape[0]])
        if isinstance(answer, ModelFault):
            raise answer
        return answer

    def answers(
        self, inputs: Mapping[str, Array], rows: Sequence[int]
    ) -> list[Outputs | ModelFault]:
        """The same for several requests joined to one batch, of so many rows each: what is wrong
        with the rows of one fails that one. Raises `ModelFault` for what is wrong with all or
        cannot be told apart; its words may be about any of them."""
        try:
            answer = self._predict(self._handed(inputs))
        except BaseException as error:
            raise raised(f"predict() raised on a batch of {sum(rows)}", error) from None
        try:
            return self._answers.split(answer, rows)
        except ModelFault:
            raise
        except BaseException as error:  # code of the user's too: of a dict, or of a str
            raise raised("what predict() returned raised", error) from None

    def stream(
        self, inputs: Mapping[str, Array], leaving: Leaving | None = None
    ) -> Iterator[Outputs]:
        """The parts of an answer to one request, checked like `predict`'s but for their rows. The
        user's generator, which may be an asynchronous one, is closed when this one is; what it
        awaits is cancelled by `leaving`."""
        parts: Any = None
        try:
            parts = self.user.stream(self._handed(inputs))
            if hasattr(parts, "__anext__"):
                parts = in_this_thread(parts, leaving or Leaving())
            for part in parts:
                yield self._answers.part(part)
        except (ModelFault, GeneratorExit):  # the second closes this generator
            raise
        except BaseException as error:
            raise raised("stream() raised", error) from None
        finally:
            close = getattr(parts, "close", None)
            if close is not None:
                close()

    def example(self, rows: int = 1, length: int = 1) -> dict[str, Array]:
        """Zeros of `rows` rows in the shape of the declared inputs, `length` where any fits;
        empty if the model declares none."""
        return {
            spec.name: np.zeros(
                (rows, *(length if d == -1 else d for d in spec.shape)), dtype=spec.dtype
            )
            for spec in self.inputs
            if spec.dtype.kind != "O"
        }

    def rehearse(self, rows: int, *, finite: bool = False) -> None:
        """Predict a batch of zeros, if the inputs are declared and `max_batch` allows it. Raises
        `ModelFault` as `predict` does, for NaN only if `finite`: zeros may have no answer."""
        batch = self.example(rows)
        if rows > self.max_batch or not batch or len(batch) < len(self.inputs):
            return
        with contextlib.nullcontext() if finite else self.allowing_nan():
            self.predict(batch)

    @contextlib.contextmanager
    def allowing_nan(self) -> Iterator[None]:
        """In the block, NaN and infinity are answers."""
        before, self._answers.allow_nan = self._answers.allow_nan, True
        try:
            yield
        finally:
            self._answers.allow_nan = before

    def _handed(self, inputs: Mapping[str, Array]) -> Any:
        handed: dict[str, Any] = dict(inputs)
        if self._as_torch:
            import torch

            handed = {
                # A request's array may look into its body, which torch must not write to.
                name: torch.from_numpy(array if array.flags.writeable else array.copy())
                for name, array in inputs.items()
            }
        return next(iter(handed.values())) if len(handed) == 1 else handed


def _method(user: Any, name: str, what: str) -> Callable[[Any], Any]:
    method = getattr(user, name, None)
    if not callable(method) or inspect.iscoroutinefunction(method):
        raise SpecError(
            f"{what} needs a method {name}(self, batch), a plain one: it runs in a thread of its "
            "own, so it may block."
        )
    return method


def _wants_torch(predict: Callable[[Any], Any]) -> bool:
    parameters = list(inspect.signature(predict).parameters.values())
    return bool(parameters) and "torch" in str(parameters[0].annotation).lower()

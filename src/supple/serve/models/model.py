"""Find and load the user's model, and validate its answers.

A model is a class with `load()` and `predict(batch)`; with `load(weights=None)` its weights can be
swapped while it serves. `batch` is one array, or a dict of arrays by input name if the class names
several inputs; rows are the first dim. `predict` and `stream` receive torch tensors, or numpy
arrays if their parameter is annotated with anything but a tensor, such as `np.ndarray`. An input of
strings is always a numpy array of `bytes`. Optional class attributes:

    inputs = {"pixels": "float32[64]"}    # one row: dtype and shape, -1 for any length
    outputs = {"digit": "int64[]"}        # checked if given
    max_batch = 32                        # rows of one call, default 64
    allow_nan = True                      # NaN and infinity are answers, not faults
    retry_safe = False                    # a request may not be computed or sent twice

If the rows of an output differ in length, declare it with a -1 and return a list, with a tensor for
each row.
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
from supple.serve.protocol.dtypes import BF16, DATATYPES, FP32, Array, native
from supple.serve.protocol.refusal import refuse
from supple.serve.streams import Leaving, in_this_thread

_MODULE = "supple_user_model"
_DEFAULT_MAX_BATCH = 64


def check_target(target: str) -> tuple[str, str]:
    """Validate a target such as `"app.py:Model"` without running it, and return (path, class); for
    a saved program return (path, ""). Raises `SpecError`."""
    if target.lower().endswith(".pt2"):
        if Path(target).is_file():
            return target, ""
        what = "is not a regular file" if Path(target).exists() else "does not exist"
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
        raise SpecError(f"{class_name} in {path} has no predict(self, batch). Add the method.")
    return path, class_name


def split_target(target: str) -> tuple[str, str]:
    """Split a target such as `"app.py:Model"` into (path, class); the class may be empty."""
    path, colon, class_name = target.rpartition(":")
    return (path, class_name) if colon else (target, "")


def declared(target: str, attribute: str, default: Any) -> Any:
    """Read the literal value of a class attribute of `target` without running the file; `default`
    if the class body has none. Raises `SpecError` as `check_target` does."""
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
    """Import the class of `target`, create the model, and call its `load()` or `load(weights)`.
    `source` is the content of the file from an earlier read; None: read the file now.

    Raises `SpecError` if `check_target` refuses the target, and `ModelFault`, with the user's
    traceback, if the code raises.
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
    # Tracebacks then show these lines even if the file has changed.
    lines = text.decode(errors="replace").splitlines(keepends=True)
    linecache.cache[path] = (len(text), None, lines, path)
    try:
        exec(compile(text, path, "exec"), module.__dict__)
        user: Any = getattr(module, class_name)()
    except BaseException as error:
        raise ModelFault(f"{target} could not be created:\n{user_traceback(error)}") from None
    return ServedModel(user, name=name or Path(path).stem, weights=weights)


@final
class ServedModel:
    """A loaded model with validation. Not thread-safe: one `predict` at a time."""

    def __init__(self, user: Any, *, name: str, weights: str | None = None) -> None:
        """Read the declarations of `user`, and call its `load()` if it has one, or `load(weights)`
        if `weights` is given."""
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
        self._takes_torch = _takes_torch(self._predict)
        if self._takes_torch and not (
            self.inputs and all(s.dtype.kind == "O" for s in self.inputs)
        ):
            import torch  # noqa: F401  (seconds, which the first request should not wait)
        if self.max_batch < 1:
            raise SpecError(f"max_batch of {what} is {self.max_batch}; it must be at least 1.")
        load = getattr(user, "load", None)
        arguments = () if weights is None else (weights,)
        if arguments and (load is None or not inspect.signature(load).parameters):
            raise SpecError(
                f"weights {weights} were given, and load() of {what} takes none. Write "
                "load(self, weights=None)."
            )
        if load is not None:
            try:
                load(*arguments)
            except BaseException as error:
                raise ModelFault(f"load() of {what} raised:\n{user_traceback(error)}") from None

    def renewed(self, weights: str | None) -> "ServedModel":
        """Return a new instance of the class, loaded with `weights`; this one is unchanged. Raises
        `ModelFault` if loading fails, or if the new one declares other tensors."""
        try:
            user = type(self.user)()
        except BaseException as error:
            raise ModelFault(f"could not be created again:\n{user_traceback(error)}") from None
        fresh = ServedModel(user, name=self.name, weights=weights)
        if (fresh.inputs, fresh.outputs) != (self.inputs, self.outputs):
            raise ModelFault(f"with the weights {weights} the model declares other tensors")
        return fresh

    @property
    def streams(self) -> bool:
        """Whether the model has `stream(batch)`, which yields the parts of an answer."""
        return callable(getattr(self.user, "stream", None))

    def check(self, inputs: Mapping[str, Array]) -> int:
        """Return the number of rows of a request. Raises `Refused` (400) for invalid inputs."""
        if self.inputs:
            if inputs.keys() != self._by_name.keys():
                refuse(
                    f"the model takes {', '.join(self._by_name)}; the request has "
                    f"{', '.join(inputs)}"[:400]
                )
            for name, array in inputs.items():
                spec = self._by_name[name]
                if not spec.accepts(array):
                    have = f"{DATATYPES[native(array.dtype)]}{list(array.shape)}"
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
        """Whether requests may share a batch. With an output of any length they may only after the
        model has returned it as a list of rows: a single tensor is padded to the longest row, so a
        request's answer would depend on the others in its batch."""
        return self._answers.shares

    def predict(self, inputs: Mapping[str, Array]) -> Outputs:
        """Return the model's outputs for a validated request. The outputs are validated too: number
        of rows, dtypes of the protocol, finite numbers. Raises `ModelFault`."""
        (answer,) = self.answers(inputs, [next(iter(inputs.values())).shape[0]])
        if isinstance(answer, ModelFault):
            raise answer
        return answer

    def answers(
        self, inputs: Mapping[str, Array], rows: Sequence[int]
    ) -> list[Outputs | ModelFault]:
        """Return the outputs, or the `ModelFault`, of each request of a joined batch; `rows` are
        their numbers of rows. Raises `ModelFault` for an error in the whole batch, or in an unknown
        part of it; its message may quote any of the requests."""
        try:
            answer = self._predict(self._as_argument(inputs, as_torch=self._takes_torch))
        except BaseException as error:
            raise raised(f"predict() raised on a batch of {sum(rows)}", error) from None
        try:
            return self._answers.split(answer, rows)
        except ModelFault:
            raise
        except BaseException as error:  # the answer may be a user's subclass of dict or str
            raise raised("what predict() returned raised", error) from None

    def stream(
        self, inputs: Mapping[str, Array], leaving: Leaving | None = None
    ) -> Iterator[Outputs]:
        """Yield the parts of an answer, validated like `predict`'s except for the number of rows.
        Closing this generator closes the user's, which may be asynchronous; `leaving` cancels what
        that one awaits."""
        parts: Any = None
        try:
            stream = self.user.stream
            parts = stream(self._as_argument(inputs, as_torch=_takes_torch(stream)))
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
        """Return zeros for the declared inputs, with `rows` rows, and `length` for each dim of any
        length; empty if the model declares none."""
        return {
            spec.name: np.zeros(
                (rows, *(length if d == -1 else d for d in spec.shape)), dtype=spec.dtype
            )
            for spec in self.inputs
            if spec.dtype.kind != "O"
        }

    def rehearse(self, rows: int, *, finite: bool = False) -> None:
        """Predict a batch of zeros, if the inputs are declared and `max_batch` allows it. Raises
        `ModelFault` as `predict` does, for NaN only if `finite`: zeros may be no valid input."""
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

    def _as_argument(self, inputs: Mapping[str, Array], *, as_torch: bool) -> Any:
        arrays: dict[str, Any] = {
            name: self._widened(name, array) if array.dtype == BF16 else array
            for name, array in inputs.items()
        }
        if as_torch:
            arrays = {name: _tensor(array) for name, array in arrays.items()}
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays

    def _widened(self, name: str, array: Array) -> Array:
        """Convert an array of BF16 to FP32, unless this input is declared as bfloat16."""
        spec = self._by_name.get(name)
        return array if spec is not None and spec.dtype == BF16 else array.astype(FP32)


def _tensor(array: Array) -> Any:
    """Convert an array to a torch tensor; an array of strings is returned as it is."""
    import torch

    if array.dtype.kind == "O":
        return array
    # An array may share memory with the request's body, which torch must not write to.
    own = array if array.flags.writeable else array.copy()
    if array.dtype == BF16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def _method(user: Any, name: str, what: str) -> Callable[[Any], Any]:
    method = getattr(user, name, None)
    if not callable(method) or inspect.iscoroutinefunction(method):
        raise SpecError(
            f"{what} needs a method {name}(self, batch) that is not async: it runs in its own "
            "thread, so it may block."
        )
    return method


def _takes_torch(method: Callable[[Any], Any]) -> bool:
    """Whether the first parameter of `method` has no annotation, or names a tensor."""
    parameters = list(inspect.signature(method).parameters.values())
    if not parameters or parameters[0].annotation is inspect.Parameter.empty:
        return True
    annotation = str(parameters[0].annotation).lower()
    return "torch" in annotation or "tensor" in annotation

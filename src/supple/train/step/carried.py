"""Refuses a loss that depends on a value which the script's loop carries from turn to turn: a
counter of its own, a running mean.

The loop's first turn is rehearsed, so the value would be a turn ahead, and a worker that joins
begins with the value from before the loop. Found in the source of the loop; without a source,
nothing is refused.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, final

from supple.train.step.finite import TrainingError


def frames_of(caller: FrameType | None) -> list[FrameType]:
    """Return the script's frames, the innermost first, without progress bars' generators."""
    frames: list[FrameType] = []
    while caller is not None and not _is_ours(caller):
        if not caller.f_code.co_flags & inspect.CO_GENERATOR:
            frames.append(caller)
        caller = caller.f_back
    return frames


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("supple.")


def refuse_carried(frames: Sequence[FrameType], job: Any, kept: Iterable[Any]) -> None:
    """Raise `TrainingError` if the loss of the loop that takes the batches, or whether it is
    stepped, depends on a value that the loop carries from one turn to the next."""
    if not frames:
        return
    frame = frames[0]
    loop = _loop_of(frame)
    names = _names_of(job, frame.f_locals)
    if loop is None or not names:
        return
    known = [*kept]
    carried = {path for path in _carried(loop) if not _is_kept(path, frame.f_locals, known)}
    found = _Flow(names, carried).first(loop.body)
    if found is not None:
        raise TrainingError(
            f"job.step depends on {found}, which the loop itself changes: the loop's first turn is "
            "rehearsed, so it would be a turn ahead, and a worker that joins would begin with the "
            "value from before the loop. Use job.step_count or job.epoch; or hold it in an object "
            "with state_dict and load_state_dict that is given to job.keep. To accumulate "
            "gradients, step every batch and give job.batches(..., micro_batch_size=...)."
        )


def _names_of(job: Any, variables: Mapping[str, Any]) -> set[str]:
    """Return how the script may write its job: job, or self.job."""
    names = {name for name, value in variables.items() if value is job}
    for name, value in variables.items():
        inside = getattr(value, "__dict__", {})
        if isinstance(inside, dict):
            names |= {f"{name}.{attribute}" for attribute, of in inside.items() if of is job}
    return names


def _loop_of(frame: FrameType) -> ast.For | None:
    """Return the loop whose batches are being taken; None without the source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(frame.f_code)))
    except (OSError, SyntaxError, TypeError):
        return None
    line = frame.f_lineno - frame.f_code.co_firstlineno + 1
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and node.lineno <= line <= (node.iter.end_lineno or 0)
    ]
    return loops[-1] if loops else None


def _paths(node: ast.AST, kind: type[ast.expr_context] = ast.Load) -> set[str]:
    """Return the variables, attributes and items that an expression reads (or assigns), without
    those of its own: of a comprehension or a lambda."""
    found: set[str] = set()
    own = _own_names(node)
    for inner in ast.walk(node):
        is_path = isinstance(inner, ast.Name | ast.Attribute | ast.Subscript)
        if is_path and isinstance(inner.ctx, kind) and _root(inner) not in own:
            found.add(ast.unparse(inner))
    return found


def _own_names(node: ast.AST) -> set[str]:
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.comprehension):
            names |= {of.id for of in ast.walk(inner.target) if isinstance(of, ast.Name)}
        elif isinstance(inner, ast.Lambda):
            names |= {of.arg for of in ast.walk(inner.args) if isinstance(of, ast.arg)}
    return names


def _root(path: ast.AST) -> str:
    """Return the variable that a path begins with."""
    while isinstance(path, ast.Attribute | ast.Subscript):
        path = path.value
    return path.id if isinstance(path, ast.Name) else ""


def _carried(loop: ast.For) -> set[str]:
    """Return what the body reads before it assigns it, and `enumerate`'s number."""
    given = _paths(loop.target, ast.Store)
    carried: set[str] = set()
    call, target = loop.iter, loop.target
    is_numbered = isinstance(call, ast.Call) and ast.unparse(call.func) == "enumerate"
    if is_numbered and isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name):
        carried.add(target.elts[0].id)
    read_first: set[str] = set()
    assigned = set(given)
    for statement in _simple(loop.body):
        reads, writes = _reads_and_writes(statement)
        read_first |= reads - assigned
        assigned |= writes
    return carried | (read_first & (assigned - given))


def _simple(body: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the parts of the statements in textual order: tests, then what they guard."""
    for statement in body:
        inner = [
            child
            for name in ("body", "orelse", "finalbody")
            for child in getattr(statement, name, [])
        ]
        if inner:
            yield from (test for test in _tests(statement) if test is not None)
            yield from _simple(inner)
        else:
            yield statement


def _tests(statement: ast.stmt) -> list[Any]:
    """Return what decides on the statements inside of one; None for nothing."""
    return [getattr(statement, name, None) for name in ("test", "iter")]


def _reads_and_writes(node: ast.AST) -> tuple[set[str], set[str]]:
    reads, writes = _paths(node), _paths(node, ast.Store)
    if isinstance(node, ast.AugAssign):
        reads |= writes
    return reads, writes


def _is_kept(path: str, variables: Mapping[str, Any], kept: Sequence[Any]) -> bool:
    """Return whether an object on the path, such as the first of counter.value, is kept."""
    first, *rest = path.partition("[")[0].split(".")
    value = variables.get(first)
    for name in [*rest, ""]:
        if any(value is thing for thing in kept):
            return True
        value = getattr(value, name, None) if name else None
    return False


@final
class _Flow:
    """Follows carried values through the body, statement by statement, to a call of job.step."""

    def __init__(self, jobs: set[str], carried: set[str]) -> None:
        self._steps = {f"{job}.step" for job in jobs}
        self._from = {path: path for path in carried}
        """Every value that depends on a carried one, with the carried one."""

    def first(self, body: Sequence[ast.stmt], guard: str | None = None) -> str | None:
        """Return the first carried value that a call of job.step depends on."""
        for statement in body:
            parts = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
            inner = [child for part in parts if part for child in part]
            if inner:
                tests = _tests(statement)
                under = next((source for t in tests if t and (source := self._source(t))), guard)
                found = self._of_calls(tests, guard) or self.first(inner, under)
            else:
                found = self._of_calls([statement], guard)
                self._assign(statement, is_certain=guard is None)
            if found is not None:
                return found
        return None

    def _of_calls(self, nodes: Sequence[ast.AST | None], guard: str | None) -> str | None:
        for node in nodes:
            for call in ast.walk(node) if node is not None else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) in self._steps:
                    return self._source(call) or guard
        return None

    def _source(self, node: ast.AST) -> str | None:
        return next((self._from[path] for path in sorted(_paths(node)) if path in self._from), None)

    def _assign(self, statement: ast.stmt, *, is_certain: bool) -> None:
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            return
        source = self._source(statement.value) if statement.value is not None else None
        is_more = isinstance(statement, ast.AugAssign)
        for path in _paths(statement, ast.Store):
            if source is not None:
                self._from[path] = source
            elif is_certain and not is_more:
                self._from.pop(path, None)

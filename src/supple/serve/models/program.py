"""Serve a program saved by `torch.export.save`; its inputs are read from the program.

The first dim of every input is the batch and should be exported as dynamic. A program with a fixed
batch size can be served only if that size is 1.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, final

import torch

from supple.core.spec import SpecError

SUFFIX: Final = ".pt2"
_MOST_ROWS: Final = 64


@final
class SavedProgram:
    """A saved program with the interface of a user's model class, for `load_model`."""

    def __init__(self, path: str) -> None:
        """Read the program. Raises `SpecError` for an invalid file or inputs without a batch."""
        try:
            self._program = torch.export.load(path)
        except Exception as error:
            raise SpecError(
                f"{path} is not a program of this torch, {torch.__version__}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Save it "
                "with torch.export.save(torch.export.export(model, example), path)."
            ) from None
        self.max_batch = _MOST_ROWS
        self.inputs = dict(self._specs(path))
        self._run = self._program.module()

    def _specs(self, path: str) -> Iterator[tuple[str, str]]:
        wanted = {str(name) for name in self._program.graph_signature.user_inputs}
        for node in self._program.graph.nodes:
            if node.op != "placeholder" or node.name not in wanted:
                continue
            name, value = str(node.name), node.meta["val"]
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise SpecError(
                    f"the input {name} of {path} is not a tensor with a first dim for the batch. "
                    "Export a forward() of tensors only."
                )
            rows = value.shape[0]
            if isinstance(rows, int):
                if rows != 1:
                    raise SpecError(
                        f"the input {name} of {path} has exactly {rows} rows. Export with "
                        'dynamic_shapes={"' + name + '": {0: torch.export.Dim("batch")}}.'
                    )
                self.max_batch = 1
            lengths = [d if isinstance(d, int) else -1 for d in value.shape[1:]]
            dtype = str(value.dtype).removeprefix("torch.")
            yield name, f"{dtype}[{', '.join(map(str, lengths))}]"

    @torch.inference_mode()
    def predict(self, batch: "torch.Tensor | Mapping[str, torch.Tensor]") -> dict[str, Any]:
        """Return the program's outputs by its own names, or named output, output_1, …"""
        if isinstance(batch, torch.Tensor):
            answer = self._run(batch)
        else:
            answer = self._run(*(batch[name] for name in self.inputs))
        if isinstance(answer, Mapping):
            return {str(name): value for name, value in answer.items()}
        if isinstance(answer, torch.Tensor):
            return {"output": answer}
        return {f"output_{i}" if i else "output": value for i, value in enumerate(answer)}

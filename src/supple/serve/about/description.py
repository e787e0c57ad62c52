"""What a service says about itself, over HTTP and gRPC alike: metadata and configuration.

The configuration is the one of Triton's model configuration extension, whose clients read it for
the tensors, the largest batch, and whether a request may have several answers.
"""

from typing import Any, Final, final

from supple.core.service.queue import DEFAULT_PRIORITY, LAST_PRIORITY
from supple.serve.models.model import ServedModel
from supple.serve.models.tensor_spec import TensorSpec
from supple.serve.protocol.refusal import refuse

EXTENSIONS: Final = (
    *("binary_tensor_data", "generate_stream", "model_configuration", "model_repository"),
    *("schedule_policy", "statistics"),
)


@final
class Description:
    """Name, version, tensors and configuration of the served model."""

    def __init__(self, model: ServedModel, version: str) -> None:
        self._model = model
        self.version = version

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    def check_name(self, name: str, version: str = "") -> None:
        """Raise `Refused` (404) unless the served model has this name and version."""
        if name != self.name or version not in ("", self.version):
            requested = f"{name[:80]!r}" + (f" version {version[:80]!r}" if version else "")
            refuse(
                f"no model {requested}; {self.name!r} version {self.version} is served here",
                404,
            )

    def server_metadata(self) -> dict[str, Any]:
        """The response to `GET v2`."""
        return {"name": "supple", "version": self.version, "extensions": [*EXTENSIONS]}

    def model_metadata(self) -> dict[str, Any]:
        """The response to `GET v2/models/NAME`; lists are empty for undeclared tensors."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "supple",
            "inputs": [_metadata(spec) for spec in self._model.inputs],
            "outputs": [_metadata(spec) for spec in self._model.outputs],
        }

    def model_config(self) -> dict[str, Any]:
        """The response to `GET v2/models/NAME/config`; shapes are those of one row."""
        return {
            "name": self.name,
            "platform": "",
            "backend": "supple",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self._model.max_batch,
            "input": [{**_config(s), "format": "FORMAT_NONE"} for s in self._model.inputs],
            "output": [_config(spec) for spec in self._model.outputs],
            "dynamic_batching": {
                "max_queue_delay_microseconds": 0,
                "priority_levels": LAST_PRIORITY,
                "default_priority_level": DEFAULT_PRIORITY,
            },
            "model_transaction_policy": {"decoupled": self._model.streams},
        }

    def repository_index(self, *, reason: str | None) -> list[dict[str, Any]]:
        """The response to `POST v2/repository/index`; `reason` is why the model is not ready."""
        state = "READY" if reason is None else "UNAVAILABLE"
        return [
            {"name": self.name, "version": self.version, "state": state, "reason": reason or ""}
        ]


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _config(spec: TensorSpec) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": [*spec.shape]}

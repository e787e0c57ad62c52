"""The OpenAPI document of a service, and an HTML page with the same content.

The page needs no script and no other host, so it works without a network.
"""

import html
import json
from typing import Any

from supple.serve.models.model import ServedModel
from supple.serve.models.tensor_spec import TensorSpec

_ERROR = {"description": 'Refused: {"error": "why"}.'}


def openapi(model: ServedModel, version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a service."""
    base = f"/v2/models/{model.name}"
    paths: dict[str, Any] = {}
    for path, what in _reads(base, version):
        paths[path] = {"get": {"summary": what, "responses": {"200": {"description": "OK."}}}}
    content = {"application/json": {"schema": _body(model), "example": example_body(model)}}
    calls = [(f"{base}/infer", "Infer."), (f"{base}/versions/{version}/infer", "Infer.")]
    if model.streams:
        calls.append((f"{base}/generate_stream", "Infer, the answer in server-sent events."))
    for path, what in calls:
        paths[path] = {
            "post": {
                "summary": what,
                "requestBody": {"required": True, "content": content},
                "responses": {
                    "200": {"description": "The outputs."},
                    **dict.fromkeys(("400", "401", "404", "413", "429", "500", "503"), _ERROR),
                },
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": model.name,
            "version": version,
            "description": "Open Inference Protocol v2, served by Supple.",
        },
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def example_body(model: ServedModel) -> dict[str, Any]:
    """Return a valid request: one row of zeros, or one number if no inputs are declared."""
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": next(s.datatype for s in model.inputs if s.name == name),
            "data": array.ravel().tolist(),
        }
        for name, array in model.example().items()
    ] or [{"name": "input", "shape": [1, 1], "datatype": "FP32", "data": [0.0]}]
    return {"inputs": inputs}


def page(model: ServedModel, version: str) -> bytes:
    """Return the HTML page of a service: paths, inputs, outputs and an example request."""
    base = f"/v2/models/{model.name}"
    rows = [("GET", path, what) for path, what in _reads(base, version)]
    rows.append(("POST", f"{base}/infer", "Infer."))
    if model.streams:
        rows.append(("POST", f"{base}/generate_stream", "Infer, streamed."))
    table = "".join(
        f"<tr><td>{m}</td><td><code>{html.escape(p)}</code></td><td>{html.escape(w)}</td></tr>"
        for m, p, w in rows
    )
    body = html.escape(json.dumps(example_body(model)))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(model.name)}</title>"
        "<style>body{font:16px sans-serif;margin:2em;max-width:60em}td{padding:.2em 1em .2em 0}"
        "pre{background:#eee;padding:1em;white-space:pre-wrap}</style>"
        f"<h1>{html.escape(model.name)}</h1><p>Open Inference Protocol v2. "
        '<a href="/openapi.json">OpenAPI document</a>.</p>'
        f"<p>Inputs: {html.escape(_list(model.inputs))}. "
        f"Outputs: {html.escape(_list(model.outputs))}.</p><table>{table}</table>"
        f"<h2>A request</h2><pre>POST {html.escape(base)}/infer\n\n{body}</pre>"
    ).encode()


def _reads(base: str, version: str) -> list[tuple[str, str]]:
    return [
        ("/v2/health/live", "Whether the process lives."),
        ("/v2/health/ready", "Whether it answers requests."),
        ("/v2", "Name, version and extensions of the server."),
        (base, "Name, versions, inputs and outputs of the model."),
        (f"{base}/versions/{version}", "The same, by version."),
        (f"{base}/ready", "Whether the model answers requests."),
        (f"{base}/versions/{version}/ready", "The same, by version."),
        (f"{base}/config", "Configuration of the model: tensors, largest batch, priorities."),
        (f"{base}/versions/{version}/config", "The same, by version."),
        (f"{base}/stats", "Counts and times of inferences, summed over all replicas."),
        (f"{base}/versions/{version}/stats", "The same, by version."),
        ("/v2/models/stats", "The same, of all models, which is one."),
        ("/metrics", "Prometheus metrics of all replicas, each with its label."),
        ("/metrics/replica", "The same for the replica that answers."),
        ("/statistics/replica", "The statistics of the replica that answers."),
        ("/openapi.json", "This interface."),
    ]


def _list(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec}" for spec in specs) or "any"


def _body(model: ServedModel) -> dict[str, Any]:
    names = [spec.name for spec in model.inputs]
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"type": "string", **({"enum": names} if names else {})},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"type": "string"},
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor},
            "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            "parameters": {"type": "object"},
        },
    }

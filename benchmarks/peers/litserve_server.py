"""LitServe as its documentation shows it: it starts processes, which import this file."""

from typing import Any

import litserve
from fastapi import Request


class Api(litserve.LitAPI):
    """Answers a tensor with itself."""

    def setup(self, device: Any) -> None:
        """Nothing to load."""

    def decode_request(self, request: Request) -> Any:
        return request

    def predict(self, x: Any) -> Any:
        return {"model_name": "bench", "outputs": [{**x["inputs"][0], "name": "y"}]}

    def encode_response(self, output: Any) -> Any:
        return output


def run(port: int, path: str) -> None:
    """Serve until interrupted; one worker, defaults."""
    server = litserve.LitServer(Api(api_path=path), accelerator="cpu")
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="error")

"""Every HTTP path that no inference takes, as a Starlette application.

Starlette does the routes, HEAD, the methods a path allows, and gzip. An inference does not pass
through it: that would add 15 us to the 42 it takes in the replica (decision 14).
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from supple.serve.about.description import Description
from supple.serve.about.pages import openapi, page
from supple.serve.meters import Meters, merge, merge_statistics
from supple.serve.models.model import ServedModel
from supple.serve.protocol.refusal import Refused

OWN_METRICS: Final = "/metrics/replica"
"""Path of the metrics of this replica; `/metrics` has those of all replicas."""
OWN_STATISTICS: Final = "/statistics/replica"
"""Path of the statistics of this replica; `v2/models/NAME/stats` has those of all replicas."""
_JSON_BYTES: Final = 500

Pages = Callable[[str], Awaitable[Sequence[bytes]]]
"""Fetches the page at a path from every replica."""


@final
class ColdRoutes:
    """Answers about one replica and its service. `app` is the ASGI application."""

    def __init__(
        self,
        model: ServedModel,
        description: Description,
        meters: Meters,
        *,
        stuck: Callable[[], str | None],
        all_pages: Pages | None,
        answer_error: Callable[[Exception], Response],
    ) -> None:
        """`stuck` returns why this replica must be replaced. Without `all_pages` there is only this
        replica. `answer_error` makes the response to an exception."""
        self._model = model
        self._description = description
        self._meters = meters
        self._stuck = stuck
        self._all_pages = all_pages
        self._answer_error = answer_error
        self.app = Starlette(
            routes=[*self._server_routes(), *self._model_routes()],
            middleware=[Middleware(GZipMiddleware, minimum_size=_JSON_BYTES, compresslevel=1)],
            exception_handlers={
                HTTPException: self._not_routed,
                Refused: self._error,
                Exception: self._error,
            },
        )

    def _server_routes(self) -> list[Route]:
        return [
            Route("/v2/health/live", _page(lambda: JSONResponse({"live": True}))),
            Route("/v2/health/ready", _page(self._ready)),
            Route("/v2", _page(lambda: JSONResponse(self._description.server_metadata()))),
            Route("/metrics", self._metrics),
            Route(OWN_METRICS, _page(lambda: _metrics_page(*merge([self._meters.text()])))),
            Route(OWN_STATISTICS, _page(lambda: JSONResponse(self._meters.statistics()))),
            Route("/openapi.json", _page(lambda: JSONResponse(self._openapi()))),
            Route("/docs", _page(lambda: HTMLResponse(page(self._model, self._version)))),
            Route("/v2/repository/index", _page(self._index), methods=["POST"]),
            Route("/v2/models/stats", self._statistics),
        ]

    def _model_routes(self) -> list[Route]:
        description = self._description
        reads: dict[str, Callable[[], Response]] = {
            "": lambda: JSONResponse(description.model_metadata()),
            "/ready": self._ready,
            "/config": lambda: JSONResponse(description.model_config()),
        }
        found: list[Route] = []
        for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            found += [Route(base + path, self._named(_page(read))) for path, read in reads.items()]
            found.append(Route(f"{base}/stats", self._named(self._statistics)))
            found += [
                Route(f"{base}/{path}", self._named(_unreachable), methods=["POST"])
                for path in ("infer", "generate_stream")
            ]
        return found

    def _named(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Wrap an endpoint of a model: another name or version is refused with 404."""

        async def checked(request: Request) -> Response:
            self._description.check_name(**request.path_params)
            return await endpoint(request)

        return checked

    @property
    def _version(self) -> str:
        return self._description.version

    def _openapi(self) -> dict[str, Any]:
        return openapi(self._model, self._version)

    def _ready(self) -> Response:
        reason = self._stuck()
        if reason is not None:
            return JSONResponse({"error": reason}, 503)
        return JSONResponse({"ready": True, "name": self._model.name})

    def _index(self) -> Response:
        return JSONResponse(self._description.repository_index(reason=self._stuck()))

    async def _metrics(self, request: Request) -> Response:
        pages = () if self._all_pages is None else await self._all_pages(OWN_METRICS)
        accept = request.headers.get("accept", "")
        return _metrics_page(*merge(pages or [self._meters.text()], accept))

    async def _statistics(self, _request: Request) -> Response:
        return JSONResponse({"model_stats": [await self.statistics()]})

    async def statistics(self) -> dict[str, Any]:
        """Return the `ModelStatistics` of the service, summed over its replicas."""
        pages = () if self._all_pages is None else await self._all_pages(OWN_STATISTICS)
        found = [json.loads(text) for text in pages] or [self._meters.statistics()]
        return merge_statistics(found, model=self._model.name, version=self._version)

    async def _not_routed(self, request: Request, error: Exception) -> Response:
        """Answer a path that does not exist, a method that it does not take, and OPTIONS."""
        assert isinstance(error, HTTPException)
        path, method = request.url.path[:200], request.method
        if error.status_code != 405:
            return _error(f"no resource at {path}; GET /docs lists all of them", error.status_code)
        methods = {*(error.headers or {}).get("Allow", "").split(", "), "OPTIONS"}
        allow = {"allow": ", ".join(sorted(methods))}
        if method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        reads = "read with GET" if "GET" in methods else "called with POST"
        return _error(f"{path} is {reads}, not {method}", 405, allow)

    async def _error(self, _request: Request, error: Exception) -> Response:
        return self._answer_error(error)


def _page(read: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint of a function without arguments. It runs in the event loop, not a thread."""

    async def endpoint(_request: Request) -> Response:
        return read()

    return endpoint


async def _unreachable(_request: Request) -> Response:
    raise AssertionError("inferences of the served model are answered by the surface")


def _metrics_page(text: bytes, media_type: str) -> Response:
    return Response(text, media_type=media_type)


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)

"""The playground at /: a page that asks the server's own routes, and shows what an answer looked at in its source.

The page is plain files under `page/`, sent as they are. It loads nothing from elsewhere, and its Content Security
Policy lets it talk to this server only.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from twofold.serve.errors import ApiError
from twofold.serve.playground.attribution import attribution_router
from twofold.serve.service import Service

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def add_playground(app: FastAPI, service: Service) -> None:
    """An extension of `create_app`: the page at /, which anybody may load; asking anything needs a key where there
    are keys."""
    page = {
        file.name: file.read_bytes()
        for file in files(__name__).joinpath("page").iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return _file("index.html", page)

    @router.get("/playground/page/{name}")
    async def part(name: str) -> Response:
        return _file(name, page)

    app.include_router(router)
    app.include_router(attribution_router(service))
    service.public_paths |= {"/", "/playground/page/*"}


def _file(name: str, page: dict[str, bytes]) -> Response:
    if name not in page:
        raise ApiError(404, f"the playground has no {name!r}; it is at /")
    return Response(page[name], media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)

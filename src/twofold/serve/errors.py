"""Errors as OpenAI's API writes them, so that its clients raise what their users expect."""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_MAX_MESSAGE = 2000
_TYPE_NAME = re.compile(r"str|int|constrained-\w+|list\[.*\]|function-.*")
"""What pydantic puts between the names of fields: which of several types it tried."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal that the client is told about.

    Args:
        status: of HTTP.
        message: what was given, what is allowed, what to do next.
        param: the field of the request that it is about.
        code: for programs, such as "context_length_exceeded".
        retry_after_s: after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": ...}`."""
        return error_body(self.status, self.message, param=self.param, code=self.code)

    def response(self) -> JSONResponse:
        """What is sent."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers=headers)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": message[:_MAX_MESSAGE],
            "type": kind,
            "param": param and param[:200],
            "code": code,
        }
    }


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """503, for what comes too late or is given up."""
    return ApiError(503, "the server shuts down; try again", code="shutting_down", retry_after_s=1.0)


def add_handlers(app: FastAPI) -> None:
    """Every refusal of the app in this form, those of FastAPI and Starlette too."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}; see /docs for what there is"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}; see /docs"
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong; the others usually follow from it."""
    errors = error.errors()
    # A value that may be of several types fails for each of them: the one that it comes nearest to goes deepest.
    same_field = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same_field, key=lambda one: len(one["loc"]))
    kind = first["type"]
    where = [str(part) for part in first["loc"][1:] if not _TYPE_NAME.fullmatch(str(part))]
    if kind == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']} at character {where[-1]}")
    if not where and kind in ("model_attributes_type", "missing", "model_type", "dict_type"):
        return bad_request("the body must be a JSON object, sent with Content-Type: application/json")
    if "param" in first.get("ctx", {}):
        where.append(first["ctx"]["param"])
    param = ".".join(where) or None
    return bad_request(
        f"{param}: {first['msg']}" if param else first["msg"], param=param, code="invalid_value"
    )

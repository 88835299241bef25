"""/docs: the OpenAPI document as a plain page, which needs neither scripts nor another host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
code {{ font: 0.9em ui-monospace, monospace }}
h2 {{ margin: 2.5rem 0 0.25rem; border-top: 1px solid #8885; padding-top: 1rem }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem }}
td, th {{ text-align: left; vertical-align: top; padding: 0.25rem 0.75rem 0.25rem 0; border-top: 1px solid #8883 }}
</style></head><body><h1>{title}</h1><p>{description} The same as <a href="openapi.json">openapi.json</a>.</p>
{body}</body></html>
"""
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def reference_router(app: FastAPI) -> APIRouter:
    """The page of an app."""
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        document = app.openapi()
        body = "\n".join(_operations(document))
        title, description = (escape(document["info"][key]) for key in ("title", "description"))
        page = _PAGE.format(title=f"{title} {escape(app.version)}", description=description, body=body)
        return HTMLResponse(page, headers=_HEADERS)

    return router


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            content = operation.get("requestBody", {}).get("content", {})
            for media in content.values():
                yield _table(_resolved(document, media["schema"]), document)
            statuses = (
                f"<code>{status}</code> {escape(response['description'])}"
                for status, response in operation["responses"].items()
            )
            yield f"<p>{' · '.join(statuses)}</p>"


def _table(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{escape(_type(field, document))}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table><p>* is required.</p>"


def _type(field: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """In a few words."""
    if "$ref" in field:
        inner = _resolved(document, field).get("properties", {})
        return "{" + ", ".join(inner) + "}"
    if "anyOf" in field:
        return " or ".join(_type(one, document) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return " | ".join(repr(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"[{_type(field.get('items', {}), document)}]"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")
        )
        if key in field
    ]  # fmt: skip
    return " ".join([field.get("type", "any"), *bounds])


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return found

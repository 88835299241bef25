"""Text with columns of a record in braces: `Translate to German: {en}`."""

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

_COLUMN = re.compile(r"([^\[\].!:{}]+)(?:\[(\d+)\])?")


def template_columns(template: str) -> list[str]:
    """The columns that a template names, each once.

    Raises:
        ValueError: braces that do not match, something else than a column in them, or no column.
    """
    columns = list(dict.fromkeys(column for _, column, _ in _parts(template) if column is not None))
    if not columns:
        raise ValueError(f"template {template!r} names no column; put one in braces, such as {{question}}")
    return columns


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """The text for one record, without white space around it.

    Args:
        row: texts, or lists of texts: `{column[0]}` takes one of a list, `{column}` joins it with spaces.

    Raises:
        ValueError: a column that is neither, or a list that is too short.
    """
    written = ""
    for literal, column, index in _parts(template):
        written += literal
        if column is not None:
            written += _text(row[column], column, index)
    return written.strip()


def _parts(template: str) -> list[tuple[str, str | None, int | None]]:
    """Literal text, the column behind it, and which item of that."""
    parts: list[tuple[str, str | None, int | None]] = []
    try:
        for literal, field, spec, conversion in Formatter().parse(template):
            found = None if field is None else _COLUMN.fullmatch(field)
            if field is not None and (found is None or spec or conversion):
                raise ValueError(
                    f"braces hold a column, such as {{question}} or {{summaries[0]}}, not {field!r}"
                )
            index = None if found is None or found[2] is None else int(found[2])
            parts.append((literal, None if found is None else found[1], index))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ for a brace itself") from error
    return parts


def _text(value: Any, column: str, index: int | None) -> str:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if is_list and index is not None:
        if index >= len(value):
            raise ValueError(f"column {column!r} has {len(value)} items, item {index} is asked for")
        value, is_list, index = value[index], False, None
    if is_list and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if not isinstance(value, str) or index is not None:
        wanted = "a list of texts" if index is not None else "a text or a list of texts"
        raise ValueError(f"column {column!r} must be {wanted}, got {type(value).__name__}")
    return value

"""Templates over a row's columns, as "Q: {question}": plain names in braces, so that a file never reaches further."""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter
from typing import Any


def parts_of(template: str) -> list[tuple[str, str | None]]:
    """The pieces of a template: text, and the column that follows it or None.

    Raises:
        ValueError: a brace is open, or a field is more than a column's name.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r:.60} is broken: {error}; write {{{{ and }}}} for braces") from None
    for _, field, form, conversion in pieces:
        if field is not None and (not field or field.isdigit() or set(field) & set(".[]") or form or conversion):
            shown = (field or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{{{shown}}} is more than the name of a column; write {{name}} alone")
    return [(text, field) for text, field, _, _ in pieces]


def columns_of(templates: Iterable[str]) -> list[str]:
    """The columns that templates use, each once."""
    return list(dict.fromkeys(field for template in templates for _, field in parts_of(template) if field))


def fill(template: str, row: dict[str, Any]) -> str | None:
    """A template with a row's values; None where one of them is null.

    Raises:
        ValueError: a column is missing, or holds a list or an object.
    """
    found = []
    for text, field in parts_of(template):
        found.append(text)
        if field is None:
            continue
        if field not in row:
            raise ValueError(f"there is no column {field!r}")
        value = row[field]
        if value is None:
            return None
        if isinstance(value, list | dict):
            raise ValueError(f"{field} is {described(value)}, where a template needs text or a number")
        found.append(str(value))
    return "".join(found)


def described(value: Any) -> str:
    """What a value is, in a user's words."""
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    kind = "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
    return kind if value is None or isinstance(value, list | dict) else f"{kind} ({value!r:.40})"

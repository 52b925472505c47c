"""Conversations from files that have them under other names, or in pieces: parts of a data definition."""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal

from transmla.errors import RecipeError
from transmla.recipe.base import Section

Role = Literal["system", "user", "assistant", "tool"]


class Message(Section):
    """One turn that is made of a row's columns. content: a Python format string over them."""

    role: Role
    content: str


class Turns(Section):
    """How a file's conversations are written.

    role, content: the keys of a turn. roles: a chat template's role by the file's (others are refused).
    system: column with the text of a first turn of the role `system`, which is left out where it is empty.
    replace: strings in contents and what takes their place, in this order.
    """

    role: str = "role"
    content: str = "content"
    roles: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
    system: str | None = None
    replace: dict[str, str] = {}


def message_columns(messages: list[Message]) -> list[str]:
    """The columns that the templates of `messages` use, each once."""
    fields = [field for turn in messages for _, field, _, _ in Formatter().parse(turn.content) if field]
    return list(dict.fromkeys(fields))


def build_messages(messages: list[Message], row: dict[str, Any]) -> list[dict[str, str]]:
    """A conversation, as chat templates take it, from the columns of a row."""
    return [{"role": turn.role, "content": turn.content.format(**row)} for turn in messages]


def read_turns(turns: Turns, conversation: list[dict[str, Any]], row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """A conversation, as chat templates take it, from one under the file's own names.

    Raises:
        RecipeError: a turn lacks one of the keys, or has a role that `roles` does not name.
    """
    found = []
    if turns.system is not None and row[turns.system]:
        found.append({"role": "system", "content": row[turns.system]})
    for turn in conversation:
        if turns.role not in turn or turns.content not in turn:
            raise RecipeError(
                key, f"a turn has the keys {', '.join(turn)}; correct turns.role and turns.content of the definition"
            )
        if turn[turns.role] not in turns.roles:
            raise RecipeError(key, f"a turn has the role {turn[turns.role]!r}; add it to turns.roles of the definition")
        content = turn[turns.content] or ""
        for old, new in turns.replace.items():
            content = content.replace(old, new)
        found.append({"role": turns.roles[turn[turns.role]], "content": content})
    return found

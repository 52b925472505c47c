"""Conversations: turns as chat templates take them, from files that write them otherwise or in pieces.

In a dataset a conversation is a list of roles and contents, and a column `more` with what else there is, as JSON: tool
calls, tools, contents in parts. A struct of Arrow's would give every tool call the keys of all others.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from pydantic import field_validator

from transmla.data.column_templates import columns_of, described, fill, parts_of
from transmla.recipe.base import Section

Role = Literal["system", "developer", "user", "assistant", "tool"]

Turn = dict[str, Any]

MORE = "more"  # column beside a conversation

FOREIGN = {"gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant"}


class Message(Section):
    """One turn that is made of a row's columns. content: a template over them."""

    role: Role
    content: str

    @field_validator("content")
    @classmethod
    def _plain(cls, value: str) -> str:
        parts_of(value)
        return value


class Turns(Section):
    """How a file's conversations are written.

    role, content: the keys of a turn. roles: a chat template's role by the file's (others are refused).
    system: column with the text of a first turn of the role `system`, which is left out where it is empty.
    replace: strings in contents and what takes their place, in this order.
    """

    role: str = "role"
    content: str = "content"
    roles: dict[str, Role] = {role: role for role in get_args(Role)}
    system: str | None = None
    replace: dict[str, str] = {}


def message_columns(messages: list[Message]) -> list[str]:
    """The columns that the templates of `messages` use, each once."""
    return columns_of(turn.content for turn in messages)


def build_messages(messages: list[Message], row: dict[str, Any]) -> list[Turn] | None:
    """A conversation from the columns of a row; None where one of them is null."""
    found: list[Turn] = []
    for turn in messages:
        content = fill(turn.content, row)
        if content is None:
            return None
        found.append({"role": turn.role, "content": content})
    return found


def read_turns(turns: Turns, conversation: Any, row: dict[str, Any]) -> list[Turn]:
    """A conversation, as chat templates take it, from a file's own. Keys that are null are left out at every depth.

    Raises:
        ValueError: a turn lacks a key, has a role that `roles` does not name, or no content.
    """
    found: list[Turn] = []
    if turns.system is not None and row.get(turns.system):
        if not isinstance(row[turns.system], str):
            raise ValueError(f"{turns.system} is {described(row[turns.system])}, not text")
        found.append({"role": "system", "content": row[turns.system]})
    if not isinstance(conversation, list):
        advice = "; write the list itself, not JSON in a string" if isinstance(conversation, str) else ""
        raise ValueError(f"the conversation is {described(conversation)}, not a list of turns{advice}")
    for number, turn in enumerate(conversation, 1):
        found.append(_turn(turns, turn, number))
    return found


def _turn(turns: Turns, turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {described(turn)}, not an object with {turns.role} and {turns.content}")
    rest = without_nulls(turn)
    role, content = rest.pop(turns.role, None), rest.pop(turns.content, None)
    if role is None or (content is None and turns.content not in turn and "tool_calls" not in rest):
        keys = ", ".join(map(str, turn)) or "no keys"
        advice = "turns.role and turns.content of the definition"
        if {"from", "value"} <= set(turn):
            advice = "the definition: turns: {role: from, content: value, roles: {human: user, gpt: assistant}}"
        raise ValueError(f"turn {number} has the keys {keys}; correct {advice}")
    if not isinstance(role, str) or role not in turns.roles:
        known = role if role in get_args(Role) else FOREIGN.get(str(role).lower(), "user")
        raise ValueError(
            f"turn {number} has the role {role!r:.40}; add it to turns.roles of the definition, as {{{role}: {known}}}"
        )
    if content is None and not rest.get("tool_calls"):
        raise ValueError(f"turn {number} ({role}) has no {turns.content}; leave the row out, or write it")
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"turn {number} ({role}): its {turns.content} is {described(content)}, not text")
    if isinstance(content, str):
        for old, new in turns.replace.items():
            content = content.replace(old, new)
    return {"role": turns.roles[role], "content": content} | rest


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at every depth: Arrow gives each struct the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The tools of a conversation: descriptions of functions, or JSON of them; none where the value is empty.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"the tools are {described(value)}, not a list or JSON of one") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"the tools are {described(value)}, not a list of objects")
    return without_nulls(value)


def pack(conversations: dict[str, list[Turn]], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a dataset for the conversations of a row, by column, and its tools."""
    found: dict[str, Any] = {}
    more: dict[str, Any] = {"tools": tools} if tools else {}
    for column, turns in conversations.items():
        found[column] = [{"role": turn["role"], "content": _text(turn)} for turn in turns]
        rest = [
            {key: value for key, value in turn.items() if key not in ("role", "content") or isinstance(value, list)}
            for turn in turns
        ]
        if any(rest):
            more[column] = rest
    return found | {MORE: json.dumps(more, ensure_ascii=False) if more else None}


def _text(turn: Turn) -> str | None:
    return turn["content"] if isinstance(turn["content"], str) else None


def unpack(row: dict[str, Any], column: str) -> list[Turn]:
    """The turns of a row's conversation, as they were packed, or as another dataset has them."""
    turns = [without_nulls(turn) for turn in row[column]]
    packed = row.get(MORE)
    rest = json.loads(packed).get(column) if packed else None
    return turns if rest is None else [turn | more for turn, more in zip(turns, rest, strict=True)]


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row's conversation."""
    packed = row.get(MORE)
    return json.loads(packed).get("tools", []) if packed else read_tools(row.get("tools"))

"""What comes of a row: the columns that trainers take, or nothing where the row is empty, or a reason why it is wrong.

A record has one of these sets of columns: `text`; `messages` and `more`; `prompt` and `completion` (texts, or
conversations with `more`); `problem` and `answer`. All of its columns are None where the row has nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transmla.data.column_templates import described, fill
from transmla.data.conversations import MORE, Turn, Turns, build_messages, pack, read_tools, read_turns
from transmla.data.definition import DataDefinition
from transmla.data.reading import Unreadable, rows_of

Record = dict[str, Any]

BEGINNING = 1_000_000  # bytes of a file that are read however many came before

COLUMNS = {
    "text": ("text",),
    "messages": ("messages", MORE),
    "completion": ("prompt", "completion", MORE),
    "problems": ("problem", "answer"),
}


def empty_record(definition: DataDefinition) -> Record:
    """The record of a row that has nothing to say."""
    return dict.fromkeys(COLUMNS[definition.kind])


def record_of(definition: DataDefinition, row: dict[str, Any]) -> Record | None:
    """The record of a row; None where the row is empty: a column that is needed is null, a text or conversation empty.

    Raises:
        ValueError: a column is missing or of another type than its use asks for.
    """
    if definition.messages:
        turns = build_messages(definition.messages, row)
        return None if turns is None else pack({"messages": turns}, [])
    if definition.template is not None:
        text = fill(_template_for(definition, row), row)
        return None if text is None else {"text": text}
    columns: dict[str, str] = {str(name): column for name, column in definition.columns.items()}
    values = {name: _value(row, column) for name, column in columns.items()}
    if any(value is None for value in values.values()):
        return None
    if definition.kind == "messages":
        return _messages(definition, values["messages"], row)
    if definition.kind == "completion":
        return _completion(definition, columns, values, row)
    if definition.kind == "problems":
        return _problem(columns, values)
    text = _text(values["text"], columns["text"])
    # Of pieces of one running text, an empty one is a blank line of it.
    return {"text": text} if text.strip() or definition.join is not None else None


def records(
    definition: DataDefinition, files: list[Path], *, limit: int | None = None, unseen: list[Path] | None = None
) -> Iterator[tuple[str, Record]]:
    """The records of local files, each with its place in words; empty ones too, with None in every column.

    Args:
        limit: bytes, unpacked, after which only the beginning of every further file is read.
        unseen: files that were not read to their end are added to it.

    Raises:
        Unreadable: a file or row cannot be used.
    """
    form: bool | None = None
    count = 0
    for file in files:
        size, allowed = 0, None if limit is None else max(limit, BEGINNING)
        for row in rows_of(file, columns=definition.read_columns(), separator=definition.separator, limit=allowed):
            if count == definition.rows:
                return
            count += 1
            size = row.size
            place = f"{file}, row {row.number}"
            try:
                record = record_of(definition, row.content)
            except ValueError as error:
                raise Unreadable(f"{place}: {error}") from None
            if record is not None and "prompt" in record:
                form = _same_form(record, form, place)
            yield place, record or empty_record(definition)
            if allowed is not None and size > allowed:
                if unseen is not None:
                    unseen.append(file)
                break
        limit = None if limit is None else limit - size


def _same_form(record: Record, form: bool | None, place: str) -> bool:
    turns = isinstance(record["prompt"], list)
    if form is not None and turns != form:
        raise Unreadable(f"{place}: its prompt is {'turns' if turns else 'text'}, that of rows before is not; make two")
    return turns


def _template_for(definition: DataDefinition, row: dict[str, Any]) -> str:
    assert definition.template is not None
    return next((text for column, text in definition.when_empty.items() if not row.get(column)), definition.template)


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"there is no column {column!r}; it has: {', '.join(sorted(map(str, row)))[:120]}")
    return row[column]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is {described(value)}, not text; mend the row, or make text of it by a template")
    return value


def _messages(definition: DataDefinition, value: Any, row: dict[str, Any]) -> Record | None:
    turns = read_turns(definition.turns or Turns(), value, row)
    return pack({"messages": turns}, _tools(definition, row)) if turns else None


def _completion(
    definition: DataDefinition, columns: dict[str, str], values: dict[str, Any], row: dict[str, Any]
) -> Record | None:
    parts: dict[str, Any] = {}
    if not any(isinstance(value, list) for value in values.values()):
        for name, value in values.items():
            parts[name] = _text(value, columns[name])
        return parts | {MORE: None} if any(parts.values()) else None
    for name, value in values.items():
        if not isinstance(value, list):
            raise ValueError(f"{columns[name]} is {described(value)}, and the other a list of turns")
        parts[name] = read_turns(Turns(), value, row)
    empty = next((name for name, turns in parts.items() if not turns), None)
    if empty is not None:
        raise ValueError(f"{columns[empty]} has no turn; leave the row out")
    return pack(parts, _tools(definition, row))


def _problem(columns: dict[str, str], values: dict[str, Any]) -> Record | None:
    problem = _text(values["problem"], columns["problem"])
    answer = values["answer"]
    if isinstance(answer, list | dict | bool):
        raise ValueError(f"{columns['answer']} is {described(answer)}, not text or a number")
    return {"problem": problem, "answer": str(answer)} if problem.strip() and str(answer).strip() else None


def _tools(definition: DataDefinition, row: dict[str, Any]) -> list[Turn]:
    return [] if definition.tools is None else read_tools(row.get(definition.tools))

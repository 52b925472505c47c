"""Definitions of datasets: a hub id or local files, columns, template, licence. See `data/*.yaml`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import PositiveInt, ValidationError, model_validator

from transmla.data.conversations import Message, Turns
from transmla.errors import RecipeError
from transmla.recipe.base import Section
from transmla.recipe.names import share

FORMATS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".jsonl.gz": "json", ".txt.gz": "text"}

# What trl's trainers know: language modeling, conversations, prompt with completion. The last is no text to train on.
ROLES = ({"text"}, {"messages"}, {"prompt", "completion"}, {"problem", "answer"})


def format_of(file: Path) -> str | None:
    """The format of a file by its name, a value of `FORMATS`; None where it is unknown."""
    return next((kind for suffix, kind in FORMATS.items() if file.name.endswith(suffix)), None)


class DataDefinition(Section):
    """One dataset.

    hub or path: where it is; a relative path is relative to the definition file. `path` may be a glob.
    subset, split, revision: of a hub dataset. files: which of its files, where its layout says too little (a glob).
    rows: only the first so many rows, streamed, so that no more is downloaded.
    local: name under which the directory `TRANSMLA_DATA`, where that is set, may hold a copy to use instead.
    columns: which of the file's columns is `text`, `messages`, or `prompt` and `completion`; or `problem` and `answer`
        of a set that a recipe names as `problems`.
    template: a Python format string over the file's columns that makes `text`, instead of columns.
    when_empty: by column, the template to use instead in rows where that column is empty.
    messages: turns of a conversation, each a role and a template over the file's columns, instead of columns; a row in
        which one of these columns is null is left out.
    turns: how the conversations in the column of `columns.messages` are written, where not as role and content.
    cut: `train` for the first nine tenths of the rows, `test` for the rest, where there is no split.
    join: rows are pieces of one running text: windows of tokens are cut from the rows joined by this.
    separator: for `.txt` and `.txt.gz` files, what stands between two rows.
    synthetic: a model wrote the `text`. The cross-entropy of a distillation leaves its tokens out: how people write is
        not in them.
    """

    hub: str | None = None
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | None = None
    rows: PositiveInt | None = None
    local: str | None = None
    columns: dict[Literal["text", "messages", "prompt", "completion", "problem", "answer"], str] = {}
    template: str | None = None
    when_empty: dict[str, str] = {}
    messages: list[Message] = []
    turns: Turns | None = None
    cut: Literal["train", "test"] | None = None
    join: str | None = None
    separator: str | None = None
    synthetic: bool = False
    licence: str = "unknown"
    about: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> DataDefinition:
        if (self.hub is None) == (self.path is None):
            raise ValueError("give exactly one of hub and path")
        if self.messages and (self.template is not None or self.columns or self.turns is not None):
            raise ValueError("messages makes the conversation; leave columns, template and turns out")
        if self.turns is not None and set(self.columns) != {"messages"}:
            raise ValueError("turns says how a column of conversations is written: name it, columns: {messages: ...}")
        if self.template is None and not self.messages and set(self.columns) not in ROLES:
            raise ValueError(
                "columns must name text, or messages, or prompt and completion, or problem and answer (or give a "
                "template)"
            )
        if self.synthetic and self.template is None and "text" not in self.columns:
            raise ValueError("synthetic is for text; of conversations and completions the columns say what is learnt")
        if self.join is not None and self.template is None and "text" not in self.columns:
            raise ValueError("join is for text; conversations stay apart")
        return self

    @property
    def kind(self) -> str:
        """What the rows are, as trainers take them: `text`, `messages` or `completion`; or `problems`."""
        if self.messages or "messages" in self.columns:
            return "messages"
        if self.template is not None or "text" in self.columns:
            return "text"
        return "completion" if "prompt" in self.columns else "problems"


def find_definition(name: str, key: str) -> tuple[DataDefinition, Path]:
    """The definition called `name` and the folder its paths are relative to.

    Args:
        name: a shipped definition, or the path of a `.yaml` definition, or of a `.jsonl`, `.parquet` or `.txt` file
            with a `text` column (`.jsonl.gz` and `.txt.gz` likewise); `NAME#train` or `NAME#test` for the first nine
            tenths of its rows or the rest.
        key: recipe key, for errors.
    """
    name, sign, cut = name.partition("#")
    if sign and cut not in ("train", "test"):
        raise RecipeError(key, f"{name}#{cut}: what follows # is train (the first nine tenths) or test (the rest)")
    definition, folder = _read_definition(name, key)
    if sign:
        if definition.cut is not None:
            raise RecipeError(key, f"{name} is cut already; leave #{cut} out")
        definition = definition.model_copy(update={"cut": cut})
    return local_copy(definition, key), folder


def local_copy(definition: DataDefinition, key: str) -> DataDefinition:
    """The definition with its hub replaced by the user's own copy below `TRANSMLA_DATA`, where there is one.

    `NAME/` holds files whose names begin with the split (`train*`, and `test*` or `validation*`); `NAME.jsonl`,
    `NAME.parquet` or `NAME.txt` holds everything, and so may a directory with `train*` alone: such a copy is cut, nine
    tenths to calibrate on and one tenth to test on, so that the two never meet.

    Raises:
        RecipeError: `TRANSMLA_DATA` is no directory, or its copy has no file that can be read.
    """
    root = os.environ.get("TRANSMLA_DATA")
    if not root or definition.local is None:
        return definition
    if not Path(root).is_dir():
        raise RecipeError(key, f"TRANSMLA_DATA={root} is no directory; correct or unset it")
    testing = definition.cut == "test" or (definition.cut is None and definition.split != "train")
    folder = Path(root).resolve() / definition.local
    train = _pattern(folder, "train")
    test = _pattern(folder, "test") or _pattern(folder, "validation")
    whole = _pattern(folder.parent, f"{definition.local}.")
    if train and test:
        path, cut = (test if testing else train), None
    elif either := train or whole:
        path, cut = either, "test" if testing else "train"
    elif folder.is_dir():
        raise RecipeError(key, f"{folder} has no file train*.jsonl, train*.parquet or train*.txt")
    else:
        return definition
    return definition.model_copy(
        update={"hub": None, "subset": None, "files": None, "revision": None, "path": path, "cut": cut}
    )


def _pattern(folder: Path, start: str) -> str | None:
    """A glob for the files of the first known format whose names begin so, or None."""
    for suffix in FORMATS:
        pattern = f"{start}*{suffix}" if not start.endswith(".") else f"{start[:-1]}{suffix}"
        if any(folder.glob(pattern)):
            return str(folder / pattern)
    return None


def _read_definition(name: str, key: str) -> tuple[DataDefinition, Path]:
    path = Path(name)
    if format_of(path) is not None:
        return DataDefinition(path=str(path.resolve()), columns={"text": "text"}), Path.cwd()
    file = path if path.suffix in (".yaml", ".yml") else share("data") / f"{name}.yaml"
    if not file.is_file():
        known = sorted(item.stem for item in share("data").glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; there are: {', '.join(known)}"
        raise RecipeError(key, f"no dataset {name!r}{hint}")
    try:
        return DataDefinition.model_validate(yaml.safe_load(file.read_text()) or {}), file.parent
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(key, f"{file}: {where} {first['msg'].removeprefix('Value error, ')}") from None

"""Definitions of datasets: a hub id or local files, columns, template, licence. See `data/*.yaml`."""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, ValidationError, model_validator

from transmla.data.column_templates import columns_of, parts_of
from transmla.data.conversations import Message, Turns, message_columns
from transmla.data.reading import FORMATS, format_of
from transmla.errors import RecipeError
from transmla.recipe.base import Section
from transmla.recipe.names import share
from transmla.recipe.yaml_limits import read_tree

# What trl's trainers know: language modeling, conversations, prompt with completion. The last is no text to train on.
ROLES = ({"text"}, {"messages"}, {"prompt", "completion"}, {"problem", "answer"})

OTHER_FORMATS = (".csv", ".tsv", ".json", ".json.gz", ".zip", ".zst", ".xz", ".bz2", ".arrow", ".md", ".html", ".pdf")


def _plain(template: str) -> str:
    parts_of(template)
    return template


Template = Annotated[str, AfterValidator(_plain)]


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
    tools: the column with the tools of a conversation, where the file has one; None: they are left out.
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
    local: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    columns: dict[Literal["text", "messages", "prompt", "completion", "problem", "answer"], str] = {}
    template: Template | None = None
    when_empty: dict[str, Template] = {}
    messages: list[Message] = []
    turns: Turns | None = None
    tools: str | None = "tools"
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
        if self.when_empty and self.template is None:
            raise ValueError("when_empty is for a template; give one, or leave it out")
        if "tools" in self.model_fields_set and self.kind not in ("messages", "completion"):
            raise ValueError("tools is for conversations; leave it out")
        if self.separator == "":
            raise ValueError("separator is empty; give the text that stands between two rows, or leave it out")
        return self

    @property
    def kind(self) -> str:
        """What the rows are, as trainers take them: `text`, `messages` or `completion`; or `problems`."""
        if self.messages or "messages" in self.columns:
            return "messages"
        if self.template is not None or "text" in self.columns:
            return "text"
        return "completion" if "prompt" in self.columns else "problems"

    def needed_columns(self) -> list[str]:
        """The columns that every file must have, each once."""
        templates = [*self.when_empty.values(), *([self.template] if self.template else [])]
        system = [self.turns.system] if self.turns is not None and self.turns.system is not None else []
        tools = [self.tools] if "tools" in self.model_fields_set and self.tools is not None else []
        own = [*self.columns.values(), *self.when_empty, *columns_of(templates), *message_columns(self.messages)]
        return list(dict.fromkeys([*own, *system, *tools]))

    def read_columns(self) -> list[str]:
        """The columns that are read, where they are there."""
        tools = [self.tools] if self.tools is not None and self.kind in ("messages", "completion") else []
        return list(dict.fromkeys([*self.needed_columns(), *tools]))


def find_definition(name: str, key: str) -> tuple[DataDefinition, Path]:
    """The definition called `name` and the folder its paths are relative to.

    Args:
        name: a shipped definition, or the path of a `.yaml` definition, or of a `.jsonl`, `.parquet` or `.txt` file
            with a `text` column (`.jsonl.gz` and `.txt.gz` likewise); `NAME#train` or `NAME#test` for the first nine
            tenths of its rows or the rest. `~` is the user's home.
        key: recipe key, for errors.
    """
    whole, sign, cut = name.rpartition("#")
    if sign and cut not in ("train", "test") and not os.path.lexists(name):
        raise RecipeError(key, f"{name}: what follows # is train (the first nine tenths) or test (the rest)")
    is_cut = bool(sign) and cut in ("train", "test") and not os.path.lexists(name)
    definition, folder = _read_definition(whole if is_cut else name, key)
    if is_cut:
        if definition.cut is not None:
            raise RecipeError(key, f"{whole} is cut already; leave #{cut} out")
        definition = definition.model_copy(update={"cut": cut})
    return local_copy(definition, key), folder


def local_files(definition: DataDefinition, folder: Path, key: str) -> list[Path]:
    """The files of a local dataset, sorted; empty for a hub dataset.

    A path that is there means itself, whatever letters it has; otherwise it is a glob.

    Raises:
        RecipeError: there is none, or their format is unknown.
    """
    if definition.path is None:
        return []
    path = folder / _expanded(definition.path, key)
    if os.path.isdir(path):
        raise RecipeError(key, f"{path} is a folder; name a file, or in a definition a glob, as {path.name}/*.jsonl")
    if os.path.lexists(path) or not set(definition.path) & set("*?["):
        files = [path]
    else:
        found = glob.glob(str(_expanded(definition.path, key)), root_dir=folder, recursive=True)
        files = sorted(folder / name for name in found if not os.path.isdir(folder / name))
    if not files or not all(os.path.isfile(file) for file in files):
        missing = next((file for file in files if not os.path.isfile(file)), path)
        kind = "a link that leads nowhere" if os.path.islink(missing) else "no file"
        what = f"{missing} is {kind}" if os.path.lexists(missing) else f"no such file: {missing}"
        raise RecipeError(key, f"{what}; correct the path in the data definition")
    strange = next((file for file in files if format_of(file) is None), None)
    if strange is not None:
        raise RecipeError(key, f"{strange}: unknown format; use one of {', '.join(FORMATS)}")
    return files


def source_of(definition: DataDefinition, folder: Path, key: str) -> tuple[Any, ...]:
    """Whose rows a definition counts, whatever its files are called, and before it is cut."""
    if definition.hub is not None:
        return definition.hub, definition.subset, definition.split, definition.files, definition.revision
    return tuple(os.path.realpath(file) for file in local_files(definition, folder, key))


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
    if not os.path.isdir(os.path.expanduser(root)):
        raise RecipeError(key, f"TRANSMLA_DATA={root} is no directory; correct or unset it")
    testing = definition.cut == "test" or (definition.cut is None and definition.split != "train")
    folder = Path(os.path.realpath(os.path.expanduser(root))) / definition.local
    if os.path.islink(folder) and not os.path.exists(folder):
        raise RecipeError(key, f"{folder} is a link that leads nowhere; mend or remove it")
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
        if glob.glob(pattern, root_dir=folder):
            return os.path.join(glob.escape(str(folder)), pattern)
    return None


def _expanded(path: str, key: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecipeError(key, f"{path}: there is no such home; write the path out") from None


def _read_definition(name: str, key: str) -> tuple[DataDefinition, Path]:
    if not name.strip() or "\0" in name:
        raise RecipeError(key, "a dataset has an empty name; name one")
    path = _expanded(name, key)
    if format_of(path) is not None or os.path.isdir(path):
        return DataDefinition(path=str(path), columns={"text": "text"}), Path.cwd()
    if path.suffix not in (".yaml", ".yml"):
        return _shipped(name, path, key)
    if not os.path.isfile(path):
        raise RecipeError(key, f"no such file: {path}; correct the name of the definition")
    return _validated(path, key)


def _shipped(name: str, path: Path, key: str) -> tuple[DataDefinition, Path]:
    known = {item.stem: item for item in share("data").glob("*.yaml")}
    if name in known:
        return _validated(known[name], key)
    if os.path.isfile(path) or name.lower().endswith(OTHER_FORMATS):
        raise RecipeError(key, f"{name}: unknown format; use one of {', '.join(FORMATS)}, or a definition (.yaml)")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else f"; there are: {', '.join(sorted(known))}"
    raise RecipeError(key, f"no dataset {name!r:.80}{hint}")


def _validated(file: Path, key: str) -> tuple[DataDefinition, Path]:
    tree = read_tree(file, key)
    if not isinstance(tree, dict) or not tree:
        raise RecipeError(key, f"{file} is no data definition; write keys and values, as path: and columns:")
    try:
        return DataDefinition.model_validate(tree), file.parent
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(key, f"{file}: {where} {first['msg'].removeprefix('Value error, ')}") from None

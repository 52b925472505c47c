"""Names that become folders: of a recipe, of what it writes, and of what it measures."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

LONGEST = 120  # bytes; a file system allows 255, and temporary names are longer
RESERVED = ".parts"  # ends the folder beside a name's own, where its samples lie
ALLOWED = r"\w.+=-"


def check_folder_name(name: str) -> str:
    """The name, when a folder can be called so.

    Raises:
        ValueError: it would lead elsewhere, hide, or be too long.
    """
    if not re.fullmatch(rf"\w[{ALLOWED}]*", name) or len(name.encode()) > LONGEST:
        raise ValueError(
            f"it names a folder: use letters, digits and any of . _ + = -, beginning with a letter or digit, at most "
            f"{LONGEST} bytes"
        )
    if name.endswith(RESERVED):
        raise ValueError(f"names that end in {RESERVED} are this program's own; choose another")
    return name


def as_folder_name(text: str) -> str:
    """The nearest name to a text, as the stem of a file."""
    return re.sub(rf"[^{ALLOWED}]+", "_", text).lstrip(".+=-") or "recipe"


FolderName = Annotated[str, AfterValidator(check_folder_name)]


PART = 255  # bytes of a name in a path, as Linux has it


def check_path(path: str) -> str:
    """The path, when a file or folder can have it.

    Raises:
        ValueError: it is empty, has characters that nobody sees, or a part that is too long.
    """
    if not path.strip() or not path.isprintable():
        raise ValueError("it is empty, or has characters that cannot be seen; correct it")
    if any(len(part.encode()) > PART for part in path.split("/")):
        raise ValueError(f"a part of it has more than {PART} bytes; correct it")
    return path


PathText = Annotated[str, AfterValidator(check_path)]  # a path, or another name that may be one

"""The files of a directory's weights and what their headers say; no model is made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from transmla.errors import RecipeError
from transmla.sources.safetensors_header import FLOATS, DamagedFileError, Stored, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth")
AGAIN = "download or save the model again"


def check_headers(folder: Path, key: str) -> dict[str, Stored]:
    """All tensors of a directory by name, in a number format that models are trained in. key: for errors.

    Raises:
        RecipeError: files are missing or damaged, or tensors quantised.
    """
    stored = read_headers(folder, key)
    quantised = [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]
    if quantised:
        kinds = ", ".join(sorted({stored[name].dtype for name in quantised}))
        raise RecipeError(
            key, f"{listed(quantised)} of {folder} are quantised ({kinds}); name the model that it was made of"
        )
    return stored


def weight_files(folder: Path, key: str, remedy: str = AGAIN) -> list[Path]:
    """The files that hold a directory's weights, as transformers chooses them. key, remedy: for errors.

    Raises:
        RecipeError: there are none in safetensors, or the index is broken.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            return [folder / name for name in indexed_files((folder / INDEX).read_bytes())]
        except ValueError as error:
            raise RecipeError(key, f"{folder / INDEX}: {error}; {remedy}") from None
    raise RecipeError(key, f"{folder} {without_weights(path.name for path in folder.iterdir())}")


def indexed_files(content: bytes) -> list[str]:
    """The files that an index names, each a relative path below its folder.

    Raises:
        ValueError: it is no index.
    """
    try:
        files = sorted(set(json.loads(content)["weight_map"].values()))
        paths = [PurePosixPath(file) for file in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is no index of weights") from None
    for path in paths:
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(f"it names {str(path)!r}, which is no safetensors file of its folder")
    if not files:
        raise ValueError("it names no file")
    return files


def without_weights(names: Iterable[str]) -> str:
    """Why a folder or repository with these files, which has no weights in safetensors, is refused."""
    names = list(names)
    if pickled := sorted(name for name in names if name.endswith(PICKLED)):
        return (
            f"has pickled weights alone ({pickled[0]}), which may hold code and are not read; convert them to "
            "safetensors first: load them with transformers, save_pretrained"
        )
    if packed := sorted(name for name in names if name.endswith(".gguf")):
        return f"has no safetensors weights, but a GGUF; give the path of a file such as {packed[0]} instead"
    if other := sorted(name for name in names if name.endswith(".safetensors")):
        return f"has neither {SINGLE} nor {INDEX} (but {other[0]}); save the model with transformers"
    return f"has no weights: neither {SINGLE} nor {INDEX}; {AGAIN}"


def read_headers(folder: Path, key: str, remedy: str = AGAIN) -> dict[str, Stored]:
    """All tensors of a directory by name. key, remedy: for errors.

    Raises:
        RecipeError: a file is not there or damaged, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder, key, remedy):
        try:
            header = read_header(file)
        except DamagedFileError as error:
            raise RecipeError(key, f"{error}; {remedy}") from None
        if twice := found.keys() & header.keys():
            raise RecipeError(key, f"{file} repeats {listed(twice)} of another file; {remedy}")
        found |= header
    return found


def listed(names: Iterable[str], most: int = 3) -> str:
    """How many names there are, and the first of them."""
    names = sorted(names)
    more = ", ..." if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:most])}{more})"

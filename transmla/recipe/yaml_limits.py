"""YAML read with limits: a few lines of anchors can stand for more items than any machine holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from transmla.errors import RecipeError

LARGEST = 2**18  # bytes of a file; the shipped recipes have a few thousand
NODES = 5_000  # values and lists, every alias counted with all that it stands for
DEPTH = 40

NOT_YAML = "is not valid YAML"


def check_depth(key: str, text: str) -> None:
    """Refuse lists and mappings of the command line that are nested without sense: Hydra reads them by recursion.

    Raises:
        RecipeError: they are.
    """
    depth = deepest = 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        deepest = max(deepest, depth)
    if deepest > DEPTH:
        raise RecipeError(key, f"it is nested too deeply; use at most {DEPTH} levels")


def read_tree(file: Path, key: str = "recipe") -> Any:
    """What a recipe's or a data definition's file holds, before anything in it is resolved.

    Args:
        key: for errors.

    Raises:
        RecipeError: it is too large, too deep, contains itself, says a key twice, or is no YAML text.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(key, f"cannot read {file.name}: {error.strerror}") from None
    if len(content) > LARGEST:
        raise RecipeError(key, f"{file.name} has {len(content):,} bytes, at most {LARGEST:,} are read; shorten it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(key, f"{file.name} {NOT_YAML}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    return tree_of(text, file.name, key)


def tree_of(text: str, name: str, key: str) -> Any:
    """What a YAML text holds. name, key: for errors.

    Raises:
        RecipeError: as `read_tree`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_size(node, name, key)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(key, f"{name} {NOT_YAML}: {_what_and_where(error)}") from None
    except RecursionError:  # of PyYAML's own, before the depth can be counted
        raise RecipeError(key, f"{name} is nested too deeply; use at most {DEPTH} levels") from None
    except RecipeError:
        raise
    except ValueError as error:  # a date such as 2024-99-99
        raise RecipeError(key, f"{name} {NOT_YAML}: {' '.join(str(error).split())}") from None


def _what_and_where(error: yaml.YAMLError) -> str:
    """An error of PyYAML without the line that it quotes, which may hold anything."""
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" (line {mark.line + 1})"
    return (" ".join(str(part) for part in parts if part) or type(error).__name__) + where


def _check_size(root: yaml.Node, name: str, key: str) -> None:
    sizes: dict[int, int] = {}  # by node, all aliases expanded

    def size(node: yaml.Node, depth: int) -> int:
        if depth > DEPTH:
            raise RecipeError(key, f"{name} is nested too deeply, or contains itself; use at most {DEPTH} levels")
        if id(node) not in sizes:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
                double = _double([part for part, _ in node.value])
                if double is not None:
                    raise RecipeError(
                        key, f"{name} says {double!r:.60} twice (line {node.start_mark.line + 1}); leave one"
                    )
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(node)]

    if size(root, 0) > NODES:
        raise RecipeError(key, f"{name} has more than {NODES:,} values, aliases expanded; shorten it")


def _double(keys: list[yaml.Node]) -> str | None:
    """A key that a mapping has twice, of which YAML would take the last."""
    names = [key.value for key in keys if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    return next((name for name in names if names.count(name) > 1), None)

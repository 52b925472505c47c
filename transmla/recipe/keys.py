"""Keys that no recipe has, found before Hydra composes one: importing and running Hydra takes longer than all the
rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from transmla.errors import RecipeError
from transmla.recipe.names import files_below
from transmla.recipe.schema import Recipe
from transmla.recipe.secrets import leaves
from transmla.recipe.stages import STAGES
from transmla.recipe.trainer_keys import RESERVED_TRAINER_KEYS, suggest, trainer_keys
from transmla.recipe.writing import WRITINGS
from transmla.recipe.yaml_limits import read_tree

KINDS: dict[str, dict[str, Any]] = {"recover": STAGES, "write": WRITINGS}
HYDRAS_OWN = ("defaults", "hydra")
MISSING = "???"  # OmegaConf's mark of a value that others must give
LONGEST = 1000  # items of a list that are looked at; the schema looks at all


def unknown_key(key: str, known: Iterable[str]) -> RecipeError:
    """The refusal of a dotted key that its section does not have."""
    leaf = key.rsplit(".", 1)[-1]
    return RecipeError(key, f"unknown key{suggest(leaf, known)}; remove it or correct its name")


def check_override(key: str) -> None:
    """Refuse a dotted key of the command line that no recipe has.

    Raises:
        RecipeError: with the nearest key that there is.
    """
    parts = key.split(".")
    if parts[0] in KINDS and len(parts) > 2 and parts[1].isdigit():
        _check_stage_key(parts)
        return
    section: Any = Recipe
    for depth, part in enumerate(parts):
        if not _is_section(section):
            return
        if part not in section.model_fields:
            raise unknown_key(".".join(parts[: depth + 1]), section.model_fields)
        section = section.model_fields[part].annotation


def _check_stage_key(parts: Sequence[str]) -> None:
    """`recover.N.KEY` and `write.N.KEY`, of whatever kind item N is."""
    kinds = KINDS[parts[0]].values()
    known = {name: kind for kind in kinds for name in kind.model_fields}
    if parts[2] not in known:
        raise unknown_key(".".join(parts[:3]), known)
    if parts[0] == "recover" and parts[2] == "trainer" and len(parts) == 4:
        types = {name: None for kind in kinds for name in trainer_keys(kind.trainer_config)}
        if parts[3] not in types and parts[3] not in RESERVED_TRAINER_KEYS:
            raise RecipeError(".".join(parts), f"is not a key of trl's SFTConfig{suggest(parts[3], types)}")


def check_file(file: Path, given: Iterable[str] = ()) -> None:
    """Refuse a recipe's file that cannot be read, or names a key which no recipe has; and so for the files beside it
    that it builds on.

    Args:
        given: keys of the command line, which a file may leave to it as `???`.

    Raises:
        RecipeError: with the nearest key that there is; the file is too large, too deep, builds on itself, or leaves a
            value out.
    """
    for path, value in leaves(_check_file(file, ())):
        key = ".".join(map(str, path))
        if value == MISSING and not any(key == name or key.startswith(f"{name}.") for name in given):
            raise RecipeError(key, f"{MISSING} stands for a value that is missing; give one")


def _check_file(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    tree = read_tree(file)
    if tree is None:
        return {}  # the schema says what is missing
    if not isinstance(tree, dict):
        raise RecipeError("recipe", f"{file.name} holds no keys; a recipe is a mapping, key: value")
    _check_tree({key: value for key, value in tree.items() if key not in HYDRAS_OWN}, Recipe, "")
    for other in files_below(file.parent, tree.get("defaults")):
        if other in (file, *above):
            raise RecipeError("defaults", f"{other.name} builds on itself; remove it from the defaults of {file.name}")
        if other.parent == file.parent:  # a file of a group holds one section, which the schema checks
            _check_file(other, (file, *above))
        else:
            read_tree(other)
    return tree


def _check_tree(tree: dict[str, Any], section: Any, prefix: str) -> None:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in section.model_fields:
            raise unknown_key(dotted, section.model_fields)
        below = section.model_fields[key].annotation
        if isinstance(value, dict) and _is_section(below):
            _check_tree(value, below, f"{dotted}.")
        elif isinstance(value, list) and dotted in KINDS:
            for index, item in enumerate(value[:LONGEST]):
                kind = KINDS[dotted].get(item["kind"]) if isinstance(item, dict) and _named(item) else None
                if kind is not None:
                    _check_tree(item, kind, f"{dotted}.{index}.")


def _named(item: dict[str, Any]) -> bool:
    return isinstance(item.get("kind"), str)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

"""Hydra's part: a recipe's file with its defaults and overrides as one plain tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transmla.errors import RecipeError
from transmla.recipe.interpolations import interpolations
from transmla.recipe.names import share
from transmla.recipe.secrets import check_interpolations


@dataclass(frozen=True)
class Composed:
    """A recipe as a plain tree. values: interpolations resolved. written: the values that stand as interpolations, by
    their place."""

    values: dict[str, Any]
    written: dict[tuple[str | int, ...], str]


def compose_tree(file: Path, recipe: str, chosen: list[str], assigned: list[str]) -> Composed:
    """The values of a recipe, and what stands for them.

    Args:
        file: of the recipe. recipe: as the user named it.
        chosen: overrides for Hydra's composition (groups, `+`, `~`). assigned: `key=value`, set afterwards.

    Raises:
        RecipeError: broken YAML, a missing default, an index beyond a list, an interpolation of nothing or of a secret.
    """
    tree = _composed(file, recipe, chosen)
    for override in assigned:
        _assign(tree, override)
    try:
        raw = _plain(OmegaConf.to_container(tree, resolve=False))
        written = interpolations(raw)
        check_interpolations(raw)
        return Composed(_plain(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)), written)
    except OmegaConfBaseException as error:
        raise RecipeError(error.full_key or "recipe", str(error).splitlines()[0]) from None
    except RecursionError:  # an interpolation that leads back to itself
        raise RecipeError("recipe", "an interpolation refers to itself; write the value out") from None


def _plain(tree: Any) -> dict[str, Any]:
    assert isinstance(tree, dict), "a recipe's file is a mapping"
    return {str(key): value for key, value in tree.items()}


def _composed(file: Path, recipe: str, overrides: list[str]) -> DictConfig:
    shipped = share("recipes")
    inside = file.is_relative_to(shipped)
    folder = shipped if inside else file.parent
    name = file.relative_to(folder).as_posix().removesuffix(file.suffix)
    search = [] if folder == shipped else [f"hydra.searchpath=[file://{shipped}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return compose(config_name=name, overrides=[*search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError("recipe", " ".join(str(error).split())) from None
    except Exception as error:  # YAML errors carry no common base with Hydra's
        if type(error).__module__.startswith("yaml"):
            raise RecipeError("recipe", f"{recipe} is not valid YAML: {' '.join(str(error).split())}") from None
        raise


def _assign(tree: DictConfig, override: str) -> None:
    """Set one dotted key, list items by their index. Whether the key may exist is the schema's business."""
    key, _, text = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.is_sweep_override():
            raise RecipeError(key, f"{text} means several runs; give one value, or a list as [a,b]")
        value: Any = parsed.value()
    except HydraException as error:
        if text[:1] in "[{'\"":
            raise RecipeError(key, f"cannot read the value: {' '.join(str(error).split())[:200]}") from None
        value = text  # Hydra's grammar has no bare `==`, as in pypi:PACKAGE==VERSION
    node: Any = tree
    *parents, leaf = key.split(".")
    OmegaConf.set_struct(tree, False)
    for depth, part in enumerate(parents):
        below = _item(node, part, ".".join(parents[: depth + 1]))
        if below is None:
            node[part] = {}
            below = node[part]
        if not isinstance(below, DictConfig | ListConfig):
            raise RecipeError(key, f"{'.'.join(parents[: depth + 1])} is a single value, it has no key {leaf}")
        node = below
    if isinstance(node, ListConfig):
        _item(node, leaf, key)
        node[int(leaf)] = value
    else:
        node[leaf] = value


def _item(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, ListConfig):
        return node.get(part)
    if not len(node):
        raise RecipeError(key, "the list is empty; give it whole, as [...]")
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(key, f"the list has {len(node)} items: use an index from 0 to {len(node) - 1}")
    return node[int(part)]

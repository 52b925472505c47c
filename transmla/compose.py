"""From a recipe's name and command-line overrides to a validated `Recipe`, through Hydra's compose API."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transmla.errors import RecipeError
from transmla.recipe import Recipe, validate_recipe

PACKAGE = Path(__file__).resolve().parent


def share(folder: str) -> Path:
    """The directory `recipes` or `data` that ships with the project: beside the package, or inside a wheel."""
    installed = PACKAGE / "_share" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


ZOO = "zoo"  # the folder of recipes that convert a published model and do nothing else


def recipe_names() -> list[str]:
    """Names of all shipped recipes, sorted, then those of the model zoo, `zoo/NAME` (`model/` and `_base` are none)."""
    found = [sorted(share("recipes").glob(pattern)) for pattern in ("*.yaml", f"{ZOO}/*.yaml")]
    paths = [path.relative_to(share("recipes")) for part in found for path in part if not path.stem.startswith("_")]
    return [path.as_posix().removesuffix(".yaml") for path in paths]


def listed_names() -> str:
    """The recipes in one line; of the zoo only how many there are."""
    names = recipe_names()
    zoo = [name for name in names if name.startswith(f"{ZOO}/")]
    return ", ".join(name for name in names if name not in zoo) + f", and {len(zoo)} below {ZOO}/ (transmla {ZOO} --list)"


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Compose and validate a recipe.

    Args:
        recipe: name of a shipped recipe, or the path of a YAML file, which may use the shipped groups and `_base`.
        overrides: Hydra overrides. `a.b=1` sets a value, `model=qwen2.5_7b_instruct` chooses from a group,
            `recover.0.tokens=4096` changes one stage of the list, `~a.b` removes a key.

    Raises:
        RecipeError: unknown recipe, unknown key, wrong type, broken YAML.
    """
    groups = {path.name: _choices(path) for path in share("recipes").iterdir() if path.is_dir() and path.name != ZOO}
    chosen, assigned = [], []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not key or (not sign and not override.startswith("~")):
            raise RecipeError(override, "an override has the form key.sub=value")
        (chosen if value in groups.get(key, ()) or key[0] in "+~" else assigned).append(override)
    tree = _compose(recipe, chosen)
    for override in assigned:
        _assign(tree, override)
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError("recipe", " ".join(str(error).split())) from None
    assert isinstance(plain, dict)
    plain.setdefault("name", Path(recipe).stem)
    return validate_recipe(plain)


def _choices(group: Path) -> set[str]:
    return {path.relative_to(group).as_posix().removesuffix(".yaml") for path in group.rglob("*.yaml")}


def _compose(recipe: str, overrides: list[str]) -> DictConfig:
    shipped = share("recipes")
    path = Path(recipe)
    folder, name = shipped, recipe
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError("recipe", f"no such file: {recipe}; give a path to a YAML file or a shipped name")
        folder, name = path.resolve().parent, path.stem
    elif recipe not in recipe_names():
        known = recipe_names()
        same = [name for name in known if name.rpartition("/")[2] == recipe]  # zoo/ was left out
        close = same or difflib.get_close_matches(recipe, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError("recipe", f"unknown recipe {recipe!r}{hint}; there are: {listed_names()}")
    GlobalHydra.instance().clear()
    search = [] if folder == shipped else [f"hydra.searchpath=[file://{shipped}]"]
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
    from hydra.core.override_parser.overrides_parser import OverridesParser

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
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(key, f"the list has {len(node)} items: use an index from 0 to {len(node) - 1}")
    return node[int(part)]

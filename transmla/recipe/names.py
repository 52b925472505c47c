"""Which recipes there are, and where a named one lies."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transmla.errors import RecipeError
from transmla.recipe.folder_name import check_path

PACKAGE = Path(__file__).resolve().parents[1]
ZOO = "zoo"  # the folder of recipes that convert a published model and do nothing else


def share(folder: str) -> Path:
    """A directory that ships with the project (`recipes`, `data`, `accelerate_configs`): beside the package, or inside
    a wheel."""
    installed = PACKAGE / "_share" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


def files_below(folder: Path, defaults: Any) -> list[Path]:
    """Files beside a recipe that its `defaults` name, where they are there: `name`, and `group: name`."""
    found = []
    for entry in defaults if isinstance(defaults, list) else []:
        named = [entry] if isinstance(entry, str) else entry.items() if isinstance(entry, dict) else []
        for name in named:
            path = folder / ("/".join(map(str, name)) if isinstance(name, tuple) else name)
            file = path.with_name(f"{path.name.removesuffix('.yaml')}.yaml")
            if not path.is_absolute() or folder in path.parents:
                found += [file] if file.is_file() else []
    return found


def recipe_names() -> list[str]:
    """Names of all shipped recipes, sorted, then those of the model zoo, `zoo/NAME` (`model/` and `_base` are none)."""
    found = [sorted(share("recipes").glob(pattern)) for pattern in ("*.yaml", f"{ZOO}/*.yaml")]
    paths = [path.relative_to(share("recipes")) for part in found for path in part if not path.stem.startswith("_")]
    return [path.as_posix().removesuffix(".yaml") for path in paths]


def listed_names() -> str:
    """The recipes in one line; of the zoo only how many there are."""
    names = recipe_names()
    zoo = [name for name in names if name.startswith(f"{ZOO}/")]
    plain = ", ".join(name for name in names if name not in zoo)
    return f"{plain}, and {len(zoo)} below {ZOO}/ (transmla {ZOO} --list)"


def recipe_file(recipe: str) -> Path:
    """The file of a shipped recipe, or of a path to a YAML file.

    Raises:
        RecipeError: there is none.
    """
    try:
        check_path(recipe)
    except ValueError as error:
        raise RecipeError("recipe", f"{recipe[:80]!r}: {error}") from None
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError("recipe", f"no such file: {recipe}; give a path to a YAML file or a shipped name")
        if path.suffix == ".yml":
            raise RecipeError("recipe", f"{recipe}: Hydra reads files that end in .yaml; rename it")
        return path.resolve()
    known = recipe_names()
    if recipe not in known:
        same = [name for name in known if name.rpartition("/")[2] == recipe]  # zoo/ was left out
        close = same or difflib.get_close_matches(recipe, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError("recipe", f"unknown recipe {recipe!r}{hint}; there are: {listed_names()}")
    return share("recipes") / f"{recipe}.yaml"

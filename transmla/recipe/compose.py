"""From a recipe's name and command-line overrides to a validated `Recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transmla.errors import RecipeError
from transmla.recipe.folder_name import as_folder_name
from transmla.recipe.keys import check_file, check_override
from transmla.recipe.names import ZOO, recipe_file, share
from transmla.recipe.schema import Recipe
from transmla.recipe.validation import validate_recipe
from transmla.recipe.yaml_limits import check_depth


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
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
        check_depth(key, override)
        if value in groups.get(key, ()) or key[0] in "+~":
            chosen.append(override)
        else:
            check_override(key)
            if key in groups and value.isidentifier():
                raise RecipeError(
                    key, f"there is no {value} in recipes/{key}; there are: {', '.join(sorted(groups[key]))}"
                )
            assigned.append(override)
    file = recipe_file(recipe)
    check_file(file, [override.partition("=")[0].lstrip("+~") for override in [*chosen, *assigned]])

    from transmla.recipe.hydra_tree import compose_tree  # Hydra, which takes half of a short command's time

    tree = compose_tree(file, recipe, chosen, assigned)
    validated = validate_recipe({"name": as_folder_name(Path(recipe).stem), **tree.values})
    validated._interpolations.update(tree.written)
    return validated


def _choices(group: Path) -> set[str]:
    return {path.relative_to(group).as_posix().removesuffix(".yaml") for path in group.rglob("*.yaml")}

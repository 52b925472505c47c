"""What can be said of a set of problems before it is loaded: packages, definitions, generators, rows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transmla.data.inspection import check_dataset
from transmla.errors import RecipeError
from transmla.generate.sandbox import is_supported
from transmla.recipe.writing import Problems


def require(module: str, package: str, key: str) -> None:
    """Refuse a recipe that needs a package which is not installed.

    Raises:
        RecipeError: with the command that installs it.
    """
    if find_spec(module) is None:
        raise RecipeError(key, f"{package} is not installed: pip install {package}")


def _require_sandbox(key: str) -> None:
    """Refuse problems whose scorers may evaluate what a model wrote where the kernel cannot confine that."""
    if not is_supported():
        raise RecipeError(
            key,
            "answers that a model wrote are scored behind a seccomp filter, which this machine lacks; use Linux on "
            "x86-64 or arm64",
        )


def check_problems(section: Problems, key: str, *, skip: int, limit: int | None, online: bool) -> None:
    """Everything that can be said before the problems are loaded.

    Raises:
        RecipeError: a package, a definition, a column or a generator is missing, or the rows are too few.
    """
    _require_sandbox(key)
    if section.data is not None:
        require("math_verify", "math-verify", key)
        check_dataset(section.data, f"{key}.data", online=online, problems=True)
        return
    require("reasoning_gym", "reasoning-gym", key)
    if _takes_anything(generator_of(section, key)):
        raise RecipeError(
            f"{key}.generator", f"{section.generator} takes any answer for right, even '?'; use another generator"
        )
    if skip + (limit or 1) > section.size:
        rows = f"{skip} to {skip + (limit or 1)}"
        raise RecipeError(
            f"{key}.size", f"{section.size} problems have no rows {rows}; raise size, or lower skip or limit"
        )


def generator_of(section: Problems, key: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if section.generator not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise RecipeError(f"{key}.generator", f"reasoning-gym has no {section.generator!r}; it has: {known}")
    try:
        return reasoning_gym.create_dataset(section.generator, **arguments_of(section))
    except (
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
    ) as error:  # of its config's constructor and validate()
        reason = " ".join(str(error).split()) or "its validation fails"
        raise RecipeError(
            f"{key}.config", f"{section.generator} refuses it: {reason}; correct the configuration"
        ) from None


def _takes_anything(dataset: Any) -> bool:
    """Whether a generator takes an answer for right that is none; game_of_life_halting of reasoning-gym 0.1 does."""
    try:
        return bool(dataset.score_answer("?", dataset[0]) >= 1.0)
    except Exception:  # a scorer may raise anything at a word that it does not expect
        return False


def arguments_of(section: Problems) -> dict[str, Any]:
    """The arguments of a generator's dataset."""
    return {"size": section.size, "seed": section.seed, **section.config}

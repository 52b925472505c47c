"""What can be refused of `evaluate` before weights load: tasks, and thresholds of what is not measured."""

from __future__ import annotations

from transmla.errors import RecipeError
from transmla.measure.tasks import check_tasks
from transmla.recipe.evaluation import AVERAGE
from transmla.recipe.schema import Recipe


def check_evaluation(recipe: Recipe, positions: int) -> None:
    """Check prompts, tasks and thresholds. positions: of the model.

    Raises:
        RecipeError: the first that would fail later.
    """
    length = recipe.evaluate.max_new_tokens
    if recipe.evaluate.prompts and 1 + length > positions:
        raise RecipeError(
            "evaluate.max_new_tokens",
            f"{length} after a prompt is above the {positions} positions of the model; lower it",
        )
    check_tasks(recipe.evaluate, online=not recipe.dry_run)
    check_requirements(recipe)


def check_requirements(recipe: Recipe) -> None:
    """Check models and names of `evaluate.require`.

    Raises:
        RecipeError: a threshold is about a model that the recipe does not make, or a name that it does not evaluate.
    """
    section = recipe.evaluate
    tasks = [task.label for task in section.tasks]
    solve = [str(entry["name"]) for entry in section.model_dump().get("solve", [])]
    lists = {"accuracy_drop": ("evaluate.tasks", tasks), "solve_recovered": ("evaluate.solve", solve)}
    for index, requirement in enumerate(section.require):
        key = f"evaluate.require.{index}"
        if requirement.model == "recovered" and not recipe.recover:
            raise RecipeError(f"{key}.model", "the recipe has no recovery stage; use exported")
        where, names = lists.get(requirement.measure, ("evaluate.data", section.data))
        if not names:
            raise RecipeError(f"{key}.measure", f"{requirement.measure} needs {where}, which is empty; fill it")
        if requirement.data not in (*names, AVERAGE):
            known = ", ".join([*names, AVERAGE])
            raise RecipeError(f"{key}.data", f"{requirement.data} is none of {where}; use one of: {known}")

"""Command line: `transmla VERB recipe=NAME [key.sub=value ...]`; `recover.py` is the verb `recover`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from transmla.errors import RecipeError

VERBS = {
    "recover": "run the whole recipe: write, convert, recover, export, verify, evaluate, report",
    "traces": "only write what the recipe's `write` names",
    "convert": "only make the converted student",
    "export": "only export the recovered student, with verification",
    "verify": "check an existing export again in a fresh process",
    "record": "write the teacher's top-k log-probabilities for the stages whose teacher is recorded",
    "evaluate": "evaluate whatever models are there and write the report",
    "zoo": "convert several recipes and write one table; all of recipes/zoo where none is named",
}
EXPORTING = ("recover", "export", "verify", "evaluate")  # verbs that make the final checkpoint or look at it
USAGE = "usage: transmla VERB recipe=NAME [key.sub=value ...]\n       transmla zoo [recipe=NAME ...] [key.sub=value ...]\n"
USAGE += "\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 where a threshold was missed or a recipe of the zoo failed; 2 for a user's mistake, printed as one line that names the recipe key and
        the fix.
    """
    verb, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help") or "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    try:
        if verb not in VERBS:
            raise RecipeError("verb", f"unknown verb {verb!r}; use one of: {', '.join(VERBS)}")
        return _run(verb, words)
    except RecipeError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error on process {rank}: {error}", file=sys.stderr, flush=True)
        return 2


def _run(verb: str, words: list[str]) -> int:
    from transmla.compose import load_recipe

    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    if verb == "zoo":
        return _zoo(names, [word for word in words if not word.startswith("recipe=")])
    if len(names) != 1:
        from transmla.compose import listed_names

        raise RecipeError("recipe", f"name one recipe, recipe=NAME; there are: {listed_names()}")
    recipe = load_recipe(names[0], [word for word in words if not word.startswith("recipe=")])

    from transmla.preflight import prepare

    prepared = prepare(recipe, exports=verb in EXPORTING)
    if recipe.dry_run:
        from transmla.plan import render_plan

        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if int(os.environ.get("RANK", "0")) == 0:
            print(render_plan(prepared, processes=processes))
        return 0
    quiet()
    from transmla.pipeline import Pipeline

    pipeline = Pipeline(prepared)
    getattr(pipeline, {"recover": "run", "traces": "write"}.get(verb, verb))()
    pipeline.state.wait_for_everyone()
    pipeline.state.destroy_process_group()  # gloo's threads may abort a process that ends without it
    return report_missed(pipeline.missed)


def report_missed(missed: list[str]) -> int:
    """Print the thresholds that were missed; the exit code."""
    if missed and os.environ.get("RANK", "0") == "0":
        print("\n".join(missed), file=sys.stderr, flush=True)
    return 1 if missed else 0


def _zoo(names: list[str], overrides: list[str]) -> int:
    if overrides == ["--list"]:
        from transmla.compose import ZOO, recipe_names

        print("\n".join(name for name in recipe_names() if name.startswith(f"{ZOO}/")))
        return 0
    quiet()
    from transmla.zoo import run_zoo

    return run_zoo(names, overrides)


def quiet() -> None:
    """Silence other libraries' notes that a user of this program can do nothing about."""
    import transformers
    import datasets

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading; calibration, training and evaluation have their own
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)

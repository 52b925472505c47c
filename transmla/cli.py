"""Command line: `transmla VERB recipe=NAME [key.sub=value ...]`; `recover.py` is the verb `recover`.

Nothing heavy is imported before a verb is known and a recipe has passed its schema: help and a wrong key answer at
    once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transmla.errors import RecipeError
from transmla.process.command import guarded
from transmla.recipe.system import require_linux

VERBS = {
    "recover": "run the whole recipe: write, convert, recover, export, evaluate, report",
    "write": "only write what the recipe's `write` names",
    "convert": "only make the converted student",
    "record": "keep the teacher's top-k log-probabilities for the stages whose teacher is recorded",
    "export": "only export the recovered student, with verification",
    "verify": "check an export again in a fresh process; with DIR a whole output directory, or a serving engine",
    "gguf": "write the GGUF of an exported checkpoint, for llama.cpp",
    "evaluate": "evaluate whatever models are there and write the report",
    "bench": "time the kernels and some steps of every stage at the recipe's shape, with random weights",
    "zoo": "convert several recipes and write one table; all of recipes/zoo where none is named",
    "env": "print versions, devices and paths, for a bug report",
}
RENAMED = {"traces": "write"}  # verbs of earlier versions
EXPORTING = ("recover", "export", "verify", "evaluate")  # verbs that make the final checkpoint or look at it
USAGE = "\n".join(
    [
        "usage: transmla VERB recipe=NAME [key.sub=value ...]",
        "       transmla verify DIR [--engine transformers|vllm|llama.cpp] [--python PATH] [--gguf FILE]",
        "                           [--prompts N] [--new-tokens N]",
        "       transmla gguf DIR OUT [--type f32|bf16|q8_0|q4_k_m] [--pre NAME] [--python PATH]",
        "       transmla zoo [recipe=NAME ...] [key.sub=value ...]",
        "       transmla env",
        *(f"  {verb:9} {text}" for verb, text in VERBS.items()),
        "exit codes:",
        "  0         done",
        "  1         a threshold was missed, or a recipe of the zoo failed",
        "  2         one line says what to mend: recipe, command, memory, disk, a process that died",
        "  128 + N   stopped by signal N, the same command goes on: Ctrl-C 130, SIGTERM 143, SIGHUP 129, SIGUSR1 138",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 where a threshold was missed, a recipe of the zoo failed or a directory is not as it was written; 2 for a
        user's mistake or what the machine lacks, printed as one line that names the recipe key and the fix. A signal
        ends the process, with 128 + N.
    """
    return guarded(lambda: _answer(arguments))


def _answer(arguments: Sequence[str] | None) -> int:
    verb, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help") or "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    verb = RENAMED.get(verb, verb)
    require_linux()
    if verb not in VERBS:
        raise RecipeError("verb", f"unknown verb {verb!r}; use one of: {', '.join(VERBS)}")
    if verb == "env":
        return _env()
    if verb == "verify" and words and not any(word.startswith("recipe=") for word in words):
        return _verify_folder(words)
    if verb == "gguf":
        return _gguf(words)
    return _zoo(words) if verb == "zoo" else _run(verb, words)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of recipes, and overrides."""
    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    return names, [word for word in words if not word.startswith("recipe=")]


def _run(verb: str, words: Sequence[str]) -> int:
    from transmla.recipe.compose import load_recipe
    from transmla.recipe.names import listed_names

    names, overrides = _split(words)
    if len(names) != 1:
        raise RecipeError("recipe", f"name one recipe, recipe=NAME; there are: {listed_names()}")
    recipe = load_recipe(names[0], overrides)

    from transmla.plan.checks import prepare

    prepared = prepare(recipe, exports=verb in EXPORTING, text=verb != "bench")
    if recipe.dry_run:
        from transmla.plan.dry_run import render_plan

        if os.environ.get("RANK", "0") == "0":
            print(render_plan(prepared, processes=int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    if verb == "bench":
        from transmla.bench.speed_table import bench

        print(bench(prepared))
        return 0
    from transmla.process.output_lock import only_run
    from transmla.run.context import Run
    from transmla.run.environment import quiet
    from transmla.run.pipeline import run_verb

    quiet()

    with only_run(prepared.output):
        run = Run(prepared)
        run_verb(run, verb)
    return report_missed(run.missed)


def report_missed(missed: list[str]) -> int:
    """Print the thresholds that were missed; the exit code."""
    if missed and os.environ.get("RANK", "0") == "0":
        print("\n".join(missed), file=sys.stderr, flush=True)
    return 1 if missed else 0


def _zoo(words: Sequence[str]) -> int:
    from transmla.recipe.names import ZOO, recipe_names

    names, overrides = _split(words)
    if overrides == ["--list"]:
        print("\n".join(name for name in recipe_names() if name.startswith(f"{ZOO}/")))
        return 0
    from transmla.run.environment import quiet
    from transmla.run.zoo import run_zoo

    quiet()

    return run_zoo(names, overrides)


class _Words(argparse.ArgumentParser):
    """The words after a verb that takes no recipe."""

    def error(self, message: str) -> NoReturn:
        """One line instead of a page.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(self.prog, f"{message}; transmla --help lists the words")


def _verify_folder(words: Sequence[str]) -> int:
    parser = _Words("verify", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=_path)
    parser.add_argument("--engine", choices=("transformers", "vllm", "llama.cpp"))
    parser.add_argument("--python", type=_path)
    parser.add_argument("--gguf", type=_path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    asked = vars(parser.parse_args(words))
    folder, engine = asked.pop("folder"), asked.pop("engine")
    if not folder.is_dir():  # before anything heavy is imported
        raise RecipeError("verify", f"{folder} is no directory; name an output directory, or recipe=NAME")
    if engine is None and (asked["python"] or asked["gguf"]):
        raise RecipeError("verify", "--python and --gguf are for an engine; name it with --engine")
    if min(asked["prompts"], asked["new_tokens"]) < 1:
        raise RecipeError("verify", "--prompts and --new-tokens are counts from 1 on")
    from transmla.run.environment import quiet
    from transmla.run.finished_folder import table, verify_folder

    quiet()
    if engine is None:
        found = verify_folder(folder)
    else:
        from transmla.run.engine_check import check_engine

        found = check_engine(folder, engine, **asked)
    print(table(found))
    return int(any(line.good is False for line in found))


def _gguf(words: Sequence[str]) -> int:
    parser = _Words("gguf", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=_path)
    parser.add_argument("out", metavar="OUT", type=_path)
    parser.add_argument("--type", choices=("f32", "bf16", "q8_0", "q4_k_m"), default="bf16", dest="kind")
    parser.add_argument("--pre")
    parser.add_argument("--python", type=_path)
    asked = vars(parser.parse_args(words))
    if not asked["folder"].is_dir():
        raise RecipeError("gguf", f"{asked['folder']} is no directory; name an exported checkpoint")
    from transmla.export.gguf_file import save_gguf
    from transmla.run.environment import quiet

    quiet()
    save_gguf(**asked)
    return 0


def _path(word: str) -> Path:
    return Path(word).expanduser()


def _env() -> int:
    from transmla.run.environment import describe_environment

    print(describe_environment())
    return 0

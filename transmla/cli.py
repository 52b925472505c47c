"""Command line: `transmla VERB recipe=NAME [key.sub=value ...]`; `recover.py` is the verb `recover`.

Nothing heavy is imported before a verb is known and a recipe has passed its schema: help and a wrong key answer at
once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transmla.errors import RecipeError
from transmla.process.collector import uncollected
from transmla.process.command import guarded
from transmla.recipe.system import require_linux

if TYPE_CHECKING:
    from transmla.plan.checks import Prepared

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
    "chat": "talk to the model of a folder in the terminal",
    "push": "upload an export with its card and a manifest to the hub; private unless told otherwise",
    "env": "print versions, devices and paths, for a bug report",
}
RENAMED = {"traces": "write"}  # verbs of earlier versions
EXPORTING = ("recover", "export", "verify", "evaluate")  # verbs that make the final checkpoint or look at it
FOLDER_VERBS = ("chat", "gguf", "push")  # of a folder that is there, with options in place of a recipe's keys
USAGE = "\n".join(
    [
        "usage: transmla VERB recipe=NAME [key.sub=value ...]",
        "       transmla verify DIR [--engine transformers|vllm|vllm-transformers|llama.cpp]",
        "                           [--python PATH] [--gguf FILE] [--prompts N] [--new-tokens N]",
        "       transmla gguf DIR OUT [--type f32|bf16|q8_0|q4_k_m] [--pre NAME] [--python PATH]",
        "       transmla zoo [recipe=NAME ...] [key.sub=value ...]",
        "       transmla chat DIR [--temperature T] [--max-new-tokens N] [--device D] [--dtype T]",
        "       transmla push DIR ORG/NAME [--public] [--dry-run] [--revision NAME]",
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
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    return guarded(lambda: _answer(words), signals=words[0] != "chat")  # in a conversation Ctrl-C ends a reply


def _answer(arguments: Sequence[str]) -> int:
    verb, *words = arguments
    if verb in ("-h", "--help") or (verb not in FOLDER_VERBS and ("-h" in words or "--help" in words)):
        print(USAGE)
        return 0
    verb = RENAMED.get(verb, verb)
    require_linux()
    if verb not in VERBS:
        raise RecipeError("verb", f"unknown verb {verb!r}; use one of: {', '.join(VERBS)}")
    if verb == "env":
        return _env()
    if verb in FOLDER_VERBS:
        try:
            return {"push": _push, "chat": _chat, "gguf": _gguf}[verb](words)
        except SystemExit:  # argparse has printed the verb's help
            return 0
    if verb == "verify" and words and not any(word.startswith("recipe=") for word in words):
        return _verify_folder(words)
    return _zoo(words) if verb == "zoo" else _run(verb, words)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of recipes, and overrides."""
    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    return names, [word for word in words if not word.startswith("recipe=")]


def _run(verb: str, words: Sequence[str]) -> int:
    with uncollected():
        from transmla.recipe.compose import load_recipe
        from transmla.recipe.names import listed_names

        names, overrides = _split(words)
        if len(names) != 1:
            raise RecipeError("recipe", f"name one recipe, recipe=NAME; there are: {listed_names()}")
        recipe = load_recipe(names[0], overrides)

        from transmla.plan.checks import prepare

        prepared = prepare(recipe, exports=verb in EXPORTING, text=verb != "bench")
        if recipe.dry_run:
            return _plan(prepared)
        if verb != "bench":
            from transmla.process.output_lock import only_run
            from transmla.run.context import Run
            from transmla.run.environment import quiet
            from transmla.run.pipeline import run_verb
    if verb == "bench":
        from transmla.bench.speed_table import bench

        print(bench(prepared))
        return 0
    quiet()
    with only_run(prepared.output):
        run = Run(prepared)
        run_verb(run, verb)
    return report_missed(run.missed)


def _plan(prepared: Prepared) -> int:
    from transmla.plan.dry_run import render_plan

    if os.environ.get("RANK", "0") == "0":
        print(render_plan(prepared, processes=int(os.environ.get("WORLD_SIZE", "1"))))
    return 0


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


def _verify_folder(words: Sequence[str]) -> int:
    from transmla.process.options import verify_options

    given = verify_options().parse_args(words)
    folder = _folder(given.folder, "verify", "an output directory, or recipe=NAME")
    if given.engine is None and (given.python or given.gguf):
        raise RecipeError("verify", "--python and --gguf are for an engine; name it with --engine")
    from transmla.run.environment import quiet
    from transmla.run.finished_folder import table, verify_folder

    quiet()
    if given.engine is None:
        found = verify_folder(folder)
    else:
        from transmla.run.engine_check import check_engine

        asked = {"python": given.python, "gguf": given.gguf, "prompts": given.prompts, "new_tokens": given.new_tokens}
        found = check_engine(folder, given.engine, **asked)
    print(table(found))
    return int(any(line.good is False for line in found))


def _push(words: Sequence[str]) -> int:
    from transmla.process.options import push_options

    given = push_options().parse_args(words)
    folder = _folder(given.folder, "push")
    from transmla.run.push import push

    print(
        push(folder, given.repository, public=given.public, dry_run=given.dry_run, revision=given.revision), flush=True
    )
    return 0


def _chat(words: Sequence[str]) -> int:
    from transmla.process.options import chat_options

    given = chat_options().parse_args(words)
    folder = _folder(given.folder, "chat")
    from transmla.run.chat import chat
    from transmla.run.environment import quiet

    quiet()
    try:
        chat(
            folder,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            device=given.device,
            dtype=given.dtype,
        )
    except KeyboardInterrupt:  # while the model was loaded
        return 130
    return 0


def _gguf(words: Sequence[str]) -> int:
    from transmla.process.options import gguf_options

    given = gguf_options().parse_args(words)
    folder = _folder(given.folder, "gguf", "an exported checkpoint")
    from transmla.export.gguf_file import save_gguf
    from transmla.run.environment import quiet

    quiet()
    save_gguf(folder, given.out, given.type, pre=given.pre, python=given.python)
    return 0


def _folder(folder: Path, verb: str, wanted: str = "an output directory or an exported folder") -> Path:
    """A directory that is there, before anything heavy is imported.

    Raises:
        RecipeError: it is not.
    """
    if not folder.is_dir():
        raise RecipeError(verb, f"{folder} is no directory; name {wanted}")
    return folder


def _env() -> int:
    from transmla.run.environment import describe_environment

    print(describe_environment())
    return 0

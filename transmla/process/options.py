"""Options of the commands that take a folder in place of a recipe."""

from __future__ import annotations

import argparse
from typing import NoReturn

from transmla.errors import RecipeError


class Options(argparse.ArgumentParser):
    """argparse whose complaint is one line, as of every other command."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(
            self.prog.split()[-1], f"{message}; transmla {self.prog.split()[-1]} --help lists what it takes"
        )


def push_options() -> Options:
    """Of `transmla push`."""
    options = Options("transmla push", description="Upload an export with its card and a SHA-256 manifest to the hub.")
    options.add_argument("folder", metavar="DIR", help="output directory of a finished recipe, or its exported folder")
    options.add_argument("repository", metavar="ORG/NAME", help="repository of the hub, made where it is missing")
    options.add_argument("--public", action="store_true", help="a new repository that everybody can read")
    options.add_argument("--dry-run", action="store_true", help="check and list everything, without the network")
    options.add_argument("--revision", metavar="NAME", help="branch, made where it is missing (default: main)")
    return options


def chat_options() -> Options:
    """Of `transmla chat`."""
    options = Options("transmla chat", description="Talk to an exported or recovered model in the terminal.")
    options.add_argument("folder", metavar="DIR", help="folder of a model, or output directory of a recipe")
    options.add_argument("--max-new-tokens", type=_count, default=512, metavar="N", help="longest reply (default: 512)")
    options.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0: likeliest token (default: as the model's files say)"
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    # No float16: it cannot hold the linear latent norm of an export.
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return options


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 0 < number <= 2**20:
        raise argparse.ArgumentTypeError(f"{text} is no number of tokens")
    return number


def _temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:  # NaN fails too
        raise argparse.ArgumentTypeError(f"{text} is no temperature; give 0 or more")
    return number

"""Options of the commands that take a folder in place of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
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
    options.add_argument("folder", metavar="DIR", type=_path, help="output directory of a recipe, or its export")
    options.add_argument("repository", metavar="ORG/NAME", help="repository of the hub, made where it is missing")
    options.add_argument("--public", action="store_true", help="a new repository that everybody can read")
    options.add_argument("--dry-run", action="store_true", help="check and list everything, without the network")
    options.add_argument("--revision", metavar="NAME", help="branch, made where it is missing (default: main)")
    return options


def chat_options() -> Options:
    """Of `transmla chat`."""
    options = Options("transmla chat", description="Talk to an exported or recovered model in the terminal.")
    options.add_argument("folder", metavar="DIR", type=_path, help="folder of a model, or output directory of a recipe")
    options.add_argument("--max-new-tokens", type=_count, default=512, metavar="N", help="longest reply (default: 512)")
    options.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0: likeliest token (default: as the model's files say)"
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    # No float16: it cannot hold the linear latent norm of an export.
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return options


def verify_options() -> Options:
    """Of `transmla verify DIR`."""
    options = Options("transmla verify", description="Check a finished directory, or what an engine computes of it.")
    options.add_argument("folder", metavar="DIR", type=_path, help="output directory of a recipe, or its export")
    options.add_argument(
        "--engine", choices=("transformers", "vllm", "vllm-transformers", "llama.cpp"), help="that reads the export"
    )
    options.add_argument("--python", type=_path, metavar="PATH", help="of the engine's own environment")
    options.add_argument("--gguf", type=_path, metavar="FILE", help="that llama.cpp reads")
    options.add_argument("--prompts", type=_count, default=4, metavar="N", help="how many (default: 4)")
    options.add_argument("--new-tokens", type=_count, default=32, metavar="N", help="after each (default: 32)")
    return options


def gguf_options() -> Options:
    """Of `transmla gguf`."""
    options = Options("transmla gguf", description="Write the GGUF of an exported checkpoint, for llama.cpp.")
    options.add_argument("folder", metavar="DIR", type=_path, help="an exported checkpoint")
    options.add_argument("out", metavar="OUT", type=_path, help="the file to write")
    options.add_argument("--type", choices=("f32", "bf16", "q8_0", "q4_k_m"), default="bf16")
    options.add_argument("--pre", metavar="NAME", help="llama.cpp's name of how the tokenizer splits words")
    options.add_argument("--python", type=_path, metavar="PATH", help="of an environment with llama-cpp-python")
    return options


def _path(word: str) -> Path:
    return Path(word).expanduser()


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 0 < number <= 2**20:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return number


def _temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:  # NaN fails too
        raise argparse.ArgumentTypeError(f"{text} is no temperature; give 0 or more")
    return number

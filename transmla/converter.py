"""TransMLA's command: one conversion with the arguments of the published tool.

    python transmla/converter.py --model-path meta-llama/Llama-2-7b-hf --save-path outputs/llama2-7b-mla [...]

A thin front: the arguments become a recipe, and the recipe's own code converts. Calibrates on the training part of a
dataset, prints the perplexity of the original, the partial-RoPE and the MLA model on its test part, and writes the MLA
model with its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and not __package__:  # run as a file
    # The package's own folder on the path would hide other modules (`data`, `errors`, ...); its parent must be there.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]

from transmla.errors import RecipeError
from transmla.process.command import guarded, print_error
from transmla.recipe.system import require_linux

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Recipe keys by the argument that sets them: errors name what the user typed.
ARGUMENTS = {
    "model.source": "--model-path",
    "output_dir": "--save-path",
    "dtype": "--dtype",
    "device": "--device",
    "seed": "--seed",
    "convert.calibration.data": "--cal-dataset",
    "convert.calibration.tokens": "--cal-nsamples",
    "convert.calibration.max_length": "--cal-max-seqlen",
    "convert.calibration.batch_size": "--cal-batch-size",
    "convert.freqfold": "--freqfold",
    "convert.collapse": "--collapse",
    "convert.qk_rope_head_dim": "--qk-mqa-dim",
    "convert.q_lora_rank": "--q-lora-rank",
    "convert.kv_lora_rank": "--kv-lora-rank",
    "convert.kv_balance": "--balance-kv-ratio",
    "convert.latent_norm": "--use-qkv-norm",
    "evaluate.data": "--ppl-dataset",
    "evaluate.tokens": "--ppl-eval-tokens",
    "evaluate.max_length": "--ppl-eval-seqlen",
    "evaluate.batch_size": "--ppl-eval-batch-size",
    "export.layout": "--layout",
    "export.format": "--deepseek-style",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(*_named(message))


def _named(message: str) -> tuple[str, str]:
    """argparse's message as the argument and what is wrong with it."""
    if match := re.match(r"argument (\S+): (.*)", message, re.DOTALL):
        return match[1], match[2]
    name = re.search(r"--\S+", message)
    return (name[0].rstrip(",") if name else "arguments"), f"{message}; --help lists the arguments"


def _count(least: int) -> Any:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"give a whole number of at least {least}, got {text!r}")
        return value

    return count


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _count(1)(text)


def _collapse(text: str) -> int | str:
    return text if text in ("auto", "search") else _count(1)(text)


def _count_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else _count(1)(text)


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-3 <= value <= 1e3:
        raise argparse.ArgumentTypeError(f"give a number from 0.001 to 1000, got {text!r}")
    return value


def _device(text: str) -> str:
    if text not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", text):
        raise argparse.ArgumentTypeError(f"use auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    """The arguments; names and defaults of the published tool, and a few more."""
    out = _Parser(prog="transmla/converter.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    add = out.add_argument
    add(
        "--model-path",
        default="meta-llama/Llama-2-7b-hf",
        help="hub id, directory, .gguf file, or name in recipes/model",
    )
    add("--save-path", default="outputs", help="directory for the model and its tokenizer; must not hold other files")
    add("--dtype", choices=list(DTYPES), default="bf16", help="number format of the weights (default: bf16)")
    add("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--cal-dataset", default="wikitext2", help="wikitext2, ptb, c4, alpaca, a data definition, or a file of text")
    add("--cal-nsamples", type=_count(1), default=128, help="calibration windows, at random (default: 128)")
    add("--cal-max-seqlen", type=_count(2), default=256, help="tokens a calibration window (default: 256)")
    add("--cal-batch-size", type=_count(1), default=8, help="calibration windows at a time (default: 8)")
    add("--cal-tokens", type=_count(1), help="calibration tokens in all, in place of --cal-nsamples")
    add(
        "--ppl-eval-batch-size", type=_count(0), default=0, help="windows at a time; 0 measures no perplexity (default)"
    )
    add("--ppl-dataset", help="text for perplexity (default: the test part of --cal-dataset)")
    add("--ppl-eval-tokens", type=_count(2), default=1_000_000, help="at most so many tokens (default: 1,000,000)")
    add("--ppl-eval-seqlen", type=_count(2), default=2048, help="tokens a window of perplexity (default: 2048)")
    add("--freqfold", type=_count_or_auto, default="auto", help="neighbouring frequencies in one band, or auto")
    add(
        "--collapse",
        type=_collapse,
        default="auto",
        help="auto: head dimension / --qk-mqa-dim; a smaller number; search",
    )
    add("--qk-mqa-dim", type=_count(1), default=64, help="dimension of the rope head (default: 64)")
    add("--q-lora-rank", type=_count_or_none, help="rank of the queries, or None for full rank (default)")
    add("--kv-lora-rank", type=_count(1), default=512, help="dimension of the latent (default: 512)")
    add("--balance-kv-ratio", type=_ratio, help="weight of keys against values (default: 1)")
    add("--use-qkv-norm", action="store_true", help="real RMSNorms on the latents, as DeepSeek has")
    add("--method", choices=["default", "transmla"], default="default", help="this project's solution, or the paper's")
    add("--deepseek-style", action="store_true", help="write a stock deepseek_v3 checkpoint")
    add("--layout", choices=["compact", "padded"], default="compact", help="of a --deepseek-style checkpoint")
    add("--seed", type=_count(0), default=42, help="of the choice of calibration windows (default: 42)")
    add("--dry-run", action="store_true", help="check everything, print the plan, load no weights")
    return out


def method_keys(method: str, balance: float | None) -> dict[str, Any]:
    """What `--method` and `--balance-kv-ratio` mean in a recipe's `convert` section.

    The published ratio is one of norms, the recipe's kv_balance one of energies: its square.
    """
    return {"method": method} | ({} if balance is None else {"kv_balance": balance**2})


def recipe_tree(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the arguments mean."""
    import yaml

    from transmla.recipe.names import share

    train, test = args.cal_dataset, args.ppl_dataset
    if test is None and (share("data") / f"{train}_test.yaml").is_file():
        test = f"{train}_test"
    elif test is None:  # no known test part: nine tenths to calibrate on, one tenth to measure on
        whole = train.removesuffix("#train")
        train, test = f"{whole}#train", f"{whole}#test"
    shipped = share("recipes") / "model" / f"{args.model_path}.yaml"
    model = yaml.safe_load(shipped.read_text()) if shipped.is_file() else {"source": args.model_path}
    measure = args.ppl_eval_batch_size > 0
    return {
        "name": "converter",
        "seed": args.seed,
        "output_dir": args.save_path,
        "device": args.device.partition(":")[0],
        "dtype": DTYPES[args.dtype],
        "dry_run": args.dry_run,
        "model": model,
        "convert": {
            "qk_rope_head_dim": args.qk_mqa_dim,
            "kv_lora_rank": args.kv_lora_rank,
            "q_lora_rank": args.q_lora_rank,
            "freqfold": args.freqfold,
            "collapse": {"auto": "natural", "search": "auto"}.get(args.collapse, args.collapse),
            "latent_norm": args.use_qkv_norm,
            **method_keys(args.method, args.balance_kv_ratio),
            "calibration": {
                "data": [train],
                "tokens": args.cal_tokens or args.cal_nsamples * args.cal_max_seqlen,
                "max_length": args.cal_max_seqlen,
                "batch_size": args.cal_batch_size,
                "sample": "random",
            },
        },
        "evaluate": {
            "data": [test],
            "tokens": args.ppl_eval_tokens,
            "max_length": args.ppl_eval_seqlen if measure else args.cal_max_seqlen,
            "batch_size": args.ppl_eval_batch_size if measure else 1,
        },
        "export": {"layout": args.layout, "format": "deepseek_v3" if args.deepseek_style else "student"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one conversion.

    Returns:
        0; 2 for a user's mistake, printed as one line that names the argument and the fix. A signal ends the
        process, with 128 + its number.
    """

    def answer() -> int:
        try:
            require_linux()
            _run(parser().parse_args(arguments))
        except RecipeError as error:
            key = ARGUMENTS.get(error.key, error.key)
            print_error(f"{key}: {_in_arguments(error.problem)}")
            return 2
        return 0

    return guarded(answer)


def _in_arguments(text: str) -> str:
    """A message about a recipe in the words of the command."""
    text = text.replace(", or give the architecture as model.config", "")  # a recipe can, the command cannot
    for key in sorted(ARGUMENTS, key=len, reverse=True):
        if "." in key:
            text = text.replace(key, ARGUMENTS[key])
    return re.sub(r"\bqk_rope_head_dim\b", "--qk-mqa-dim", text)


def _choose_device(index: int) -> None:
    """Make one CUDA device the only one, before CUDA looks."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(number) for number in range(index + 1)]
    names = every if visible is None else [name for name in visible.split(",") if name]
    if index >= len(names):
        raise RecipeError("--device", f"cuda:{index} is not among the {len(names)} visible devices; name another")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[index]


def _run(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda:"):
        _choose_device(int(args.device.removeprefix("cuda:")))

    from transmla.recipe.validation import validate_recipe

    recipe = validate_recipe(recipe_tree(args))

    from transmla.plan.checks import prepare
    from transmla.plan.dry_run import render_plan
    from transmla.process.output_lock import only_run
    from transmla.run.comparison import require_free, save_conversion
    from transmla.run.context import Run
    from transmla.run.environment import quiet

    prepared = prepare(recipe)
    if args.dry_run:
        print(render_plan(prepared))
        return
    require_free(prepared.output)
    quiet()
    with only_run(prepared.output.resolve(), beside=True):
        table = save_conversion(
            Run(prepared), prepared.output, stock=args.deepseek_style, measure=args.ppl_eval_batch_size > 0
        )
    print(table)


if __name__ == "__main__":
    sys.exit(main())

"""A conversion alone, measured: what `transmla/converter.py` and `transmla zoo` run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.convert.three_models import Compared, convert_and_compare
from transmla.errors import RecipeError
from transmla.export.checkpoint import save_deepseek, save_own_class
from transmla.export.formats import choose_format
from transmla.export.reload_check import check_reload, log_probabilities
from transmla.hardware import peak_memory
from transmla.run.artifacts import METADATA, make, publishing, read_metadata, save_recipe, versions
from transmla.run.context import Run
from transmla.run.convert import save_converted
from transmla.run.datasets import calibration_windows, evaluation_windows
from transmla.run.export import export_dtype
from transmla.run.fingerprints import fingerprint

FORMAT = 2  # raise it when the same settings would give another result than before
TITLES = {"original": "original", "partial_rope": "partial RoPE", "mla": "MLA"}


def require_free(folder: Path) -> None:
    """Refuse to write over files that are no earlier conversion.

    Raises:
        RecipeError: `folder` holds other files, or is one.
    """
    there = folder.exists()
    if there and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA).is_file())):
        raise RecipeError("output_dir", f"{folder} is there and is no converted model; name another directory")


def save_conversion(run: Run, folder: Path, *, stock: bool, measure: bool) -> str:
    """Convert the source and keep the student, or with `stock` the DeepSeek-V3 checkpoint, in `folder`.

    The same settings again change nothing: the table comes from the metadata.

    Args:
        measure: compare original, partial-RoPE and MLA model on the recipe's first dataset.

    Returns:
        the table of results.
    """
    _require_one_process(run)

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        calibration = calibration_windows(run)
        done = _compared(run, calibration, measure, metadata)
        if stock:
            _save_stock(run, done, calibration, scratch, metadata)
        else:
            save_own_class(done.conversion.student, run.tokenizer, run.recipe.export, export_dtype(run), scratch)

    folder = folder.resolve()  # the temporary folder lies beside it
    export = run.recipe.export.content() if stock else None
    make(run, folder, _digest(run, export=export, measure=measure), "convert", build)
    metadata = read_metadata(folder)
    assert metadata is not None, "it was just made, or is current"
    return render(metadata, folder)


def compare(run: Run) -> dict[str, Any]:
    """The metadata of a conversion and its comparison; the student is kept as the recipe's `converted`."""
    _require_one_process(run)

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        started = time.monotonic()
        done = _compared(run, calibration_windows(run), True, metadata)
        kept: dict[str, Any] = {"name": "convert", "fingerprint": run.digests.convert, "versions": versions()}
        kept |= done.conversion.describe()
        kept |= {"tokens": metadata["tokens"], "seconds": round(time.monotonic() - started, 1)}
        kept["peak_memory_bytes"] = peak_memory(run.prepared.device)
        with publishing(run.paths.converted, kept) as folder:
            save_recipe(run.recipe, folder)
            save_converted(run, done.conversion, folder)

    folder = run.paths.root / "comparison"
    make(run, folder, _digest(run), run.recipe.name, build)
    metadata = read_metadata(folder)
    assert metadata is not None, "it was just made, or is current"
    return metadata


def _require_one_process(run: Run) -> None:
    if run.state.num_processes > 1:
        raise RecipeError("device", "a conversion runs in one process; start it without accelerate launch")


def _digest(run: Run, **more: Any) -> str:
    inputs = {"convert": run.digests.convert, "windows": run.digests.evaluation("teacher")}
    return fingerprint({"format": FORMAT, **inputs, **more})


def _compared(run: Run, calibration: Tensor, measure: bool, metadata: dict[str, Any]) -> Compared:
    """The conversion and its comparison; what they found goes into the metadata."""
    if run.prepared.streaming.on:
        raise RecipeError(
            "convert.streaming",
            f"a comparison holds source and student whole ({run.prepared.streaming.reason}); run transmla convert "
            "recipe=... instead, or use false where both fit",
        )
    section = run.recipe.evaluate
    windows = evaluation_windows(run, section.data[0]) if measure else None
    done = convert_and_compare(
        run.teacher, run.recipe.convert, calibration, windows=windows, batch_size=section.batch_size
    )
    metadata |= {"tokens": calibration.numel(), "dataset": section.data[0], "conversion": done.describe()}
    for line in done.conversion.notes():
        run.say(f"[{run.recipe.name}] {line}")
    return done


def _save_stock(run: Run, done: Compared, calibration: Tensor, scratch: Path, metadata: dict[str, Any]) -> None:
    section, dtype = run.recipe.export, export_dtype(run)
    chosen = choose_format(section, done.conversion.student.config, run.dtype)
    for note in chosen.notes:
        run.say(f"[{run.recipe.name}] note: {note}")
    metadata |= chosen.serving()
    shifts = done.conversion.router_shifts
    save_deepseek(done.conversion.student, run.tokenizer, section, dtype, scratch, shifts=shifts)
    tokens = calibration[:1, : section.verify.tokens]
    expected = log_probabilities(done.conversion.student.float().cpu(), tokens)
    metadata["max_abs_logprob_diff"] = check_reload(scratch, tokens, expected, section.verify, dtype)


def _folds(freqfold: int | list[int]) -> str:
    if isinstance(freqfold, int):
        return str(freqfold)
    counts = {fold: list(freqfold).count(fold) for fold in sorted(set(freqfold))}
    return ", ".join(f"{fold} in {count} layers" for fold, count in counts.items())


def render(metadata: dict[str, Any], folder: Path) -> str:
    """The table that the converter prints."""
    found = metadata["conversion"]
    lines = [""]
    for name, quality in found["quality"].items():
        lines.append(
            f"{TITLES[name]:13} perplexity {quality['perplexity']:10.4f}   KL to the original {quality['kl']:.4f}   "
            f"top-1 {100 * quality['top1']:5.1f} %"
        )
    if found["quality"]:
        tokens = found["quality"]["original"]["tokens"]
        lines.append(f"{'':13} {tokens:,} predicted tokens of {metadata['dataset']}, the same for all three")
    else:
        lines.append("no perplexity was measured; --ppl-eval-batch-size 1 or more does")
    lines += [
        f"cache         {found['cached_values_source']} -> {found['cached_values_student']} values per token and layer "
        f"({found['saving_percent']} % less), freqfold {_folds(found['freqfold'])}, collapse {found['collapse']}",
        f"saved         {folder} ({metadata['seconds']} s, at most {metadata['peak_memory_bytes'] / 2**30:.2f} GiB)",
    ]
    return "\n".join(lines)

"""A conversion alone, measured: what `transmla/converter.py` and `transmla zoo` run."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.artifacts import RECORD, fingerprint, publishing, read_record, versions
from transmla.errors import RecipeError
from transmla.evaluate.conversion import Measured, convert_and_compare
from transmla.hardware import peak_memory
from transmla.pipeline import Pipeline
from transmla.preflight import Prepared

FORMAT = 2  # raise it when the same settings would give another result than before


def require_free(folder: Path) -> None:
    """Refuse to write over files that are no earlier conversion.

    Raises:
        RecipeError: `folder` holds other files, or is one.
    """
    there = folder.exists()
    if there and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECORD).is_file())):
        raise RecipeError("output_dir", f"{folder} is there and is no converted model; name another directory")


class ConvertRun(Pipeline):
    """Convert the source of a recipe and compare original, partial-RoPE and MLA model on the recipe's first dataset."""

    def __init__(self, prepared: Prepared) -> None:
        """
        Raises:
            RecipeError: there are several processes.
        """
        super().__init__(prepared)
        if self.state.num_processes > 1:
            raise RecipeError("device", "a conversion runs in one process; start it without accelerate launch")

    def _digest(self, **more: Any) -> str:
        inputs = {"convert": self.digests.convert, "windows": self.digests.evaluation("teacher")}
        return fingerprint({"format": FORMAT, **inputs, **more})

    @cached_property
    def calibration(self) -> Tensor:
        """Windows of calibration text, [n, L]."""
        return self._calibration_windows()

    def _convert(self, measure: bool, record: dict[str, Any]) -> Measured:
        """The conversion; what it found goes into the record."""
        section = self.recipe.evaluate
        windows = None
        if measure:
            windows = self._windows(section.data[:1], "evaluate", section.tokens, section.max_length)
        done = convert_and_compare(
            self.teacher,
            self.recipe.convert,
            self.calibration,
            windows=windows,
            batch_size=section.batch_size,
        )
        record["tokens"] = self.calibration.numel()
        record["dataset"] = section.data[0]
        record["conversion"] = done.describe()
        for line in done.conversion.notes():
            self.say(f"[{self.recipe.name}] {line}")
        return done

    def save(self, folder: Path, *, stock: bool, measure: bool) -> str:
        """Write the student, or with `stock` the DeepSeek-V3 checkpoint, to `folder`; return the table of results.

        The same settings again change nothing: the table comes from the record.
        """

        def build(scratch: Path, record: dict[str, Any]) -> None:
            done = self._convert(measure, record)
            if stock:
                self._save_stock(done, scratch, record)
            else:
                self._save_student(done.conversion.student, scratch)

        folder = folder.resolve()  # the temporary folder lies beside it
        export = self.recipe.export.model_dump(mode="json") if stock else None
        self._make(folder, self._digest(export=export, measure=measure), "convert", build)
        record = read_record(folder)
        assert record is not None, "it was just made, or is current"
        return render(record, folder)

    def _save_stock(self, done: Measured, scratch: Path, record: dict[str, Any]) -> None:
        from transmla.export.publish import verify_export, write_checkpoint

        section, dtype = self.recipe.export, self._export_dtype()
        write_checkpoint(done.conversion.student, self.tokenizer, section, dtype, scratch)
        tokens = self.calibration[:1, : section.verify.tokens]
        student = done.conversion.student.float().cpu()
        record["max_abs_logprob_diff"] = verify_export(scratch, student, tokens, section.verify, dtype)

    def compare(self) -> dict[str, Any]:
        """The record of the conversion and its comparison; the student is kept as the recipe's `converted`."""

        def build(scratch: Path, record: dict[str, Any]) -> None:
            started = time.monotonic()
            done = self._convert(True, record)
            kept = {"name": "convert", "fingerprint": self.digests.convert, "versions": versions()}
            kept |= done.conversion.record() | {"tokens": record["tokens"], "seconds": round(time.monotonic() - started, 1)}
            kept["peak_memory_bytes"] = peak_memory(self.prepared.device)
            with publishing(self.out / "converted", kept) as folder:
                self._save_recipe(folder)
                self._save_converted(done.conversion.student, done.conversion.output_scales, folder)

        self._make(self.out / "comparison", self._digest(), self.recipe.name, build)
        record = read_record(self.out / "comparison")
        assert record is not None, "it was just made, or is current"
        return record


def _folds(freqfold: int | list[int]) -> str:
    if isinstance(freqfold, int):
        return str(freqfold)
    counts = {fold: list(freqfold).count(fold) for fold in sorted(set(freqfold))}
    return ", ".join(f"{fold} in {count} layers" for fold, count in counts.items())


NAMES = {"original": "original", "partial_rope": "partial RoPE", "mla": "MLA"}


def render(record: dict[str, Any], folder: Path) -> str:
    """The table that the converter prints."""
    found = record["conversion"]
    lines = [""]
    for name, quality in found["quality"].items():
        lines.append(
            f"{NAMES[name]:13} perplexity {quality['perplexity']:10.4f}   KL to the original {quality['kl']:.4f}   "
            f"top-1 {100 * quality['top1']:5.1f} %"
        )
    if found["quality"]:
        tokens = found["quality"]["original"]["tokens"]
        lines.append(f"{'':13} {tokens:,} predicted tokens of {record['dataset']}, the same for all three")
    else:
        lines.append("no perplexity was measured; --ppl-eval-batch-size 1 or more does")
    lines += [
        f"cache         {found['cached_values_source']} -> {found['cached_values_student']} values a token and layer "
        f"({found['saving_percent']} % less), freqfold {_folds(found['freqfold'])}, collapse {found['collapse']}",
        f"saved         {folder} ({record['seconds']} s, at most {record['peak_memory_bytes'] / 2**30:.2f} GiB)",
    ]
    return "\n".join(lines)

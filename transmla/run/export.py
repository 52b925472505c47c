"""The stages `export` and `verify`: the final checkpoint, and its check in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transmla.errors import RecipeError
from transmla.export.checkpoint import save_deepseek, save_own_class
from transmla.export.reload_check import check_reload, log_probabilities, memory_of_check
from transmla.hardware import free_memory
from transmla.run.artifacts import agreed, make, require, require_unharmed
from transmla.run.context import Run
from transmla.run.datasets import token_windows_of
from transmla.sources.local_model import load_model

MAKING = "recover.py recipe=..."  # what makes an artifact that is missing


def export(run: Run) -> None:
    """The final checkpoint, published only when a fresh process agrees with the student."""
    agreed(run, lambda: require(run.paths.student, run.digests.student, "export", MAKING))

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        chosen = run.prepared.export
        if not chosen.stock:
            run.say(f"[export] {chosen.describe(run.recipe.export)}")
        for note in chosen.notes:
            run.say(f"[export] note: {note}")
        require_unharmed(run.paths.student)
        student = load_model(run.paths.student, run.dtype, "cpu")
        save = save_deepseek if chosen.stock else save_own_class
        save(student, run.tokenizer, run.recipe.export, export_dtype(run), scratch)
        del student  # one model in memory at a time
        metadata |= {"format": chosen.name, "notes": list(chosen.notes)}
        metadata["max_abs_logprob_diff"] = _check_reload(run, scratch)

    make(run, run.paths.exported, run.digests.export, "export", build)


def verify(run: Run) -> None:
    """Check an existing export again."""
    agreed(run, lambda: require(run.paths.student, run.digests.student, "verify", MAKING))
    agreed(run, lambda: require(run.paths.exported, run.digests.export, "verify", MAKING))
    agreed(run, lambda: require_unharmed(run.paths.exported))
    if run.state.is_main_process:
        difference = _check_reload(run, run.paths.exported)
        run.say(f"[verify] max |difference of log-probabilities| {difference:.2e}")
    run.state.wait_for_everyone()


def export_dtype(run: Run) -> torch.dtype:
    """Number format of the exported weights."""
    wanted = run.recipe.export.dtype
    return run.dtype if wanted == "auto" else getattr(torch, wanted)


def _check_reload(run: Run, folder: Path) -> float:
    """Compare the checkpoint in a fresh process with the student; both multiply in float32."""
    section, evaluated = run.recipe.export.verify, run.recipe.evaluate
    length = min(section.tokens, evaluated.max_length)
    tokens = token_windows_of(run, evaluated.data[:1], "evaluate", tokens=section.tokens, length=length)
    _require_memory(run)
    require_unharmed(run.paths.student)
    student = load_model(run.paths.student, torch.float32, "cpu")
    expected = log_probabilities(student, tokens)
    del student  # one model in memory at a time
    return check_reload(folder, tokens, expected, section, export_dtype(run), stock=run.prepared.export.stock)


def _require_memory(run: Run) -> None:
    """Refuse a check that would end in the middle, for want of memory.

    Raises:
        RecipeError: too little is free, even without the teacher.
    """
    section, cpu = run.recipe.export.verify, torch.device("cpu")
    needed = memory_of_check(section, run.prepared.sizes.student, run.prepared.config)
    if free_memory(cpu) < needed:
        run.release_teacher()
    if (free := free_memory(cpu)) < needed:
        raise RecipeError(
            "export.verify",
            f"the check of the export takes {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free; end other "
            "programs or lower export.verify.tokens, and run the recipe again",
        )

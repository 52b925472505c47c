"""The stages `export` and `verify`: the final checkpoint, and its check in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transmla.errors import RecipeError
from transmla.export.checkpoint import save_deepseek, save_own_class
from transmla.export.formats import choose_format
from transmla.export.fresh_process import FreshProcess, model_on_disk
from transmla.export.latent_blocks import describe_blocks
from transmla.export.reload_check import check_reload, log_probabilities, memory_of_check
from transmla.families import family_of
from transmla.hardware import free_memory
from transmla.run.artifacts import agreed, make, require, require_unharmed
from transmla.run.context import Run
from transmla.run.datasets import token_windows_of
from transmla.run.statistics import router_shifts
from transmla.sources.local_model import load_model, stream_model
from transmla.sources.source_facts import source_facts

MAKING = "recover.py recipe=..."  # what makes an artifact that is missing


def export(run: Run) -> None:
    """The final checkpoint, published only when a fresh process agrees with the student."""
    agreed(run, lambda: require(run.paths.student, run.digests.student, "export", MAKING))

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        require_unharmed(run.paths.student)
        student = stream_model(run.paths.student, run.dtype, "cpu")
        chosen = choose_format(run.recipe.export, student.model.config, run.dtype)  # a search may have chosen otherwise
        if not chosen.stock:
            run.say(f"[export] {chosen.describe(run.recipe.export)}")
        for note in chosen.notes:
            run.say(f"[export] note: {note}")
        with run.fresh_process() as fresh:  # if it is new, it imports while the weights are written
            section, dtype = run.recipe.export, export_dtype(run)
            if chosen.stock:
                shifts = router_shifts(run.paths.student)
                save_deepseek(student, run.tokenizer, section, dtype, scratch, shifts=shifts)
            else:
                save_own_class(student, run.tokenizer, section, dtype, scratch)
            metadata |= {"format": chosen.name} | chosen.serving()
            if not run.drawn:
                metadata["source"] = source_facts(run.recipe.model, run.source_folder)
            metadata |= describe_blocks(student.model.config) if chosen.stock else {}
            metadata["max_abs_logprob_diff"] = _check_reload(run, scratch, fresh)

    make(run, run.paths.exported, run.digests.export, "export", build)
    run.end_fresh_process()  # where the export was there already


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


def _check_reload(run: Run, folder: Path, fresh: FreshProcess | None = None) -> float:
    """Compare the checkpoint in a fresh process with the student; both multiply in float32. fresh: as in
    `check_reload`."""
    section, evaluated = run.recipe.export.verify, run.recipe.evaluate
    length = min(section.tokens, evaluated.max_length)
    tokens = token_windows_of(run, evaluated.data[:1], "evaluate", tokens=section.tokens, length=length)
    by_module = _by_module(run)
    require_unharmed(run.paths.student)
    if by_module:
        kernel = family_of(run.prepared.config).kernel
        student = model_on_disk(run.paths.student, attn_implementation=kernel)
    else:
        student = load_model(run.paths.student, torch.float32, "cpu")
    expected = log_probabilities(student, tokens)
    del student  # one model in memory at a time
    dtype, stock = export_dtype(run), run.prepared.export.stock
    return check_reload(folder, tokens, expected, section, dtype, stock=stock, by_module=by_module, fresh=fresh)


def _by_module(run: Run) -> bool:
    """Whether the check reads weights when they are needed, because a model in float32 does not fit in memory.

    Raises:
        RecipeError: too little is free even for that, even without the teacher.
    """
    section, cpu, sizes = run.recipe.export.verify, torch.device("cpu"), run.prepared.sizes
    whole, part = (memory_of_check(section, sizes.student, run.prepared.config, by_module=way) for way in (False, True))
    if free_memory(cpu) < whole:
        run.release_teacher()
    if (free := free_memory(cpu)) >= whole:
        return False
    if free < part:
        raise RecipeError(
            "export.verify",
            f"the check of the export takes {part / 2**30:.1f} GiB of memory, even where weights are read when they "
            f"are needed, {free / 2**30:.1f} are free; end other programs or lower export.verify.tokens, and run the "
            "recipe again",
        )
    run.say(
        f"[export] weights are read when they are needed: a model in float32 takes {whole / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} are free"
    )
    return True

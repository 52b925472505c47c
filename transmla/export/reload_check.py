"""Compare an exported checkpoint, loaded in a fresh process, with the student."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from transmla.export.fresh_process import score_in_fresh_process
from transmla.files import PARTIAL, scratch_folder
from transmla.recipe.schema import Verify

# Max |Δ log-probability| of a reload. In bfloat16 the weights that the eps trick scales are rounded a second time.
# That moves unlikely words most, so the mean is held to a tighter bound: nats per token, 1.5e-4 measured in bfloat16.
DEFAULT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}

MAX_KL = 5e-3


@torch.no_grad()
def log_probabilities(student: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[n, L] -> [n, L, V] in float32, row by row, on the CPU."""
    rows = [student(row[None].to(student.device)).logits.float().log_softmax(-1).cpu() for row in tokens]
    return torch.cat(rows)


def verify_export(
    folder: Path, student: PreTrainedModel, tokens: Tensor, section: Verify, dtype: torch.dtype, *, stock: bool = True
) -> float:
    """`check_reload` against a student in float32, with the recipe's tolerance or the one of the stored `dtype`."""
    tolerance = section.tolerance or DEFAULT_TOLERANCE[dtype]
    return check_reload(folder, tokens, log_probabilities(student, tokens), tolerance, stock=stock)


def check_reload(folder: Path, tokens: Tensor, expected: Tensor, tolerance: float, *, stock: bool = True) -> float:
    """Score tokens with the exported model in a fresh process and compare.

    Args:
        expected: log-probabilities of the student, [n, L, V].
        stock: whether it must load without this package.

    Returns:
        The largest difference.

    Raises:
        RuntimeError: it is above the tolerance, or the mean KL is above `MAX_KL`, or the checkpoint does not load.
    """
    with scratch_folder(folder.with_name(f"{PARTIAL}-reload-of-{folder.name.lstrip('.')}")) as scratch:
        tokens_file, scores_file = scratch / "tokens.safetensors", scratch / "scores.safetensors"
        save_file({"input_ids": tokens}, tokens_file)
        score_in_fresh_process(folder, tokens_file, scores_file, stock=stock)
        scores = load_file(scores_file)["log_probs"]
    difference = float((scores - expected).abs().max())
    kl = float((expected.exp() * (expected - scores)).sum(-1).mean())
    if not (difference <= tolerance and kl <= MAX_KL):  # a NaN fails too
        raise RuntimeError(
            f"export.verify: log-probabilities of the exported model differ from the student's by up to "
            f"{difference:.3g} "
            f"(tolerance {tolerance:.3g}), KL {kl:.3g} (at most {MAX_KL}); nothing was published"
        )
    return difference

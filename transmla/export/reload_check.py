"""Compare an exported checkpoint, loaded in a fresh process, with the student."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from transmla.errors import RecipeError
from transmla.export.fresh_process import FreshProcess, normalised
from transmla.modeling.config_facts import has_experts
from transmla.recipe.schema import Verify

# Max |Δ log-probability| of a reload. In bfloat16 the weights that the eps trick scales are rounded a second time.
# That moves unlikely words most, so the mean is held to a tighter bound: nats per token, 1.5e-4 measured in bfloat16.
DEFAULT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}

MAX_KL = 5e-3


def memory_of_check(section: Verify, parameters: int, config: PretrainedConfig, *, by_module: bool = False) -> int:
    """Rough bytes of memory that the check takes at its fullest: one model in float32, or its largest module where
    weights are read by module, and the log-probabilities of both, of which one is in two processes."""
    stacked = 2 * config.num_local_experts if has_experts(config) else 1  # gates and ups of all experts are one tensor
    largest = config.hidden_size * max(config.vocab_size, stacked * config.intermediate_size)
    weights = 2 * largest if by_module else parameters  # as it is stored, too
    return 4 * weights + 4 * 3 * section.tokens * config.vocab_size


@torch.no_grad()
def log_probabilities(student: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[n, L] -> [n, L, V] in float32, row by row, on the CPU."""
    device = "cpu" if student.device.type == "meta" else student.device  # weights that are read by module
    rows = [normalised(student(row[None].to(device)).logits).cpu() for row in tokens]
    return torch.cat(rows)


def check_reload(
    folder: Path,
    tokens: Tensor,
    expected: Tensor,
    section: Verify,
    dtype: torch.dtype,
    *,
    stock: bool = True,
    by_module: bool = False,
    fresh: FreshProcess | None = None,
) -> float:
    """Score tokens with the exported model in a fresh process and compare.

    Args:
        expected: log-probabilities of the student in float32, [n, L, V].
        dtype: what the weights are stored in; decides the tolerance where the recipe names none.
        stock: whether it must load without this package. by_module: whether weights are read when they are needed.
        fresh: a process that was started before; None: it is started here.

    Returns:
        The largest difference.

    Raises:
        RecipeError: it is above the tolerance, or the mean KL is above `MAX_KL`, or the check cannot run.
    """
    tolerance = section.tolerance or DEFAULT_TOLERANCE[dtype]
    try:
        with fresh or FreshProcess(stock=stock) as process:
            scores = process.score(folder, tokens, by_module=by_module)
    except (OSError, RuntimeError) as error:  # no process, no memory, no checkpoint that loads
        raise RecipeError("export.verify", f"{error}; nothing was published") from None
    difference = float((scores - expected).abs().max())
    kl = float((expected.exp() * (expected - scores)).sum(-1).mean())
    if not (difference <= tolerance and kl <= MAX_KL):  # a NaN fails too
        raise RecipeError(
            "export.verify",
            f"log-probabilities of the exported model differ from the student's by up to {difference:.3g} (tolerance "
            f"{tolerance:.3g}), KL {kl:.3g} (at most {MAX_KL}); nothing was published; a difference that rounding "
            "explains passes with a larger export.verify.tolerance",
        )
    return difference

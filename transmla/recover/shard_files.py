"""What is trained of a sharded model, and its optimizer, in a folder: every process writes and reads its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from transmla.recover.snapshot import trained_weights

FOLDER = "shards"  # below a checkpoint, PyTorch's distributed format
WEIGHTS, OPTIMIZER = "weights", "optimizer"


def save_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write trained weights and optimizer; every process calls this, and each writes what it keeps.

    Raises:
        OSError: one of them could not; on all processes.
    """
    state = {WEIGHTS: _weights(model), OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    try:
        checkpoint.save(state, checkpoint_id=folder / FOLDER)
    except CheckpointException as error:
        raise OSError(_first(error)) from None


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill the trained weights, whichever number of processes wrote them.

    Raises:
        ValueError: a weight is missing, or of another shape.
    """
    reader = checkpoint.FileSystemReader(folder / FOLDER)
    there = {
        name.removeprefix(f"{WEIGHTS}.")
        for name in reader.read_metadata().state_dict_metadata
        if name.startswith(f"{WEIGHTS}.")
    }
    wanted = _weights(model)
    if there != set(wanted):
        name = min(there ^ set(wanted))
        raise ValueError(f"it has {name}, which is not trained" if name in there else f"it lacks {name}")
    try:
        checkpoint.load({WEIGHTS: wanted}, checkpoint_id=folder / FOLDER)
    except CheckpointException as error:
        raise ValueError(_first(error)) from None


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill an optimizer, whichever number of processes wrote it."""
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    checkpoint.load({OPTIMIZER: state}, checkpoint_id=folder / FOLDER)
    set_optimizer_state_dict(model, optimizer, state)


def _first(error: CheckpointException) -> str:
    """What came in the way of the first process that failed."""
    rank, (reason, _) = min(error.failures.items())
    return f"process {rank}: {reason}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in trained_weights(model).items()}

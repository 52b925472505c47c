"""A tiny Mixtral as a stock checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conftest import FULL, settings, tiny_model, windows
from transmla.convert.conversion import Conversion, convert_model
from transmla.export.checkpoint import save_deepseek
from transmla.recipe.schema import Export
from transmla.sources.random_model import byte_tokenizer

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def exported_mixtral(folder: Path, *, dtype: torch.dtype = torch.float32, **fields: object) -> Conversion:
    """The conversion of a random Mixtral whose states lean to one side, with its export in a directory."""
    source = tiny_model("mixtral", leaning=True, groups=1, vocab_size=260, **(EXPERTS | fields))
    done = convert_model(source, settings(**FULL, router="stock"), torch.cat(windows()))
    folder.mkdir()
    tokenizer = byte_tokenizer(source.config)
    save_deepseek(done.student, tokenizer, Export(), dtype, folder, shifts=done.router_shifts)
    return done

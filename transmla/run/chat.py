"""`transmla chat DIR`: a conversation with a model of a folder, loaded by transformers."""

from __future__ import annotations

from pathlib import Path

from transmla.errors import RecipeError
from transmla.generate.conversation import Conversation, talk
from transmla.hardware import resolve_device, resolve_dtype
from transmla.run.artifacts import require_unharmed
from transmla.sources.check import check_folder
from transmla.sources.local_model import load_model
from transmla.sources.tokenizer import load_tokenizer

KEY = "chat"
RESULTS = ("exported", "recovered", "converted")  # of an output directory, the first that is there


def chat(folder: Path, *, max_new_tokens: int, temperature: float | None, device: str, dtype: str) -> None:
    """Talk to an export, a student, a source, or the newest result of an output directory.

    Args:
        device, dtype: as in a recipe.

    Raises:
        RecipeError: the folder has no model that can be loaded.
    """
    if not (folder / "config.json").is_file():
        results = (folder / name for name in RESULTS)
        found = next((result for result in results if (result / "config.json").is_file()), None)
        if found is None:
            raise RecipeError(KEY, f"{folder} has no model (config.json); name an exported folder")
        folder = found
    resolved = resolve_device(device)
    require_unharmed(folder)
    check_folder(folder, KEY)
    model = load_model(folder, resolve_dtype(dtype, resolved), resolved)
    talk(Conversation(model, load_tokenizer(folder, KEY), max_new_tokens, temperature))

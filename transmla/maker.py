"""Make an artifact once: by the first process, with a record of what it took, and not again while it is current."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf

from transmla.artifacts import is_current, publishing, versions
from transmla.hardware import peak_memory, reset_peak_memory
from transmla.preflight import Prepared
from transmla.recipe import Recipe


class Maker:
    """What every run of a recipe does with its artifacts; a run sets the three attributes."""

    prepared: Prepared
    recipe: Recipe
    state: PartialState

    def say(self, text: str) -> None:
        self.state.print(text, flush=True)

    def _make(
        self,
        folder: Path,
        digest: str,
        label: str,
        build: Callable[[Path, dict[str, Any]], None],
        before: Callable[[], None] | None = None,
    ) -> bool:
        """Make an artifact on the first process unless it is current; returns whether it was made.

        Args:
            build: writes it into a folder and completes its record.
            before: what all processes do for it first; its time and memory are in the record too.
        """
        if self._is_current(folder, digest):
            self.say(f"[{label}] unchanged, skipped")
            return False
        self.say(f"[{label}] ...")
        started = time.monotonic()
        reset_peak_memory(self.prepared.device)
        if before is not None:
            before()
        if self.state.is_main_process:
            record: dict[str, Any] = {"name": label, "fingerprint": digest, "versions": versions()}
            with publishing(folder, record) as scratch:
                self._save_recipe(scratch)
                build(scratch, record)
                record["seconds"] = round(time.monotonic() - started, 1)
                record["peak_memory_bytes"] = peak_memory(self.prepared.device)
            self.say(f"[{label}] {record['seconds']} s")
        self.state.wait_for_everyone()
        return True

    def _is_current(self, folder: Path, digest: str) -> bool:
        """Whether an artifact is there and current. The first process looks, so that all processes do the same."""
        answer = [is_current(folder, digest)]
        broadcast_object_list(answer)
        return answer[0]

    def _save_recipe(self, folder: Path) -> None:
        OmegaConf.save(OmegaConf.create(self.recipe.model_dump(mode="json", exclude={"dry_run"})), folder / "recipe.yaml")

"""One run of one recipe: what every stage is given."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.export.fresh_process import FreshProcess
from transmla.generate.problems import ProblemSet, load_problems
from transmla.hardware import use_cores
from transmla.modeling.determinism import use_deterministic
from transmla.plan.checks import Prepared
from transmla.process.siblings import address, watch_others
from transmla.recipe.launch_file import open_processes
from transmla.run.fingerprints import Fingerprints
from transmla.run.paths import Paths
from transmla.run.rows_ahead import CORES, RowsAhead
from transmla.sources.drawn_parts import drawn_model
from transmla.sources.fetch import fetch
from transmla.sources.kinds import kind_of
from transmla.sources.layered_model import LayeredModel
from transmla.sources.local_model import load_source, stream_source
from transmla.sources.random_model import byte_tokenizer
from transmla.sources.tokenizer import load_tokenizer


class Run:
    """A prepared recipe with its paths, digests, processes and models; models are loaded when they are asked for.

    A stage is a function of it. Work that one process does is done by the first; the others wait.

    prepared, recipe: what passed every check. paths: where artifacts lie. digests: what they are made from.
    state: the processes. missed: thresholds that were missed, after `evaluate`.
    """

    def __init__(self, prepared: Prepared) -> None:
        use_deterministic(prepared.recipe.deterministic)  # before the processes find one another
        # A process may wait for the first one's calibration or evaluation: longer than the default timeouts.
        self.state = open_processes(prepared.device, timedelta(hours=24))
        if self.state.num_processes > 1:
            watch_others(gather_object([address()]))
        chosen = [prepared.streaming, prepared.evaluation]  # by free memory, which processes may find to differ
        broadcast_object_list(chosen)
        prepared = replace(prepared, streaming=chosen[0], evaluation=chosen[1])
        self.prepared = prepared
        self.recipe = prepared.recipe
        self.paths = Paths(prepared.output, prepared.recipe)
        self.digests = Fingerprints(prepared)
        self.missed: list[str] = []
        self._fresh: FreshProcess | None = None
        for line in prepared.replaced:
            self.say(f"[deterministic] {line}")
        set_seed(self.recipe.seed)
        if prepared.device == "cpu":
            use_cores(self.recipe.threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if self.state.num_processes > 1:
            with self.state.main_process_first():  # one process downloads, the others find it in the cache
                if not self.drawn:
                    _ = self.source_folder

    def say(self, text: str) -> None:
        """Print a line, on the first process."""
        self.state.print(text, flush=True)

    @property
    def device(self) -> str:
        """The device of this process."""
        return str(self.state.device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of weights and products."""
        return self.prepared.dtype

    @property
    def positions(self) -> int:
        """Tokens that the source was made for."""
        return self.prepared.config.max_position_embeddings

    @cached_property
    def source_folder(self) -> Path:
        """The source as a local directory, downloaded or dequantised where need be."""
        return fetch(self.recipe.model)

    @property
    def drawn(self) -> bool:
        """Whether the source is a random model that is drawn layer by layer and never stored."""
        return self.prepared.streaming.on and kind_of(self.recipe.model.source) == "random"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's tokenizer."""
        if self.drawn:
            return byte_tokenizer(self.prepared.config)
        return load_tokenizer(self.source_folder, "model.source")

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The source model, on this process's device."""
        return load_source(self.source_folder, self.dtype, self.device)

    def stream_source(self) -> LayeredModel:
        """The source model with one part in memory at a time, on this process's device."""
        if self.drawn:
            return drawn_model(self.prepared.config, self.dtype, torch.device(self.device), "model.config")
        return stream_source(self.source_folder, self.dtype, self.device)

    def release_teacher(self) -> None:
        """Make room for another model; the next use of `teacher` loads it again."""
        self.__dict__.pop("teacher", None)
        gc.collect()

    @property
    def spares_cores(self) -> bool:
        """Whether other processes may work beside this one: it is the first, waits for a GPU, and has cores."""
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.prepared.device == "cuda" and self.state.is_main_process and cores >= CORES

    @cached_property
    def rows_ahead(self) -> RowsAhead | None:
        """The process that makes rows of coming stages, where cores are to spare."""
        return RowsAhead() if self.spares_cores and not self.drawn else None

    def end_rows_ahead(self) -> None:
        """End that process, if there is one."""
        process = self.__dict__.pop("rows_ahead", None)
        if process is not None:
            process.end()

    def start_fresh_process(self) -> None:
        """Have the process of the export's check import what it needs, where cores are to spare: some machines take a
        quarter of a minute for it."""
        if self.spares_cores and self._fresh is None:
            self._fresh = FreshProcess(stock=self.prepared.export.stock)

    def fresh_process(self) -> FreshProcess:
        """The process of the export's check, for the caller to end; a new one where none was started, or where that was
        killed while it waited."""
        if self._fresh is not None and self._fresh.waits:
            found, self._fresh = self._fresh, None
            return found
        self.end_fresh_process()
        return FreshProcess(stock=self.prepared.export.stock)

    def end_fresh_process(self) -> None:
        """End that process, if one was started and not asked for."""
        found, self._fresh = self._fresh, None
        if found is not None:
            found.end()

    @cached_property
    def exams(self) -> dict[str, ProblemSet]:
        """The problems of `evaluate.solve` by name."""
        return {
            entry.name: load_problems(
                entry.problems, f"evaluate.solve.{index}.problems", skip=entry.skip, limit=entry.limit
            )
            for index, entry in enumerate(self.recipe.evaluate.solve)
        }

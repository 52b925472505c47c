"""The conversion of a model that does not fit in memory: one loop over its layers, each read, solved and let go.

Hidden states of all calibration windows wait in a stream before the layer at hand. Its arithmetic is that of the whole
conversion (transmla.convert.conversion). A search is possible for what one layer alone decides: its freqfold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from transmla.convert.calibration import LayerStatistics, calibrate_layer
from transmla.convert.conversion import Findings, drift_of, linear_attention, solve_attention
from transmla.convert.refit import refit_layer
from transmla.convert.router_calibration import RouterErrors, RouterFit, observed, require_small, router_moments
from transmla.convert.search import folds_of, split
from transmla.families import family_of
from transmla.families.student_config import student_config
from transmla.geometry import candidates, derive_geometry
from transmla.hardware import trim_memory
from transmla.measure.streamed_quality import attention_of, output_error
from transmla.modeling.decoder_layers import DecoderLayers
from transmla.modeling.state_stream import StateStream, batches_of
from transmla.modeling.student import ATTENTION
from transmla.recipe.schema import Convert
from transmla.sources.layered_model import LayeredModel, model_without_weights

Keep = Callable[[dict[str, Tensor]], None]


@dataclass(kw_only=True)
class StreamedConversion(Findings):
    """student: without weights. seconds: by layer."""

    student: PreTrainedModel
    seconds: list[float]


def needs_whole_models(config: PretrainedConfig, settings: Convert) -> str | None:
    """The key of `convert` that is chosen by comparing whole students, so that nothing can be streamed; None where
    there is none. config: of the source."""
    if settings.mean_rotation == "auto":
        return "mean_rotation"
    if len(candidates(config, settings)) > 1:
        free = ("qk_rope_head_dim", "kv_lora_rank", "collapse")
        return next(name for name in free if getattr(settings, name) == "auto")
    return "freqfold" if settings.freqfold == "auto" and settings.method == "transmla" else None


@torch.no_grad()
def stream_conversion(source: LayeredModel, settings: Convert, windows: Tensor, keep: Keep) -> StreamedConversion:
    """Convert a source layer by layer.

    Memory: one layer of source and student, the embedding or head, this layer's moments, O(D²), and one batch.
    Streams of hidden states are on the GPU where they are small there, else in files (`StateStream`).

    Args:
        windows: calibration tokens, [n, L]. keep: is given the student's tensors by name, as they are ready.
    """
    assert needs_whole_models(source.config, settings) is None, "the plan refuses it"
    work = _Streaming(source, settings, windows)
    seconds = []
    first, *layers = source.parts[: source.config.num_hidden_layers + 1]
    with source.part(first):
        work.begin()
        keep(source.tensors(first))
    for index, part in enumerate(tqdm(layers, desc="convert", unit="layer")):
        started = time.monotonic()
        with source.part(part):
            keep(work.convert_layer(index))
        trim_memory()
        seconds.append(round(time.monotonic() - started, 2))
    for part in source.parts[len(layers) + 1 :]:
        with source.part(part):
            keep(source.tensors(part))
    return work.result(seconds)


class _Streaming:
    """What the loop over layers carries along."""

    def __init__(self, source: LayeredModel, settings: Convert, windows: Tensor) -> None:
        config, device = source.config, source.device
        self.source, self.family = source, family_of(config)
        self.windows, self.held_out = split(windows, settings)
        if self.held_out is not None:
            settings = candidates(config, settings)[0]
        self.geometry = derive_geometry(config, settings)
        self.settings = (
            settings.model_copy(update={"collapse": self.geometry.collapse}) if settings.searched else settings
        )
        self.batch_size, self.drift = settings.calibration.batch_size, drift_of(config, settings)
        self.student = model_without_weights(student_config(config, self.geometry, self.family), source.dtype, device)
        self.layers = DecoderLayers(self.student, device, source.dtype)
        hidden = config.hidden_size
        stream = lambda ids: StateStream((*ids.shape, hidden), source.dtype, device=device)  # noqa: E731
        self.original = stream(self.windows)
        self.own = stream(self.windows) if settings.refit else None
        self.judged = None if self.held_out is None else stream(self.held_out)
        self.folds: list[int] = []
        self.scales: list[float] = []
        self.key_errors: list[float] = []
        self.routers: list[RouterFit] = []

    def begin(self) -> None:
        """Fill the streams from the embedding."""
        for rows in batches_of(self.windows, self.batch_size):
            states = self.source.layers.first_states(self.windows[rows])
            for stream in (self.original, self.own):
                if stream is not None:
                    stream.put(rows, states)
        if self.held_out is not None and self.judged is not None:
            for rows in batches_of(self.held_out, 1):
                self.judged.put(rows, self.source.layers.first_states(self.held_out[rows]))

    def convert_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of one student layer, by name; the source's layer is in memory."""
        source, device = self.source.layers, self.source.device
        statistics = self._measure(index)
        self.scales.append(statistics.output_mean_square)
        attention = self._solve(index, statistics)
        if statistics.key_error is not None:
            self.key_errors.append(float(statistics.key_error.mean()))
        del statistics
        self._load(index, attention)
        if self.own is not None:
            refit_layer(
                source, self.layers, index, self.original, self.own, batch_size=self.batch_size, drift=self.drift
            )
        if self.judged is not None:
            for rows in batches_of(self.judged.states, 1):
                self.judged.put(rows, source.run(index, self.judged.get(rows, device)))
        layer = self.student.model.layers[index]
        found = {f"{self.source.layer(index)}.{name}": value for name, value in layer.state_dict().items()}
        layer.to("meta")
        return found

    def _measure(self, index: int) -> LayerStatistics:
        """What the layer does with the calibration text; its router is looked at twice, where it becomes DeepSeek's."""
        source, device = self.source.model, self.source.device
        moments = router_moments(source, [index], device) if self.settings.router == "stock" else {}
        run = partial(self._pass_text, index, keep=not moments)
        with observed(moments):
            statistics = calibrate_layer(source, index, run, length=self.windows.shape[1], device=device)
        for router, seen in moments.items():
            errors = RouterErrors(seen.shift())
            with observed({router: errors}):
                self._pass_text(index, keep=True)
            self.routers.append(errors.result())
            require_small(self.routers[-1], index, self.source.dtype)
        return statistics

    def _pass_text(self, index: int, *, keep: bool) -> None:
        """Pass the calibration text through the layer. keep: the states behind it take the place of those before it;
        where there is a refit, which needs the latter, it does that."""
        source = self.source.layers
        for rows in batches_of(self.windows, self.batch_size):
            states = source.run(index, self.original.get(rows, self.source.device))
            if keep and self.own is None:
                self.original.put(rows, states)

    def _solve(self, index: int, statistics: LayerStatistics) -> dict[str, Tensor]:
        """The student's attention by name within the layer, with the freqfold that is best for it."""
        source, config, device = self.source.model, self.source.config, self.source.device
        module = source.model.layers[index].self_attn
        weights = linear_attention(self.family, module, config, statistics, device)
        frequencies = self.family.frequencies(source, index).double()

        def solve(fold: int) -> dict[str, Tensor]:
            solved = solve_attention(
                weights, statistics, frequencies, self.geometry, self.settings, self.student.config, freqfold=fold
            )
            return {f"{ATTENTION[1:]}{name}": value.to(self.source.dtype) for name, value in solved.items()}

        if self.settings.freqfold != "auto":
            return solve(self.geometry.freqfold_of(index))
        inputs = self._attention_inputs(index)
        best: dict[str, Tensor] = {}
        least, chosen = float("inf"), 0
        for fold in folds_of(self.geometry):
            tried = solve(fold)
            self._load(index, tried)
            error = output_error(self.layers, index, inputs, statistics.output_mean_square)
            if not best or error < least:
                best, least, chosen = tried, error, fold
        self.folds.append(chosen)
        return best

    def _attention_inputs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """By held-out window: what the source's attention is given, and what it puts out."""
        judged, source = self.judged, self.source
        assert judged is not None, "windows are held out where something is auto"
        return [
            attention_of(source.layers, index, judged.get(rows, source.device)) for rows in batches_of(judged.states, 1)
        ]

    def _load(self, index: int, attention: dict[str, Tensor]) -> None:
        """Put an attention into the student's layer, beside the source's trunk."""
        trunk = self.source.model.model.layers[index].state_dict()
        state = {name: value for name, value in trunk.items() if not name.startswith(ATTENTION[1:])} | attention
        self.student.model.layers[index].load_state_dict(state, assign=True, strict=True)

    def result(self, seconds: list[float]) -> StreamedConversion:
        """What was found."""
        geometry, choices = self.geometry, []
        if self.folds:
            geometry = derive_geometry(self.source.config, self.settings, freqfold=tuple(self.folds))
            choices.append(f"freqfold by layer: {self.folds}")
        return StreamedConversion(
            settings=self.settings,
            geometry=geometry,
            choices=choices,
            output_scales=self.scales,
            key_errors=self.key_errors,
            routers=self.routers,
            student=self.student,
            seconds=seconds,
        )

"""What a conversion measures of a source's routers: what the shift of their logits is fitted to, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from transmla.convert.router_shift import DEPTH, MOST, RouterShift, fit_shift, weight_errors
from transmla.errors import RecipeError
from transmla.families import family_of
from transmla.families.family import SourceModule

KINDS = {"float32": torch.float32, "16 bits": torch.bfloat16}  # number formats of a checkpoint, as far as depths differ


class Observer(Protocol):
    """Sees what a router is given."""

    def add(self, inputs: Tensor, router: SourceModule) -> None:
        """inputs: [n, D], float64."""


class RouterMoments:
    """Sums over tokens of the router's input h and of its largest logit l; float64."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        self.second, self.first, self.cross, self.largest = zeros(hidden, hidden), zeros(hidden), zeros(hidden), zeros()
        self.tokens = 0

    def add(self, inputs: Tensor, router: SourceModule) -> None:
        """inputs: h, [n, D], float64."""
        largest = (inputs @ router.weight.double().mT).amax(-1)
        self.second.addmm_(inputs.mT, inputs)
        self.first += inputs.sum(0)
        self.cross += inputs.mT @ largest
        self.largest += largest.sum()
        self.tokens += len(inputs)

    def shift(self) -> RouterShift:
        """What is fitted to them."""
        n = self.tokens
        return fit_shift(self.second / n, self.first / n, self.cross / n, float(self.largest / n))


class RouterErrors:
    """The errors of the experts' weights where a shifted sigmoid stands for the softmax, by number format."""

    def __init__(self, shift: RouterShift) -> None:
        self.shift = shift
        self.most = dict.fromkeys(KINDS, 0.0)
        self.total = dict.fromkeys(KINDS, 0.0)
        self.tokens = 0

    def add(self, inputs: Tensor, router: SourceModule) -> None:
        """inputs: h, [n, D], float64."""
        logits = inputs @ router.weight.double().mT
        for kind, dtype in KINDS.items():
            errors = weight_errors(logits, inputs @ self.shift.at(dtype), router.top_k)
            self.most[kind] = max(self.most[kind], float(errors.max()))
            self.total[kind] += float(errors.sum())
        self.tokens += len(inputs)

    def result(self) -> RouterFit:
        """Means and largest errors."""
        mean = {kind: total / self.tokens for kind, total in self.total.items()}
        return RouterFit(self.shift, mean, dict(self.most))


@dataclass(frozen=True)
class RouterFit:
    """One layer's shift, and the relative errors of a weight that it leaves on the calibration text, by number format:
    mean over tokens, and largest."""

    shift: RouterShift
    mean: dict[str, float]
    most: dict[str, float]

    def describe(self) -> dict[str, dict[str, float]]:
        """The errors for a file."""
        return {"mean": self.mean, "largest": self.most}


@contextmanager
def observed(observers: Mapping[SourceModule, Observer]) -> Iterator[None]:
    """While the context is open, observers see the inputs of their routers."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        observers[module].add(args[0].detach().flatten(0, -2).double(), module)

    handles = [module.register_forward_pre_hook(before) for module in observers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def router_moments(
    source: PreTrainedModel, layers: Sequence[int], device: torch.device
) -> dict[SourceModule, RouterMoments]:
    """Empty moments of some layers' routers."""
    router = family_of(source.config).router
    assert router is not None, "the plan refuses it"
    hidden = source.config.hidden_size
    return {router(source.model.layers[index]): RouterMoments(hidden, device) for index in layers}


@torch.no_grad()
def measure_routers(
    source: PreTrainedModel, moments: dict[SourceModule, RouterMoments], windows: Iterable[Tensor], total: int
) -> list[RouterFit]:
    """Fit the shift of every router, and measure it by a second look at the calibration text.

    Args:
        moments: of all routers, in order; they are let go. windows: batches of token ids [B, T]. total: number of them.

    Raises:
        RecipeError: a sigmoid cannot stand for the softmax of a layer.
    """
    errors = {router: RouterErrors(moments.pop(router).shift()) for router in list(moments)}
    with observed(errors):
        for batch in tqdm(windows, total=total, desc="routers", unit="batch"):
            source.model(input_ids=batch.to(source.device), use_cache=False)
    fits = [found.result() for found in errors.values()]
    for index, fit in enumerate(fits):
        require_small(fit, index, source.dtype)
    return fits


def require_small(fit: RouterFit, index: int, dtype: torch.dtype) -> None:
    """Refuse a router whose softmax no sigmoid stands for.

    Args:
        index: of the layer. dtype: of the student.

    Raises:
        RecipeError: the mean error of a weight is too large.
    """
    kind = next(kind for kind, known in KINDS.items() if DEPTH[known] == DEPTH[dtype])
    if not fit.mean[kind] <= MOST:  # a NaN fails too
        raise RecipeError(
            "convert.router",
            f"no shift of its logits turns the router of layer {index} into a sigmoid's: on the calibration text an "
            f"expert's weight would be wrong by {fit.mean[kind]:.1e} on average (at most {MOST:.0e}) and by "
            f"{fit.most[kind]:.1e} at most, because the router's inputs have no direction in common; use keep, which "
            "exports the student's own class",
        )


def describe_routers(errors: Sequence[dict[str, dict[str, float]]]) -> str:
    """One line on what sigmoids in the place of softmaxes cost. errors: by layer, as `RouterFit.describe` has them."""
    parts = [
        f"{max(layer['largest'][kind] for layer in errors):.1e} in a checkpoint of {kind} (mean "
        f"{sum(layer['mean'][kind] for layer in errors) / len(errors):.1e})"
        for kind in KINDS
    ]
    return (
        "an engine that chooses experts by a sigmoid finds the weights of the softmax; their largest relative error on "
        f"the calibration text is {', '.join(parts)}"
    )

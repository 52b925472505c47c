"""Streamed statistics of every attention's input: memory O(layers · D²), whatever the number of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.families import FAMILIES, HeadNorm
from transmla.modeling.backends import cap, eager_attention
from transmla.modeling.window import layer_window

IMPLEMENTATION = "mla_calibration"
QUERY_BLOCK = 256  # rows of an attention matrix that exist at a time


@dataclass
class LayerStatistics:
    """Moments of one attention's input x and of its attention distances; float64.

    second_moment: E[x x^T], [D, D]. mean: E[x], [D]. distance: [H, L], how much attention a head gives to the
    token Δ positions back, rows sum to one. output_mean_square: E|o|² of the attention's output.

    Only of an attention whose queries and keys pass a norm, both before rotation and behind the norm: query_moment:
    E[q q^T], [H, d, d]. key_cross: E[k [x;1]^T], [G, d, D1]. key_energy: E|k|², [G]. key_error: [G], the share of the
    keys' variance that no linear map of x explains, set when the keys are fitted (transmla.convert.keynorm).
    """

    second_moment: Tensor
    mean: Tensor
    distance: Tensor
    output_mean_square: float
    query_moment: Tensor | None = None
    key_cross: Tensor | None = None
    key_energy: Tensor | None = None
    key_error: Tensor | None = None

    def augmented(self) -> Tensor:
        """Second moment of [x; 1], [D1, D1]."""
        size = len(self.mean)
        full = self.second_moment.new_empty(size + 1, size + 1)
        full[:size, :size] = self.second_moment
        full[:size, size] = full[size, :size] = self.mean
        full[size, size] = 1.0
        return full


class NormedMoments:
    """Moments of queries and keys behind their norms, from the attention's input in float64."""

    def __init__(self, module: nn.Module, norms: tuple[HeadNorm, HeadNorm]) -> None:
        self.module = module
        self.query_norm, self.key_norm = norms
        self.query: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0

    @staticmethod
    def _heads(linear: nn.Linear, norm: HeadNorm, x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.double()
        return norm(F.linear(x, linear.weight.double(), bias).unflatten(-1, (-1, len(norm.weight))))

    def add(self, x: Tensor) -> None:
        """x: [n, D], float64."""
        query = self._heads(self.module.q_proj, self.query_norm, x)
        key = self._heads(self.module.k_proj, self.key_norm, x)
        self.query = self.query + torch.einsum("nhv,nhw->hvw", query, query)
        self.cross = self.cross + torch.einsum("ngw,nx->gwx", key, F.pad(x, (0, 1), value=1.0))
        self.energy = self.energy + key.square().sum((0, 2))

    def result(self, tokens: int) -> dict[str, Tensor]:
        """The fields of `LayerStatistics`."""
        return {
            "query_moment": self.query / tokens,
            "key_cross": self.cross / tokens,
            "key_energy": self.energy / tokens,
        }


class _Accumulator:
    def __init__(self, hidden: int, heads: int, length: int, device: torch.device) -> None:
        self.second = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.first = torch.zeros(hidden, dtype=torch.float64, device=device)
        self.distance = torch.zeros(heads, length, dtype=torch.float64, device=device)
        self.output = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self.normed: NormedMoments | None = None

    def add_input(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).double()
        self.second.addmm_(x.T, x)
        self.first += x.sum(0)
        self.tokens += len(x)
        if self.normed is not None:
            self.normed.add(x)

    def add_output(self, out: Tensor) -> None:
        self.output += out.detach().double().square().sum()

    def add_attention(
        self, query: Tensor, key: Tensor, scaling: float, softcap: float | None, window: int | None
    ) -> None:
        """Histogram of causal attention weights over distances. query: [H, T, d]; key: [G, T, d]."""
        heads, length, _ = query.shape
        key = key.repeat_interleave(heads // len(key), 0)
        position = torch.arange(length, device=query.device)
        for start in range(0, length, QUERY_BLOCK):
            rows = position[start : start + QUERY_BLOCK]
            columns = position[: rows[-1] + 1]
            delta = rows[:, None] - columns[None, :]
            logits = cap((query[:, rows] @ key[:, columns].mT).float() * scaling, softcap)
            hidden = delta < 0 if window is None else (delta < 0) | (delta >= window)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).double()
            # The first token collects attention that means nothing (a sink), from everywhere: left in, it would make
            # every mean rotation near zero.
            weights[..., 0] = 0.0
            self.distance.index_add_(1, delta.clamp_min(0).flatten(), weights.flatten(1))

    def result(self) -> LayerStatistics:
        return LayerStatistics(
            second_moment=self.second / self.tokens,
            mean=self.first / self.tokens,
            distance=self.distance / self.distance.sum(-1, keepdim=True),
            output_mean_square=float(self.output / self.tokens),
            **({} if self.normed is None else self.normed.result(self.tokens)),
        )


def capped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float, scaling: float
) -> tuple[Tensor, None]:
    """Grouped attention with capped logits, which PyTorch's fused kernels do not have, in blocks of queries.

    query: [B, H, T, d]. key, value: [B, G, T, d]. mask: boolean, broadcastable to [B, H, T, T], or None: causal.
    Returns [B, T, H, d] and None.
    """
    repeat, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    lowest = torch.finfo(query.dtype).min
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        penalty = torch.zeros_like(mask[:, :, rows], dtype=query.dtype).masked_fill_(~mask[:, :, rows], lowest)
        blocks.append(eager_attention(module, query[:, :, rows], key, value, penalty, scaling, softcap=softcap)[0])
    return torch.cat(blocks, dim=1), None


@contextmanager
def _recording(model: PreTrainedModel, accumulators: dict[nn.Module, _Accumulator]) -> Iterator[None]:
    """Register an attention function that sees the rotated queries and keys of the model's own attention."""
    known = weakref.WeakKeyDictionary(accumulators)
    config = model.config

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object):
        softcap = kwargs.get("softcap")
        # One row of the batch: distances need far fewer tokens than second moments.
        known[module].add_attention(query[0], key[0], kwargs["scaling"], softcap, layer_window(config, module.layer_idx))
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return capped_attention(module, query, key, value, mask, softcap, kwargs["scaling"])

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        known[module].add_input(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def after(module: nn.Module, args: tuple, out: tuple) -> None:
        known[module].add_output(out[0])

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in accumulators]
    handles += [module.register_forward_hook(after) for module in accumulators]
    previous = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = previous
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, windows: Iterable[Tensor], *, length: int, total: int | None = None
) -> list[LayerStatistics]:
    """Stream windows of text through the source's trunk and measure every attention.

    Args:
        windows: batches of token ids [B, T], T at most `length`.
        length: longest window, the size of the distance histogram.
        total: number of batches, for the progress bar.

    Returns:
        One `LayerStatistics` a layer, on the model's device.

    Raises:
        ValueError: there was no text.
    """
    config = model.config
    modules = [layer.self_attn for layer in model.model.layers]
    accumulators = {
        module: _Accumulator(config.hidden_size, config.num_attention_heads, length, model.device)
        for module in modules
    }
    head_norms = FAMILIES[config.model_type].head_norms
    if head_norms is not None:
        for module, accumulator in accumulators.items():
            accumulator.normed = NormedMoments(module, head_norms(module))
    with _recording(model, accumulators):
        for batch in tqdm(windows, total=total, desc="calibrate", unit="batch"):
            model.model(input_ids=batch.to(model.device), use_cache=False)
    if not accumulators[modules[0]].tokens:
        raise ValueError("convert.calibration.data: no text to calibrate on; name a dataset that has some")
    return [accumulators[module].result() for module in modules]

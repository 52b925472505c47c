"""Streamed statistics of every attention's input: memory O(layers · D²), whatever the number of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.convert.attention_moments import QUERY_BLOCK, AttentionMoments, tensor_cores
from transmla.families import FAMILIES
from transmla.families.family import HeadNorm, SourceModule
from transmla.modeling.config_facts import sliding_window_of
from transmla.modeling.kernels.eager import eager_attention

IMPLEMENTATION = "mla_calibration"


@dataclass
class LayerStatistics:
    """Moments of one attention's input x and of what attention does with it; float64.

    second_moment: E[x x^T], [D, D]. mean: E[x], [D]. output_mean_square: E|o|² of the attention's output.
    distance: [H, L], how much attention a head gives to the token Δ positions back, rows sum to one.
    averaged: E[z z^T] of the inputs as attention averages them, z_t = sum_s A_ts x_s, [D, D]; averaged_mean: E[z], [D].
    attended: E[sum_s A_ts x_s x_s^T], [D, D]. logit_cost: [H], see `AttentionMoments`.

    Only of an attention whose queries and keys pass a norm, both before rotation and behind the norm: query_moment:
    E[q q^T], [H, d, d]. key_cross: E[k [x;1]^T], [G, d, D1]; attended_key_cross: the same over attended keys.
    key_energy: E|k|², [G]. key_error: [G], the share of the keys' variance that no linear map of x explains, set when
    the keys are fitted (transmla.convert.key_norm).
    """

    second_moment: Tensor
    mean: Tensor
    output_mean_square: float
    distance: Tensor
    averaged: Tensor
    averaged_mean: Tensor
    attended: Tensor
    logit_cost: Tensor
    query_moment: Tensor | None = None
    key_cross: Tensor | None = None
    attended_key_cross: Tensor | None = None
    key_energy: Tensor | None = None
    key_error: Tensor | None = None

    def augmented(self) -> Tensor:
        """Second moment of [x; 1], [D1, D1]."""
        return _augment(self.second_moment, self.mean)

    def augmented_attended(self) -> Tensor:
        """Second moment of [x; 1] over attended tokens, [D1, D1]."""
        return _augment(self.attended, self.averaged_mean)  # E[sum_s A_ts x_s] is E[z]


def _augment(second_moment: Tensor, mean: Tensor) -> Tensor:
    size = len(mean)
    full = second_moment.new_empty(size + 1, size + 1)
    full[:size, :size] = second_moment
    full[:size, size] = full[size, :size] = mean
    full[size, size] = 1.0
    return full


class NormedMoments:
    """Moments of queries and keys behind their norms, from the attention's input in float64."""

    def __init__(self, module: SourceModule, norms: tuple[HeadNorm, HeadNorm]) -> None:
        self.module = module
        self.query_norm, self.key_norm = norms
        self.query: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0

    def keys(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, G, d]."""
        return self._heads(self.module.k_proj, self.key_norm, x)

    def keys_by_row(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, G, T, d]."""
        return self.keys(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)

    @staticmethod
    def _heads(linear: nn.Linear, norm: HeadNorm, x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.double()
        return norm(F.linear(x, linear.weight.double(), bias).unflatten(-1, (-1, len(norm.weight))))

    def add(self, x: Tensor) -> None:
        """x: [n, D], float64."""
        query = self._heads(self.module.q_proj, self.query_norm, x)
        key = self.keys(x)
        self.query = self.query + torch.einsum("nhv,nhw->hvw", query, query)
        self.cross = self.cross + torch.einsum("ngw,nx->gwx", key, F.pad(x, (0, 1), value=1.0))
        self.energy = self.energy + key.square().sum((0, 2))

    def result(self, tokens: int) -> dict[str, Tensor]:
        """The fields of `LayerStatistics`."""
        query, cross, energy = self.query, self.cross, self.energy
        assert isinstance(query, Tensor) and isinstance(cross, Tensor) and isinstance(energy, Tensor), "nothing added"
        return {"query_moment": query / tokens, "key_cross": cross / tokens, "key_energy": energy / tokens}


class _Accumulator:
    def __init__(self, hidden: int, attention: AttentionMoments, normed: NormedMoments | None) -> None:
        device = attention.averaged.device
        self.second = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.first = torch.zeros(hidden, dtype=torch.float64, device=device)
        self.output = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self.attention, self.normed = attention, normed
        self.input: Tensor | None = None

    def add_input(self, x: Tensor) -> None:
        self.input = x.detach()  # [B, T, D], for the attention that follows
        x = self.input.flatten(0, -2).double()
        self.second.addmm_(x.T, x)
        self.first += x.sum(0)
        self.tokens += len(x)
        if self.normed is not None:
            self.normed.add(x)

    def add_output(self, out: Tensor) -> None:
        self.output += out.detach().double().square().sum()
        self.input = None

    def add_attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        """query: [B, H, T, d]; key, value: [B, G, T, d]."""
        assert self.input is not None, "an attention's input comes before its queries"
        plain = None if self.normed is None else self.normed.keys_by_row
        with tensor_cores(query.dtype):
            self.attention.add(self.input, query, key, value, plain_keys=plain, **options)

    def result(self) -> LayerStatistics:
        return LayerStatistics(
            second_moment=self.second / self.tokens,
            mean=self.first / self.tokens,
            output_mean_square=float(self.output / self.tokens),
            **self.attention.result(),
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
def _observed(model: PreTrainedModel, accumulators: dict[nn.Module, _Accumulator]) -> Iterator[None]:
    """Register an attention function that sees the rotated queries and keys of the model's own attention."""
    known = weakref.WeakKeyDictionary(accumulators)
    config = model.config

    def attention(
        module: SourceModule, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        softcap = kwargs.get("softcap")
        window = sliding_window_of(config, module.layer_idx)
        known[module].add_attention(query, key, value, scaling=kwargs["scaling"], softcap=softcap, window=window)
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
        known.clear()  # the registry keeps the function, and it would keep every moment
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
    modules = [layer.self_attn for layer in model.model.layers]
    accumulators = {module: _accumulator(model.config, module, length, model.device) for module in modules}
    with _observed(model, accumulators):
        for batch in tqdm(windows, total=total, desc="calibrate", unit="batch"):
            model.model(input_ids=batch.to(model.device), use_cache=False)
    if not next(iter(accumulators.values())).tokens:
        raise ValueError("convert.calibration.data: no text to calibrate on; name a dataset that has some")
    return [accumulators.pop(module).result() for module in list(accumulators)]  # a layer's sums go as its means come


@torch.no_grad()
def calibrate_layer(
    model: PreTrainedModel, index: int, run: Callable[[], None], *, length: int, device: torch.device
) -> LayerStatistics:
    """Measure one attention while `run` passes text through its layer, the only one that has to be in memory.

    Args:
        length: longest window. device: where the layer is, and its statistics will be.
    """
    module = model.model.layers[index].self_attn
    accumulator = _accumulator(model.config, module, length, device)
    with _observed(model, {module: accumulator}):
        run()
    return accumulator.result()


def _accumulator(config: PretrainedConfig, module: SourceModule, length: int, device: torch.device) -> _Accumulator:
    family = FAMILIES[config.model_type]
    source = family.read_attention(module, config, device)
    normed = None if family.head_norms is None else NormedMoments(module, family.head_norms(module))
    attention = AttentionMoments(source.output, len(source.key), length, normed_keys=normed is not None)
    return _Accumulator(config.hidden_size, attention, normed)

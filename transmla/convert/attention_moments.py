"""What attention does with its inputs: the moments that errors of keys and values are weighed by.

A value error reaches the output only averaged by attention, so it is weighed by the second moment of the averaged
input z_t = sum_s A_ts x_s. A key error changes attention only where it differs between the tokens that one query
attends to, so it is weighed by the spread around z_t. Both are [D, D], means over heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from transmla.modeling.kernels.eager import cap

QUERY_STRIDE = 4  # one query in so many is looked at; which one moves from batch to batch

QUERY_BLOCK = 256  # rows of an attention matrix that exist at a time


@contextmanager
def tensor_cores(dtype: torch.dtype) -> Iterator[None]:
    """Let a GPU multiply float32 by its tensor cores (TF32) where a model computes in 16 bits.

    Their factors have 11 significant bits, bfloat16 has 8: inputs lose nothing. Probabilities and averages are cut off,
    which moves second moments by 1e-4 of their norm (docs/experiments.md), a tenth of the ridge that they get.
    """
    before = torch.get_float32_matmul_precision()
    if dtype in (torch.bfloat16, torch.float16) and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def by_distance(weights: Tensor, stride: int) -> Tensor:
    """Attention by distance: sums along diagonals, all at once.

    Args:
        weights: [H, R, C], of queries `stride` tokens apart, the last at C - 1, to the tokens 0 to C - 1, causal.

    Returns:
        [H, C], float64, of distances 0 to C - 1.
    """
    heads, rows, columns = weights.shape
    width = max(columns, stride) + stride * (rows - 1)
    # Every row is shifted so that a distance has the same place in all of them.
    shifted = weights.new_zeros(heads, rows * width)
    aligned = shifted.as_strided((heads, rows, columns), (rows * width, width - stride, 1), stride * (rows - 1))
    aligned.copy_(weights)
    return shifted.unflatten(1, (rows, width))[..., :columns].sum(1).double().flip(1)


class AttentionMoments:
    """Accumulates over rows of text; float64 on one device.

    averaged: E[z z^T]. attended: E[sum_s A_ts x_s x_s^T]. distance: [H, L], attention by distance. logit_cost: [H],
    what one unit of independent logit error costs in output error, E[sum_s A_ts² |O (v_s - o_t)|²]. key_cross: [G, d,
    D1], E[sum_s A_ts k_s [x_s; 1]^T], the attention that of all heads, only with `normed_keys`.
    """

    def __init__(self, output: Tensor, groups: int, length: int, *, normed_keys: bool) -> None:
        """output: O, [D, H, d], on the device where moments are kept. length: longest row."""
        hidden, self.heads, width = output.shape
        self.gram = torch.einsum("xhw,xhv->hwv", output, output).float()
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=output.device)  # noqa: E731
        self.averaged, self.attended = zeros(hidden, hidden), zeros(hidden, hidden)
        self.distance = zeros(self.heads, length)
        self.logit_cost = zeros(self.heads)
        self.key_cross = zeros(groups, width, hidden + 1) if normed_keys else None
        self.mean = zeros(hidden)
        self.rows = 0
        self.calls = 0

    def add(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
        plain_key: Tensor | None,
    ) -> None:
        """One row of text.

        Args:
            x: [T, D]. query: [H, T, d] and key: [G, T, d], rotated. value: [G, T, d].
            plain_key: keys behind their norm without rotation [G, T, d], where they have a norm.
        """
        x, value = x.float(), value.float()
        repeat = self.heads // len(key)
        key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
        position = torch.arange(x.shape[0], device=x.device)
        offset, self.calls = self.calls % QUERY_STRIDE, self.calls + 1
        chosen = range(min(offset, len(x) - 1), len(x), QUERY_STRIDE)
        size = torch.einsum("hsd,hde,hse->hs", value, self.gram, value)  # |O v_s|²
        received = x.new_zeros(self.heads, len(x))
        for start in range(0, len(chosen), QUERY_BLOCK):
            block = chosen[start : start + QUERY_BLOCK]
            rows, columns = position[block[0] : block[-1] + 1 : QUERY_STRIDE], position[: block[-1] + 1]
            delta = rows[:, None] - columns[None, :]
            logits = cap(query[:, rows].float() @ key[:, columns].float().mT * scaling, softcap)
            hidden = delta < 0 if window is None else (delta < 0) | (delta >= window)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            averaged = (weights @ x[columns]).flatten(0, 1)
            self.averaged += (averaged.mT @ averaged).double()
            self.mean += averaged.sum(0).double()
            received[:, columns] += weights.sum(1)
            self._add_cost(weights, value[:, columns], size[:, columns])
            # The first token collects attention that means nothing (a sink), from everywhere: left in, it would make
            # every mean rotation near zero.
            weights[..., 0] = 0.0
            self.distance[:, : len(columns)] += by_distance(weights, QUERY_STRIDE)
        total = received.sum(0)
        self.attended += (x.mT @ (total[:, None] * x)).double()
        if plain_key is not None:
            assert self.key_cross is not None, "normed_keys asked for it"
            ones = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
            self.key_cross += torch.einsum("t,gtw,tx->gwx", total, plain_key.float(), ones).double()
        self.rows += len(chosen)

    def _add_cost(self, weights: Tensor, value: Tensor, size: Tensor) -> None:
        squares = weights.square()
        out = weights @ value  # [H, rows, d]
        cross = out @ self.gram @ value.mT
        own = torch.einsum("htd,hde,hte->ht", out, self.gram, out)
        terms = squares * (size[:, None] - 2 * cross + own[..., None])
        self.logit_cost += terms.clamp_min(0.0).sum((1, 2)).double()

    def result(self) -> dict[str, Tensor]:
        """The fields of `LayerStatistics`."""
        count = self.rows * self.heads
        found = {
            "distance": self.distance / self.distance.sum(-1, keepdim=True).clamp_min(1e-30),
            "averaged": self.averaged / count,
            "attended": self.attended / count,
            "averaged_mean": self.mean / count,
            "logit_cost": self.logit_cost / self.rows,
        }
        return found if self.key_cross is None else found | {"attended_key_cross": self.key_cross / count}

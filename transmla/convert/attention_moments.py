"""What attention does with its inputs: the moments that errors of keys and values are weighed by.

A value error reaches the output only averaged by attention, so it is weighed by the second moment of the averaged
input z_t = sum_s A_ts x_s. A key error changes attention only where it differs between the tokens that one query
attends to, so it is weighed by the spread around z_t. Both are [D, D], means over heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from transmla.modeling.kernels.eager import cap

QUERY_STRIDE = 4  # one query in so many is looked at; which one moves from row to row of text

QUERY_BLOCK = 256  # rows of an attention matrix that exist at a time

TOGETHER = 2**25  # numbers of an intermediate result on a GPU: of small models several rows of text give as many


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
        self.rows = 0  # of text
        self.queries = 0  # that were looked at

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
        plain_keys: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Rows of text of one length.

        Args:
            x: [B, T, D]. query: [B, H, T, d] and key: [B, G, T, d], rotated. value: [B, G, T, d].
            plain_keys: where keys have a norm, of inputs [n, T, D] in float64 the keys behind it without rotation,
                [n, G, T, d].
        """
        for rows in self._alike(x):
            looked_at = range(min((self.rows + rows.start) % QUERY_STRIDE, x.shape[1] - 1), x.shape[1], QUERY_STRIDE)
            plain = None if plain_keys is None else plain_keys(x[rows].double())
            self._add(x[rows], query[rows], key[rows], value[rows], looked_at, scaling, softcap, window, plain)
        self.rows += len(x)

    def _alike(self, x: Tensor) -> Iterator[slice]:
        """The rows of x in parts of which the same queries are looked at."""
        if (together := self._together(x)) < 2:
            yield from (slice(row, row + 1) for row in range(len(x)))
            return
        for first in range(min(QUERY_STRIDE, len(x))):
            for start in range(first, len(x), QUERY_STRIDE * together):
                yield slice(start, min(start + QUERY_STRIDE * together, len(x)), QUERY_STRIDE)

    def _together(self, x: Tensor) -> int:
        """Rows of text [B, T, D] that make enough work at a time: for a CPU one does."""
        _, length, hidden = x.shape
        of_queries = self.heads * min(QUERY_BLOCK, length) * max(length, hidden)
        return TOGETHER // max(of_queries, hidden * hidden) if x.is_cuda else 1

    def _add(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        looked_at: range,
        scaling: float,
        softcap: float | None,
        window: int | None,
        plain_key: Tensor | None,
    ) -> None:
        """Rows of text, [n, ...], of which the same queries are looked at. plain_key: [n, G, T, d]."""
        x, value = x.float(), value.float()
        length, repeat = x.shape[1], self.heads // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        position = torch.arange(length, device=x.device)
        size = torch.einsum("nhsd,hde,nhse->nhs", value, self.gram, value)  # |O v_s|²
        received = x.new_zeros(len(x), self.heads, length)
        for start in range(0, len(looked_at), QUERY_BLOCK):
            block = looked_at[start : start + QUERY_BLOCK]
            rows, columns = position[block[0] : block[-1] + 1 : QUERY_STRIDE], position[: block[-1] + 1]
            delta = rows[:, None] - columns[None, :]
            logits = cap(query[:, :, rows].float() @ key[:, :, columns].float().mT * scaling, softcap)
            hidden = delta < 0 if window is None else (delta < 0) | (delta >= window)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            averaged = weights.flatten(1, 2) @ x[:, columns]  # [n, H · rows, D]; with a dimension of heads x is copied
            self.averaged += (averaged.mT @ averaged).double().sum(0)
            self.mean += averaged.sum(1).double().sum(0)
            received[:, :, columns] += weights.sum(2)
            self._add_cost(weights, value[:, :, columns], size[:, :, columns])
            # The first token collects attention that means nothing (a sink), from everywhere: left in, it would make
            # every mean rotation near zero.
            weights[..., 0] = 0.0
            found = by_distance(weights.flatten(0, 1), QUERY_STRIDE).unflatten(0, (len(x), -1))
            self.distance[:, : len(columns)] += found.sum(0)
        total = received.sum(1)  # [n, T]
        self.attended += (x.mT @ (total[..., None] * x)).double().sum(0)
        if plain_key is not None:
            assert self.key_cross is not None, "normed_keys asked for it"
            ones = torch.cat((x, x.new_ones(*x.shape[:2], 1)), dim=-1)
            self.key_cross += torch.einsum("nt,ngtw,ntx->ngwx", total, plain_key.float(), ones).double().sum(0)
        self.queries += len(looked_at) * len(x)

    def _add_cost(self, weights: Tensor, value: Tensor, size: Tensor) -> None:
        """weights: [n, H, rows, T]. value: [n, H, T, d]. size: [n, H, T]."""
        squares = weights.square()
        out = weights @ value  # [n, H, rows, d]
        cross = out @ self.gram @ value.mT
        own = torch.einsum("nhtd,hde,nhte->nht", out, self.gram, out)
        terms = squares * (size[:, :, None] - 2 * cross + own[..., None])
        self.logit_cost += terms.clamp_min(0.0).sum((2, 3)).double().sum(0)

    def result(self) -> dict[str, Tensor]:
        """The fields of `LayerStatistics`."""
        count = self.queries * self.heads
        found = {
            "distance": self.distance / self.distance.sum(-1, keepdim=True).clamp_min(1e-30),
            "averaged": self.averaged / count,
            "attended": self.attended / count,
            "averaged_mean": self.mean / count,
            "logit_cost": self.logit_cost / self.queries,
        }
        return found if self.key_cross is None else found | {"attended_key_cross": self.key_cross / count}

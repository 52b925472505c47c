"""Softmax attention of one query a row, as in decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ONE_QUERY = "transmla_one_query"  # name of `one_query` among transformers' attention functions


def one_query(parts: Sequence[tuple[Tensor, Tensor]], value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Softmax attention of one query a row, as in decoding: query heads of a group read keys and values as they are
    cached.

    The fused kernels would have every group's keys and values repeated for its query heads first, which at one query
    costs more than the attention itself. Logits are sums over parts, so that a latent and a rope key need not be
    joined.

    Args:
        parts: query [B, H, 1, E] and key [B, G, S, E], H divisible by G; their logits are added.
        value: [B, G, S, V].
        mask: boolean (True: attend) or additive, broadcastable to [B, 1, 1, S]; None: everything is seen.
        scaling: factor on the logits.

    Returns:
        [B, H, 1, V].
    """
    batch, groups, length, _ = value.shape
    logits = sum(
        _product(query.reshape(batch * groups, -1, query.shape[-1]), key.flatten(0, 1).mT) for query, key in parts
    )
    assert isinstance(logits, Tensor), "there is at least one part"
    logits = logits.view(batch, -1, 1, length) * scaling
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min  # a query that may see nothing (padding) must not become NaN
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    weights = torch.softmax(logits, dim=-1).to(value.dtype).view(batch * groups, -1, length)
    return torch.bmm(weights, value.flatten(0, 1)).view(batch, -1, 1, value.shape[-1])


def _one_query_of_a_source(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`one_query` as transformers calls attention functions.

    Raises:
        ValueError: the model caps its logits, or has attention sinks, which `one_query` knows nothing of.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} caps its attention or has sinks; decode with a cache that grows")
    return one_query([(query, key)], value, attention_mask, scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ONE_QUERY, _one_query_of_a_source)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product in float32 at least: logits rounded to bfloat16 would have two digits."""
    with torch.autocast(a.device.type, enabled=False):
        half = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
        if a.is_cuda and half and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return torch.bmm(a, b, out_dtype=torch.float32)  # it has no gradient
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return torch.bmm(a.to(wide), b.to(wide))

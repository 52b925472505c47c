"""Softmax attention of one query a row, as in decoding."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

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


def one_latent_query(
    query: Tensor, rope_query: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """`one_query` over a cached latent, whose values are the latents themselves; on a GPU by a kernel that reads the
    cache once.

    Args:
        query, rope_query: [B, H, 1, R] and [B, H, 1, P]. latent, rope_key: [B, 1, S, R] and [B, 1, S, P].
        mask, scaling: as in `one_query`.

    Returns:
        [B, H, 1, R].
    """
    tensors = (query, rope_query, latent, rope_key)
    if _kernel_takes(*tensors) and (mask is None or mask.shape[1:3] == (1, 1)):
        from transmla.modeling.kernels.latent_query import latent_query

        hidden = None if mask is None else _additive(mask[:, 0, 0])
        return latent_query(query[:, :, 0], rope_query[:, :, 0], latent[:, 0], rope_key[:, 0], hidden, scaling)[
            :, :, None
        ]
    return one_query([(query, latent), (rope_query, rope_key)], latent, mask, scaling)


def _additive(mask: Tensor) -> Tensor:
    """What a mask, boolean or additive, adds to logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def _for_a_kernel(*tensors: Tensor) -> bool:
    """Whether tensors, the query first, are on a GPU with Triton, in one format, and no gradient is asked for."""
    if not tensors[0].is_cuda or find_spec("triton") is None:
        return False
    if len({tensor.dtype for tensor in tensors}) > 1 or any(tensor.stride(-1) != 1 for tensor in tensors[1:]):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _many(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether rows and groups are enough for the kernel that gives each of them a program."""
    if not _for_a_kernel(query, key, value):
        return False
    from transmla.modeling.kernels.grouped_query import fits

    rows, groups, _, width = value.shape
    return fits(rows, groups, key.shape[-1], width, value.dtype, value.device)


def _kernel_takes(*tensors: Tensor) -> bool:
    """Whether the kernel computes this: on a GPU that has it, in one 16-bit format, and no gradient is asked for."""
    query, rope_query, latent, _ = tensors
    if not _for_a_kernel(*tensors):
        return False
    from transmla.modeling.kernels.latent_query import fits

    return fits(query.shape[-1], rope_query.shape[-1], latent.dtype, latent.device)


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
    if _many(query, key, value) and (attention_mask is None or attention_mask.shape[1:3] == (1, 1)):
        from transmla.modeling.kernels.grouped_query import grouped_query

        hidden = None if attention_mask is None else _additive(attention_mask[:, 0, 0])
        return grouped_query(query[:, :, 0], key, value, hidden, scaling)[:, None], None
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

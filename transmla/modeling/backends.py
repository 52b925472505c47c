"""Which kernel computes softmax attention of MLA's shape, where queries and keys are wider than values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# First choice first. cuDNN takes values narrower than keys as they are and was nine times as fast on Hopper as what
# plain SDPA falls to (docs/experiments.md). FlashAttention-2 is left out: it wants equal widths.
CUDA_PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

ONE_QUERY = "transmla_one_query"  # name of `one_query` among transformers' attention functions

TAP = "transmla_tap"  # name of what looks at queries and keys on their way to another kernel (transmla.recover.taps)

CAPPING = ("eager", "flex_attention", TAP)  # what can cap the logits (Gemma 2), or hands the cap on


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """Softmax attention by PyTorch's fused kernels, the backend chosen for MLA's shape.

    Args:
        query, key: [B, H, T, E] and [B, H, S, E]. value: [B, H, S, V].
        mask: boolean (True: attend) or additive, broadcastable to [B, H, T, S]; None for a causal mask over equal
            lengths, or for one query that sees everything.
        scaling: factor on the logits.

    Returns:
        [B, T, H, V].
    """
    causal = mask is None and query.shape[2] > 1
    width = value.shape[-1]
    if query.device.type == "cpu":
        # The CPU's flash kernel wants equal widths; without padding the whole T×S matrix is computed (3 times slower).
        if width < query.shape[-1]:
            value = F.pad(value, (0, query.shape[-1] - width))
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    else:
        with sdpa_kernel(CUDA_PRIORITY, set_priority=True):
            out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    return out[..., :width].transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    implementation: str,
    scaling: float,
    dropout: float,
    softcap: float | None = None,
    eager: Callable[..., tuple[Tensor, Tensor | None]],
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Dispatch on transformers' `attn_implementation`: `sdpa` is ours, everything else is transformers' own.

    Args:
        softcap: logits become softcap · tanh(logits / softcap) before the mask; None: they stay.

    Raises:
        ValueError: the kernel would drop the softcap.
    """
    if softcap is not None:
        if implementation not in CAPPING:
            raise ValueError(
                f"attn_implementation {implementation!r} does not cap attention logits at MLA's shape; use one of {CAPPING[:2]}"
            )
        kwargs["softcap"] = softcap
    if implementation == "sdpa":
        return sdpa(query, key, value, mask, scaling, dropout), None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def one_query(
    parts: Sequence[tuple[Tensor, Tensor]], value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Softmax attention of one query a row, as in decoding: query heads of a group read keys and values as they are cached.

    The fused kernels would have every group's keys and values repeated for its query heads first, which at one query costs
    more than the attention itself. Logits are sums over parts, so that a latent and a rope key need not be joined.

    Args:
        parts: query [B, H, 1, E] and key [B, G, S, E], H divisible by G; their logits are added.
        value: [B, G, S, V].
        mask: boolean (True: attend) or additive, broadcastable to [B, 1, 1, S]; None: everything is seen.
        scaling: factor on the logits.

    Returns:
        [B, H, 1, V].
    """
    batch, groups, length, _ = value.shape
    logits = sum(_product(query.reshape(batch * groups, -1, query.shape[-1]), key.flatten(0, 1).mT) for query, key in parts)
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


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap), or the logits themselves without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """The definition, written out; the reference for every other kernel. Returns ([B, T, H, V], [B, H, T, S])."""
    logits = cap(query @ key.transpose(2, 3) * scaling, softcap)
    if mask is not None:
        logits = logits + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights

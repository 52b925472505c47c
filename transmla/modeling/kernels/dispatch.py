"""Which kernel computes softmax attention of MLA's shape, by transformers' `attn_implementation`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.modeling.kernels.fused import sdpa
from transmla.modeling.kernels.packed import PACKED

# Name of what looks at queries and keys on their way to another kernel (transmla.measure.attention_taps).
TAP = "transmla_tap"

CAPPING = ("eager", "flex_attention", TAP)  # what can cap the logits (Gemma 2), or hands the cap on


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
    """Dispatch on transformers' `attn_implementation`: `sdpa` is ours, as is PACKED; everything else is transformers'
    own.

    Args:
        softcap: logits become softcap · tanh(logits / softcap) before the mask; None: they stay.

    Raises:
        ValueError: the kernel would drop the softcap.
    """
    if softcap is not None:
        if implementation not in CAPPING:
            raise ValueError(
                f"attn_implementation {implementation!r} does not cap attention logits at MLA's shape; use one of "
                f"{CAPPING[:2]}"
            )
        kwargs["softcap"] = softcap
    if implementation == "sdpa" or (implementation == PACKED and kwargs.get("document_bounds") is None):
        return sdpa(query, key, value, mask, scaling, dropout), None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)

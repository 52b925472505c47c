"""Softmax attention by PyTorch's fused kernels, where queries and keys are wider than values."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transmla.modeling.determinism import is_deterministic

# First choice first. cuDNN takes values narrower than keys as they are and was nine times as fast on Hopper as what
# plain SDPA falls to (docs/experiments.md). FlashAttention-2 is left out: it wants equal widths.
CUDA_PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# With `deterministic`, where PyTorch leaves cuDNN out: it adds the gradients in any order. The other two have a flag
# against that, of which FlashAttention-2's costs less; it takes no mask.
ORDERED_PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    cpu, ordered = query.device.type == "cpu", is_deterministic()
    # The CPU's flash kernel wants equal widths; without padding the whole T×S matrix is computed (3 times slower).
    # FlashAttention-2 wants them too.
    if width < query.shape[-1] and (cpu or (ordered and mask is None)):
        value = F.pad(value, (0, query.shape[-1] - width))
    if cpu:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    else:
        with sdpa_kernel(ORDERED_PRIORITY if ordered else CUDA_PRIORITY, set_priority=True):
            out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    return out[..., :width].transpose(1, 2)

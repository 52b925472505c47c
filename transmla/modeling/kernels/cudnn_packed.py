"""cuDNN's attention over packed documents (package nvidia-cudnn-frontend): whether it is there, and what it is told."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def why_no_cudnn(device: torch.device) -> str | None:
    """Why cuDNN's kernel cannot compute attention over packed documents here; None: it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it was measured on compute capability 9.0 alone, this card has {capability[0]}.{capability[1]}"
    if find_spec("cudnn") is None:
        return 'the package nvidia-cudnn-frontend is not installed (pip install "transmla[gpu]")'
    try:
        import_module("cudnn.sdpa.fwd.torch_op")
    except ImportError:
        return "this version of nvidia-cudnn-frontend has no such operator; 1.32 has"
    return None


@cache
def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's frontend is there, its operators registered, on a card on which it was measured."""
    return why_no_cudnn(device) is None


def documents_of(bounds: Tensor, longest: int) -> dict[str, Any]:
    """What both of cuDNN's operators are told of the documents."""
    lengths = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    return {"is_causal": True, "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds} | lengths


@cache
def why_not_ordered(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> str | None:
    """Why cuDNN's backward pass cannot add in one order at these widths; None: it can. Tried out, on a few tokens:
    which shapes have such a kernel depends on card and version.

    Args:
        device: one for which `has_cudnn`. width: of queries and keys. value_width: of values.
    """
    tokens, heads, longest = 512, 2, 512
    bounds = torch.tensor([0, 200, tokens], dtype=torch.int32, device=device)
    sizes = (width, width, value_width, value_width)
    query, key, value, grad = (
        torch.linspace(-1.0, 1.0, tokens * heads * size, device=device).view(tokens, heads, size).to(dtype)
        for size in sizes
    )
    try:
        documents = documents_of(bounds, longest)
        out, logs = torch.ops.cudnn.sdpa_fwd(query, key, value, 0.1, **documents)
        padded = import_module("cudnn.sdpa.fwd.torch_op").thd_lse_to_padded(logs[:, :, 0].contiguous(), bounds, longest)
        torch.ops.cudnn.sdpa_bwd(grad, query, key, value, out, padded, 0.1, **documents, is_deterministic=True)
    except Exception as error:  # of classes of cuDNN's own, which derive from nothing in particular
        reason = " ".join(str(error).split())[:120]
        return f"its backward pass has no fixed order at widths {width} and {value_width}: {reason}"
    return None

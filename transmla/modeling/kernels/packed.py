"""Softmax attention over packed documents: their boundaries say what is seen, there is no mask.

On a GPU, in 16 bits, one of two kernels computes it: cuDNN's (package nvidia-cudnn-frontend) where there is much to do,
FlashAttention-2 as PyTorch has it elsewhere and where that package is missing; on a CPU every document is computed by
itself. `_by_cudnn` is the rule, docs/speed.md has the figures. With `deterministic` both add gradients in one order:
cuDNN's where its backward pass does so for these widths, FlashAttention-2's always.

Boundaries reach attention through a trunk's further arguments (`trunk_arguments`), so that layers that are computed
again for a backward pass get them too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.modeling.config_facts import shortest_sliding_window
from transmla.modeling.determinism import is_deterministic
from transmla.modeling.kernels.cudnn_packed import documents_of, has_cudnn, why_not_ordered
from transmla.modeling.kernels.fused import sdpa

PACKED = "transmla_packed"  # name among transformers' attention functions
DOCUMENTS = ("document_bounds", "document_plan")  # what a trunk hands through to attention

# Where cuDNN is faster on an H100: keys that lie in a query's document, the mean over queries; with values narrower
# than keys, which FlashAttention has to widen, heads times tokens from which its longer way to a launch does not count.
LONG, MANY = 1536, 2**17
SHORT_ONES, LONG_ONES, ALWAYS_FLASH, ALWAYS_CUDNN = range(4)  # second number of a plan
STEP = 512  # the longest document is rounded up to it: cuDNN makes a plan for every length


def boundaries(positions: Tensor) -> Tensor:
    """Where documents begin and end in a row that starts counting in each: [n + 1], int32.

    Args:
        positions: [1, T] on the CPU, zero where a document begins.
    """
    starts = (positions[0] == 0).nonzero()[:, 0]
    assert len(starts) and starts[0] == 0, "a row begins with a document"
    return torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)


def trunk_arguments(bounds: Tensor, plan: tuple[int, int]) -> dict[str, Tensor]:
    """What a trunk is called with so that attention goes by boundaries. A mask of four dimensions is handed on as it
    is: with one, the trunk makes none, which would be of T x T."""
    return {
        "attention_mask": bounds[None, None, None],
        "document_bounds": bounds,
        "document_plan": torch.tensor(plan),  # stays on the CPU; made here, because a trainer moves all tensors
    }


def plan_of(bounds: Tensor, kernel: str = "auto") -> tuple[int, int]:
    """What the choice of a kernel goes by: length of the longest document, rounded up, and whether documents are long
    (SHORT_ONES, LONG_ONES), or which kernel was asked for (ALWAYS_FLASH, ALWAYS_CUDNN).

    Args:
        bounds: on the CPU. kernel: `auto`, `cudnn` or `flash`.
    """
    lengths = bounds.diff().double()
    long = float(lengths.square().sum()) >= LONG * float(lengths.sum())
    asked = {"auto": LONG_ONES if long else SHORT_ONES, "cudnn": ALWAYS_CUDNN, "flash": ALWAYS_FLASH}
    return -(-int(lengths.max()) // STEP) * STEP, asked[kernel]


def needs_mask(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention of this model over packed documents goes by a mask; None: by their boundaries.

    Args:
        tokens: of the longest document.
        dtype: of products.
    """
    if config._attn_implementation != "sdpa":
        return f"attention runs as {config._attn_implementation}"
    if getattr(config, "attention_dropout", 0.0):  # some architectures have none
        return "attention has dropout"
    window = shortest_sliding_window(config)
    if window is not None and window < tokens:
        return f"a layer sees {window} tokens, documents have up to {tokens}"
    if device.type == "cuda":
        if dtype not in (torch.bfloat16, torch.float16):
            return f"its kernels have no {str(dtype).removeprefix('torch.')}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need compute capability 8.0"
    elif device.type != "cpu":
        return f"its kernels do not run on {device.type}"
    return None


def kernels_there(device: torch.device, kernel: str = "auto") -> str:
    """For the log: what computes attention over packed documents on this device. kernel: as `plan_of` takes it."""
    if device.type == "cpu":
        return "every document by itself"
    if kernel != "auto":
        return f"{'cuDNN' if kernel == 'cudnn' else 'FlashAttention'}'s kernel, as asked"
    if has_cudnn(device):
        return "cuDNN's kernel where there is much to do, FlashAttention's elsewhere"
    return "FlashAttention's kernel"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    document_bounds: Tensor | None = None,
    document_plan: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention functions; every document of the one row sees itself, causally.

    Args:
        query: [1, H, T, E]. key: [1, G, T, E]. value: [1, G, T, V]; H divisible by G, V at most E.
        mask: not looked at where boundaries are given. Without them this is PyTorch's attention, by its mask.
        document_bounds: as `boundaries` gives them, on the device.
        document_plan: as `plan_of` gives it, [2], on the CPU, so that the choice of a kernel waits for nothing.

    Returns:
        [1, T, H, V].
    """
    if document_bounds is None or document_plan is None:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        return out, None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        wanted = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        rows = (states[0].transpose(0, 1).to(wanted) for states in (query, key, value))
        return torch.ops.transmla.packed(*rows, document_bounds, document_plan, scaling)[0][None], None
    return _by_document(query, key, value, document_bounds, scaling), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)


@torch.compiler.disable
def _by_document(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    ends = bounds.tolist()
    pieces = [
        sdpa(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, scaling, 0.0)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    return torch.cat(pieces, dim=1)


library.define(
    "transmla::packed",
    "(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor plan, float scaling) -> (Tensor, Tensor)",
)
library.define(
    "transmla::packed_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logs, Tensor bounds, Tensor plan, "
    "float scaling) -> (Tensor, Tensor, Tensor)",
)


def _by_cudnn(query: Tensor, value: Tensor, chosen: int) -> bool:
    """Whether cuDNN's kernel computes this: the rule."""
    tokens, heads, width = query.shape
    if chosen in (ALWAYS_FLASH, ALWAYS_CUDNN):
        return chosen == ALWAYS_CUDNN
    wanted = chosen == LONG_ONES or (value.shape[-1] < width and heads * tokens >= MANY)
    if not (wanted and has_cudnn(query.device)):
        return False
    return not is_deterministic() or why_not_ordered(query.device, query.dtype, width, value.shape[-1]) is None


@library.impl("transmla::packed", "CUDA")
def _packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, plan: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """query [T, H, E], key [T, G, E], value [T, G, V] -> output [T, H, V], logarithms of the sums [H, T]."""
    longest, chosen = plan.tolist()
    if _by_cudnn(query, value, chosen):
        out, logs = torch.ops.cudnn.sdpa_fwd(query, key, value, scaling, **documents_of(bounds, longest))
        return out, logs[:, :, 0].T.contiguous()
    width = value.shape[-1]
    out, logs = torch.ops.aten._flash_attention_forward(
        query, key, _widened(value, query), bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
    )[:2]
    return out[..., :width].contiguous(), logs


@library.register_fake("transmla::packed")
def _(query, key, value, bounds, plan, scaling):
    tokens, heads, _ = query.shape
    return query.new_empty(tokens, heads, value.shape[-1]), query.new_empty(heads, tokens, dtype=torch.float32)


@library.impl("transmla::packed_backward", "CUDA")
def _packed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    bounds: Tensor,
    plan: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    longest, chosen = plan.tolist()
    if _by_cudnn(query, value, chosen):
        padded = import_module("cudnn.sdpa.fwd.torch_op").thd_lse_to_padded
        return torch.ops.cudnn.sdpa_bwd(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            padded(logs.T.contiguous(), bounds, longest),
            scaling,
            **documents_of(bounds, longest),
            is_deterministic=is_deterministic(),
        )
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    grads = torch.ops.aten._flash_attention_backward(
        _widened(grad, query),
        query,
        key,
        _widened(value, query),
        _widened(out, query),
        logs,
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        True,
        unused,
        unused,
        scale=scaling,
    )
    return grads[0].contiguous(), grads[1].contiguous(), grads[2][..., : value.shape[-1]].contiguous()


@library.register_fake("transmla::packed_backward")
def _(grad, query, key, value, out, logs, bounds, plan, scaling):
    return tuple(states.new_empty(states.shape) for states in (query, key, value))


def _widened(states: Tensor, query: Tensor) -> Tensor:
    """With zeros up to the queries' width: FlashAttention wants equal ones."""
    return F.pad(states, (0, query.shape[-1] - states.shape[-1]))


def _setup(ctx, inputs, output) -> None:
    query, key, value, bounds, plan, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, plan)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return *torch.ops.transmla.packed_backward(grad, *ctx.saved_tensors, ctx.scaling), None, None, None


library.register_autograd("transmla::packed", _gradients, setup_context=_setup)

"""Attention over packed documents on a GPU: both kernels against a mask in float64."""

import pytest
import torch
from torch import Tensor

from transmla.modeling.kernels import packed as module
from transmla.modeling.kernels.packed import boundaries, packed_attention, plan_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCALE = 0.08
DOCUMENTS = [[300], [1], [1, 1, 1], [100, 1, 257, 3], [64, 64], [2] * 40, [1000, 20, 700]]


def bounds_of(lengths: list[int]) -> Tensor:
    return boundaries(torch.cat([torch.arange(length) for length in lengths])[None])


def drawn(tokens: int, heads: int, groups: int, wide: int, narrow: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, tokens, heads, wide), (1, tokens, groups, wide), (1, tokens, groups, narrow))
    made = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]
    return [states.transpose(1, 2).requires_grad_() for states in made]


def attend(inputs: list[Tensor], bounds: Tensor, long: bool | None = None) -> Tensor:
    longest, rule = plan_of(bounds)
    plan = torch.tensor([longest, rule if long is None else int(long)])
    documents = {"document_bounds": bounds.cuda(), "document_plan": plan}
    return packed_attention(torch.nn.Identity(), *inputs, None, scaling=SCALE, **documents)[0]


def reference(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    seen = (document[:, None] == document[None]) & torch.ones(len(document), len(document), device="cuda").tril().bool()
    query, key, value = (states.double() for states in inputs)
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    logits = (query @ key.mT * SCALE).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("shape", [(28, 28, 192, 128), (28, 4, 128, 128), (9, 9, 96, 64), (4, 2, 64, 64)])
def test_value_and_gradients(shape, lengths, kernel, dtype, monkeypatch) -> None:
    if kernel == "cudnn" and not module.has_cudnn(torch.device("cuda", 0)):
        pytest.skip("needs nvidia-cudnn-frontend and compute capability 9.0")
    monkeypatch.setattr(module, "MANY", 2**60)
    inputs = drawn(sum(lengths), *shape, dtype)
    found, wanted = attend(inputs, bounds_of(lengths), kernel == "cudnn"), reference(inputs, lengths)
    assert relative(found, wanted) < 6e-3
    weights = torch.randn_like(wanted)
    own, expected = (torch.autograd.grad((x * weights.to(x)).sum(), inputs) for x in (found, wanted))
    for one, other in zip(own, expected, strict=True):
        # of a token that sees itself alone queries and keys have no gradient: what is left is rounding
        assert relative(one, other) < 1e-2 or float(one.norm()) < 1e-2 * float(own[2].norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_with_rows_of_any_length(checkpointing) -> None:
    """One graph for all of them, gradients as without."""

    def layer(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, plan: Tensor) -> Tensor:
        documents = {"document_bounds": bounds, "document_plan": plan}
        return packed_attention(torch.nn.Identity(), query * 2, key, value, None, scaling=SCALE, **documents)[0] * 3

    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for lengths in ([300, 5], [64, 64, 64], [2] * 40, [1000]):
        inputs, bounds = drawn(sum(lengths), 4, 4, 64, 48, torch.bfloat16), bounds_of(lengths)
        documents = bounds.cuda(), torch.tensor(plan_of(bounds))
        results = []
        for run in (layer, compiled):
            if checkpointing:
                out = torch.utils.checkpoint.checkpoint(run, *inputs, *documents, use_reentrant=False)
            else:
                out = run(*inputs, *documents)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
        for one, other in zip(*results, strict=True):
            assert relative(one, other) < 1e-2


def test_under_autocast() -> None:
    """Queries turned in float32 are computed in 16 bits, as PyTorch's own attention does."""
    inputs = [states.detach().float() for states in drawn(50, 4, 4, 64, 48, torch.bfloat16)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = attend(inputs, bounds_of([30, 20]))
    assert found.dtype == torch.bfloat16 and relative(found, reference(inputs, [30, 20])) < 6e-3


def test_nothing_waits_for_the_device() -> None:
    inputs, bounds = drawn(50, 4, 4, 64, 48, torch.bfloat16), bounds_of([30, 20])
    on_device = bounds.cuda()
    documents = {"document_bounds": on_device, "document_plan": torch.tensor(plan_of(bounds))}
    for _ in range(2):  # the first time, kernels are made
        packed_attention(torch.nn.Identity(), *inputs, None, scaling=SCALE, **documents)[0].sum().backward()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")

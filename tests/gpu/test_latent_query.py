"""The kernel for one query a row on the cached latent, against float64."""

import pytest
import torch
from torch import Tensor

from transmla.modeling.kernels.one_query import one_latent_query

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def reference(query: Tensor, rope_query: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None) -> Tensor:
    query, rope_query, latent, rope_key = (x.double() for x in (query, rope_query, latent, rope_key))
    logits = (query @ latent.mT + rope_query @ rope_key.mT) * 0.07
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1) @ latent


def drawn(rows: int, heads: int, rank: int, rope: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, heads, 1, rank), (rows, heads, 1, rope), (rows, 1, length, rank), (rows, 1, length, rope))
    return tuple(torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes)


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the kernel: a test that ran the products instead would show nothing."""
    from transmla.modeling.kernels import latent_query as module

    calls, original = [], module.latent_query
    monkeypatch.setattr(module, "latent_query", lambda *a: (calls.append(1), original(*a))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, heads, rank, rope, length",
    [
        (1, 28, 512, 64, 32768),
        (2, 28, 512, 64, 8192),
        (3, 9, 96, 32, 517),
        (1, 1, 16, 16, 1),
        (512, 9, 160, 32, 63),
        (5, 40, 448, 48, 1000),
        (2, 128, 512, 64, 700),
        (7, 16, 256, 16, 64),
    ],
)
def test_against_float64(rows, heads, rank, rope, length, dtype, monkeypatch) -> None:
    tensors = drawn(rows, heads, rank, rope, length, dtype)
    calls = count(monkeypatch)
    generator = torch.Generator("cuda").manual_seed(1)
    seen = torch.rand(rows, 1, 1, length, device="cuda", generator=generator) > 0.3
    seen[..., -1] = True
    additive = torch.zeros(seen.shape, device="cuda").masked_fill(~seen, -torch.inf)
    for mask in (None, seen, additive, additive.clamp(min=torch.finfo(dtype).min).to(dtype), seen[:1]):
        found = one_latent_query(*tensors, mask, 0.07)
        wanted = reference(*tensors, mask)
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    assert len(calls) == 5


def test_a_row_that_sees_nothing_is_finite() -> None:
    tensors = drawn(2, 4, 64, 16, 300, torch.bfloat16)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[1] = False
    found = one_latent_query(*tensors, mask, 0.07)
    assert found.isfinite().all()
    wanted = reference(*tensors, mask)[0]
    assert float((found[0] - wanted).norm() / wanted.norm()) < 5e-3


def test_a_cache_that_is_longer_than_what_is_seen(monkeypatch) -> None:
    """Keys and latents as slices of buffers: strides are not those of whole tensors."""
    query, rope_query, latent, rope_key = drawn(4, 28, 512, 64, 400, torch.bfloat16)
    calls = count(monkeypatch)
    found = one_latent_query(query, rope_query, latent[:, :, :333], rope_key[:, :, :333], None, 0.07)
    wanted = reference(query, rope_query, latent[:, :, :333], rope_key[:, :, :333], None)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3 and calls


def test_in_a_graph() -> None:
    tensors = drawn(4, 28, 512, 64, 1024, torch.bfloat16)
    one_latent_query(*tensors, None, 0.07)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = one_latent_query(*tensors, None, 0.07)
    tensors[0].mul_(0.5)
    graph.replay()
    wanted = reference(*tensors, None)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3


def test_what_the_kernel_does_not_take(monkeypatch) -> None:
    """Gradients, float32 and odd dimensions: computed all the same."""
    calls = count(monkeypatch)
    for rank, dtype, grad in ((512, torch.float32, False), (513, torch.bfloat16, False), (64, torch.bfloat16, True)):
        tensors = drawn(2, 4, rank, 16, 50, dtype)
        tensors[0].requires_grad_(grad)
        found, wanted = one_latent_query(*tensors, None, 0.07), reference(*tensors, None)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    assert not calls

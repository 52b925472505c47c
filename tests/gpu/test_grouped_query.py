"""The kernel for one query a row on cached keys and values of groups, against float64."""

import pytest
import torch
from torch import Tensor, nn

from transmla.modeling.kernels import one_query as module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers calls it."""
    return module._one_query_of_a_source(nn.Module(), query, key, value, mask, 0.11)[0].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, heads, groups, width, value_width, length",
    [
        (512, 9, 3, 64, 64, 192),
        (700, 14, 2, 64, 64, 33),
        (300, 8, 8, 128, 128, 70),
        (600, 28, 4, 128, 128, 517),
        (400, 4, 1, 256, 256, 40),
        (999, 3, 3, 48, 16, 1),
        (512, 40, 2, 80, 80, 96),
    ],
)
def test_against_float64(rows, heads, groups, width, value_width, length, dtype, monkeypatch) -> None:
    from transmla.modeling.kernels import grouped_query

    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(shape, device="cuda", generator=generator).to(dtype)
        for shape in (
            (rows, heads, 1, width),
            (rows, groups, length, width),
            (rows, groups, length, value_width),
        )
    )
    calls, original = [], grouped_query.grouped_query
    monkeypatch.setattr(grouped_query, "grouped_query", lambda *a: (calls.append(1), original(*a))[1])
    seen = torch.rand(rows, 1, 1, length, device="cuda", generator=generator) > 0.3
    seen[..., length // 2 :] = False  # what of a buffer is not written yet
    seen[..., 0] = True
    value[:, :, length // 2 + 1 :] = torch.nan  # a column that no row sees is not read at all
    additive = torch.zeros(seen.shape, device="cuda").masked_fill(~seen, -torch.inf)
    clean = value.nan_to_num()
    for mask, values in ((seen, value), (additive, value), (additive[:1], value), (None, clean)):
        found = attend(query, key, values, mask)
        logits = query.double() @ key.double().repeat_interleave(heads // groups, 1).mT * 0.11
        if mask is not None:
            logits = logits + (mask.double() if mask.dtype != torch.bool else additive.double())
        wanted = logits.softmax(-1) @ clean.double().repeat_interleave(heads // groups, 1)
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    assert len(calls) == 4


def test_few_rows_and_gradients_take_the_products(monkeypatch) -> None:
    from transmla.modeling.kernels import grouped_query

    monkeypatch.setattr(grouped_query, "grouped_query", None)
    few = [torch.randn(2, 2, size, 64, device="cuda", dtype=torch.bfloat16) for size in (1, 50, 50)]
    assert attend(*few, None).shape == (2, 2, 1, 64)
    many = [torch.randn(600, 2, size, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in (1, 5, 5)]
    attend(*many, None).sum().backward()
    assert many[0].grad is not None

"""A trained float32 head that is bfloat16 in its own memory for the time of a loss."""

import pytest
import torch
from torch import Tensor

from tests.gpu.test_fused_divergence import reference, relative
from transmla.recover.divergence import Divergence
from transmla.recover.losses import Mixture, Teacher, token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def bits(head: Tensor) -> Tensor:
    return head.detach().view(torch.int32).clone()


@pytest.mark.parametrize("rows, width", [(1000, 3584), (17, 576), (3, 70), (5, 1), (2, 16384)])
def test_rounded_and_back(rows: int, width: int) -> None:
    """To the nearest, ties away from zero; and every bit back."""
    from transmla.recover.rounded_head import can_be_rounded, rounded_in_place

    head = torch.randn(rows, width, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    flat = head.view(torch.int32).view(-1)
    ties = torch.arange(min(width, 64), device="cuda") * 0x8000 + 0x3F800000
    flat[: len(ties)] = ties
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-45, 3.4028235e38], device="cuda")
    head.view(-1)[-len(special) :] = special[: head.numel()]
    before, nearest = bits(head), head.clone()
    assert can_be_rounded(head)
    with rounded_in_place(head) as rounded:
        assert rounded.dtype == torch.bfloat16 and rounded.data_ptr() == head.data_ptr()
        tied = (before & 0xFFFF) == 0x8000
        up = (((before >> 16) + 1) << 16).view(torch.float32)
        wanted = torch.where(tied, up, nearest).to(torch.bfloat16)
        assert torch.equal(rounded.contiguous().view(torch.int16), wanted.view(torch.int16))
    assert torch.equal(bits(head), before)


def test_no_number_stays_none() -> None:
    from transmla.recover.rounded_head import rounded_in_place

    head = torch.full((1, 4), 0x7F800001, dtype=torch.int32, device="cuda").view(torch.float32)
    head.view(torch.int32)[0, 1:] = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000])
    with rounded_in_place(head) as rounded:
        assert rounded.isnan().all()
    assert head.isnan().all()


def test_a_failure_leaves_the_head_as_it_was() -> None:
    from transmla.recover.rounded_head import rounded_in_place

    head = torch.randn(9, 33, device="cuda")
    before = bits(head)
    with pytest.raises(KeyboardInterrupt), rounded_in_place(head):
        raise KeyboardInterrupt
    assert torch.equal(bits(head), before)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("words, more, tokens, width", [(49152, 0, 200, 576), (8000, 192, 65, 128), (260, 0, 33, 64)])
def test_a_loss_under_autocast(kind, words: int, more: int, tokens: int, width: int) -> None:
    """Value and both gradients against float64, in several chunks; no bit of the head has changed, and rows that the
    teacher has no words for have no gradient."""
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    teacher, other = normal(tokens, width).bfloat16(), (1.5 * width**-0.5 * normal(words, width)).bfloat16()
    student = (teacher.float() + 0.3 * normal(tokens, width)).bfloat16().requires_grad_()
    head = 1.5 * width**-0.5 * normal(words + more, width)
    head[:words] = other.float() + 0.02 * normal(words, width)
    head.requires_grad_()
    before = bits(head)
    mixture = Mixture(Divergence(kind), 1.0, 0.2)
    labels = torch.randint(0, words, (tokens,), device="cuda", generator=generator)
    exact = student.detach().double().requires_grad_()
    exact_head = head.detach()[:words].double().requires_grad_()
    expected = reference(exact, exact_head, teacher.double(), other.double(), labels, mixture, None)
    expected.backward()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = token_loss(student, head, Teacher(teacher, other), labels=labels, mixture=mixture, chunk=32)
    found.backward()
    assert torch.equal(bits(head), before)
    assert abs(found.item() - expected.item()) <= 2e-3 * expected.item()
    assert relative(student.grad, exact.grad) <= 1.2e-2 and relative(head.grad[:words], exact_head.grad) <= 1.2e-2
    assert not head.grad[words:].any()


def test_memory() -> None:
    """No copy of the head: what is there beside the gradient is logits and slopes."""
    words, width, tokens = 152064, 1024, 512
    head = torch.randn(words, width, device="cuda").mul_(0.02).requires_grad_()
    teacher = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    student = (teacher + 0.05).requires_grad_()
    other = head.detach().bfloat16()

    def peak() -> int:
        student.grad = head.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            token_loss(student, head, Teacher(teacher, other), chunk=128).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()
    assert peak() <= head.numel() * 4 + 128 * words * 8 + tokens * words * 2 + 2**26

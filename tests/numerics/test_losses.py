"""The chunked divergence against float64 and autograd."""

import pytest
import torch
from torch.nn import functional as F

from transmla.recover.losses import forward_kl, normalised_error


def reference(student, student_head, teacher, teacher_head, temperature, softcap=None):
    """Written out, whole logits, float64."""
    logits_s, logits_t = student.double() @ student_head.double().T, teacher.double() @ teacher_head.double().T
    if softcap is not None:
        logits_s, logits_t = (softcap * torch.tanh(logits / softcap) for logits in (logits_s, logits_t))
    log_s, log_t = F.log_softmax(logits_s / temperature, -1), F.log_softmax(logits_t / temperature, -1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_value_and_gradients(temperature: float, chunk: int, softcap: float | None) -> None:
    student = torch.randn(50, 24, requires_grad=True)
    head = torch.randn(301, 24, requires_grad=True)
    teacher, teacher_head = torch.randn(50, 32), torch.randn(301, 32)
    loss = forward_kl(student, head, teacher, teacher_head, temperature=temperature, softcap=softcap, chunk=chunk) / 50
    loss.backward()
    exact_student, exact_head = student.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    exact = reference(exact_student, exact_head, teacher, teacher_head, temperature, softcap) / 50
    exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    for got, want in ((student.grad, exact_student.grad), (head.grad, exact_head.grad)):
        assert (got.double() - want).norm() / want.norm() < 1e-6


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    hidden, head = torch.randn(9, 24, requires_grad=True), torch.randn(301, 24)
    loss = forward_kl(hidden, head, hidden.detach(), head)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert hidden.grad.abs().max() < 1e-5


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head = torch.randn(9, 24, requires_grad=True), torch.randn(31, 24)
    forward_kl(hidden, head, torch.randn(9, 24), head).backward()
    assert head.grad is None and hidden.grad is not None


def test_no_tokens_is_a_differentiable_zero() -> None:
    hidden, head = torch.randn(0, 24, requires_grad=True), torch.randn(31, 24)
    loss = forward_kl(hidden, head, torch.randn(0, 24), head)
    loss.backward()
    assert loss.item() == 0.0


def test_direction_is_teacher_to_student() -> None:
    """Forward KL punishes a student that misses what the teacher may say, not the other way round."""
    wide, narrow = torch.zeros(1, 2), torch.tensor([[8.0, 0.0]])
    head = torch.eye(2)
    assert forward_kl(narrow, head, wide, head) > 2 * forward_kl(wide, head, narrow, head)


def test_normalised_error() -> None:
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = sum((student[b, t] - teacher[b, t]).square().sum() for b in range(2) for t in range(5)) / 3.0
    torch.testing.assert_close(normalised_error(student, teacher, 3.0), expected)

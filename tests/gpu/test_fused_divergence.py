"""The kernel that makes value and slope of two models' logits, against float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transmla.recover.divergence import Divergence
from transmla.recover.losses import Mixture, Teacher, token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [
    (152064, 96, 512),
    (49152, 200, 576),
    (260, 33, 64),
    (8192, 64, 128),
    (100003, 16, 64),
]  # words, tokens, width
SETTINGS = [(1.0, 0.0, None), (2.0, 0.0, None), (1.0, 0.3, None), (1.7, 0.3, 30.0), (1.0, 0.0, 30.0)]


def reference(
    student: Tensor,
    head: Tensor,
    teacher: Tensor,
    other: Tensor,
    labels: Tensor,
    mixture: Mixture,
    softcap: float | None,
) -> Tensor:
    def capped(logits: Tensor) -> Tensor:
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    own, expected, kind = capped(student @ head.T), capped(teacher @ other.T), mixture.divergence
    log_q = F.log_softmax(own / mixture.temperature, -1)
    log_p = F.log_softmax(expected / mixture.temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if kind.kind == "forward_kl":
        value = (p * (log_p - log_q)).sum(-1)
    elif kind.kind == "reverse_kl":
        value = (q * (log_q - log_p)).sum(-1)
    else:
        middle = torch.log(kind.beta * p + (1 - kind.beta) * q)
        value = kind.beta * (p * (log_p - middle)).sum(-1) + (1 - kind.beta) * (q * (log_q - middle)).sum(-1)
    value = value * mixture.temperature**2
    if mixture.cross_entropy:
        share = mixture.cross_entropy * (labels >= 0).double()
        value = (1 - share) * value + share * F.cross_entropy(own, labels.clamp(min=0), reduction="none")
    return value.sum()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature, cross_entropy, softcap", SETTINGS)
@pytest.mark.parametrize("kind, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_value_and_gradients(kind, beta, temperature, cross_entropy, softcap, dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    mixture = Mixture(Divergence(kind, beta), temperature, cross_entropy)
    limits = (2e-4, 6e-3) if dtype == torch.bfloat16 else (2e-4, 2e-3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    for words, tokens, width in SHAPES:
        teacher, other = normal(tokens, width).to(dtype), (1.5 * width**-0.5 * normal(words, width)).to(dtype)
        student = (teacher.float() + 0.3 * normal(tokens, width)).to(dtype)
        head = (other.float() + 0.02 * normal(words, width)).to(dtype)
        labels = torch.randint(0, words, (tokens,), device="cuda", generator=generator)
        labels[::5] = -200  # scored against the teacher alone
        for shared in (False, True):
            own = student.clone().requires_grad_()
            own_head = other if shared else head.clone().requires_grad_()
            exact, exact_head = student.double().requires_grad_(), own_head.detach().double().requires_grad_()
            expected = reference(exact, exact_head, teacher.double(), other.double(), labels, mixture, softcap)
            expected.backward()
            chunk = 32 if tokens > 40 else None
            found = token_loss(
                own, own_head, Teacher(teacher, other), labels=labels, mixture=mixture, softcap=softcap, chunk=chunk
            )
            found.backward()
            # The difference of the states is rounded once where both models have one head.
            slack = 5.0 if shared else 1.0
            assert abs(float(found) - float(expected)) <= slack * limits[0] * float(expected), (words, shared)
            assert relative(own.grad, exact.grad) <= 2 * limits[1], (words, shared)
            if not shared:
                assert relative(own_head.grad, exact_head.grad) <= limits[1], words

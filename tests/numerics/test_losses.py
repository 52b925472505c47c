"""The chunked losses against float64 and autograd, with whole logits written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from transmla.measure.attention_errors import normalised_error
from transmla.recover import losses
from transmla.recover.divergence import Divergence
from transmla.recover.logits import compiled as compiled_chunk
from transmla.recover.losses import Kept, Mixture, Teacher, token_loss

FORWARD, REVERSE = Divergence("forward_kl"), Divergence("reverse_kl")
DIVERGENCES = [FORWARD, REVERSE, Divergence("jsd", 0.5), Divergence("jsd", 0.1), Divergence("jsd", 0.9)]


def names(divergence: Divergence) -> str:
    return f"{divergence.kind}{divergence.beta if divergence.kind == 'jsd' else ''}"


def definition(p, q, divergence: Divergence):
    """Sum over rows, from probabilities, as the papers write it."""

    def kl(one, other):
        return torch.where(one > 0, one * (one.log() - other.log()), 0.0).sum()

    if divergence.kind == "jsd":
        middle = divergence.beta * p + (1 - divergence.beta) * q
        return divergence.beta * kl(p, middle) + (1 - divergence.beta) * kl(q, middle)
    return kl(p, q) if divergence.kind == "forward_kl" else kl(q, p)


PLAIN = Mixture()


def capped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(student, head, teacher, *, labels=None, mixture=PLAIN, softcap=None):
    logits = capped(student @ head.T, softcap)
    entropy = F.cross_entropy(logits, labels, reduction="sum") if labels is not None else 0.0
    if teacher is None:
        return entropy
    q = F.softmax(logits / mixture.temperature, -1)
    if isinstance(teacher, Kept):
        p = teacher.logp.double().exp()
        q, p = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (q.gather(1, teacher.ids), p))
    else:
        p = F.softmax(capped(teacher.hidden.double() @ teacher.head.double().T, softcap) / mixture.temperature, -1)
    whole = mixture.temperature**2 * definition(p, q, mixture.divergence)
    return (1 - mixture.cross_entropy) * whole + mixture.cross_entropy * entropy


def compare(student, head, teacher, *, chunk=None, **options) -> None:
    """Value, and both gradients, of the mean: at most 1e-6 relative."""
    student, head = student.requires_grad_(), head.requires_grad_()
    loss = token_loss(student, head, teacher, chunk=chunk, **options) / len(student)
    loss.backward()
    exact_student, exact_head = student.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    exact = reference(exact_student, exact_head, teacher, **options) / len(student)
    exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    for got, want in ((student.grad, exact_student.grad), (head.grad, exact_head.grad)):
        assert (got.double() - want).norm() / want.norm() < 1e-6


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    # Logits of about one: where two models are tens of nats apart, float32 has no more than 1e-5 of these gradients.
    return torch.randn(50, 24), torch.randn(301, 24) / 5, Teacher(torch.randn(50, 32), torch.randn(301, 32) / 5)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_value_and_gradients(tensors, divergence, temperature, chunk, softcap) -> None:
    compare(*tensors, chunk=chunk, mixture=Mixture(divergence, temperature), softcap=softcap)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_mixture_with_cross_entropy(tensors, divergence, softcap) -> None:
    labels = torch.randint(0, 301, (50,))
    compare(*tensors, chunk=16, labels=labels, mixture=Mixture(divergence, 1.5, 0.3), softcap=softcap)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
@pytest.mark.parametrize("kept", [False, True])
def test_a_negative_label_leaves_the_divergence_whole(tensors, divergence, kept, monkeypatch) -> None:
    """The sum of two groups of tokens: one of the mixture, one of the divergence alone; compiled likewise."""
    student, head, teacher = tensors
    labels = torch.randint(0, 301, (50,))
    labels[::3] = -200
    if kept:
        logp, ids = F.log_softmax(teacher.hidden @ teacher.head.T, -1).topk(16)
        teacher = Kept(ids, logp)
    mixture = Mixture(divergence, 1.0 if kept else 1.5, 0.3)

    def part(keep):
        return Kept(teacher.ids[keep], teacher.logp[keep]) if kept else Teacher(teacher.hidden[keep], teacher.head)

    exact_student, exact_head = student.double().requires_grad_(), head.double().requires_grad_()
    human = labels >= 0
    exact = reference(exact_student[human], exact_head, part(human), labels=labels[human], mixture=mixture)
    exact = exact + reference(
        exact_student[~human], exact_head, part(~human), mixture=Mixture(divergence, mixture.temperature)
    )
    exact.backward()
    for compiling in (False, True):
        if compiling:
            monkeypatch.setattr(losses, "fast", lambda function, logits: compiled_chunk(function))
        own, own_head = student.clone().requires_grad_(), head.clone().requires_grad_()
        loss = token_loss(own, own_head, teacher, labels=labels, mixture=mixture, chunk=16)
        loss.backward()
        assert abs(loss.item() / exact.item() - 1) < 1e-6
        for got, want in ((own.grad, exact_student.grad), (own_head.grad, exact_head.grad)):
            assert (got.double() - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy_alone(tensors, softcap) -> None:
    student, head, _ = tensors
    compare(student, head, None, chunk=16, labels=torch.randint(0, 301, (50,)), softcap=softcap)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_kept_part_of_the_teacher(tensors, divergence, share) -> None:
    """The k largest and one bucket for the rest; the student's own bucket is not what is left to one in float32."""
    student, head, teacher = tensors
    logp, ids = F.log_softmax(teacher.hidden @ teacher.head.T, -1).topk(16)
    labels = torch.randint(0, 301, (50,))
    compare(
        student,
        head,
        Kept(ids, logp),
        chunk=16,
        labels=labels if share else None,
        mixture=Mixture(divergence, 1.0, share),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
def test_kept_whole_is_the_whole(tensors, divergence) -> None:
    student, head, teacher = tensors
    logp, ids = F.log_softmax(teacher.hidden @ teacher.head.T, -1).topk(301)
    results = []
    for one in (teacher, Kept(ids, logp)):
        hidden = student.clone().requires_grad_()
        loss = token_loss(hidden, head, one, mixture=Mixture(divergence))
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_compiled_chunks(tensors, monkeypatch) -> None:
    """What a GPU runs: there the label is subtracted by a comparison within the fused pass."""
    student, head, teacher = tensors
    labels = torch.randint(0, 301, (50,))
    monkeypatch.setattr(losses, "fast", lambda function, logits: compiled_chunk(function))
    for mixture, softcap in ((Mixture(FORWARD, cross_entropy=0.3), None), (Mixture(FORWARD, 2.0, 0.3), 3.0)):
        compare(student.clone(), head.clone(), teacher, labels=labels, mixture=mixture, softcap=softcap, chunk=8)
    compare(student.clone(), head.clone(), None, labels=labels, chunk=8)


def test_padded_vocabularies_are_cut(tensors) -> None:
    """Rows that only one of the models has take no part, on either side."""
    student, head, teacher = tensors
    expected = token_loss(student, head, teacher)
    longer = torch.cat((teacher.head, torch.full((7, 32), 3.0)))
    assert token_loss(student, head, Teacher(teacher.hidden, longer)) == expected
    padded = torch.cat((head, torch.full((7, 24), 3.0))).requires_grad_()
    loss = token_loss(student, padded, teacher)
    loss.backward()
    assert loss == expected and padded.grad[301:].abs().max() == 0 and padded.grad[:301].abs().max() > 0


def near(kl: float, n: int = 64, words: int = 4096, width: int = 256):
    """Two models in bfloat16 about `kl` apart: hidden states that differ a little, one head."""
    torch.manual_seed(1)
    head = (torch.randn(words, width) * 0.2).bfloat16()
    hidden = torch.randn(n, width)
    other = hidden + torch.randn(n, width) * math.sqrt(2 * kl) / 0.2 / math.sqrt(width)
    return hidden.bfloat16(), other.bfloat16(), head


@pytest.mark.parametrize("kl", [0.02, 0.002, 0.0002])
@pytest.mark.parametrize("divergence", DIVERGENCES[:3], ids=names)
def test_small_differences_survive_bfloat16(kl: float, divergence: Divergence) -> None:
    """Where recovery ends up the gradient is a difference of nearly equal numbers: at most 2 % off."""
    student, teacher, head = near(kl)
    student.requires_grad_()
    token_loss(student, head, Teacher(teacher, head), mixture=Mixture(divergence)).backward()
    exact = student.detach().double().requires_grad_()
    value = reference(exact, head.double(), Teacher(teacher, head), mixture=Mixture(divergence))
    value.backward()
    if divergence.kind != "jsd":
        assert 0.2 < value.item() / len(student) / kl < 5
    assert (student.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.02
    # What the bound is for: logits in bfloat16 are not good enough.
    narrow = student.detach().clone().requires_grad_()
    p, log_q = F.softmax((teacher @ head.T).float(), -1), F.log_softmax((narrow @ head.T).float(), -1)
    F.kl_div(log_q, p, reduction="sum").backward()
    if divergence.kind == "forward_kl":
        assert (narrow.grad.double() - exact.grad).norm() / exact.grad.norm() > 0.05


def test_head_gradient_over_several_groups_and_blocks(tensors, monkeypatch) -> None:
    """Groups of chunks of which the last is short, and blocks of rows that do not divide the vocabulary."""
    import transmla.recover.losses as losses

    monkeypatch.setattr(losses, "SLOPES", 301 * 17)
    monkeypatch.setattr(losses, "ROWS", 64)
    compare(*tensors, chunk=8)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    hidden, head = torch.randn(9, 24, requires_grad=True), torch.randn(301, 24)
    for divergence in DIVERGENCES:
        loss = token_loss(hidden, head, Teacher(hidden.detach(), head), mixture=Mixture(divergence))
        (grad,) = torch.autograd.grad(loss, hidden)
        assert abs(loss.item()) < 1e-5
        assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=names)
def test_impossible_tokens_give_numbers(divergence: Divergence) -> None:
    """Probabilities that underflow on either side leave value and gradient finite."""
    hidden, head = torch.tensor([[400.0, 0.0]], requires_grad=True), torch.eye(2)
    loss = token_loss(hidden, head, Teacher(torch.tensor([[0.0, 400.0]]), head), mixture=Mixture(divergence))
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head = torch.randn(9, 24, requires_grad=True), torch.randn(31, 24)
    token_loss(hidden, head, Teacher(torch.randn(9, 24), head)).backward()
    assert head.grad is None and hidden.grad is not None


def test_no_tokens_is_a_differentiable_zero() -> None:
    hidden, head = torch.randn(0, 24, requires_grad=True), torch.randn(31, 24)
    loss = token_loss(hidden, head, Teacher(torch.randn(0, 24), head))
    loss.backward()
    assert loss.item() == 0.0


def test_direction_is_teacher_to_student() -> None:
    """Forward KL punishes a student that misses what the teacher may say, not the other way round."""
    wide, narrow, head = torch.zeros(1, 2), torch.tensor([[8.0, 0.0]]), torch.eye(2)
    missing, inventing = (
        [token_loss(one, head, Teacher(other, head), mixture=Mixture(d)) for d in (FORWARD, REVERSE)]
        for one, other in ((narrow, wide), (wide, narrow))
    )
    assert missing[0] > 2 * inventing[0] and inventing[1] > 2 * missing[1]


def test_what_is_missing_is_said() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="labels"):
        token_loss(hidden, head, None)
    with pytest.raises(ValueError, match="temperature"):
        token_loss(
            hidden, head, Kept(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1)), mixture=Mixture(temperature=2.0)
        )
    with pytest.raises(ValueError, match="beta"):
        Divergence("jsd", 1.0)


def test_normalised_error() -> None:
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = sum((student[b, t] - teacher[b, t]).square().sum() for b in range(2) for t in range(5)) / 3.0
    torch.testing.assert_close(normalised_error(student, teacher, 3.0), expected)

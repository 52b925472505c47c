"""The refit of the output projections: its formula, and that every layer of a refitted student is at its optimum."""

import pytest
import torch
from torch import Tensor

from tests.conftest import FULL, settings, tiny_model, windows
from transmla.convert import refit
from transmla.convert.conversion import convert_model
from transmla.convert.refit import Moments, choose_damping, ridge_update

SMALL = dict(qk_rope_head_dim=8, kv_lora_rank=12, freqfold=2)


def moments_of(error: Tensor, inputs: Tensor) -> Moments:
    found = Moments(torch.zeros(error.shape[1], inputs.shape[1]))
    found.add(error, inputs)
    return found


def test_ridge_update_is_least_squares_with_a_prior() -> None:
    torch.manual_seed(0)
    inputs, error = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    level = (0.1 * inputs.square().sum() / 6).sqrt()
    rows = torch.cat((inputs, level * torch.eye(6, dtype=torch.float64)))
    expected = torch.linalg.lstsq(rows, torch.cat((error, torch.zeros(6, 4, dtype=torch.float64)))).solution.mT
    torch.testing.assert_close(ridge_update(moments_of(error, inputs), 0.1), expected)


def test_damping_follows_what_the_judges_see() -> None:
    """Errors that follow from the inputs take the least damping, noise the most."""
    torch.manual_seed(0)
    inputs, judges = torch.randn(2, 40, 30, dtype=torch.float64)
    truth = torch.randn(30, 5, dtype=torch.float64)
    assert choose_damping(moments_of(inputs @ truth, inputs), moments_of(judges @ truth, judges)) == refit.DAMPINGS[0]
    noise = torch.randn(2, 40, 5, dtype=torch.float64)
    noisy = [moments_of(x @ truth + 10 * e, x) for x, e in zip((inputs, judges), noise, strict=True)]
    assert choose_damping(*noisy) in (refit.DAMPINGS[-1], None)
    assert choose_damping(moments_of(inputs @ truth, inputs), moments_of(judges @ -truth, judges)) is None


def streams(model: torch.nn.Module, rows: Tensor) -> list[dict[str, Tensor]]:
    """By layer: what enters it, what enters its output projection, what its attention puts out."""
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        keep = found[index]
        layer.register_forward_pre_hook(lambda m, a, keep=keep: keep.update(enters=a[0].double()))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, keep=keep: keep.update(heads=a[0].double()))
        layer.self_attn.register_forward_hook(lambda m, a, out, keep=keep: keep.update(out=out[0].double()))
    with torch.no_grad():
        model(rows)
    return found


@pytest.mark.parametrize("family,drift", [("llama", 0.3), ("llama", 0.0), ("qwen2", 0.3), ("gemma2", 0.3)])
def test_every_layer_is_at_its_optimum(family: str, drift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the streams of the finished models, where a layer does not depend on the ones above it, the gradient of
    E|y + δ (h - h~) - O a|² + ε|O - O_0|² vanishes."""
    monkeypatch.setattr(refit, "choose_damping", lambda fit, judge: 0.01)
    rows = torch.cat(windows(12))[:11]  # a last batch that is smaller
    chosen = settings(**SMALL, drift=drift)
    before = convert_model(tiny_model(family), chosen.model_copy(update={"refit": False}), rows).student
    source = tiny_model(family)
    student = convert_model(source, chosen, rows).student
    if family == "gemma2":
        drift = 0.0  # a norm lies between its attention and the stream
    for index, (one, own) in enumerate(zip(streams(source, rows), streams(student, rows), strict=True)):
        old, new = (m.model.layers[index].self_attn.o_proj.weight.double() for m in (before, student))
        heads = own["heads"].flatten(0, 1)
        left = one["out"] + drift * (one["enters"] - own["enters"]) - own["out"]
        gradient = left.detach().flatten(0, 1).mT @ heads / len(heads)
        gram = heads.mT @ heads / len(heads)
        pull = 0.01 * gram.diagonal().mean() * (new - old)
        torch.testing.assert_close(gradient, pull, rtol=1e-2, atol=1e-3 * float(pull.detach().abs().max()))
        assert float((new - old).detach().norm()) > 1e-2 * float(old.detach().norm())


def test_nothing_to_correct_nothing_changed() -> None:
    source = tiny_model(num_key_value_heads=1)
    student = convert_model(source, settings(**FULL), torch.cat(windows())).student
    for layer, other in zip(student.model.layers, source.model.layers, strict=True):
        torch.testing.assert_close(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight, rtol=0, atol=1e-4)

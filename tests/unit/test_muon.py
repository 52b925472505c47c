"""Muon: its steps against float64, which matrices it has, its share of the rates, and a resumed run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.unit.test_stages import make_trainer
from transmla.errors import RecipeError
from transmla.modeling.student import ATTENTION
from transmla.plan.checks import prepare
from transmla.plan.memory import memory_by_part
from transmla.recipe.compose import load_recipe
from transmla.recover.muon import MOMENTUM, MUON, MuonAdamW, orthogonal

SHAPES = [(6, 6), (4, 9), (9, 4), (3, 5, 8), (4, 9)]


def muon_reference(weight, gradients, rate: float, decay: float) -> torch.Tensor:
    """Every matrix by itself, in float64, as the papers write it: the polynomial of its singular values."""
    weight, momentum = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        gradient = gradient.double()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        step = torch.empty_like(ahead)
        for place in range(ahead.shape[0] if ahead.ndim == 3 else 1):
            matrix = ahead[place] if ahead.ndim == 3 else ahead
            left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            made = left @ values.diag() @ right
            if ahead.ndim == 3:
                step[place] = made
            else:
                step = made
        weight = weight * (1 - rate * decay) - rate * 0.2 * max(weight.shape[-2:]) ** 0.5 * step
    return weight


def drawn(shapes, count: int, seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [2**26, 70])
def test_steps_equal_the_papers(decay: float, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr("transmla.recover.muon.AT_ONCE", at_once)
    [start], steps = drawn(SHAPES, 1, 0), drawn(SHAPES, 3, 1)
    weights = [nn.Parameter(value.clone()) for value in start]
    vector, start_of_vector = nn.Parameter(torch.ones(7)), torch.ones(7)
    optimizer = MuonAdamW([vector], lr=0.02, weight_decay=decay)
    optimizer.add_param_group({"params": weights, MUON: True, "lr": 0.05})
    alone = nn.Parameter(start_of_vector.clone())
    adamw = torch.optim.AdamW([alone], lr=0.02, weight_decay=decay)
    for gradients in steps:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        vector.grad = alone.grad = gradients[0].flatten()[:7].clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(vector, alone, rtol=0, atol=0)
    for index, weight in enumerate(weights):
        wanted = muon_reference(start[index], [gradients[index] for gradients in steps], 0.05, decay)
        torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=3e-6)


def test_steps_are_those_of_pytorchs_own() -> None:
    """torch.optim.Muon, one matrix after another and in bfloat16, which is why it is not used: to its rounding."""
    [start], steps = drawn([(24, 40), (24, 40), (40, 24)], 1, 5), drawn([(24, 40), (24, 40), (40, 24)], 3, 6)
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer = MuonAdamW(ours[:1], lr=0.05, weight_decay=0.1)
    optimizer.param_groups[0] |= {"params": ours, MUON: True}
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for gradients in steps:
        for one, two, gradient in zip(ours, theirs, gradients, strict=True):
            one.grad, two.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    for one, two, first in zip(ours, theirs, start, strict=True):
        assert (one - two).norm() < 0.01 * (two - first).norm()


def test_singular_values_become_one() -> None:
    values = torch.linalg.svdvals(orthogonal(drawn([(5, 24, 40)], 1, 2)[0][0]))
    assert values.min() > 0.6 and values.max() < 1.3


def test_state_goes_on_as_if_never_saved() -> None:
    [start], steps = drawn(SHAPES[:2], 1, 3), drawn(SHAPES[:2], 4, 4)
    weights = [nn.Parameter(value.clone()) for value in start]
    optimizer = MuonAdamW(weights[:1], lr=0.01)
    optimizer.add_param_group({"params": weights[1:], MUON: True})
    for number, gradients in enumerate(steps):
        if number == 2:
            saved, copied = copy.deepcopy(optimizer.state_dict()), [nn.Parameter(w.detach().clone()) for w in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    other = MuonAdamW(copied[:1], lr=0.5)
    other.add_param_group({"params": copied[1:], MUON: True})
    other.load_state_dict(saved)
    for gradients in steps[2:]:
        for weight, gradient in zip(copied, gradients, strict=True):
            weight.grad = gradient
        other.step()
    assert all(torch.equal(one, two) for one, two in zip(weights, copied, strict=True))


def test_matrices_of_the_layers_at_their_share(tmp_path) -> None:
    """Embedding, norms and head are AdamW's at their own rates; attentions and MLPs Muon's at theirs."""
    stage = {"train": "all", "trunk_learning_rate": 0.5, "muon_learning_rate": 3.0}
    trainer = make_trainer("distill", tmp_path, steps=1, stage=stage, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, MuonAdamW)
    names = {id(value): name for name, value in trainer.student.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for value in group["params"]:
            name = names[id(value)]
            seen.add(name)
            muon = ".layers." in name and value.ndim == 2
            assert group.get(MUON, False) is muon, name
            share = (1.0 if ATTENTION in name else 0.5) * (3.0 if muon else 1.0)
            assert group["lr"] == pytest.approx(1e-3 * share), name
    assert seen == {name for name, value in trainer.student.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["recover.1.train=lora"], "not for adapters"),
        (["recover.1.relative_learning_rate=true"], "size of their own"),
        (["recover.1.trainer.optim=sgd"], "use trainer.optim"),
        (["recover.1.trainer.optim=adafactor"], "use trainer.optim"),
    ],
)
def test_what_does_not_go_with_it(words: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe("debug", ["recover.1.muon_learning_rate=1.5", *words])


def test_shards_are_refused(monkeypatch) -> None:
    from transmla.plan import launch_checks

    recipe = load_recipe("debug", ["recover.1.muon_learning_rate=1.5"])
    for way in ("fsdp2", "zero2", "zero3"):
        monkeypatch.setattr(launch_checks, "layout", lambda way=way: way)
        monkeypatch.setattr(launch_checks, "find_spec", lambda name: object())
        with pytest.raises(RecipeError, match=rf"recover\.1\.muon_learning_rate.*{way} has them in pieces"):
            launch_checks.check_launch(recipe, "cpu", "float32")


def test_the_plan_counts_one_moment_of_a_matrix() -> None:
    plan = prepare(load_recipe("debug", ["device=cpu", "recover.1.train=all", "dry_run=true"]))
    stage, config = plan.recipe.recover[1], plan.config
    other = stage.model_copy(update={"muon_learning_rate": 1.5})
    adamw, muon = (memory_by_part(one, plan.sizes, config, torch.float32) for one in (stage, other))
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert adamw["optimizer"] == 8 * plan.sizes.student
    assert muon["optimizer"] == 8 * embedding + 4 * (plan.sizes.student - embedding)
    assert adamw | {"optimizer": 0} == muon | {"optimizer": 0}

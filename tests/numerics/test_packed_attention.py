"""Attention over packed documents by their boundaries, against a mask in float64."""

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import settings, tiny_config, tiny_model
from tests.unit.test_recover import PLAIN, make_trainer
from transmla.convert.conversion import convert_model
from transmla.modeling.kernels.packed import LONG, PACKED, STEP, boundaries, needs_mask, packed_attention, plan_of
from transmla.recover import stage as stage_module

LENGTHS = [[7], [1], [1, 1, 1], [5, 1, 11, 3], [16, 16], [1, 30], [30, 1], [2] * 20]


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads, groups, wide, narrow", [(4, 4, 24, 16), (4, 2, 16, 16)])
def test_every_document_sees_itself(lengths, heads, groups, wide, narrow) -> None:
    tokens, bounds = sum(lengths), boundaries(positions(lengths))
    shapes = ((1, heads, tokens, wide), (1, groups, tokens, wide), (1, groups, tokens, narrow))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    wanted = F.scaled_dot_product_attention(*inputs, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    found, _ = packed_attention(
        torch.nn.Identity(),
        *inputs,
        None,
        scaling=0.3,
        document_bounds=bounds,
        document_plan=torch.tensor(plan_of(bounds)),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_boundaries() -> None:
    assert boundaries(positions([3, 1, 2])).tolist() == [0, 3, 4, 6]


def test_without_boundaries_a_mask_counts() -> None:
    """A model that is asked something else between two steps: padding stays unseen, whatever attention is called."""
    torch.manual_seed(3)
    teacher = tiny_model("llama")
    student = convert_model(
        teacher, settings(qk_rope_head_dim=8, kv_lora_rank=24), torch.randint(1, 97, (4, 32))
    ).student
    tokens, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for model in (teacher, student):
        found = []
        for name in ("sdpa", PACKED):
            model.config._attn_implementation = name
            with torch.no_grad():
                found.append(model(input_ids=tokens, attention_mask=mask).logits[mask.bool()])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_the_rule() -> None:
    """Long documents, the mean over tokens, are for cuDNN; lengths are rounded up."""
    assert plan_of(boundaries(positions([LONG, LONG]))) == (-(-LONG // STEP) * STEP, 1)
    assert plan_of(boundaries(positions([LONG - 1] * 2)))[1] == 0
    assert plan_of(boundaries(positions([1] * 500 + [8000]))) == (8192, 1)
    assert plan_of(boundaries(positions([1]))) == (STEP, 0)


@pytest.mark.parametrize("stage", [{"logits": 0.1}, None])
def test_what_needs_a_mask(stage: dict | None, tmp_path, monkeypatch) -> None:
    """A loss that compares attention's logits; a teacher whose trunk may not hand boundaries through."""
    if stage is None:
        monkeypatch.setattr(stage_module, "FAMILIES", {})
    trainer = make_trainer("layerwise", tmp_path, packing=True, stage=stage)
    assert trainer.attention.startswith("a mask: ") and not trainer.batches.packed
    assert trainer.student.config._attn_implementation == trainer.teacher.config._attn_implementation == "sdpa"


def test_windows_and_kernels_that_need_a_mask() -> None:
    config, cpu = tiny_config("mistral", sliding_window=8), torch.device("cpu")
    config._attn_implementation = "sdpa"
    assert needs_mask(config, 8, torch.float32, cpu) is None
    assert "a layer sees 8 tokens" in needs_mask(config, 9, torch.float32, cpu)
    config._attn_implementation = "eager"
    assert "eager" in needs_mask(config, 8, torch.float32, cpu)
    config._attn_implementation, config.attention_dropout = "sdpa", 0.1
    assert "dropout" in needs_mask(config, 8, torch.float32, cpu)


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_a_stage_learns_as_with_a_mask(kind: str, tmp_path, monkeypatch) -> None:
    """Losses and weights of three steps; and the models are left with the kernel that they came with."""
    found = []
    for reason in (None, "for this test"):
        monkeypatch.setattr(stage_module, "needs_mask", lambda *args, reason=reason: reason)
        folder = tmp_path / str(reason)
        folder.mkdir()
        trainer = make_trainer(kind, folder, steps=3, batch=2, packing=True, **PLAIN)
        models = [model for model in (trainer.student, trainer.teacher) if model is not None]
        assert all((model.config._attn_implementation == PACKED) is (reason is None) for model in models)
        result = stage_module.run_stage(trainer, torch.float32)
        assert all(model.config._attn_implementation == "sdpa" for model in models)
        assert ("a mask: for this test" in result["computed_by"]) is (reason is not None)
        losses = [line["loss"] for line in result["log"] if "loss" in line]
        found.append((losses, torch.cat([value.flatten() for value in trainer.student.parameters()])))
    (packed, weights), (masked, expected) = found
    assert len(packed) == 3
    torch.testing.assert_close(packed, masked, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)

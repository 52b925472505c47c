"""Real norms on the latents: the scale they keep, and the export that carries them as they are."""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from tests.conftest import settings, tiny_model, windows
from tests.numerics.test_exact import TOKENS, difference, stock
from transmla.convert.conversion import convert_model
from transmla.export.deepseek_weights import export_state
from transmla.export.expressible import blocking_dtype, blocking_feature

TRUNCATED = dict(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2)


def student_of(family: str = "llama", query_rank: int | None = None, *, norm: bool = True, **fields):
    source = tiny_model(family, **fields)
    convert = settings(**TRUNCATED, q_lora_rank=query_rank, latent_norm=norm)
    return convert_model(source, convert, torch.cat(windows())).student


def latents(student) -> list[torch.Tensor]:
    """What `kv_b` reads in every layer, on the calibration text."""
    found: list[torch.Tensor] = []
    handles = [
        layer.self_attn.kv_b_proj.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
        for layer in student.model.layers
    ]
    with torch.no_grad():
        student(torch.cat(windows()))
    for handle in handles:
        handle.remove()
    return found


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def test_the_norm_keeps_the_latents_scale() -> None:
    """Of the first layer, whose input is the same with and without norm; the inverse rms would miss it by its
    square."""
    plain, normed = latents(student_of(norm=False))[0], latents(student_of())[0]
    assert abs(rms(plain) - 1) > 0.1  # else the inverse would pass too
    assert rms(normed) == pytest.approx(rms(plain), rel=1e-3)
    mean_of_token_rms = float(plain.double().square().mean(-1).sqrt().mean())
    assert 0.85 * rms(plain) < mean_of_token_rms <= rms(plain)  # the other estimate of the same scale


def test_the_query_latents_scale_is_kept() -> None:
    plain, normed = student_of(query_rank=24, norm=False), student_of(query_rank=24)
    found = []
    for student in (plain, normed):
        student.model.layers[0].self_attn.q_b_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            student(torch.cat(windows()))
    assert rms(found[1]) == pytest.approx(rms(found[0]), rel=1e-3)


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize(
    "family,query_rank,fields",
    [("llama", None, {}), ("llama", 24, {"rms_norm_eps": 1e-2}), ("qwen2", None, {})],
)
def test_export_equals_student(family: str, query_rank: int | None, fields: dict, layout: str) -> None:
    student = student_of(family, query_rank, **fields)
    with torch.no_grad():  # as after training
        for layer in student.model.layers:
            attention = layer.self_attn
            attention.kv_a_layernorm.weight.mul_(torch.linspace(0.5, 1.5, 24))
            if attention.kv_b_proj.bias is not None:
                attention.kv_b_proj.bias.normal_(std=0.2)
                attention.kv_a_proj_with_mqa.bias.normal_(std=0.2)
    assert difference(student, stock(student, layout, torch.float32)) <= 1e-5
    weight = export_state(student, layout, torch.float32)["model.layers.0.self_attn.kv_a_layernorm.weight"]
    assert weight.max() < 100  # no linear norm


def test_cached_generation_with_a_norm() -> None:
    student = student_of()
    with torch.no_grad():
        whole = student(TOKENS).logits[:, -1]
        first = student(TOKENS[:, :-1], use_cache=True)
        last = student(TOKENS[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    assert (whole - last).abs().max() <= 1e-4


def test_save_and_load(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    student = student_of()
    student.save_pretrained(tmp_path)
    assert difference(student, AutoModelForCausalLM.from_pretrained(tmp_path)) <= 1e-6


def test_what_cannot_be_exported() -> None:
    assert "query bias" in blocking_feature(student_of("qwen2", 24).config)
    half = torch.float16
    assert blocking_dtype(student_of().config, half) is None
    assert "2^-30" in blocking_dtype(student_of(norm=False).config, half)
    assert "2^-30" in blocking_dtype(student_of("qwen2").config, half)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        export_state(student_of(norm=False), "compact", half)


def test_float16_export_with_a_real_norm() -> None:
    student = student_of().half().float()  # weights that float16 holds
    exported: DeepseekV3ForCausalLM = stock(student, "compact", torch.float16).float()
    assert difference(student, exported) <= 1e-2  # alpha rounds the trunk

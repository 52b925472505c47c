"""Whole models: nothing truncated, nothing lost; against the source, and again after export in stock classes."""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from tests.conftest import FULL, LLAMA3, VOCAB, settings, tiny_model, windows
from transmla.convert.conversion import convert_model
from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_weights import export_state
from transmla.sources.weights import FILLED

TOKENS = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))
CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 rope": (
        "llama",
        {"rope_parameters": LLAMA3},
    ),
    "qwen2": ("qwen2", {}),
}


def conversion(family: str, fields: dict, dtype: torch.dtype, groups: int = 1, **section):
    source = tiny_model(family, groups=groups, dtype=dtype, **fields)
    convert = settings(**(FULL | section))
    return source, convert_model(source, convert, torch.cat(windows()))


def converted(family: str, fields: dict, dtype: torch.dtype, groups: int = 1, **section):
    source, done = conversion(family, fields, dtype, groups, **section)
    return source, done.student


def stock(student, layout: str, dtype: torch.dtype, shifts: torch.Tensor | None = None):
    config = deepseek_config(student.config, layout, dtype)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    model = model.to_empty(device="cpu").to(dtype)
    state = export_state(student, layout, dtype, shifts=shifts)
    filled = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.endswith(FILLED)}
    model.load_state_dict(state | filled, strict=True)
    rope = type(model.model.rotary_emb)(config)  # buffers are not in a state dict
    model.model.rotary_emb = rope
    return model.eval()


@torch.no_grad()
def difference(one, other) -> float:
    return float((one(TOKENS).logits - other(TOKENS).logits).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_full_rank_student_equals_source(case: str) -> None:
    family, fields = CASES[case]
    source, student = converted(family, fields, torch.float32)
    assert source(TOKENS).logits.std() > 0.2
    assert difference(source, student) <= 1e-5


def test_full_rank_in_float64() -> None:
    source, student = converted("qwen2", {}, torch.float64)
    assert difference(source, student) <= 1e-6  # cos and sin come from float32 angles in both


@pytest.mark.parametrize("query_rank", [None, 64])
@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_export_equals_student_and_source(case: str, layout: str, query_rank: int | None) -> None:
    family, fields = CASES[case]
    source, student = converted(family, fields, torch.float32, q_lora_rank=query_rank)
    exported = stock(student, layout, torch.float32)
    assert difference(student, exported) <= 1e-5
    assert difference(source, exported) <= 1e-5


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_export_of_a_truncated_student(family: str, layout: str) -> None:
    """Several key heads, half the rotary channels, a quarter of the rank: the export is as exact as ever."""
    source, student = converted(
        family, {}, torch.float32, groups=2, qk_rope_head_dim=8, kv_lora_rank=16, freqfold="auto", q_lora_rank=24
    )
    exported = stock(student, layout, torch.float32)
    assert difference(source, student) > 0.1
    assert difference(student, exported) <= 1e-5


def test_export_keeps_the_norm_trick_exact_for_any_eps() -> None:
    """The residual stream's scale: with eps 1e-2 a forgotten alpha would be seen at once."""
    _, student = converted("llama", {"rms_norm_eps": 1e-2}, torch.float32)
    assert difference(student, stock(student, "compact", torch.float32)) <= 1e-5


def test_truncated_conversion_is_better_than_chance_and_monotone() -> None:
    """More latent, less error; a transposed factor or a dropped scale breaks this."""
    errors = []
    for rank in (8, 24, 64):
        source, student = converted("llama", {}, torch.float32, groups=2, qk_rope_head_dim=16, kv_lora_rank=rank)
        with torch.no_grad():
            log_s, log_t = student(TOKENS).logits.log_softmax(-1), source(TOKENS).logits.log_softmax(-1)
        errors.append(float((log_t.exp() * (log_t - log_s)).sum(-1).mean()))
    assert errors[0] > errors[1] > errors[2]

"""The student's attention: packing, kernels, checkpointing, compilation, caching."""

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import VOCAB, settings, tiny_model, windows
from transmla.convert.conversion import convert_model
from transmla.modeling.kernels.eager import eager_attention
from transmla.modeling.kernels.fused import sdpa
from transmla.modeling.kernels.one_query import one_query


def student():
    source = tiny_model()
    convert = settings(qk_rope_head_dim=8, kv_lora_rank=24)
    return convert_model(source, convert, torch.cat(windows())).student


def packed(lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    documents = [torch.randint(1, VOCAB, (length,)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return documents, torch.cat(documents)[None], positions[None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_unpacked(implementation: str) -> None:
    model = student()
    model.set_attn_implementation(implementation)
    documents, row, positions = packed((13, 5, 22))
    with torch.no_grad():
        together = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]
        apart = torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
        mixed = model(input_ids=row).logits[0]
    assert (together - apart).abs().max() < 1e-5
    assert (mixed - apart).abs().max() > 1e-2  # the boundary matters


def test_padding_does_not_reach_other_tokens() -> None:
    model = student()
    row = torch.randint(1, VOCAB, (1, 9))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), row), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=mask, position_ids=mask.cumsum(-1) - 1).logits[:, 4:]
        assert (got - model(input_ids=row).logits).abs().max() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
def test_kernel_against_the_definition(masked: bool) -> None:
    query, key = torch.randn(2, 3, 17, 24).unbind(0)[0][None], torch.randn(1, 3, 17, 24)
    value = torch.randn(1, 3, 17, 10)
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    if masked:
        causal &= torch.arange(17)[None] // 6 == torch.arange(17)[:, None] // 6
    additive = torch.zeros(17, 17).masked_fill(~causal, float("-inf"))
    wanted = eager_attention(torch.nn.Module().eval(), query.double(), key.double(), value.double(), additive, 0.3)[0]
    got = sdpa(query, key, value, causal[None, None] if masked else None, 0.3, 0.0)
    assert (got - wanted).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = student().train()
    row = torch.randint(1, VOCAB, (2, 20))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in plain)


def test_compiled_without_a_graph_break() -> None:
    model = student()
    compiled = torch.compile(model.model, fullgraph=True)
    row = torch.randint(1, VOCAB, (2, 20))
    with torch.no_grad():
        got = compiled(input_ids=row, use_cache=False).last_hidden_state
        assert (got - model.model(input_ids=row).last_hidden_state).abs().max() < 1e-5


def test_generation_with_the_latent_cache() -> None:
    model = student()
    model.generation_config.eos_token_id = None  # what follows the end of one row would be padding
    row = torch.randint(1, VOCAB, (2, 9))
    out = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    full = row
    for _ in range(8):
        with torch.no_grad():
            following = model(input_ids=full, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        full = torch.cat((full, following), dim=1)
    generated = out.sequences
    assert torch.equal(generated, full[:, : generated.shape[1]])
    layer = out.past_key_values.layers[0]
    assert layer.keys.shape[-1] + layer.values.shape[-1] == 24 + 8  # latent and rope key, nothing per head


@pytest.mark.parametrize("mask_of", [None, torch.bool, torch.float32])
def test_one_query_against_the_definition(mask_of: torch.dtype | None) -> None:
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 5)
    seen = torch.rand(3, 1, 1, 11) > 0.4
    seen[..., -1] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    repeated_key, repeated_value = (states.double().repeat_interleave(3, dim=1) for states in (key, value))
    wanted = eager_attention(
        torch.nn.Module().eval(),
        query.double(),
        repeated_key,
        repeated_value,
        None if mask_of is None else additive,
        0.3,
    )[0]
    mask = None if mask_of is None else seen if mask_of == torch.bool else additive
    halves = [(query[..., :3], key[..., :3]), (query[..., 3:], key[..., 3:])]
    for parts in ([(query, key)], halves):
        assert (one_query(parts, value, mask, 0.3).transpose(1, 2) - wanted).abs().max() < 1e-6


def test_one_query_that_sees_nothing_is_a_number() -> None:
    """As the fused kernels: a padding token's query, fed alone, must not poison the cache."""
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    seen = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    seen[1] = True
    out = one_query([(query, key)], value, seen, 0.3)
    assert out.isfinite().all()
    assert torch.equal(out[1:], one_query([(query[1:], key[1:])], value[1:], None, 0.3))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_token_at_a_time_with_padding(family: str) -> None:
    """Prefill by single tokens, padded on the left: every visible token as in one pass."""
    source = tiny_model(family)
    model = convert_model(source, settings(qk_rope_head_dim=8, kv_lora_rank=24), torch.cat(windows())).student
    rows = torch.randint(1, VOCAB, (3, 9))
    mask = torch.ones_like(rows)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for place in range(9):
            at = slice(place, place + 1)
            steps.append(
                model(
                    input_ids=rows[:, at],
                    attention_mask=mask[:, : place + 1],
                    position_ids=positions[:, at],
                    past_key_values=cache,
                ).logits
            )
    assert ((torch.cat(steps, dim=1) - whole).abs().amax(-1) * mask).max() < 1e-5


def test_one_query_in_bfloat16_rounds_no_logits() -> None:
    query, key = 6 * torch.randn(4, 6, 1, 32), torch.randn(4, 2, 40, 32)
    value = torch.randn(4, 2, 40, 16)
    query, key, value = (states.bfloat16() for states in (query, key, value))
    repeated = [states.double().repeat_interleave(3, dim=1) for states in (key, value)]
    wanted = eager_attention(torch.nn.Module().eval(), query.double(), *repeated, None, 1.0)[0].transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = one_query([(query, key)], value, None, 1.0)
    assert (got.double() - wanted).norm() / wanted.norm() < 4e-3  # rounded logits give 2e-2


def test_a_weight_that_accelerate_keeps_elsewhere_is_called_for() -> None:
    from accelerate import cpu_offload

    model = student()
    row = torch.randint(1, VOCAB, (2, 9))
    options = dict(attention_mask=torch.ones_like(row), max_new_tokens=4, do_sample=False)
    wanted = model.generate(row, **options)
    assert torch.equal(cpu_offload(model, execution_device=torch.device("cpu")).generate(row, **options), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_absorbed_equals_expanded(family: str) -> None:
    """One more token after a cached prompt, padded on the left: float64, biases included, nothing expanded."""
    source = tiny_model(family)
    model = convert_model(source, settings(qk_rope_head_dim=8, kv_lora_rank=24), torch.cat(windows())).student.double()
    rows = torch.randint(1, VOCAB, (3, 9))
    mask = torch.ones_like(rows)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    calls = []
    with torch.no_grad():
        whole = model(input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(
            input_ids=rows[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache
        )
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
        last = model(
            input_ids=rows[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache
        ).logits[:, -1]
    assert not calls
    assert (last - whole).abs().max() < 1e-12


def test_save_and_load(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = student()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = torch.randint(1, VOCAB, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=row).logits, loaded(input_ids=row).logits)
    assert list(tmp_path.glob("*.safetensors"))

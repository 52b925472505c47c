"""What is left `auto`, and dimensions whose frequencies are not the natural ones."""

import pytest
import torch

from tests.conftest import settings, tiny_model, windows
from transmla.convert.conversion import convert_model
from transmla.convert.search import split
from transmla.errors import RecipeError
from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_weights import export_state
from transmla.geometry import candidates, derive_geometry

ROWS = torch.cat(windows(32))


def test_held_out_windows_are_not_fitted_on() -> None:
    fitted, held_out = split(ROWS, settings(freqfold="auto"))
    assert len(held_out) == len(ROWS) // 8 and len(fitted) + len(held_out) == len(ROWS)
    assert not {tuple(row) for row in fitted.tolist()} & {tuple(row) for row in held_out.tolist()}
    everything, none = split(ROWS, settings(freqfold=2))
    assert none is None and len(everything) == len(ROWS)


def test_freqfold_by_layer_is_the_better_one_of_each() -> None:
    source = tiny_model()
    sizes = dict(qk_rope_head_dim=8, kv_lora_rank=12, refit=False)
    found = convert_model(source, settings(**sizes, freqfold="auto"), ROWS)
    assert isinstance(found.geometry.freqfold, tuple) and len(found.geometry.freqfold) == len(source.model.layers)
    for index, fold in enumerate(found.geometry.freqfold):
        alone = convert_model(source, settings(**sizes, freqfold=fold), found.fitted_on).student
        own, other = (model.model.layers[index].self_attn for model in (found.student, alone))
        torch.testing.assert_close(own.q_proj.weight, other.q_proj.weight)
    assert any("freqfold 2" in line for line in found.choices) and any("freqfold 4" in line for line in found.choices)


def test_published_method_searches_one_freqfold_for_all() -> None:
    chosen = settings(method="transmla", qk_rope_head_dim=8, kv_lora_rank=12, freqfold="auto")
    found = convert_model(tiny_model(), chosen, ROWS)
    scores = {int(line.split(":")[0].split()[1]): float(line.split("KL")[1].split()[0]) for line in found.choices}
    assert set(scores) == {2, 4, 8} and found.geometry.freqfold == min(scores, key=scores.__getitem__)


def test_dimensions_fill_the_budget() -> None:
    chosen = settings(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=24, collapse="auto", freqfold="auto")
    tried = candidates(tiny_model().config, chosen)
    assert {(c.qk_rope_head_dim, c.kv_lora_rank, c.collapse) for c in tried} == {(8, 16, 2), (8, 16, 1), (16, 8, 1)}
    found = convert_model(tiny_model(), chosen, ROWS)
    assert found.geometry.cache == 24 and found.student.config.kv_lora_rank == found.geometry.kv_lora_rank
    with pytest.raises(ValueError, match="cached_values"):
        settings(qk_rope_head_dim="auto")
    with pytest.raises(ValueError, match="cached_values"):
        settings(qk_rope_head_dim=8, kv_lora_rank=12, cached_values=24)


def test_a_rope_head_of_the_highest_frequencies() -> None:
    """A source that only rotates its upper half of frequencies keeps them all in half the dimensions, with another
    rope_theta; the stock checkpoint has it too."""
    source = tiny_model(num_key_value_heads=1)
    for layer in source.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            with torch.no_grad():
                linear.weight.unflatten(0, (-1, 2, 8))[:, :, 4:] = 0.0  # pairs (l, l + 8), the lower frequencies
    sizes = dict(qk_rope_head_dim=8, kv_lora_rank=32, collapse=1, freqfold=1)
    student = convert_model(source, settings(**sizes), ROWS).student
    rows = windows(4)[0]
    with torch.no_grad():
        expected = source(rows).logits
        torch.testing.assert_close(student(rows).logits, expected, rtol=0, atol=1e-5)
        natural = convert_model(source, settings(**(sizes | {"collapse": 2, "freqfold": 2})), ROWS).student
        assert float((natural(rows).logits - expected).abs().max()) > 1e-2
    from transformers import DeepseekV3ForCausalLM

    stock = DeepseekV3ForCausalLM(deepseek_config(student.config, "compact", torch.float32)).eval()
    stock.load_state_dict(export_state(student, "compact", torch.float32))
    with torch.no_grad():
        torch.testing.assert_close(stock(rows).logits, expected, rtol=0, atol=1e-5)


def test_impossible_channels_are_refused() -> None:
    config = tiny_model().config
    for fields, key in (
        (dict(qk_rope_head_dim=6), "qk_rope_head_dim"),
        (dict(qk_rope_head_dim=8, collapse=3), "collapse"),
        (dict(qk_rope_head_dim=8, freqfold=3), "freqfold"),
    ):
        with pytest.raises(RecipeError) as caught:
            derive_geometry(config, settings(kv_lora_rank=12, **fields))
        assert caught.value.key == f"convert.{key}"
    assert derive_geometry(config, settings(kv_lora_rank=12, qk_rope_head_dim=6, collapse=2)).collapse == 2
    llama3 = tiny_model(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    ).config  # fmt: skip
    with pytest.raises(RecipeError, match="scales its frequencies"):
        derive_geometry(llama3, settings(kv_lora_rank=12, qk_rope_head_dim=8, collapse=1))


@pytest.mark.parametrize(
    "fields",
    [
        dict(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=76),  # half a head would leave too high a rank
        dict(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=12),
        dict(qk_rope_head_dim="auto", kv_lora_rank=4, cached_values=12),
        dict(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=24, collapse=2, freqfold="auto"),
        dict(qk_rope_head_dim=4, kv_lora_rank=8, collapse="auto", freqfold=4),
    ],
)
def test_candidates_are_possible(fields: dict) -> None:
    """Each of them passes every check, so that a search does not end in a refusal."""
    config = tiny_model().config
    tried = candidates(config, settings(**fields))
    for option in tried:
        geometry = derive_geometry(config, option)
        assert geometry.cache == fields.get("cached_values", geometry.cache)
    assert derive_geometry(config, settings(**fields)) == derive_geometry(config, tried[0])


def test_nothing_fits() -> None:
    config = tiny_model().config
    with pytest.raises(RecipeError, match="convert"):
        derive_geometry(config, settings(qk_rope_head_dim="auto", kv_lora_rank="auto", cached_values=7))


def test_one_window_cannot_be_searched_on() -> None:
    with pytest.raises(RecipeError, match="one window"):
        convert_model(tiny_model(), settings(qk_rope_head_dim=8, kv_lora_rank=12), ROWS[:1])

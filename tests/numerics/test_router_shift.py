"""Routers whose logits are shifted down: DeepSeek's sigmoid is Mixtral's softmax there, and the student what it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from tests.conftest import FULL, settings, tiny_config, tiny_model, windows
from tests.mixtral_export import EXPERTS, exported_mixtral
from tests.numerics.test_exact import TOKENS, difference, stock
from transmla.convert.conversion import Conversion, convert_model
from transmla.convert.router_shift import DEPTH, RouterShift, fit_shift, sigmoid_weights, weight_errors
from transmla.convert.streaming import stream_conversion
from transmla.errors import RecipeError
from transmla.export.fresh_process import score
from transmla.families import family_of
from transmla.plan.conversion_checks import check_conversion
from transmla.plan.disk import bytes_by_artifact
from transmla.plan.memory import count_parameters
from transmla.recipe.compose import load_recipe
from transmla.sources.local_model import load_model, load_source, stream_source
from transmla.sources.weights import check_weights

TEXT = torch.cat(windows())
HIDDEN, COUNT, TOP = 32, 8, 2
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def inputs(seed: int = 0) -> torch.Tensor:
    """Inputs of a router [n, D] with a direction in common, and one token in a hundred that has less of it."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    x = 0.3 * torch.randn(2000, HIDDEN, generator=generator, dtype=torch.float64)
    x[::100] -= 0.1 * common
    return x + common


def fitted(x: torch.Tensor, weight: torch.Tensor) -> RouterShift:
    largest = (x @ weight.mT).amax(-1)
    return fit_shift(x.mT @ x / len(x), x.mean(0), x.mT @ largest / len(x), float(largest.mean()))


def router() -> torch.Tensor:
    return torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_sigmoids_of_shifted_logits_are_the_softmax() -> None:
    x, weight = inputs(), router()
    logits, shift = x @ weight.mT, fitted(x, weight)
    errors = weight_errors(logits, x @ shift.at(FLOAT32), TOP)
    assert float(errors.mean()) < 1e-7 and float(errors.max()) < 1e-6
    coarse = weight_errors(logits, x @ shift.at(BFLOAT16), TOP)
    assert float(errors.max()) < float(coarse.max()) < 2e-2 and float(coarse.mean()) < 1e-3
    assert float(weight_errors(logits, torch.zeros(len(x)), TOP).mean()) > 0.1
    assert float(weight_errors(logits, -x @ shift.at(FLOAT32), TOP).mean()) > 0.1


def test_errors_are_those_of_the_weights() -> None:
    logits, shift = torch.randn(50, COUNT, dtype=torch.float64), torch.full((50,), 3.0, dtype=torch.float64)
    chosen = logits.topk(TOP).values
    wanted, found = chosen.softmax(-1), sigmoid_weights(chosen - shift[:, None])
    torch.testing.assert_close(weight_errors(logits, shift, TOP), ((found - wanted).abs() / wanted).amax(-1))
    assert float(found.sum(-1).sub(1).abs().max()) < 1e-12
    far = weight_errors(logits, torch.full((50,), 60.0, dtype=torch.float64), TOP)  # 1e-20 is most of the sum
    assert float(far.min()) > 0.5


def test_the_largest_logit_is_followed() -> None:
    """It lies near -depth, nearer than a shift by a constant would put it."""
    x, weight = inputs(), router()
    shift, largest = fitted(x, weight), (x @ weight.mT).amax(-1)
    place = largest - x @ shift.at(FLOAT32)
    assert float(place.mean()) == pytest.approx(-DEPTH[FLOAT32], abs=1e-6)
    alone = largest - (DEPTH[FLOAT32] + largest.mean()) * (x @ shift.one)
    assert float(place.std()) < 0.8 * float(alone.std())


def test_it_is_the_least_squares_of_one() -> None:
    x = inputs()
    solved = torch.linalg.lstsq(x, torch.ones(len(x), 1, dtype=torch.float64)).solution[:, 0]
    found = fitted(x, router()).one
    assert float((x @ found).mean()) == pytest.approx(1.0, abs=1e-9)
    assert float((x @ found - x @ solved).std()) < 0.1 * float((x @ solved).std())


def test_transformers_routers_choose_and_weigh_alike() -> None:
    x, weight = inputs(), router()
    mixtral = MixtralTopKRouter(MixtralConfig(num_local_experts=COUNT, num_experts_per_tok=TOP, hidden_size=HIDDEN))
    fields = dict(n_routed_experts=COUNT, num_experts_per_tok=TOP, hidden_size=HIDDEN, n_group=1, topk_group=1)
    deepseek = DeepseekV3TopkRouter(DeepseekV3Config(**fields, routed_scaling_factor=1.0))
    with torch.no_grad():
        mixtral.weight.copy_(weight)
        deepseek.weight.copy_(weight - fitted(x, weight).at(FLOAT32))
        found = []
        for module in (mixtral, deepseek):
            _, weights, chosen = module(x.float())
            found.append(torch.zeros(len(x), COUNT).scatter_(1, chosen, weights))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def leaning(**fields: object):
    return tiny_model("mixtral", leaning=True, groups=1, **(EXPERTS | fields))


def converted(router: str = "stock", **fields: object) -> Conversion:
    return convert_model(leaning(**fields), settings(**FULL, router=router), TEXT)


def test_the_student_is_what_it_was() -> None:
    """Weights, and with them every logit; the shift waits beside it, and its configuration says so."""
    kept, done = converted("keep"), converted()
    expected, found = kept.student.state_dict(), done.student.state_dict()
    assert list(expected) == list(found) and all(torch.equal(value, found[name]) for name, value in expected.items())
    assert kept.router_shifts is None and not hasattr(kept.student.config, "mla_stock_router")
    assert "router_error" not in kept.describe()
    assert done.router_shifts is not None and done.router_shifts.shape == (2, 2, 64)
    assert done.student.config.mla_stock_router
    assert len(done.describe()["router_error"]) == 2 and any("sigmoid" in note for note in done.notes())


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize(
    "fields", [{}, {"num_experts_per_tok": 4}, {"num_experts_per_tok": 1}, {"tie_word_embeddings": True}]
)
def test_its_export_equals_it(layout: str, fields: dict) -> None:
    done = converted(**fields)
    exported = stock(done.student, layout, FLOAT32, done.router_shifts)
    assert difference(done.student, exported) <= 2e-5
    assert type(exported.model.layers[0].mlp).__name__ == "DeepseekV3MoE"


def test_each_part_of_it_matters() -> None:
    """None goes unseen: another sign, no shift, one of other coordinates, experts in another order, gates in the place
    of ups, weights that do not sum to one."""
    done = converted()
    shifts = done.router_shifts
    assert shifts is not None
    wrong = [stock(done.student, "compact", FLOAT32, other) for other in (-shifts, 0 * shifts, shifts.flip(2))]
    for change in range(3):
        exported = stock(done.student, "compact", FLOAT32, shifts)
        experts = exported.model.layers[0].mlp
        with torch.no_grad():
            if change == 0:
                experts.experts.gate_up_proj.copy_(experts.experts.gate_up_proj.flip(0))
            elif change == 1:
                experts.experts.gate_up_proj.copy_(torch.cat(experts.experts.gate_up_proj.chunk(2, 1)[::-1], 1))
            else:
                experts.gate.norm_topk_prob = False
        wrong.append(exported)
    assert all(difference(done.student, other) > 1e-3 for other in wrong)


def test_a_router_without_a_common_direction_is_refused() -> None:
    source = tiny_model("mixtral", groups=1, **EXPERTS)
    with pytest.raises(RecipeError, match=r"^convert.router: .*layer 0.*at most 1e-03.*use keep"):
        convert_model(source, settings(**FULL, router="stock"), TEXT)


@pytest.mark.parametrize("refit", [True, False])
def test_layer_by_layer(refit: bool, tmp_path: Path) -> None:
    leaning().save_pretrained(tmp_path / "source")
    section = settings(**FULL, router="stock", refit=refit)
    whole = convert_model(load_source(tmp_path / "source", FLOAT32, "cpu"), section, TEXT)
    kept: dict[str, torch.Tensor] = {}
    done = stream_conversion(stream_source(tmp_path / "source", FLOAT32, "cpu"), section, TEXT, kept.update)
    assert done.router_shifts is not None and whole.router_shifts is not None
    torch.testing.assert_close(done.router_shifts, whole.router_shifts, rtol=1e-9, atol=1e-12)
    for one, other in zip(done.routers, whole.routers, strict=True):
        assert one.mean == pytest.approx(other.mean) and one.most == pytest.approx(other.most)
    expected = whole.student.state_dict()
    assert kept.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in kept.items())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_its_files_are_a_stock_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    """Experts one by one, the router in float32, read whole, by module and by transformers alone."""
    student = exported_mixtral(tmp_path / "it", dtype=dtype).student.to(FLOAT32)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "it", output_loading_info=True, dtype=dtype)
    assert {name.split(".gate.")[-1] for name in report.pop("missing_keys")} == {"e_score_correction_bias"}
    assert not any(report.values())
    stored = load_file(tmp_path / "it" / "model.safetensors")  # transformers before 5.24 rounds it when it loads it
    assert stored["model.layers.0.mlp.gate.weight"].dtype == FLOAT32
    check_weights(tmp_path / "it", model.config, "it")
    load_model(tmp_path / "it", FLOAT32, "cpu")
    with torch.no_grad():
        expected = torch.log_softmax(student(TOKENS).logits, -1)
    for by_module in (False, True):
        found = score(tmp_path / "it", TOKENS, stock=True, by_module=by_module)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < (1e-8 if dtype == FLOAT32 else 1e-3)
        assert float((found - expected).abs().max()) < (3e-5 if dtype == FLOAT32 else 1.0)


def test_the_plan_counts_its_files(tmp_path: Path) -> None:
    """The head and the shared experts of zeros, which the student has not."""
    done = exported_mixtral(tmp_path / "it")
    config = leaning(vocab_size=260).config
    sizes = count_parameters(config, done.student.config)
    expected = bytes_by_artifact(load_recipe("debug", words("convert.router=stock")), sizes, config, FLOAT32).exported
    stored = sum(file.stat().st_size for file in (tmp_path / "it").glob("*.safetensors"))
    assert stored == pytest.approx(expected, rel=0.06)
    kept = bytes_by_artifact(load_recipe("debug", words()), sizes, config, FLOAT32).exported
    assert expected - kept == 4 * 2 * 3 * 64 * 96


def words(*more: str) -> list[str]:
    facts = [f"+model.config.{name}={value}" for name, value in EXPERTS.items()]
    return ["device=cpu", "dtype=float32", "model.config.model_type=mixtral", *facts, *more]


def plan(*more: str):
    return check_conversion(load_recipe("debug", words(*more)), FLOAT32, exports=True)


def test_the_plan_knows_what_it_becomes() -> None:
    assert plan().export.name == "mla_mixtral"
    found = plan("convert.router=stock")
    assert found.export.name == "deepseek_v3" and len(found.export.readers) == 5 and found.geometry.stock_router
    windowed = plan("convert.router=stock", "+model.config.sliding_window=16")
    assert windowed.export.name == "mla_mixtral" and "window" in str(windowed.export.reason)


def test_what_is_refused_before_weights_load() -> None:
    with pytest.raises(RecipeError, match=r"^export.format: .*by sigmoid.*convert.router=stock"):
        plan("export.format=deepseek_v3")
    with pytest.raises(RecipeError, match=r"^export.engines: .*convert.router=stock"):
        plan("export.engines=[llama.cpp]")
    with pytest.raises(RecipeError, match=r"^convert.router: .*two experts.*use keep"):
        plan("convert.router=stock", "model.config.num_local_experts=1", "model.config.num_experts_per_tok=1")
    with pytest.raises(RecipeError, match=r"^convert.router: a llama has no experts.*use keep"):
        check_conversion(load_recipe("debug", ["device=cpu", "convert.router=stock"]), FLOAT32, exports=True)


def test_other_families_have_no_such_router() -> None:
    assert family_of(tiny_config("mixtral")).router is not None and family_of(tiny_config("llama")).router is None

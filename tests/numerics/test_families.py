"""Every family: a student of full rank equals its source, with and without a cache."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tests.conftest import FULL, LLAMA3, VOCAB, settings, tiny_config, tiny_model, windows
from transmla.convert.calibration import calibrate, capped_attention
from transmla.convert.conversion import assemble_student, convert_model
from transmla.convert.key_norm import fit_keys
from transmla.errors import RecipeError
from transmla.export.formats import choose_format
from transmla.families import FAMILIES, default_kernel, family_of
from transmla.families.student_config import student_config
from transmla.geometry import derive_geometry
from transmla.modeling.kernels.eager import eager_attention
from transmla.recipe.schema import Export
from transmla.sources.local_model import load_model

TOKENS = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))
# Small caps and windows, so that a student without them would be far off.
GEMMA2 = {
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
}
GEMMA3 = {"query_pre_attn_scalar": 24, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}
CASES = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "mimo": ("mimo", {"num_nextn_predict_layers": 1, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA2),
    "qwen3": ("qwen3", {}),
    "qwen3, biases and window": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma3": ("gemma3_text", GEMMA3 | {"rope_parameters": GEMMA3_ROPE}),
}


def make_source(case: str, groups: int = 1, dtype: torch.dtype = torch.float32):
    """A tiny random source. Where keys pass a norm, its eps is raised until the norm is linear, and its weight with it,
    so that a linear map of the input can be exact."""
    family, fields = CASES[case]
    source = tiny_model(family, groups=groups, dtype=dtype, **fields)
    if FAMILIES[family].head_norms is not None:
        offset = 1.0 if family == "gemma3_text" else 0.0
        for layer in source.model.layers:
            norm, eps = layer.self_attn.k_norm, 1e8
            setattr(norm, "eps" if family == "gemma3_text" else "variance_epsilon", eps)
            norm.weight.data = (offset + norm.weight.data) * eps**0.5 - offset
    return source


def convert(source, **section):
    chosen = settings(**(FULL | section))
    done = convert_model(source, chosen, torch.cat(windows()))
    return done.student, done.statistics


@torch.no_grad()
def difference(one, other) -> float:
    return float((one(TOKENS).logits - other(TOKENS).logits).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_full_rank_student_equals_source(case: str) -> None:
    source = make_source(case)
    student, statistics = convert(source)
    assert type(student) is FAMILIES[source.config.model_type].student_model
    assert source(TOKENS).logits.std() > 0.2
    assert difference(source, student) <= 1e-5
    linearised = FAMILIES[source.config.model_type].head_norms is not None
    assert all((layer.key_error is not None) == linearised for layer in statistics)
    if linearised:
        assert all(layer.key_error.max() < 1e-9 for layer in statistics)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cache_equals_the_whole(case: str) -> None:
    """A first part at once, then token by token, past the window where there is one."""
    student, _ = convert(make_source(case))
    whole = student(TOKENS).logits
    out = student(TOKENS[:, :5], use_cache=True)
    parts = [out.logits]
    for position in range(5, TOKENS.shape[1]):
        out = student(TOKENS[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    assert out.past_key_values.layers[0].keys.shape[-1] == student.config.kv_lora_rank
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    greedy = student.generate(TOKENS[:1, :12], max_new_tokens=6, do_sample=False, eos_token_id=None)
    again = student(greedy).logits[0, 11:-1].argmax(-1)
    assert again.tolist() == greedy[0, 12:].tolist()


@pytest.mark.parametrize("case", ["mistral, window", "gemma2", "gemma3", "qwen2, window"])
def test_a_window_and_a_cap_are_seen(case: str) -> None:
    """The cases above would fail without them: the source itself is another model without its window or cap."""
    source = make_source(case)
    with torch.no_grad():
        before = source(TOKENS).logits
        assert (source(TOKENS[:, 20:]).logits - before[:, 20:]).abs().max() > 1e-3  # positions matter at all
        for fields in [{"sliding_window": 1000}] + [{"attn_logit_softcapping": None}] * (case == "gemma2"):
            family, chosen = CASES[case]
            other = tiny_model(family, groups=1, **(chosen | fields))
            other.load_state_dict(source.state_dict())
            assert (other(TOKENS).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["mistral, window", "gemma3", "qwen3"])
def test_kernels_agree(case: str) -> None:
    source = make_source(case)
    student, _ = convert(source)
    student.set_attn_implementation("eager")
    assert difference(source, student) <= 1e-5


def test_a_cap_is_never_dropped() -> None:
    """Kernels that have no cap are refused; so is PyTorch's fused attention, by transformers itself."""
    student, _ = convert(make_source("gemma2"))
    assert student.config._attn_implementation == default_kernel("gemma2") == default_kernel("mla_gemma2") == "eager"
    for kernel in ("sdpa", "flash_attention_2"):
        student.config._attn_implementation = kernel
        with pytest.raises(ValueError, match="does not cap"):
            student(TOKENS)


def test_who_caps_the_logits_of_attention() -> None:
    """Both configurations have the key; transformers' Gemma 2 follows it, its Gemma 3 does not."""
    for name, wanted in (("gemma2", 2.0), ("gemma3_text", None)):
        source = tiny_config(name, attn_logit_softcapping=2.0)
        geometry = derive_geometry(source, settings(qk_rope_head_dim=8, kv_lora_rank=24))
        student = FAMILIES[name].student_model(student_config(source, geometry, FAMILIES[name]))
        assert {layer.self_attn.softcap for layer in student.model.layers} == {wanted}


def test_capped_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration's own attention of Gemma 2 against the definition, grouped heads and blocks included."""
    monkeypatch.setattr("transmla.convert.calibration.QUERY_BLOCK", 5)
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    module = nn.Identity()
    mask = torch.ones(12, 12).tril().bool() & torch.ones(12, 12).triu(-3).bool()
    for chosen in (mask, torch.ones(12, 12).tril().bool()):
        penalty = torch.zeros(12, 12).masked_fill(~chosen, float("-inf"))
        expected, _ = eager_attention(
            module, query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), penalty, 0.7, softcap=1.5
        )
        given = None if chosen.sum() == 78 else chosen[None, None]
        out, _ = capped_attention(module, query, key, value, given, 1.5, 0.7)
        torch.testing.assert_close(out, expected)


class _Linear(nn.Module):
    """k_proj and k_norm replaced by one affine map of the input [G·d, D + 1]."""

    def __init__(self, maps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return F.linear(x, self.maps[:, :-1], self.maps[:, -1])


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "qwen3, biases and window"])
def test_student_equals_a_source_with_linear_keys(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its true norms: the student is the source whose keys are the regressed map, and the regression is that of
    least squares, half of the weight on all tokens and half on those attended to."""
    monkeypatch.setattr("transmla.convert.attention_moments.QUERY_STRIDE", 1)
    family, fields = CASES[case]
    source = tiny_model(family, groups=1, **fields)
    text = torch.cat(windows(64))
    inputs, keys = _observe(source, text)
    statistics = calibrate(source, [text], length=32)
    chosen = settings(**FULL, refit=False)
    kernel = source.config._attn_implementation
    source.set_attn_implementation("eager")
    received = [
        weights.double().mean(1).sum(1).flatten() for weights in source(text, output_attentions=True).attentions
    ]
    source.set_attn_implementation(kernel)
    student = assemble_student(source, derive_geometry(source.config, chosen), chosen, statistics)
    for index, layer in enumerate(source.model.layers):
        fit = fit_keys(
            FAMILIES[family].read_attention(layer.self_attn, source.config, source.device), statistics[index]
        )
        x = F.pad(inputs[index], (0, 1), value=1.0)
        share = ((1 + received[index]) / 2).sqrt()[:, None]
        best = torch.linalg.lstsq(share * x, share * keys[index]).solution
        left = (keys[index] - x @ best).square().sum() / (keys[index] - keys[index].mean(0)).square().sum()
        assert float(statistics[index].key_error[0]) == pytest.approx(float(left), rel=1e-2)
        assert 1e-3 < float(left) < 0.9
        torch.testing.assert_close(x @ fit.maps[0].mT, x @ best, rtol=0, atol=2e-2)
        layer.self_attn.k_proj, layer.self_attn.k_norm = _Linear(fit.maps[0].float()), nn.Identity()
    assert source(TOKENS).logits.std() > 0.2
    assert difference(source, student) <= 1e-5


@torch.no_grad()
def _observe(model, text):
    """Inputs and normalised keys of every attention, from whole tensors."""
    inputs, keys, handles = [], [], []
    for layer in model.model.layers:
        handles.append(layer.self_attn.k_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0])))
        handles.append(layer.self_attn.k_norm.register_forward_hook(lambda m, args, out: keys.append(out)))
    model(text)
    for handle in handles:
        handle.remove()
    return [x.flatten(0, 1).double() for x in inputs], [k.reshape(-1, k.shape[-1]).double() for k in keys]


def test_query_moment_is_that_of_normalised_queries() -> None:
    model = tiny_model("gemma3_text", groups=2, **GEMMA3)
    seen = []
    handle = model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda m, args, out: seen.append(out))
    (statistics,) = calibrate(model, [windows(4)[0]], length=32)[1:]
    handle.remove()
    query = seen[0].double().transpose(0, 1).flatten(1, 2)  # [H, tokens, d]
    torch.testing.assert_close(statistics.query_moment, query.mT @ query / query.shape[1], rtol=1e-4, atol=1e-5)
    assert statistics.key_cross.shape == (2, 16, 65) and statistics.key_energy.shape == (2,)


def _drop_rotation(source, student_rope: int) -> None:
    """Zero the queries' and keys' rotary pairs that a rope head of `student_rope` coordinates has no frequency for."""
    step = 16 // student_rope
    lost = [pair + half for pair in range(8) if pair % step for half in (0, 8)]
    for layer in source.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.data.unflatten(0, (-1, 16))[:, lost] = 0


@pytest.mark.parametrize("heads", ["given", "none"])
def test_one_key_head_for_every_query_head(heads: str) -> None:
    """MHA. At full rank with all frequencies one component of four a frequency keeps its rotation, so a random source
    loses some; a source whose key heads are multiples of one another (each head its own complex factor) loses none,
    whatever the four heads' values are."""
    source = tiny_model("llama", groups=4 if heads == "given" else None)
    assert source.config.num_key_value_heads == 4
    section = FULL | {"kv_lora_rank": 64}
    lossy, _ = convert(source, **section)
    assert difference(source, lossy) > 0.05
    factors = torch.polar(torch.tensor([1.0, 0.5, 2.0, 1.5])[:, None] * torch.ones(8), 6.0 * torch.rand(4, 8))
    for layer in source.model.layers:
        weight = layer.self_attn.k_proj.weight.data.unflatten(0, (4, 2, 8))
        first = torch.complex(weight[0, 0], weight[0, 1])
        mixed = factors[:, :, None] * first
        weight.copy_(torch.stack((mixed.real, mixed.imag), dim=1))
    student, _ = convert(source, **section)
    assert derive_geometry(source.config, settings(**section)).num_key_value_heads == 4
    assert source(TOKENS).logits.std() > 0.2
    assert difference(source, student) <= 1e-5


def test_fewer_channels_are_exact_where_the_source_does_not_use_the_others() -> None:
    """Half the frequencies kept, unfolded: exact when the other pairs of queries and keys are zero."""
    for case in ("llama", "gemma2", "mistral, window"):
        source = make_source(case)
        _drop_rotation(source, 8)
        student, _ = convert(source, qk_rope_head_dim=8, freqfold=2)
        assert difference(source, student) <= 1e-5


def test_the_final_format_follows_from_the_configuration() -> None:
    """A window that no position outruns is none; what DeepSeek cannot express is refused only when it was asked for."""

    def chosen(fields: dict, wanted: str = "auto", family: str = "mistral") -> str:
        config = tiny_config(family, groups=1, **fields)
        student = student_config(config, derive_geometry(config, settings(**FULL)), family_of(config))
        return choose_format(Export(format=wanted), student, torch.float32).name

    assert chosen({"sliding_window": None}) == chosen({"sliding_window": 256}, "deepseek_v3") == "deepseek_v3"
    assert chosen({"sliding_window": 255}) == chosen({"sliding_window": None}, "student") == "mla_mistral"
    for family, fields in (
        ("mistral", {"sliding_window": 255}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("qwen3", {}),
        ("mixtral", {}),
    ):
        with pytest.raises(RecipeError, match="a stock checkpoint cannot express"):
            chosen(fields, "deepseek_v3", family)


def test_what_no_adapter_carries_is_refused() -> None:
    with pytest.raises(RecipeError, match="both directions"):
        family_of(tiny_config("gemma3_text", use_bidirectional_attention=True, sliding_window=8))
    with pytest.raises(RecipeError, match="rope type 'yarn'"):
        family_of(
            tiny_config(
                "gemma3_text",
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "yarn",
                        "rope_theta": 1e4,
                        "factor": 4.0,
                        "original_max_position_embeddings": 64,
                    },
                },
            )
        )
    with pytest.raises(RecipeError, match="no adapter for model type 'gpt2'"):
        family_of(tiny_config("gpt2"))


def test_mimo_checkpoint_of_the_hub(tmp_path) -> None:
    """Code named in config.json is not asked for, and weights of the prediction layers are passed over."""
    source = tiny_model("mimo", num_nextn_predict_layers=1)
    source.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.mtp_layers.0.input_proj.weight"] = torch.ones(64, 128)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"] = {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = load_model(tmp_path, torch.float32, "cpu")
    assert loaded.config.num_nextn_predict_layers == 1 and "are dropped" in family_of(loaded.config).notice(
        loaded.config
    )
    assert difference(loaded, source) == 0.0
    student, _ = convert(loaded, kv_lora_rank=32)
    assert not {"auto_map", "num_nextn_predict_layers"} & set(student.config.to_dict())


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "mistral, window", "qwen3"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case: str) -> None:
    """Two documents in one row, told apart by their positions, as recovery packs them."""
    student, _ = convert(make_source(case))
    first, second = TOKENS[:1, :17], TOKENS[1:2, :23]
    positions = torch.cat((torch.arange(17), torch.arange(23)))[None]
    packed = student(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat((student(first).logits, student(second).logits), 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)

"""Several latents, and values tied to them: closed form, attention, tensor parallelism and export against float64
references."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from tests.conftest import VOCAB, settings, tiny_config, tiny_model, windows
from tests.numerics.test_exact import difference, stock
from tests.numerics.test_factorize import spd, two_moment_error, weighted_error
from tests.numerics.test_families import CASES
from transmla.convert.conversion import convert_model
from transmla.convert.latent_shares import Errors, Latent, latent_bias, solve_latents
from transmla.convert.low_rank import joint_two_moments, symmetric_root
from transmla.convert.tied import tied_key_value
from transmla.export.deepseek_weights import export_state
from transmla.export.latent_blocks import describe_blocks, whole_up_projection
from transmla.modeling.attention import MLAAttention, rotate
from transmla.modeling.student import rotation

TOKENS = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))
GLA = dict(latent_heads=2)
GTA = dict(latent_heads=2, tied=True)
FORMS = {"gla": GLA, "gta": GTA, "tied, one latent": dict(tied=True, kv_lora_rank=16)}
FULL = dict(qk_rope_head_dim=16, kv_lora_rank=64, freqfold=1)  # two latents of 2·d: the low-rank step loses nothing
SMALL = dict(qk_rope_head_dim=8, kv_lora_rank=24, freqfold="auto")


def draws(groups: int = 4, width: int = 6, hidden: int = 40):
    k_nope, value = torch.randn(2, groups, width, hidden, dtype=torch.float64)
    return k_nope, value, (spd(hidden), spd(hidden)), (spd(groups, width), spd(groups, width))


def student(family: str = "llama", *, dtype: torch.dtype = torch.float64, fields: dict | None = None, **section):
    source = tiny_model(family, groups=2, dtype=dtype, **(fields or {}))
    done = convert_model(source, settings(**(SMALL | section)), torch.cat(windows())).student
    return source, done


def test_every_latent_is_the_optimum_of_its_heads() -> None:
    """Eckart-Young by share: the truncated singular values of L (K; V) C^{1/2} of its own heads."""
    k_nope, value, (moment, _), costs = draws()
    solved = solve_latents(k_nope, value, Errors(moment, moment, *costs), rank=14, latents=2)
    assert [tuple(one.down.shape) for one in solved] == [(7, 40), (7, 40)]
    root = symmetric_root(moment)[0]
    for one, share in zip(solved, (slice(0, 2), slice(2, 4)), strict=True):
        maps = torch.cat((k_nope[share], value[share]))
        cost = torch.cat((costs[0][share], costs[1][share]))
        singular = torch.linalg.svdvals((symmetric_root(cost)[0] @ maps).flatten(0, 1) @ root)
        error = weighted_error(maps, moment, cost, one.down, torch.cat((one.up_key, one.up_value)))
        torch.testing.assert_close(error, singular[7:].square().sum())


def test_two_moments_by_share() -> None:
    """Each latent solves for its own heads; what the others are does not matter."""
    k_nope, value, moments, costs = draws()
    solved = solve_latents(k_nope, value, Errors(*moments, *costs), rank=14, latents=2)
    last = slice(2, 4)
    alone = joint_two_moments(k_nope[last], value[last], *moments, costs[0][last], costs[1][last], 7)
    for found, expected in zip((solved[1].down, solved[1].up_key, solved[1].up_value), alone, strict=True):
        torch.testing.assert_close(found, expected)
    k_nope[:2] = 0.1 * k_nope[:2].flip(0)
    again = solve_latents(k_nope, value, Errors(*moments, *costs), rank=14, latents=2)
    assert torch.equal(again[1].down, solved[1].down) and not torch.equal(again[0].down, solved[0].down)


def test_balance_of_norms_is_taken_within_a_share() -> None:
    """A share whose values are a thousand times its keys would lose the keys without it."""
    k_nope, value, (moment, _), _ = draws()
    value[2:] *= 1000
    solved = solve_latents(k_nope, value, Errors(moment, moment, None, None), rank=20, latents=2)
    plain = solve_latents(k_nope, value / torch.tensor([1, 1, 1e3, 1e3]).double()[:, None, None],
                          Errors(moment, moment, None, None), rank=20, latents=2)  # fmt: skip
    torch.testing.assert_close(solved[1].up_key @ solved[1].down, plain[1].up_key @ plain[1].down)


def tied_error(factors, k_nope, value, moments, costs) -> torch.Tensor:
    down, up_key, up_value = factors
    half = up_key.shape[-1]
    key = weighted_error(k_nope, moments[0], costs[0], down[:half], up_key)
    return key + weighted_error(value, moments[1], costs[1], down, up_value)


def test_tied_with_one_moment_ends_where_neither_half_can_be_better() -> None:
    """T1 the leading part of [K; V - A2 T2], T2 of V - A1 T1: written out by singular values, it moves no further."""
    k_nope, value, (moment, _), costs = draws(groups=2)
    down, up_key, up_value = tied_key_value(k_nope, value, moment, moment, *costs, 8, sweeps=600)
    found = tied_error((down, up_key, up_value), k_nope, value, (moment, moment), costs)
    roots, root = [symmetric_root(cost)[0] for cost in costs], symmetric_root(moment)[0]
    first, second = up_value[..., :4] @ down[:4], up_value[..., 4:] @ down[4:]
    rows = torch.cat(((roots[0] @ k_nope), (roots[1] @ (value - second)))).flatten(0, 1) @ root
    torch.testing.assert_close(torch.linalg.svdvals(rows)[4:].square().sum(), found, rtol=1e-6, atol=0)
    rest = (roots[1] @ (value - first)).flatten(0, 1) @ root
    keys = weighted_error(k_nope, moment, costs[0], down[:4], up_key)
    torch.testing.assert_close(keys + torch.linalg.svdvals(rest)[4:].square().sum(), found, rtol=1e-6, atol=0)


def test_tied_with_two_moments_reaches_a_stationary_point_below_the_start() -> None:
    k_nope, value, moments, costs = draws(groups=2)
    few, many = (tied_key_value(k_nope, value, *moments, *costs, 8, sweeps=n) for n in (1, 400))
    middle = (moments[0] * moments[1].diagonal().mean() / moments[0].diagonal().mean() + moments[1]) / 2
    start = tied_key_value(k_nope, value, middle, middle, *costs, 8)
    errors = [float(tied_error(factors, k_nope, value, moments, costs)) for factors in (start, many)]
    assert errors[1] < 0.95 * errors[0]
    assert errors[1] <= float(tied_error(few, k_nope, value, moments, costs))
    slopes = []
    for found in (start, many):
        factors = [factor.clone().requires_grad_() for factor in found]
        tied_error(factors, k_nope, value, moments, costs).backward()
        slopes.append([factor.grad.norm() for factor in factors])
    assert all(after < 1e-2 * before for before, after in zip(*slopes, strict=True))


def test_fewer_freedoms_lose_more() -> None:
    k_nope, value, moments, costs = draws()
    errors = []
    for form in (dict(), dict(latents=2), dict(latents=2, tied=True)):
        solved = solve_latents(k_nope, value, Errors(*moments, *costs), rank=16, **form)
        shares = [slice(i, i + 4 // len(solved)) for i in range(0, 4, 4 // len(solved))]
        total = 0.0
        for one, share in zip(solved, shares, strict=True):
            parts = (k_nope[share], value[share], moments, [cost[share] for cost in costs])
            factors = (one.down, one.up_key, one.up_value)
            total += float(tied_error(factors, *parts) if "tied" in form else two_moment_error(*parts, *factors))
        errors.append(total)
    assert errors[0] < errors[1] < errors[2]


def test_the_constant_of_tied_latents() -> None:
    latent = Latent(torch.randn(8, 40).double(), torch.randn(2, 6, 4).double(), torch.randn(2, 6, 8).double())
    bias, cost = torch.randn(2, 6).double(), spd(2, 6)
    root = symmetric_root(cost)[0]
    stacked = (root @ latent.up_value).flatten(0, 1)
    expected = torch.linalg.lstsq(stacked, (root @ bias[..., None]).flatten(0, 1))[0][:, 0]
    torch.testing.assert_close(latent_bias(latent, bias, cost), expected)


@pytest.mark.parametrize("form", [GLA, GTA], ids=["gla", "gta"])
@pytest.mark.parametrize("case", CASES)
def test_full_latents_are_the_student_that_lost_rotations_only(case: str, form: dict) -> None:
    """Every family, biases, windows, caps and norms of queries: 2·d for each key/value head lose nothing more."""
    family, fields = CASES[case]
    experts = family == "mixtral"  # whose kernels know no float64
    section = dict(FULL, refit=False, dtype=torch.float32 if experts else torch.float64)
    _, one = student(family, fields=fields, **section)
    source, several = student(family, fields=fields, **section, **form)
    assert difference(source, one) > 1e-3
    assert difference(one, several) < (1e-5 if experts else 1e-6)
    assert sum(p.numel() for p in several.parameters()) < sum(p.numel() for p in one.parameters())


def reference(attention: MLAAttention, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: dict):
    """The attention written out head by head from its own weights, in float64."""
    latents, tied = form.get("latent_heads", 1), form.get("tied", False)
    nope, width, rank = attention.qk_nope_head_dim, attention.v_head_dim, attention.kv_lora_rank
    size, heads = rank // latents, attention.num_heads
    both = attention.kv_a_proj_with_mqa(states)
    latent, k_rope = both[..., :rank], rotate(both[:, None, :, rank:], cos, sin)[:, 0]
    queries = attention.q_proj(states).unflatten(-1, (heads, -1))
    seen = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
    outputs = []
    for head in range(heads):
        index = head // (heads // latents)
        own = latent[..., index * size : (index + 1) * size]
        if tied:
            key, value = own[..., : size // 2], own
        else:
            up, place = attention.kv_b_proj[index], head % (heads // latents)
            rows = slice(place * (nope + width), (place + 1) * (nope + width))
            expanded = F.linear(own, up.weight[rows], None if up.bias is None else up.bias[rows])
            key, value = expanded[..., :nope], expanded[..., nope:]
        q_rope = rotate(queries[:, None, :, head, nope:], cos, sin)[:, 0]
        logits = (queries[:, :, head, :nope] @ key.mT + q_rope @ k_rope.mT) / (nope + k_rope.shape[-1]) ** 0.5
        outputs.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value)
    return attention.o_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_attention_is_its_definition(name: str, family: str) -> None:
    _, model = student(family, **FORMS[name])
    states = torch.randn(2, 11, 64, dtype=torch.float64)
    cos, sin = rotation(model, states, torch.arange(11)[None], 0)
    attention = model.model.layers[0].self_attn
    got = attention(states, (cos, sin))[0]
    assert (got - reference(attention, states, cos, sin, FORMS[name])).abs().max() < 1e-12 * got.abs().max()


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_absorbed_equals_expanded(name: str) -> None:
    _, model = student("qwen2", **FORMS[name])
    rows, cache, calls = TOKENS[:, :9], DynamicCache(config=model.config), []
    whole = model(rows, use_cache=False).logits[:, -1]
    model(rows[:, :-1], past_key_values=cache)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
    last = model(rows[:, -1:], past_key_values=cache).logits[:, -1]
    assert not calls and (last - whole).abs().max() < 1e-12
    layer = cache.layers[0]
    assert layer.keys.shape[-1] + layer.values.shape[-1] == model.config.kv_lora_rank + 8


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["gla", "gta"])
@torch.no_grad()
def test_ranks_with_latents_of_their_own_add_up(name: str, family: str) -> None:
    """Each rank has one latent, its heads and the rope key, in an attention that knows of no other; cut by what the
    metadata say, out of the one block-sparse kv_b."""
    _, model = student(family, **FORMS[name])
    states = torch.randn(2, 11, 64, dtype=torch.float64)
    embeddings = rotation(model, states, torch.arange(11)[None], 0)
    attention, blocks = model.model.layers[0].self_attn, describe_blocks(model.config)["kv_b_blocks"]
    weights = whole_up_projection(attention.state_dict(), model.config)
    count, size, heads = blocks["latent_heads"], blocks["latent_size"], blocks["heads_of_a_latent"]
    config = copy.deepcopy(model.config)
    del config.mla_latent_heads
    if name == "gta":
        del config.mla_tied
    config.num_attention_heads, config.kv_lora_rank, config.mla_output_bias = heads, size, False
    total = torch.zeros(())
    for rank in range(count):
        own, part = MLAAttention(config, 0).double().eval(), {}
        columns = slice(rank * size, (rank + 1) * size)
        for key, value in weights.items():
            if key.startswith("kv_a"):
                part[key] = torch.cat((value[columns], value[count * size :]))
            elif key == "o_proj.weight":
                part[key] = value.chunk(count, dim=1)[rank]
            elif key.startswith(("q_proj", "kv_b")):
                part[key] = value.chunk(count)[rank]
                part[key] = part[key][:, columns] if key == "kv_b_proj.weight" else part[key]
        own.load_state_dict(part, strict=True)
        total = total + own(states, embeddings)[0]
    expected = attention(states, embeddings)[0]
    assert (total - expected).abs().max() < 1e-10 and expected.abs().max() > 1e-2


@pytest.mark.parametrize("query_rank", [None, 24])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", FORMS)
def test_stock_transformers_computes_the_same(name: str, family: str, query_rank: int | None) -> None:
    source, model = student(family, dtype=torch.float32, q_lora_rank=query_rank, **FORMS[name])
    exported = stock(model, "compact", torch.float32)
    assert difference(source, exported) > 1e-2
    assert difference(model, exported) <= 1e-5
    if FORMS[name].get("latent_heads", 1) == 1:
        assert difference(model, stock(model, "padded", torch.float32)) <= 1e-5


@pytest.mark.parametrize("name", ["gla", "gta"])
def test_what_is_between_the_blocks_is_zero(name: str) -> None:
    _, model = student("qwen2", dtype=torch.float32, **FORMS[name])
    blocks = describe_blocks(model.config)["kv_b_blocks"]
    assert blocks == dict(
        latent_heads=2, latent_size=12, heads_of_a_latent=2, shared_columns=1, tied=name == "gta"
    )  # fmt: skip
    for layer in range(2):
        up = export_state(model, "compact", torch.float32)[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        first, second = up.chunk(2)
        assert not first[:, 12:24].any() and not second[:, :12].any()
        assert first[:, :12].any() and second[:, 12:24].any()


def test_the_cache_of_every_rank() -> None:
    from transmla.geometry import derive_geometry

    fields = dict(hidden_size=4096, num_attention_heads=32, head_dim=128)
    found = {}
    for latents in (1, 2):
        convert = settings(qk_rope_head_dim=64, kv_lora_rank=512, latent_heads=latents)
        for row in derive_geometry(tiny_config(groups=8, **fields), convert).cache_by_ranks:
            found[latents, row["ranks"]] = (row["source"], row["stock"], row["split"])
    assert found[1, 1] == (2048, 576, 576) and found[1, 8] == (256, 576, 576)
    assert found[2, 2] == (1024, 576, 320) and found[2, 8] == (256, 576, 320)
    assert {ranks for latents, ranks in found if latents == 2} == {1, 2, 4, 8}  # what 32 heads can be shared among
    shape = tiny_config(groups=3, hidden_size=576, num_attention_heads=9, head_dim=64)
    rows = derive_geometry(shape, settings(qk_rope_head_dim=32, kv_lora_rank=96, latent_heads=3)).cache_by_ranks
    assert rows == [
        {"ranks": 1, "source": 384, "stock": 128, "split": 128},
        {"ranks": 3, "source": 128, "stock": 128, "split": 64},
    ]

"""Absorbed norms of queries and keys: the student is the source whose norms are the maps of least squares."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.conftest import FULL, VOCAB, settings, tiny_config, tiny_model, windows
from transmla.convert.conversion import Conversion, convert_model
from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_weights import export_state
from transmla.export.engines import stock_features
from transmla.export.formats import choose_format
from transmla.families import FAMILIES, family_of
from transmla.families.student_config import student_config
from transmla.geometry import derive_geometry
from transmla.recipe.schema import Export

TOKENS = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3))
TEXT = torch.cat(windows(64))
PARTS = (("q_proj", "q_norm"), ("k_proj", "k_norm"))


class _Map(nn.Module):
    """A projection and the norm behind it as one map of [x; 1], [heads·d, D + 1], x divided by `shared` of it."""

    def __init__(self, maps: torch.Tensor, shared) -> None:
        super().__init__()
        self.maps, self.shared = maps, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.shared is None else x / self.shared(x)
        return F.linear(x, self.maps[:, :-1], self.maps[:, -1])


def _shared_rms(weight: torch.Tensor):
    """Of 4 heads of 16: the root of 16/64 of the mean over heads of |W_h x|² / |W_h|², with DeepSeek's eps."""
    heads = weight.detach().unflatten(0, (4, 16))
    unit = torch.cat([head / head.norm() for head in heads])
    return lambda x: ((x @ unit.mT).square().sum(-1, keepdim=True) / 4 * 16 / 64 + 1e-6).sqrt()


def absorbed(source, **section: object) -> Conversion:
    return convert_model(source, settings(**FULL, refit=False, qk_norm="absorb", **section), TEXT)


@torch.no_grad()
def replace_norms(source, *, gain: float = 1.0, latent: bool = False) -> list[list[float]]:
    """Put the maps of least squares in the place of projections and norms, from whole tensors in float64.

    A bias only where the source has one. gain: factor on the queries' maps. latent: queries are read from x divided by
    the root mean square of all heads' queries, each head's projection scaled to norm 1, which no rank truncates.
    Returns, by layer, the share of the variance that the maps of queries and keys leave.
    """
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles, received = [], []
    for index, layer in enumerate(source.model.layers):
        for part in ("q_norm", "k_norm", "v_proj"):
            store = seen.setdefault((index, part), [])
            module = getattr(layer.self_attn, part)
            handles.append(module.register_forward_hook(lambda m, args, out, s=store: s.extend((args[0], out))))
    kernel = source.config._attn_implementation
    source.set_attn_implementation("eager")
    for weights in source(TEXT, output_attentions=True).attentions:
        received.append(weights.mean(1).sum(1).flatten())
    source.set_attn_implementation(kernel)
    for handle in handles:
        handle.remove()
    errors = []
    for index, layer in enumerate(source.model.layers):
        attention, left = layer.self_attn, []
        x = seen[index, "v_proj"][0].flatten(0, 1)
        for projection, norm in PARTS:
            biased = getattr(attention, projection).bias is not None
            shared = _shared_rms(attention.q_proj.weight) if latent and projection == "q_proj" else None
            inputs = F.pad(x, (0, 1), value=1.0) if biased else x if shared is None else x / shared(x)
            normed = seen[index, norm][1].flatten(2).flatten(0, 1)
            share = ((1 + received[index]) / 2).sqrt()[:, None] if projection == "k_proj" else 1.0
            best = torch.linalg.lstsq(share * inputs, share * normed).solution.mT
            missed = (normed - inputs @ best.mT).square().sum() / (normed - normed.mean(0)).square().sum()
            left.append(float(missed))
            factor = gain if projection == "q_proj" else 1.0
            setattr(attention, projection, _Map(factor * (best if biased else F.pad(best, (0, 1))), shared))
            setattr(attention, norm, nn.Identity())
        errors.append(left)
    return errors


@torch.no_grad()
def difference(one, other) -> float:
    return float((one(TOKENS).logits - other(TOKENS).logits).abs().max())


@pytest.mark.parametrize("biased,rank", [(False, None), (True, None), (False, 64)])
def test_student_is_the_source_with_linear_maps(
    biased: bool, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys' maps are weighed half by attention. With a query latent of full rank, queries are linear in x over the
    shared root mean square."""
    monkeypatch.setattr("transmla.convert.attention_moments.QUERY_STRIDE", 1)
    monkeypatch.setattr("transmla.convert.linear_norms.RIDGE", 1e-14)
    source = tiny_model("qwen3", groups=1, dtype=torch.float64, attention_bias=biased)
    true = source(TOKENS).logits.detach()
    done = absorbed(source, q_lora_rank=rank)
    names = {name.rsplit(".", 2)[-2] for name, _ in done.student.named_parameters()}
    assert done.student.config.mla_query_norm_dim is None and not {"q_norm", "q_mix"} & names
    assert done.student.config.mla_qkv_bias is biased
    errors = replace_norms(source, latent=rank is not None)
    assert (source(TOKENS).logits - true).abs().max() > 0.05  # the norms are not linear here
    assert difference(source, done.student) < 1e-4  # attention's moments are summed in float32
    for index, (query, key) in enumerate(errors):
        assert done.query_errors[index] == pytest.approx(query, rel=0.1)
        assert done.key_errors[index] == pytest.approx(key, rel=0.1)
    assert all("no linear map explains" in note for note in done.notes()) and len(done.notes()) == 2


def test_a_wrong_gain_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: maps of queries that are 1 % too large are another model."""
    monkeypatch.setattr("transmla.convert.attention_moments.QUERY_STRIDE", 1)
    source = tiny_model("qwen3", groups=1, dtype=torch.float64)
    student = absorbed(source).student
    replace_norms(source, gain=1.01)
    assert difference(source, student) > 1e-3


@pytest.mark.parametrize("rank", [None, 48])
@pytest.mark.parametrize("layout", ["compact", "padded"])
@torch.no_grad()
def test_export_is_stock_and_equals_the_student(rank: int | None, layout: str, tmp_path: Path) -> None:
    """The query latent's norm is real, that of keys and values linear."""
    student = absorbed(tiny_model("qwen3", groups=2), q_lora_rank=rank).student
    assert choose_format(Export(), student.config, torch.float32).name == "deepseek_v3"
    config = deepseek_config(student.config, layout, torch.float32)
    assert config.q_lora_rank == rank and config.attention_bias is False
    assert ("no_query_latent" if rank is None else "query_latent") in stock_features(config, linear_norm=True)
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.load_state_dict(export_state(student, layout, torch.float32))
    assert type(stock).__module__.startswith("transformers.") and difference(stock, student) < 1e-5
    student.save_pretrained(tmp_path)
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path), student) == 0.0


def test_kept_norms_stay_in_the_own_class() -> None:
    config = tiny_config("qwen3")
    for wanted, expected in (("keep", "mla_qwen3"), ("absorb", "deepseek_v3")):
        geometry = derive_geometry(config, settings(**FULL, qk_norm=wanted))
        student = student_config(config, geometry, family_of(config))
        assert choose_format(Export(), student, torch.float32).name == expected
    assert FAMILIES["qwen3"].head_norms is not None

"""Which engines read an export: the table as a whole, and what the plan says and refuses because of it."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config

from tests.conftest import FULL, settings, tiny_config
from transmla.errors import RecipeError
from transmla.export.deepseek_config import deepseek_config
from transmla.export.engines import engine_table, notes_of, own_features, readings_of, require_engines, stock_features
from transmla.families import FAMILIES, family_of
from transmla.families.student_config import student_config
from transmla.geometry import derive_geometry
from transmla.geometry.rotary import rope_types
from transmla.plan.checks import prepare
from transmla.plan.conversion_checks import check_conversion
from transmla.plan.dry_run import render_plan
from transmla.recipe.compose import load_recipe
from transmla.recipe.names import recipe_names, share
from transmla.recipe.schema import ENGINES

TABLE = engine_table()
CELLS = [(feature, engine) for feature in TABLE["features"] for engine in TABLE["engines"]]
# A configuration that has a feature, by what it changes of the checkpoint that every engine reads.
STOCK = {
    "all_dense": {},
    "softmax_experts": {"first_k_dense_replace": 1, "scoring_func": "softmax"},
    "shifted_experts": {"first_k_dense_replace": 0, "scoring_func": "softmax", "router_shifted": True},
    "attention_bias": {"attention_bias": True},
    "tied_head": {"tie_word_embeddings": True},
    "other_eps": {"rms_norm_eps": 1e-5},
    "no_query_latent": {"q_lora_rank": None},
    "query_latent": {"q_lora_rank": 16},
    "lite_depth": {"q_lora_rank": 16, "num_hidden_layers": 27, "first_k_dense_replace": 27},
    "fast_dimensions": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "other_dimensions": {"kv_lora_rank": 513},
    "rope_default": {},
    "rope_yarn": {"rope": {"rope_type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 1.0}},
    "rope_yarn_ramp": {
        "rope": {"rope_type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 1.0, "beta_fast": 2.0}
    },
    "rope_yarn_other": {"rope": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "rope_llama3": {"rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "rope_linear": {"rope": {"rope_type": "linear", "factor": 2.0}},
    "rope_dynamic": {"rope": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_longrope": {"rope": {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}},
    "rope_half_split": {"rope_interleave": False},
    "other_activation": {"hidden_act": "gelu"},
}
OWN = {
    "own_class": ("llama", {}),
    "own_window": ("mistral", {"sliding_window": 8}),
    "own_softcap": ("gemma2", {}),
    "own_query_norm": ("qwen3", {}),
    "own_experts": ("mixtral", {"num_local_experts": 4}),
}
EVERYWHERE = dict(q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, tie_word_embeddings=False)


def stock(rope: dict | None = None, **fields: object) -> DeepseekV3Config:
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "rope_type": "default"} | (rope or {})
    fields = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "rms_norm_eps": 1e-6} | EVERYWHERE | fields
    config = DeepseekV3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **fields)
    config.rope_parameters = rope
    return config


def student(family: str, fields: dict, **section: object):
    config = tiny_config(family, **fields)
    return student_config(config, derive_geometry(config, settings(**(FULL | section))), family_of(config))


def features_with(feature: str) -> tuple[str, ...]:
    """Features of a checkpoint that has this one."""
    if feature in OWN:
        return own_features(student(*OWN[feature]))
    if feature == "linear_norm":
        return stock_features(stock(), linear_norm=True)
    return stock_features(stock(**STOCK[feature]), linear_norm=False)


def test_the_table_is_whole() -> None:
    """Every cell has a reading, how it is known and of which version, and one reason; every feature has a case here."""
    assert tuple(TABLE["engines"]) == ENGINES
    assert set(TABLE["features"]) == set(STOCK) | set(OWN) | {"linear_norm"}
    for entry in TABLE["engines"].values():
        assert set(entry) <= {"how", "instead"} and entry.get("instead", "vllm") in ENGINES
    for feature, row in TABLE["features"].items():
        assert set(row) - set(ENGINES) <= {"about", "note", "mend"} and set(ENGINES) <= set(row), feature
        for engine in ENGINES:
            cell = row[engine]
            assert set(cell) - {"needs", "run", "read"} == {"reads", "why"} and isinstance(cell["reads"], bool)
            versions = [cell[how] for how in ("run", "read") if how in cell]
            assert versions and all(re.fullmatch(r"\d+(\.\d+)+", version) for version in versions)
            assert "needs" not in cell or cell["reads"], "what is not read needs nothing"
            for text in (row["about"], cell["why"], cell.get("needs", "")):
                assert not text.endswith(".") and "\n" not in text.strip()


def test_what_was_only_read_is_said() -> None:
    by_engine = {reading.engine: reading for reading in readings_of(features_with("rope_llama3"))}
    assert by_engine["sglang"].checked == "only read 0.5.23" and by_engine["vllm"].checked == "run 0.32.0"
    by_engine = {reading.engine: reading for reading in readings_of(features_with("rope_half_split"))}
    assert by_engine["vllm"].checked == "run 0.32.0; partly only read 0.33.0"


def test_the_documentation_has_the_table() -> None:
    page = (share("recipes").parent / "docs" / "serving.md").read_text()
    for row in TABLE["features"].values():
        cells = ("yes" if row[engine]["reads"] else "**no**" for engine in ENGINES)
        assert f"| {row['about']} | {' | '.join(cells)} |\n" in page


def test_the_base_is_read_everywhere() -> None:
    features = stock_features(stock(), linear_norm=False)
    assert features == ("all_dense", "no_query_latent", "fast_dimensions", "rope_default")
    assert all(reading.reads for reading in readings_of(features))


@pytest.mark.parametrize("feature", TABLE["features"])
def test_a_configuration_has_its_feature(feature: str) -> None:
    others = {"all_dense", "no_query_latent", "query_latent", "fast_dimensions", "rope_default", "rope_yarn"}
    others |= {"own_class", "own_window"}
    found = set(features_with(feature))
    assert feature in found and found - {feature} <= others


@pytest.mark.parametrize(("feature", "engine"), CELLS)
def test_every_no_is_refused_and_every_yes_passes(feature: str, engine: str) -> None:
    features = features_with(feature)
    readings, cell = readings_of(features), TABLE["features"][feature][engine]
    reading = next(reading for reading in readings if reading.engine == engine)
    assert not reading.reads or cell["reads"], "one wrong feature is enough"
    if cell["reads"]:
        assert reading.reads, "the other features of this configuration are read everywhere"
        require_engines([engine], features, readings)
        assert cell.get("needs") is None or any(cell["needs"] in note for note in notes_of(features, readings))
        return
    with pytest.raises(RecipeError) as refused:
        require_engines([engine], features, readings)
    assert refused.value.key == "export.engines"
    message = refused.value.problem
    assert message.startswith(f"{engine} ") and TABLE["features"][feature]["about"] in message
    assert cell["why"] in message and f"leave {engine} out" in message and "\n" not in message
    exact = TABLE["features"][feature]["vllm-transformers"]["reads"]
    assert ("name vllm-transformers instead" in message) == (engine == "vllm" and exact)
    assert any(f"by {engine}" in note or f", {engine}" in note for note in notes_of(features, readings))


def test_what_mends_a_feature_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE["features"]["other_dimensions"]["sglang"], "reads", False)
    features = features_with("other_dimensions")
    with pytest.raises(RecipeError, match="export.layout=padded"):
        require_engines(["sglang"], features, readings_of(features))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_readings(family: str) -> None:
    """Whatever is exported, transformers reads it; and no family has a feature that the table lacks."""
    config = student(family, {})
    assert readings_of(own_features(config))[0].reads
    if family_of(tiny_config(family)).inexpressible(config) is None:
        exported = deepseek_config(config, "padded", torch.float32)
        features = stock_features(exported, linear_norm=True)
        assert "linear_norm" in features and readings_of(features)[0].reads
        assert ("attention_bias" in features) == (family in ("qwen2", "mimo"))


BIASED = ["model.config.model_type=qwen2", "~model.config.head_dim"]
LLAMA3 = "{rope_type: llama3, rope_theta: 1e4, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0}"
LINEAR = "{rope_type: linear, rope_theta: 1e4, factor: 12.0}"
SCALED = [f"model.config.rope_parameters={LLAMA3}"]
PLANS = {
    "plain": ([], ENGINES),
    "padded": (["export.layout=padded"], ENGINES),
    "norm": (["convert.latent_norm=true"], ENGINES),
    "biases": (BIASED, ("transformers", "vllm-transformers")),
    "biases, folded": ([*BIASED, "convert.biases=fold"], ENGINES),
    "llama3": (SCALED, ("transformers", "vllm-transformers")),
    "llama3, stock": ([*SCALED, "convert.rope=stock"], ENGINES),
    "linear, stock": (
        [f"model.config.rope_parameters={LINEAR}", "convert.rope=stock"],
        ENGINES,
    ),
    "own class": (["model.config.model_type=qwen3"], ("transformers", "vllm")),
    "own class that need not be": (["export.format=student"], ("transformers", "vllm")),
}


def plan(*overrides: str) -> SimpleNamespace:
    prepared = prepare(load_recipe("debug", ["device=cpu", "dtype=float32", "dry_run=true", *overrides]))
    return SimpleNamespace(export=prepared.export, text=render_plan(prepared))


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_says_who_reads_the_export(case: str) -> None:
    overrides, readers = PLANS[case]
    found = plan(*overrides)
    assert tuple(found.export.readers) == readers
    assert f"             read by {', '.join(readers)}\n" in found.text
    noted = [line[19:] for line in found.text.splitlines() if line.startswith("             note: ")]
    assert noted == list(found.export.notes)
    assert any("float16" in note for note in noted) == (case not in ("norm", "own class", "own class that need not be"))
    serving = found.export.serving()
    assert serving["notes"] == noted and list(serving["engines"]) == list(ENGINES)
    assert [engine for engine, entry in serving["engines"].items() if entry["reads"]] == list(readers)
    assert all(entry["reads"] != bool(entry["why"]) and entry["checked"] for entry in serving["engines"].values())


@pytest.mark.parametrize("case", PLANS)
def test_a_named_engine_has_to_read_it(case: str) -> None:
    overrides, readers = PLANS[case]
    plan(*overrides, f"export.engines=[{','.join(readers)}]")
    for engine in set(ENGINES) - set(readers):
        with pytest.raises(RecipeError, match=f"^export.engines: {engine} would not read"):
            plan(*overrides, f"export.engines=[transformers,{engine}]")


def test_the_ways_out_are_said() -> None:
    with pytest.raises(RecipeError, match="name vllm-transformers instead.*convert.biases=fold"):
        plan(*BIASED, "export.engines=[vllm]")
    with pytest.raises(RecipeError, match="convert.rope=stock"):
        plan(*SCALED, "export.engines=[vllm]")
    with pytest.raises(RecipeError, match="use export.format=auto"):
        plan("export.format=student", "export.engines=[llama.cpp]")
    with pytest.raises(RecipeError) as refused:  # llama.cpp does not read that either
        plan(*BIASED, "export.format=student", "export.engines=[llama.cpp]")
    assert "format" not in str(refused.value)


@pytest.mark.parametrize("wrong", ["vlm", "[]", "[vllm,auto]", "[[vllm]]", "{vllm: true}", "3", "null"])
def test_other_engines_are_refused_with_the_list(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"^export.engines: auto, or a list .*llama\.cpp"):
        load_recipe("debug", [f"export.engines={wrong}"])


def test_one_engine_needs_no_brackets() -> None:
    assert load_recipe("debug", ["export.engines=vllm"]).export.engines == ["vllm"]
    assert load_recipe("debug", ["export.engines=[vllm,sglang,vllm]"]).export.engines == ["vllm", "sglang"]
    assert load_recipe("debug", []).export.engines == "auto"


def test_the_list_changes_no_file() -> None:
    """Naming an engine afterwards makes nothing again."""
    contents = [load_recipe("debug", words).export.content() for words in ([], ["export.engines=vllm"])]
    assert contents[0] == contents[1] != load_recipe("debug", ["export.layout=padded"]).export.content()


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_still_plan(name: str) -> None:
    """Whatever their sources have, the export is decided and transformers reads it."""
    plan = check_conversion(load_recipe(name, ["device=cpu"]), torch.bfloat16, exports=True)
    assert "transformers" in plan.export.readers
    scaled = rope_types(plan.student) != {"default"}
    assert ("vllm" in plan.export.readers) == (not plan.export.stock or not (plan.student.mla_qkv_bias or scaled))


@pytest.mark.parametrize(("name", "latent", "rope"), [("qwen7b_r1", 512, 64), ("qwen0.5b_r1", 96, 32)])
def test_recovered_qwens_are_native_everywhere(name: str, latent: int, rope: int) -> None:
    """Without biases there is no constant channel and no query latent: the cache that was asked for, exactly."""
    plan = check_conversion(load_recipe(name, ["device=cpu"]), torch.bfloat16, exports=True)
    assert tuple(plan.export.readers) == ENGINES
    config = deepseek_config(plan.student, "compact", torch.bfloat16)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.q_lora_rank) == (latent, rope, None)
    assert not config.attention_bias

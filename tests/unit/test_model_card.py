"""The card of an export: metadata that the hub reads, figures of the report, commands by engine, edits that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from transmla.export.engines import readings_of
from transmla.recipe.compose import load_recipe
from transmla.recipe.schema import Recipe
from transmla.report.figures import plot_figures
from transmla.report.model_card import is_ours, render_card, save_card, stored_geometry
from transmla.report.serving import serving_lines

QUALITY = {"perplexity": 12.5, "perplexity_interval": [12.0, 13.0], "kl": 0.25, "kl_interval": [0.2, 0.3], "top1": 0.5}
QUALITY |= {"tokens": 1000, "windows": 8}
TEACHER = QUALITY | {"kl": 0.0, "kl_interval": [0.0, 0.0], "top1": 1.0}
GEOMETRY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GEOMETRY |= {"head_dim": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
GEOMETRY |= {"q_lora_rank": None, "cached_values_source": 64, "cached_values_student": 32, "saving_percent": 50.0}
SOURCE = {"name": "org/base", "hub": "org/base", "license": "apache-2.0", "language": ["en"]}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("debug", ["output_dir=/machine/out", "evaluate.data=[/machine/held.jsonl]"])


def report(**changes: Any) -> dict[str, Any]:
    data = "/machine/held.jsonl"
    stage = {"seconds": 1.0, "peak_memory_gib": 1.0}
    return {
        "recipe": "tiny",
        "source": "org/base",
        "geometry": GEOMETRY,
        "stored": GEOMETRY,
        "stages": [{"name": "convert", "tokens": 2048} | stage, {"name": "recover.0 distill", "tokens": 4096} | stage],
        "quality": {"teacher": {data: TEACHER}, "exported": {data: QUALITY}},
        "tasks": {},
        "recovered": [],
        "required": [],
        "left_out": [],
        "key_regression_error": None,
        "versions": {"transmla": "0.1.0"},
        "seed": 0,
        "provenance": {
            "command": "/machine/recover.py recipe=tiny",
            "device": "CPU, 2 threads",
            "hub": {
                "model.source": {"repository": "org/base", "revision": None, "commit": "c0ffee"},
                "recover.0.data: text": {"repository": "org/text", "revision": None, "commit": None},
                "write.0.problems: sums": {"repository": "org/sums", "revision": None, "commit": None},
                "evaluate.data: held": {"repository": "org/held", "revision": None, "commit": None},
            },
        },
    } | changes


def card(recipe: Recipe, metadata: dict[str, Any] | None = None, **changes: Any) -> str:
    own = {"format": "deepseek_v3", "notes": ["do not run it in float16"], "source": SOURCE} | (metadata or {})
    return render_card(report(**changes), own, recipe, figures=["quality.png"], chat=False)


def test_metadata(recipe: Recipe) -> None:
    data = ModelCard(card(recipe)).data
    assert (data.base_model, data.license, data.language) == ("org/base", "apache-2.0", ["en"])
    told = data.to_dict()
    assert (told["library_name"], told["pipeline_tag"]) == ("transformers", "text-generation")
    assert data.model_name == "tiny"
    assert data.datasets == ["org/text", "org/sums"]  # not what it was measured on
    assert {"mla", "transmla", "distillation"} <= set(data.tags)
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("held.jsonl", "perplexity"): 12.5, ("held.jsonl", "kl"): 0.25}


def test_what_is_not_known_is_not_said(recipe: Recipe) -> None:
    text = card(recipe, {"source": {"name": "folder"}}, provenance={}, quality={})
    data = ModelCard(text).data
    assert all(
        getattr(data, name) is None for name in ("base_model", "license", "language", "datasets", "eval_results")
    )
    assert "| original model | `folder` |" in text and "its licence | not stated in its files" in text
    infinite = {"exported": {"held": QUALITY | {"perplexity": float("inf")}}}
    (result,) = ModelCard(card(recipe, quality=infinite)).data.eval_results
    assert result.metric_type == "kl"


def test_an_export_of_an_earlier_version(recipe: Recipe) -> None:
    """It noted nothing of its source: the report's name of it counts."""
    own = {"format": "deepseek_v3", "notes": []}
    texts = {
        name: render_card(report(source=name), own, recipe, figures=[], chat=False)
        for name in ("org/base", "/machine/models/base", "random")
    }
    assert ModelCard(texts["org/base"]).data.base_model == "org/base"
    assert "| original model | `base` |" in texts["/machine/models/base"]
    assert "random weights: this checkpoint tries out the conversion" in texts["random"]
    assert not any("/machine" in text for text in texts.values())


def test_content(recipe: Recipe) -> None:
    text = card(recipe, required=[{"requirement": "kl on /machine/held.jsonl <= 0.1", "value": 0.25, "met": False}])
    for part in (
        "[org/base](https://huggingface.co/org/base) with multi-head latent attention",
        "caches 32 values where the original caches 64: 50.0 % less.",
        "| exported | 12.500 (12.000 to 13.000) | 0.2500 (0.2000 to 0.3000) | 50.0 % |",
        "The teacher is the original model. Exported is what these files hold.",
        "![Perplexity and KL of every model](figures/quality.png)",
        "recipe=recipe.yaml output_dir=NEW",
        "- model.source is org/base, commit c0ffee",
        "- Do not run it in float16.",
        "- A threshold of its recipe was missed: kl on held.jsonl <= 0.1.",
        "in windows of 128 tokens",
    ):
        assert part in text, part
    assert "/machine" not in text


def test_a_padded_export_caches_what_it_has_room_for(recipe: Recipe) -> None:
    config = {"kv_lora_rank": 88, "qk_rope_head_dim": 8, "q_lora_rank": 65, "vocab_size": 260}
    stored = stored_geometry(GEOMETRY, config)
    assert (stored["cached_values_student"], stored["saving_percent"]) == (96, -50.0)
    text = card(recipe, stored=stored)
    assert "caches 96 values where the original caches 64: 50.0 % more." in text
    assert "| `kv_lora_rank` (latent) | 88 |" in text and "| `q_lora_rank` | 65 |" in text
    assert "The model itself has a latent of 24 and a rope head of 8, 32 values" in text
    assert stored_geometry(GEOMETRY, {}) == GEOMETRY and "The model itself" not in card(recipe)


def test_engines_as_the_export_says() -> None:
    """Every engine as the table has it, for a checkpoint with biases and for one without."""
    cards = {}
    for features in (("all_dense", "attention_bias"), ("all_dense", "no_query_latent")):
        engines = {reading.engine: reading.describe() for reading in readings_of(features)}
        text = "\n".join(serving_lines({"format": "deepseek_v3", "engines": engines}, chat=True))
        assert "apply_chat_template" in text and "import transmla" not in text
        cards[features[1]] = {part.partition("\n")[0]: part for part in text.split("### ")}
    biased, plain = cards["attention_bias"], cards["no_query_latent"]
    assert "```bash\nvllm serve ORG/NAME --model-impl transformers --dtype bfloat16\n```" in biased["vLLM"]
    assert "skips them in the file without a message." in biased["vLLM"]
    assert "Do not serve this checkpoint with it." in biased["SGLang"] and "```" not in biased["SGLang"]
    assert "```bash\nvllm serve ORG/NAME --dtype bfloat16\n```" in plain["vLLM"] and "sglang" in plain["SGLang"]
    assert "A file by transmla gguf: " in plain["llama.cpp"] and "llama-server" in plain["llama.cpp"]


def test_engines_that_nobody_asked() -> None:
    """Only what is exact whatever the checkpoint has: transformers' class within vLLM."""
    text = "\n".join(serving_lines({"format": "deepseek_v3"}, chat=False))
    assert "vllm serve ORG/NAME --model-impl transformers --dtype bfloat16" in text
    assert "sglang.launch_server" not in text and "llama-server" not in text
    own = "\n".join(serving_lines({"format": "mla_qwen3"}, chat=False))
    assert "vllm serve" not in own and own.count("It does not know the model's class.") == 3
    assert "import transmla" in own


def test_an_edited_card_stays(recipe: Recipe, tmp_path: Path) -> None:
    exported, metadata = tmp_path / "exported", {"format": "deepseek_v3", "notes": [], "source": SOURCE}
    (tmp_path / "figures").mkdir()
    exported.mkdir()
    (tmp_path / "figures" / "loss.png").write_bytes(b"png")
    assert save_card(exported, report(), metadata, recipe)
    assert (exported / "figures" / "loss.png").read_bytes() == b"png"
    assert is_ours((exported / "README.md").read_text())
    (tmp_path / "figures" / "loss.png").unlink()
    assert save_card(exported, report(recipe="other"), metadata, recipe)
    text = (exported / "README.md").read_text()
    assert "# other\n" in text and not (exported / "figures" / "loss.png").exists()
    (exported / "README.md").write_text(text.replace("# other", "# mine"))
    assert not save_card(exported, report(), metadata, recipe)
    assert "# mine" in (exported / "README.md").read_text()


def test_figures_name_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are published with the card, and no text search finds a path that is drawn."""
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, label, **_: titles.append(label))
    plot_figures(report(training=[], layer_errors={}), tmp_path)
    assert titles == ["held.jsonl", "held.jsonl"]

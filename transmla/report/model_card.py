"""The card of an exported model, README.md beside its weights: what it is, how good, how to serve it, what it lacks."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from transmla.convert.router_calibration import describe_routers
from transmla.files import read_json, save_whole
from transmla.recipe.local_paths import paths_in, short_names, shortened
from transmla.recipe.schema import Recipe
from transmla.report.card_metadata import front_matter, training_sets
from transmla.report.generated_text import written_lines
from transmla.report.serving import serving_lines
from transmla.report.tables import quality_table, recovered_table, task_tables, threshold_table
from transmla.sources.source_facts import RANDOM, hub_id, name_of

CARD = "README.md"
FIGURES = {
    "quality.png": "Perplexity and KL of every model",
    "tasks.png": "Accuracy by task",
    "layers.png": "Error of the attention by layer",
    "loss.png": "Training loss",
}
STORED = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
NAMES = {
    "teacher": "The teacher is the original model.",
    "converted": "Converted is the model before training.",
    "recovered": "Recovered is the model after training.",
    "exported": "Exported is what these files hold.",
}
# The last line of a card: an edited one is not overwritten.
MARK = re.compile(r"\n<!-- written by transmla, ([0-9a-f]{16}); an edited card is not overwritten -->\n\Z")


def save_card(exported: Path, report: dict[str, Any], metadata: dict[str, Any], recipe: Recipe) -> bool:
    """Write the card and copy its figures beside it; whether it was written, and not an edited one left as it is.

    Args:
        exported: folder of the final checkpoint; its report's figures are in `figures` beside it.
        report: the content of report.json. metadata: of the export.
    """
    file = exported / CARD
    if file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        return False
    figures = [name for name in FIGURES if (exported.parent / "figures" / name).is_file()]
    chat = any((exported / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    stored = stored_geometry(report["geometry"], read_json(exported / "config.json") or {})
    save_whole(file, signed(render_card(report | {"stored": stored}, metadata, recipe, figures=figures, chat=chat)))
    for name in FIGURES:
        (exported / "figures" / name).unlink(missing_ok=True)
    for name in figures:
        (exported / "figures").mkdir(exist_ok=True)
        shutil.copyfile(exported.parent / "figures" / name, exported / "figures" / name)
    return True


def stored_geometry(geometry: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The geometry as the files have it, and an engine allocates it: padded, or with a channel for biases.

    Args:
        geometry: the report's. config: the export's.
    """
    found = geometry | {name: config[name] for name in STORED if name in config}
    found["cached_values_student"] = found["kv_lora_rank"] + found["qk_rope_head_dim"]
    saved = 1 - found["cached_values_student"] / found["cached_values_source"]
    return found | {"saving_percent": round(100 * saved, 2)}


def signed(text: str) -> str:
    """A card with the line by which `is_ours` knows it again."""
    return f"{text}\n<!-- written by transmla, {_digest(text)}; an edited card is not overwritten -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as it was written, and not edited."""
    mark = MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render_card(
    report: dict[str, Any], metadata: dict[str, Any], recipe: Recipe, *, figures: list[str], chat: bool
) -> str:
    """The card's text, without paths of this machine.

    Args:
        report: the content of report.json, and `stored`, the geometry of the files.
        figures: names of those that are beside it. chat: whether the tokenizer has a chat template.
    """
    source = metadata.get("source") or _known_by_name(report["source"])
    lines = ["---", front_matter(report, source), "---", "", f"# {report['recipe']}", "", *_summary(report, source), ""]
    lines += _source(source)
    lines += _geometry(report["stored"], report["geometry"])
    for dataset in next(iter(report["quality"].values()), {}):
        lines += quality_table(report, dataset)
    if report["quality"]:
        lines += [f"{' '.join(NAMES[model] for model in report['quality'])}", ""]
    lines += task_tables(report["tasks"])
    lines += written_lines({"written": {}, "solve": report.get("solve") or {}})
    lines += recovered_table(report["recovered"])
    lines += threshold_table(report["required"])
    for name in figures:
        lines += [f"![{FIGURES[name]}](figures/{name})", ""]
    lines += serving_lines(metadata, chat=chat)
    lines += _made(report)
    lines += _limits(report, metadata, recipe)
    text = "\n".join(lines).rstrip("\n") + "\n"
    return shortened(text, short_names(paths_in(recipe.model_dump(mode="json")) | paths_in(report)))


def _known_by_name(source: str) -> dict[str, Any]:
    """What the name alone says of a source, for exports of versions that noted nothing else."""
    hub = hub_id(source)
    return {"name": name_of(source)} | ({} if hub is None else {"hub": hub})


def _link(source: dict[str, Any]) -> str:
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/{source['hub']})"
    return "A model of random weights" if source["name"] == RANDOM else f"`{source['name']}`"


def _summary(report: dict[str, Any], source: dict[str, Any]) -> list[str]:
    g = report["stored"]
    before, after, saved = g["cached_values_source"], g["cached_values_student"], g["saving_percent"]
    trained = any(stage["name"].startswith("recover.") for stage in report["stages"])
    how = "trained to predict what the original predicts" if trained else "not trained afterwards"
    return [
        f"{_link(source)} with multi-head latent attention (MLA) in place of its own attention, converted by TransMLA "
        f"and {how}.",
        f"Per token and layer it caches {after:,} values where the original caches {before:,}: "
        + (f"{saved} % less." if saved >= 0 else f"{-saved} % more."),
    ]


def _source(source: dict[str, Any]) -> list[str]:
    if source["name"] == RANDOM:
        text = "The original has random weights: this checkpoint tries out the conversion and is of no other use."
        return ["## Source and licence", "", text, ""]
    licence = source.get("license_name") or source.get("license")
    link = source.get("license_link")
    shown = "not stated in its files; find it out before you use or share this model" if licence is None else licence
    if licence is not None and link is not None and "://" in link:
        shown = f"[{licence}]({link})"
    rows = [("original model", _link(source)), ("its licence", shown)]
    rows += [("its revision", f"`{source['revision']}`")] if "revision" in source else []
    rows += [("languages", ", ".join(source["language"]))] if "language" in source else []
    text = "This model is derived from the original, whose licence applies to it."
    return ["## Source and licence", "", *_table(rows), "", text, ""]


def _geometry(g: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """g: of the files. own: of the model, which may be smaller."""
    rows = [
        ("dimension", "value"),
        ("layers", f"{g['num_hidden_layers']:,}"),
        ("hidden size", f"{g['hidden_size']:,}"),
        ("query heads", f"{g['num_attention_heads']:,}"),
        ("key and value heads of the original", f"{g['num_key_value_heads']:,} of {g['head_dim']:,}"),
        ("`kv_lora_rank` (latent)", f"{g['kv_lora_rank']:,}"),
        ("`qk_rope_head_dim` (rope head)", f"{g['qk_rope_head_dim']:,}"),
        ("`qk_nope_head_dim`, `v_head_dim`", f"{g['qk_nope_head_dim']:,}, {g['v_head_dim']:,}"),
        ("`q_lora_rank`", "none" if g["q_lora_rank"] is None else f"{g['q_lora_rank']:,}"),
        ("cached values per token and layer", f"{g['cached_values_source']:,} → {g['cached_values_student']:,}"),
    ]
    lines = ["## Geometry", "", *_table(rows), ""]
    if g["cached_values_student"] != own["cached_values_student"]:
        lines += [
            f"The model itself has a latent of {own['kv_lora_rank']:,} and a rope head of {own['qk_rope_head_dim']:,}, "
            f"{own['cached_values_student']:,} values; the rest is padding or carries biases.",
            "",
        ]
    return lines


def _made(report: dict[str, Any]) -> list[str]:
    made = report.get("provenance", {})
    lines = ["## How it was made", "", "| stage | tokens |", "|---|---|"]
    for stage in report["stages"]:
        if not stage["name"].startswith(("evaluate", "export")):
            lines.append(f"| {stage['name']} | {stage['tokens']:,} |")
    lines += [
        "",
        "`recipe.yaml` beside the weights is the whole recipe. With TransMLA installed it makes the model again:",
    ]
    lines += ["", "```bash", "accelerate launch recover.py recipe=recipe.yaml output_dir=NEW", "```", ""]
    lines += [
        "Files of its maker's machine are named there without their folder; put them beside it, or give their paths.",
        "",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    device = f"; {made['device']}" if "device" in made else ""
    lines += [f"Made with {versions}, seed {report['seed']}{device}.", ""]
    if sets := training_sets(report):
        lines += [f"Datasets of the hub: {', '.join(sets)}.", ""]
    read = [
        f"- {key} is {entry['repository']}, commit {entry['commit']}"
        for key, entry in made.get("hub", {}).items()
        if entry.get("commit")
    ]
    lines += [*read, ""] if read else []
    return [*lines, "`manifest.json` has size and SHA-256 of the files.", ""]


def _limits(report: dict[str, Any], metadata: dict[str, Any], recipe: Recipe) -> list[str]:
    names = ", ".join(next(iter(report["quality"].values()), {})) or "nothing"
    rows = [
        f"Its quality was measured on {names}, in windows of {recipe.evaluate.max_length:,} tokens. On other text, in "
        "other languages and at greater length its distance to the original is not known.",
        "What the original gets wrong, this model gets wrong too. It was not tested for safety.",
    ]
    if errors := report.get("key_regression_error"):
        rows.append(
            f"The original's keys pass a norm, which a linear map replaces: {100 * sum(errors) / len(errors):.1f} % of "
            "their variance was not explained before training."
        )
    if errors := report.get("router_error"):
        rows.append(f"Experts: {describe_routers(errors)}.")
    if report["left_out"]:
        rows.append(f"Not measured: {', '.join(report['left_out'])}.")
    missed = [entry["requirement"] for entry in report["required"] if not entry["met"]]
    rows += [f"A threshold of its recipe was missed: {text}." for text in missed]
    rows += [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in metadata.get("notes", ())]
    return ["## Limits", "", *(f"- {row}" for row in rows), ""]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    """Two columns; the first row is the head."""
    head, *others = (f"| {name} | {value} |" for name, value in rows)
    return [head, "|---|---|", *others]

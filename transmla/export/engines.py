"""Which serving engines read an exported checkpoint rightly: its features, looked up in engine_table.yaml.

The table is data, one cell for each feature and engine. A checkpoint is read by an engine whose cells are all `reads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.dimensions import EPS, PADDED
from transmla.geometry.rotary import context_for_fixed_betas, rope_types
from transmla.modeling.config_facts import has_experts, shortest_sliding_window

TABLE = Path(__file__).with_name("engine_table.yaml")


@cache
def engine_table() -> dict[str, dict[str, Any]]:
    """`engines` and `features` of the table, as the file has them."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Reading:
    """How one engine reads a checkpoint.

    reads: whether its result is right. why: for each feature that it does not read, what that is and what happens.
    needs: what a user has to do for a right result. checked: which version was run, or read in its source alone.
    """

    engine: str
    reads: bool
    why: tuple[str, ...]
    needs: tuple[str, ...]
    checked: str

    def describe(self) -> dict[str, Any]:
        """The same for a file."""
        return {"reads": self.reads, "why": list(self.why), "needs": list(self.needs), "checked": self.checked}


def stock_features(config: PretrainedConfig, *, linear_norm: bool) -> tuple[str, ...]:
    """Features of a stock checkpoint, by their names in the table.

    Args:
        config: of the exported DeepseekV3ForCausalLM.
        linear_norm: whether rows that float16 cannot hold make its latent norms linear.
    """
    padded = (PADDED["kv_lora_rank"], PADDED["qk_rope_head_dim"])
    sparse = config.first_k_dense_replace < config.num_hidden_layers
    shifted = getattr(config, "router_shifted", False)  # as an export of this package says
    found = {
        "all_dense": not sparse,
        "softmax_experts": sparse and _has_softmax(config) and not shifted,
        "shifted_experts": sparse and _has_softmax(config) and shifted,
        "attention_bias": config.attention_bias,
        "tied_head": config.tie_word_embeddings,
        "linear_norm": linear_norm,
        "other_eps": config.rms_norm_eps != EPS,
        "no_query_latent": config.q_lora_rank is None,
        "query_latent": config.q_lora_rank is not None,
        "lite_depth": config.q_lora_rank is not None and _is_lite(config),
        "fast_dimensions": (config.kv_lora_rank, config.qk_rope_head_dim) == padded,
        "other_dimensions": (config.kv_lora_rank, config.qk_rope_head_dim) != padded,
        **{f"rope_{kind}": True for kind in sorted(rope_types(config) - {"yarn"})},
        "rope_yarn": _is_yarn(config) and _is_deepseeks(config.rope_parameters),
        "rope_yarn_other": _is_yarn(config) and not _is_deepseeks(config.rope_parameters),
        "rope_yarn_ramp": _is_yarn(config) and _is_deepseeks(config.rope_parameters) and not _has_fixed_betas(config),
        "rope_half_split": not config.rope_interleave,
        "other_activation": config.hidden_act != "silu",
    }
    return tuple(name for name, there in found.items() if there)


def _has_softmax(config: PretrainedConfig) -> bool:
    return getattr(config, "scoring_func", None) == "softmax"


def _is_lite(config: PretrainedConfig) -> bool:
    """Whether llama.cpp takes a checkpoint for DeepSeek-V2-Lite or its like, by its depth and vocabulary."""
    return config.num_hidden_layers in (26, 27) or (config.num_hidden_layers, config.vocab_size) == (48, 128256)


def _is_yarn(config: PretrainedConfig) -> bool:
    return "yarn" in rope_types(config)


def _is_deepseeks(parameters: dict[str, Any]) -> bool:
    return (
        parameters.get("mscale") == parameters.get("mscale_all_dim") == 1 and parameters.get("attention_factor") is None
    )


def _has_fixed_betas(config: PretrainedConfig) -> bool:
    return context_for_fixed_betas(config.rope_parameters, config.qk_rope_head_dim) is not None


def own_features(config: PretrainedConfig) -> tuple[str, ...]:
    """Features of a checkpoint of the student's own class, by their names in the table. config: of the student."""
    found = {
        "own_class": True,
        "own_window": shortest_sliding_window(config) is not None,
        "own_softcap": getattr(config, "attn_logit_softcapping", None) is not None,  # a field of Gemma's alone
        "own_query_norm": config.mla_query_norm_dim is not None,
        "own_experts": has_experts(config),
    }
    return tuple(name for name, there in found.items() if there)


def readings_of(features: Sequence[str]) -> tuple[Reading, ...]:
    """How every engine of the table reads a checkpoint with these features."""
    table = engine_table()
    found = []
    for engine in table["engines"]:
        cells = {name: table["features"][name][engine] for name in features}
        found.append(
            Reading(
                engine=engine,
                reads=all(cell["reads"] for cell in cells.values()),
                why=tuple(
                    f"{table['features'][name]['about']}: {cell['why']}"
                    for name, cell in cells.items()
                    if not cell["reads"]
                ),
                needs=tuple(cell["needs"] for cell in cells.values() if "needs" in cell),
                checked=_checked(list(cells.values())),
            )
        )
    return tuple(found)


def _checked(cells: Sequence[dict[str, Any]]) -> str:
    """How well cells are known together: `run 1.2.0`, `read 1.3.0`, or both where some features were only read."""
    run = sorted({cell["run"] for cell in cells if "run" in cell})
    only_read = sorted({cell["read"] for cell in cells if "run" not in cell})
    parts = [f"run {', '.join(run)}"] if run else []
    if only_read:
        parts.append(f"{'partly ' if run else ''}only read {', '.join(only_read)}")
    return "; ".join(parts)


def reading_of(engine: str, config: PretrainedConfig) -> Reading:
    """How an engine reads an exported checkpoint, seen from its configuration."""
    stock = config.model_type == "deepseek_v3"
    features = stock_features(config, linear_norm=False) if stock else own_features(config)
    return next(reading for reading in readings_of(features) if reading.engine == engine)


def notes_of(features: Sequence[str], readings: Sequence[Reading]) -> tuple[str, ...]:
    """What a user has to know before serving a checkpoint, a line each: who does not read it, what the others need."""
    wrong: dict[str, list[str]] = {}
    needed: dict[str, list[str]] = {}
    for reading in readings:
        for text in reading.needs if reading.reads else reading.why:
            (needed if reading.reads else wrong).setdefault(text, []).append(reading.engine)
    kinds = engine_table()["features"]
    return (
        *(f"not read rightly by {', '.join(engines)}: {text}" for text, engines in wrong.items()),
        *(f"{', '.join(engines)}: {text}" for text, engines in needed.items()),
        *(kinds[name]["note"] for name in features if "note" in kinds[name]),
    )


def require_engines(
    engines: Sequence[str], features: Sequence[str], readings: Sequence[Reading], *, ways: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint that a named engine would not read.

    Args:
        engines: that have to read it. ways: to another checkpoint, which the caller knows.

    Raises:
        RecipeError: the first engine that does not, why, and the ways out.
    """
    table, by_name = engine_table(), {reading.engine: reading for reading in readings}
    for engine in engines:
        if by_name[engine].reads:
            continue
        other = table["engines"][engine].get("instead")
        out = [f"leave {engine} out of the list"]
        if other is not None and by_name[other].reads:
            out.append(f"serve it with {table['engines'][other]['how']}, which is exact, and name {other} instead")
        failing = [name for name in features if not table["features"][name][engine]["reads"]]
        out += [table["features"][name]["mend"] for name in failing if "mend" in table["features"][name]]
        raise RecipeError(
            "export.engines",
            f"{engine} would not read this checkpoint rightly: {'; '.join(by_name[engine].why)}; "
            f"{', or '.join([*out, *ways])}",
        )

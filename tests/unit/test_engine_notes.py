"""What a user is told about serving a stock checkpoint that some engines read wrongly without an error."""

import pytest

from transmla.plan.checks import prepare
from transmla.plan.dry_run import render_plan
from transmla.recipe.compose import load_recipe

LLAMA3 = "{rope_type: llama3, rope_theta: 1e4, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0}"
CASES = {
    "plain": ([], ["do not run it in float16"]),
    "norm": (["convert.latent_norm=true"], []),
    "biases": (
        ["model.config.model_type=qwen2", "~model.config.head_dim"],
        ["biases on queries, keys and values", "do not run it in float16"],
    ),
    "llama3": ([f"model.config.rope_parameters={LLAMA3}"], ["llama3 scaling", "do not run it in float16"]),
    "linear": (
        ["model.config.rope_parameters={rope_type: linear, rope_theta: 1e4, factor: 2.0}"],
        ["linear scaling", "do not run it in float16"],
    ),
    "own class": (["export.format=student", "model.config.model_type=qwen2", "~model.config.head_dim"], []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_says_what_native_engines_get_wrong(case: str) -> None:
    overrides, expected = CASES[case]
    prepared = prepare(load_recipe("debug", ["device=cpu", "dtype=float32", "dry_run=true", *overrides]))
    notes = prepared.export.notes
    assert len(notes) == len(expected) and all(
        note.startswith(start) for note, start in zip(notes, expected, strict=True)
    )
    assert [line[19:] for line in render_plan(prepared).splitlines() if line.startswith("             note: ")] == [
        *notes
    ]
    for note in notes[: -1 if notes else None]:
        assert "vLLM" in note and "--model-impl transformers" in note  # what is wrong, and what to do

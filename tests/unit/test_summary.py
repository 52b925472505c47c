"""Intervals, differences to the teacher, what was recovered, thresholds."""

import math

import pytest
import torch

from transmla.errors import RecipeError
from transmla.measure.intervals import paired_difference, standard_error, student_t, wilson
from transmla.measure.perplexity import compare, full_float32
from transmla.measure.tasks import Answers
from transmla.recipe.evaluation import Requirement
from transmla.report.summary import check_thresholds, compare_tasks, figure_lines, measured, missed, recovered
from transmla.report.tables import recovered_table, task_tables


def test_quality_by_window() -> None:
    """Means over all tokens; the errors have windows as units, also where a chunk of tokens ends within one."""
    torch.manual_seed(0)
    count, length, width, vocabulary = 5, 300, 8, 11
    windows = torch.randint(vocabulary, (count, length))
    own, other = torch.randn(2, count, length, width)
    heads = torch.randn(2, vocabulary, width)
    quality = compare(windows, own, heads[0], other, heads[1])
    log_s, log_t = (
        torch.log_softmax((h.double() @ head.double().T)[:, :-1], -1)
        for h, head in zip((own, other), heads, strict=True)
    )
    kls = (log_t.exp() * (log_t - log_s)).sum(-1).mean(1)
    nlls = -log_s.gather(2, windows[:, 1:, None]).squeeze(2).mean(1)
    assert quality.tokens == count * (length - 1) and quality.windows == count
    assert quality.kl == pytest.approx(float(kls.mean()), rel=1e-5)
    assert quality.perplexity == pytest.approx(float(nlls.mean().exp()), rel=1e-5)
    assert quality.top1 == pytest.approx(float((log_s.argmax(-1) == log_t.argmax(-1)).double().mean()))
    assert quality.kl_se == pytest.approx(float(kls.std()) / math.sqrt(count), rel=1e-4)
    half = 2.776 * float(nlls.std()) / math.sqrt(count)  # Student's t, four degrees of freedom
    low, high = quality.perplexity_interval
    assert math.log(high / low) / 2 == pytest.approx(half, rel=0.01)
    assert quality.kl_interval[1] - quality.kl == pytest.approx(2.776 * quality.kl_se, rel=0.01)
    single = compare(windows[:1], own[:1], heads[0], other[:1], heads[1])
    assert single.kl_se is None and single.kl_interval is None and single.perplexity_interval is None


def test_a_trainers_tf32_does_not_reach_the_measures() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with full_float32():
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_figures_of_one_model_are_said_before_the_report() -> None:
    quality = {"news": {"kl": 0.12345, "perplexity": 26.4371, "top1": 0.675}}
    assert figure_lines({"quality": quality, "tasks": {"boolq": {"acc": 0.4128, "count": 3270}}}) == [
        "news: KL 0.1235, perplexity 26.437, top-1 67.5 %",
        "boolq: accuracy 41.3 % of 3,270",
    ]
    assert figure_lines({}) == []


def test_intervals() -> None:
    assert [round(student_t(freedom), 1) for freedom in (3, 7, 60)] == [3.2, 2.4, 2.0]
    assert standard_error([1.0]) is None and standard_error([0.0, 1.0]) == pytest.approx(0.5)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4) and wilson(81, 263) == pytest.approx(
        (0.2553, 0.3662), abs=1e-4
    )
    ours, theirs = [1.0] * 50 + [0.0] * 50, [1.0] * 48 + [0.0] * 2 + [1.0] * 6 + [0.0] * 44
    value, error = paired_difference(ours, theirs)
    assert value == pytest.approx(-0.04)
    assert error == pytest.approx(
        math.sqrt((8 / 100 - 0.04**2) / 99), rel=1e-9
    )  # (b + c)/n − d²: discordant pairs alone
    assert error < 0.5 * math.hypot(standard_error(ours), standard_error(theirs))


def answers(right: str, picked: str) -> Answers:
    """From digits: which choice is right, which was picked, question by question."""
    gold, picks = [int(digit) for digit in right], [int(digit) for digit in picked]
    correct = [float(a == b) for a, b in zip(gold, picks, strict=True)]
    return Answers(gold, picks, picks, correct, None)


FOUND = {
    "teacher": {"one": answers("0123", "0120"), "two": answers("01", "01")},
    "converted": {"one": answers("0123", "3331"), "two": answers("01", "00")},
    "recovered": {"one": answers("0123", "0221"), "two": answers("01", "01")},
}
TASKS = compare_tasks(
    {model: {task: one.summary() for task, one in own.items()} for model, own in FOUND.items()}, FOUND
)


def quality(perplexity: float, kl: float, top1: float) -> dict:
    return {"text": {"perplexity": perplexity, "kl": kl, "top1": top1}}


REPORT = {
    "quality": {"teacher": quality(10, 0, 1), "converted": quality(20, 0.8, 0.5), "recovered": quality(12.5, 0.2, 0.8)},
    "tasks": TASKS,
    "solve": {"teacher": {"sums": {"accuracy": 0.6}}, "recovered": {"sums": {"accuracy": 0.45}}},
}


def test_tasks_beside_the_teachers() -> None:
    one = TASKS["recovered"]["one"]
    assert one["acc"] == 0.5 and one["difference"]["acc"]["value"] == -0.25 and one["agreement"]["acc"] == 0.5
    assert one["difference"]["acc"]["se"] == pytest.approx(0.25)
    assert one["difference"]["acc"]["interval"] == pytest.approx((-0.25 - 1.96 * 0.25, -0.25 + 1.96 * 0.25), abs=1e-4)
    average = TASKS["recovered"]["average"]
    assert average["acc"] == 0.75 and average["difference"]["acc"]["value"] == -0.125 and average["count"] == 6
    assert average["difference"]["acc"]["se"] == pytest.approx(0.125)  # √(0.25² + 0²)/2
    assert average["acc_norm"] is None and "difference" not in TASKS["teacher"]["one"]
    text = "\n".join(task_tables(TASKS))
    assert (
        "| one | 4 | 75.0 (30.1 to 95.4) | 0.0 " in text
        and "| average | -62.5 (" in text
        and "| one | 0.0 | 50.0 |" in text
    )


def test_recovered_in_per_cent() -> None:
    rows = {(row["measure"], row["data"]): row["per_cent"] for row in recovered(REPORT)}
    assert rows["kl", "text"] == pytest.approx({"converted": 0, "recovered": 75})
    assert rows["perplexity", "text"] == pytest.approx({"converted": 50, "recovered": 80})
    assert rows["acc", "one"] == pytest.approx({"converted": 0, "recovered": 100 * 2 / 3})
    assert rows["acc", "average"] == pytest.approx({"converted": 100 * 0.25 / 0.875, "recovered": 100 * 0.75 / 0.875})
    assert rows["solve", "sums"] == pytest.approx({"recovered": 75})
    table = "\n".join(recovered_table(recovered(REPORT)))
    assert (
        "| KL | text | 0.0 | 75.0 |" in table
        and "| problems solved | sums |  | 75.0 |" in table
        and "- Problems" in table
    )
    perfect = REPORT | {"quality": {"teacher": quality(10, 0, 1), "converted": quality(10, 0, 1)}}
    assert not [row for row in recovered(perfect) if row["measure"] == "kl"]  # nothing was lost


@pytest.mark.parametrize(
    "measure,data,value",
    [
        ("kl", "text", 0.2),
        ("perplexity_ratio", "average", 1.25),
        ("top1", "text", 80.0),
        ("accuracy_drop", "one", 25.0),
        ("accuracy_drop", "average", 12.5),
        ("solve_recovered", "sums", 75.0),
    ],
)
def test_thresholds(measure: str, data: str, value: float) -> None:
    bound = lambda **side: Requirement(measure=measure, data=data, **side)  # noqa: E731
    assert measured(bound(at_most=9), REPORT) == pytest.approx(value)
    sides = [
        bound(at_most=value * 1.01),
        bound(at_least=value * 0.99),
        bound(at_most=value * 0.99),
        bound(at_least=value * 1.01),
    ]
    found = check_thresholds(sides, REPORT)
    assert [entry["met"] for entry in found] == [True, True, False, False]
    lines = missed({"required": found})
    assert (
        len(lines) == 2 and f"got {value:.4g}" in lines[0] and f"{measure} of recovered on {data} at most" in lines[0]
    )


def test_what_was_not_measured_is_missed() -> None:
    (entry,) = check_thresholds([Requirement(measure="kl", data="text", model="exported", at_most=9)], REPORT)
    assert entry["value"] is None and not entry["met"] and missed({"required": [entry]})[0].endswith("got nothing")


@pytest.mark.parametrize(
    "wrong,reason",
    [
        ({"at_most": 1, "at_least": 0}, "exactly one"),
        ({}, "exactly one"),
        ({"at_most": float("nan")}, "finite"),
        ({"measure": "top1", "at_least": 0.9}, "write 90, not 0.9"),
    ],
)
def test_thresholds_that_mean_nothing(wrong: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Requirement.model_validate({"measure": "kl", "data": "text"} | wrong)


def test_thresholds_name_what_the_recipe_measures(tmp_path) -> None:
    from transmla.plan.evaluation_checks import check_requirements
    from transmla.recipe.compose import load_recipe

    def check(*words: str) -> None:
        check_requirements(load_recipe("debug", [f"output_dir={tmp_path}", *words]))

    entry = "evaluate.require=[{{measure: {}, data: {}, at_most: 2}}]"
    tasks = "evaluate.tasks=[{path: a.jsonl, name: mine}]"
    check(entry.format("kl", "sample_heldout"))
    check(entry.format("accuracy_drop", "mine"), tasks)
    check(entry.format("accuracy_drop", "average"), tasks)
    for words, key in (
        ([entry.format("kl", "mine"), tasks], "evaluate.require.0.data: mine is none of evaluate.data"),
        ([entry.format("accuracy_drop", "average")], "evaluate.require.0.measure: accuracy_drop needs evaluate.tasks"),
        (
            [entry.format("solve_recovered", "gsm8k")],
            "evaluate.require.0.measure: solve_recovered needs evaluate.solve",
        ),
        ([entry.format("kl", "sample_heldout"), "recover=[]"], "evaluate.require.0.model: the recipe has no recovery"),
        ([entry.format("speed", "sample_heldout")], "evaluate.require.0.measure"),
    ):
        with pytest.raises(RecipeError, match=key):
            check(*words)

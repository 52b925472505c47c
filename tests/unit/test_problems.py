"""Problems, their checkers, and the rule that nothing is written for what is evaluated on."""

import json
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from transmla.data.inspection import check_dataset
from transmla.errors import RecipeError
from transmla.generate.checkers import MathChecker, accepts, boxed, final_answer, reference_answer
from transmla.generate.problems import load_problems, prompt_text, stored_prompt
from transmla.generate.sampler import Sample
from transmla.measure.solved import score
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.recipe.writing import Problems


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: \boxed{\sqrt{\frac{2}{3}}}.", r"\sqrt{\frac{2}{3}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\left\{ x, x > 0 \right.}", r"\left\{ x, x > 0 \right."),
        (r"\boxed{5} and then \boxed{6", "5"),  # the last one was cut off
        (r"\boxed{}", None),
        ("17 + 1 = 18\n#### 18", "18"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("The answer is **42**.", "42"),
        ("**Final answer:** 7.5", "7.5"),
        ("I counted 42 of them", None),
    ],
)
def test_final_answers(reply: str, answer: str | None) -> None:
    assert final_answer(reply) == answer


def test_nested_boxes() -> None:
    assert boxed(r"\boxed{a {b {c}} d}") == "a {b {c}} d"


@pytest.mark.parametrize(
    ("row", "answer"),
    [("9 * 8 = 72\n#### 1,072", "1072"), (r"Thus $x = \boxed{\frac34}$.", r"\frac34"), (" 12 ", "12")],
)
def test_reference_answers(row: str, answer: str) -> None:
    assert reference_answer(row) == answer


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("1072", "1,072", True),
        ("42", "42.0", True),
        (r"\frac{1}{2}", "0.5", True),
        ("x^2+1", "1 + x^2", True),
        ("18", "18 dollars", True),
        ("2", "2x", False),
        ("42", "43", False),
        ("12", "}{", False),
        ("12", r"\frac{1}{", False),
    ],
)
def test_mathematics(reference: str, answer: str, right: bool) -> None:
    assert MathChecker()(answer, {"answer": reference}) is right


def test_reasoning_must_end() -> None:
    section = Problems(data="x", think="<think>\n{thought}\n</think>\n")
    entry = {"answer": "4"}
    assert accepts(MathChecker(), r"<think> \boxed{5}? no </think> \boxed{4}", entry, section)
    assert not accepts(MathChecker(), r"<think> \boxed{4}, or", entry, section)
    assert not accepts(MathChecker(), r"<think> \boxed{4} </think> I am not sure", entry, section)


def test_a_generator_scores_itself() -> None:
    section = Problems(generator="leg_counting", size=5, seed=3, config={"max_animals": 4})
    found = load_problems(section, "k", skip=1, limit=3)
    assert [problem.number for problem in found.problems] == [1, 2, 3]
    for problem in found.problems:
        right = problem.entry["answer"]
        assert accepts(found.checker, f"<answer>{right}</answer>", problem.entry, section)
        assert not accepts(found.checker, f"<answer>{int(right) + 1}</answer>", problem.entry, section)
        assert not accepts(found.checker, f"I think {right}", problem.entry, section)


@pytest.fixture
def school(tmp_path) -> str:
    rows = [{"question": f"How much is {n} and {n}?", "answer": f"it is\n#### {2 * n}"} for n in range(10)]
    (tmp_path / "school.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "school.yaml").write_text("{path: school.jsonl, columns: {problem: question, answer: answer}}")
    return str(tmp_path / "school.yaml")


def test_rows_of_a_file(school: str) -> None:
    found = load_problems(Problems(data=school), "k", skip=2, limit=3)
    assert [(one.number, one.question[12], one.entry["answer"]) for one in found.problems] == [
        (2, "2", "4"),
        (3, "3", "6"),
        (4, "4", "8"),
    ]
    with pytest.raises(RecipeError, match="has 10 rows, not 12"):
        load_problems(Problems(data=school), "k", skip=9, limit=3)
    with pytest.raises(RecipeError, match="problems, not text"):
        check_dataset(school, "recover.0.data", online=False)
    with pytest.raises(RecipeError, match="no problems"):
        check_dataset("sample_train", "k", online=False, problems=True)


def tokenizer(template: str | None, *, start: bool = False) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if start:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")
    made.chat_template = template
    return made


CHAT = (
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] TAG{% endif %}"
)


def test_prompts(school: str) -> None:
    problem = load_problems(Problems(data=school), "k").problems[1]
    section = Problems(
        data=school, system="Be short.", prompt="{problem} In \\boxed{}.", think="<think>\n{thought}\n</think>"
    )
    plain = CHAT.replace("TAG", "")
    words = "[system] Be short. [user] How much is 1 and 1? In \\boxed{}. [assistant] "
    assert prompt_text(problem, section, tokenizer(plain)) == (f"<s>{words}<think>\n", "<think>\n")
    begun = CHAT.replace("TAG", "<think>\\n")
    text, tag = prompt_text(problem, section, tokenizer(begun.replace("\\n", "\n")))
    assert tag == "" and text.count("<think>") == 1  # R1's template begins the reasoning itself
    base = tokenizer(None, start=True)
    text, _ = prompt_text(problem, section.model_copy(update={"think": None}), base)
    assert text == "<s>Be short.\n\nHow much is 1 and 1? In \\boxed{}.\n\n"
    assert stored_prompt(text, base).startswith("Be short") and stored_prompt(text, tokenizer(None)).startswith("<s>")


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe("debug", ["device=cpu", *overrides]))
    return str(caught.value)


def write(problems: str, more: str = "") -> str:
    return f"write=[{{name: w, kind: traces, max_new_tokens: 8, problems: {problems}{more}}}]"


def solve(problems: str, more: str = "") -> str:
    return f"evaluate.solve=[{{name: s, max_new_tokens: 8, problems: {problems}{more}}}]"


def accepted(*overrides: str) -> None:
    prepare(load_recipe("debug", ["device=cpu", *overrides]))


def test_what_is_evaluated_on_is_not_written_for(school: str) -> None:
    whole = school
    assert "rows from 4 on" in refused(write(whole, ", skip: 4"), solve(whole, ", skip: 3"))
    assert "rows 4 to 6" in refused(write(whole, ", skip: 4"), solve(whole, ", limit: 7"))
    accepted(write(whole, ", skip: 7"), solve(whole, ", limit: 7"))
    assert "is part of" in refused(write(f"'{whole}#train'"), solve(whole, ", limit: 2"))
    accepted(write(f"'{whole}#train'"), solve(f"'{whole}#test'"))
    assert "rows" in refused(write(f"'{whole}#test'"), solve(f"'{whole}#test'"))


def test_seeds_of_generators_overlap() -> None:
    """reasoning-gym's problem i of seed s is problem i - 1 of seed s + 1."""

    def gym(seed: int, size: int = 10) -> str:
        return f"{{generator: leg_counting, size: {size}, seed: {seed}}}"

    one, other = (load_problems(Problems(generator="leg_counting", size=4, seed=seed), "k").problems for seed in (0, 1))
    assert one[1].question == other[0].question
    assert "rows 1 to 9" in refused(write(gym(0)), solve(gym(1)))
    assert "rows 0 to 4" in refused(write(gym(0)), solve(gym(0), ", limit: 5"))
    accepted(write(gym(0), ", skip: 5"), solve(gym(0), ", limit: 5"))
    accepted(write(gym(0)), solve(gym(10)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([write("{generator: leg_countin}")], "write.0.problems.generator: reasoning-gym has no"),
        ([write("{generator: game_of_life_halting}")], "write.0.problems.generator: game_of_life_halting takes any"),
        (
            [write("{generator: composite, config: {datasets: [{name: x}]}}")],
            "write.0.problems.config: composite refuses",
        ),
        (
            [write("{generator: leg_counting, config: {max_legs: 3}}")],
            "write.0.problems.config: leg_counting refuses it",
        ),
        (
            [write("{generator: leg_counting, size: 5}", ", skip: 4, limit: 2")],
            "write.0.problems.size: 5 problems have no",
        ),
        ([write("{data: gsm8k, size: 5}")], "write.0.problems: size, seed and config are for a generator"),
        (
            [write("{generator: leg_counting}", ", temperature: 0, samples: 2")],
            "write.0: several samples at temperature 0",
        ),
        ([write("{generator: leg_counting}", ", samples: 0")], "write.0.samples"),
        (["write=[{name: w, kind: tales}]"], "write.0.kind: unknown kind of stage; use one of: traces, text"),
        (
            ["write=[{name: w, kind: text, tokens: 9, prefix_tokens: 4}]"],
            "write.0: prefix_data and prefix_tokens belong together",
        ),
        (
            ["write=[{name: w, kind: text, tokens: 9, max_new_tokens: 512}]"],
            "write.0.max_new_tokens: 512 after a prompt",
        ),
        (
            ["write=[{name: w, kind: text, tokens: 9, max_new_tokens: 8, prefix_data: ['@w'], prefix_tokens: 2}]"],
            "write.0.prefix_data: @w is no text of an entry before this one",
        ),
        (
            [
                "write=[{name: v, kind: text, tokens: 9, max_new_tokens: 8}, "
                "{name: w, kind: text, tokens: 9, max_new_tokens: 8, "
                "prefix_data: ['@v', s1k_1.1], prefix_tokens: 2}]",
                "dry_run=true",
            ],
            "write.1.prefix_data: datasets of different kinds cannot be joined",
        ),
        (
            ["write=[{name: w, kind: text, tokens: 9, max_new_tokens: 4, cues: [" + "x" * 512 + "]}]"],
            "write.0.max_new_tokens: 4 after a prompt",
        ),
        (["recover.0.data=['@w']"], "recover.0.data: @w is no entry of the recipe's write (it writes nothing)"),
        (
            ["write=[{name: w, kind: text, tokens: 9, max_new_tokens: 8}]", "evaluate.data=['@w']"],
            "evaluate.data: @w is text of the teacher's own",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    assert refused(*overrides).startswith(message)


@pytest.mark.parametrize(
    ("module", "problems", "command"),
    [
        ("math_verify", "gsm8k", "pip install math-verify"),
        ("reasoning_gym", "{generator: leg_counting}", "pip install reasoning-gym"),
    ],
)
def test_missing_packages_are_named(module: str, problems: str, command: str, monkeypatch) -> None:
    monkeypatch.setattr("transmla.generate.problem_checks.find_spec", lambda name: None if name == module else object())
    assert command in refused(write(problems)) and command in refused(solve(problems))


def test_several_replies_to_a_problem_count_as_one_share() -> None:
    """The error is that of 3 problems, not of 12 replies: replies to one problem resemble each other."""
    right = [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    flat = [one for row in right for one in row]
    asked = SimpleNamespace(
        samples=4,
        accepted=lambda index, sample: bool(flat[index]),
        reply=lambda index, sample: f"reply {index}",
        found=SimpleNamespace(problems=[SimpleNamespace(question=f"question {number}") for number in range(3)]),
    )
    found = score(asked, [Sample([1, 2], finished=True)] * 12)
    assert found["accuracy"] == pytest.approx(5 / 12) and found["count"] == 3
    shares = [1, 0.25, 0]
    spread = sum((share - 5 / 12) ** 2 for share in shares) / 2
    assert found["standard_error"] == pytest.approx((spread / 3) ** 0.5)
    assert [shown["reply"] for shown in found["replies"]] == ["reply 0", "reply 4"]
    assert found["replies"][1]["question"] == "question 1"

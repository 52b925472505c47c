"""Questions with choices: log-likelihoods against a plain loop and against lm-eval-harness, verdicts, refusals."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import FULL, VOCAB, settings, tiny_model, windows
from transmla.convert.conversion import convert_model
from transmla.errors import RecipeError
from transmla.measure.choices import batches, loglikelihoods, rows_of
from transmla.measure.tasks import Answers, answer, check_tasks, read_questions
from transmla.recipe.evaluation import ChoiceTask, Evaluate

TEXT = [
    "the sea and the land and the hills",
    "a cat sat on the mat, a dog ran to the hills",
    "what is the answer? the answer is ten",
]
PAIRS = [
    ("the sea and", " the land"),
    ("the sea and", " a"),
    ("the sea and", " e"),  # one token each: one forward pass
    ("what is the answer? ", "ten"),  # the space goes to the continuation
    ("", " the hills"),
    ("", "<s> the hills"),  # begins with the begin token itself
    ("the an", "swer"),  # merges into the context's token
    ("a cat sat on the mat, " * 20, " a dog ran to the hills"),  # longer than the model's positions
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte pairs with merges, and a begin token before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({letter for text in TEXT for letter in text.replace(" ", "Ġ")})
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 1, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXT, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def plain(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> float:
    """One pair, one forward pass of the whole model, float64."""
    before = tokenizer(context)["input_ids"]
    tokens = tokenizer(context + continuation)["input_ids"]
    log_p = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double(), -1)
    return sum(float(log_p.detach()[place - 1, tokens[place]]) for place in range(len(before), len(tokens)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loglikelihoods_against_a_plain_loop(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Source and student, batched with padding; Gemma 2 caps its logits."""
    fields = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    source = tiny_model(family, dtype=torch.float64, **fields)
    student = convert_model(source, settings(**FULL), torch.cat(windows())).student
    for model in (source, student.double()):
        got = loglikelihoods(model, tokenizer, PAIRS[:3], budget=64, label="test")
        wanted = [plain(model, tokenizer, *pair) for pair in PAIRS[:3]]
        assert [score for score, _ in got] == pytest.approx(wanted, abs=1e-5)
    assert len(set(map(round, wanted))) > 1, "a constant would pass"


def test_loglikelihoods_are_the_harness_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = tiny_model(max_position_embeddings=40)
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS) if pair != PAIRS[6]]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=None)
    wanted = harness.loglikelihood(requests, disable_tqdm=True)
    for budget in (1, 90):
        got = loglikelihoods(model, tokenizer, [request.args for request in requests], budget=budget, label="test")
        assert [score for score, _ in got] == pytest.approx([score for score, _ in wanted], abs=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    (merged,) = loglikelihoods(model, tokenizer, [PAIRS[6]], budget=64, label="test")
    assert merged[0] < -0.1  # scored apart, not lost


def test_the_greedy_continuation_is_recognised(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    tokens = tokenizer("the sea")["input_ids"]
    best = tokenizer.decode(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    ((_, greedy), (_, other)) = loglikelihoods(
        model, tokenizer, [("the sea", best), ("the sea", " the land")], budget=64, label="t"
    )
    assert (greedy, other) == (True, False)


def test_same_inputs_are_one_row_and_batches_keep_their_budget() -> None:
    rows = rows_of([([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2], [3, 6]), ([7] * 20, [8])], limit=10)
    assert [len(row.tokens) for row in rows] == [10, 3]
    assert rows[1].targets == [(0, [4]), (1, [5]), (2, [3, 6])]
    sizes = [
        (len(part), len(part[0].tokens)) for part in batches(rows_of([([1] * n, [2]) for n in range(1, 9)], 99), 10)
    ]
    assert all(count * length <= 10 for count, length in sizes) and sum(count for count, _ in sizes) == 8
    assert [len(part) for part in batches(rows, 1)] == [1, 1]


ROWS = [
    {"ctx": "the sea", "choices": [" a", " the hills", " ten"], "gold": 1},
    {"ctx": "a cat", "choices": [" sat", " on the mat"], "gold": 0},
    {"ctx": "what is", "choices": [" the answer", " a", " e", " land"], "gold": 3},
    {"ctx": "a dog ran to", "choices": [" the hills", " a mat"], "gold": 1},
    {"ctx": "the land and", "choices": [" the sea", " a cat", " a dog ran"], "gold": 2},
]


def write(folder: Path, rows: list[dict] = ROWS) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def ask(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: ChoiceTask) -> Answers:
    return answer(model, tokenizer, task, key="k", budget=64, label="test")


def test_verdicts_of_a_model_without_opinions(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    """Every token costs ln V: fewest tokens are the likeliest, most letters a token the likeliest a character."""
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    choices = [" the answer", " a", " land"]
    tokens, letters = [count(choice) for choice in choices], [10, 1, 4]
    assert tokens[1] == 1 < tokens[0] and min(range(3), key=lambda i: tokens[i] / letters[i]) == 0
    rows = [{"ctx": "the sea", "choices": choices, "gold": gold} for gold in (0, 1, 1, 2)]
    answers = ask(model, tokenizer, ChoiceTask(path=str(write(tmp_path, rows))))
    assert answers.picked == [1] * 4 and answers.picked_norm == [0] * 4
    assert answers.correct == [0, 1, 1, 0] and answers.correct_norm == [1, 0, 0, 0]
    summary = answers.summary()
    assert (summary["count"], summary["acc"], summary["acc_norm"]) == (4, 0.5, 0.25)
    assert summary["acc_se"] == pytest.approx((1 / 3) ** 0.5 / 2)  # the harness: sample deviation / √n
    assert summary["acc_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson


HARNESS = {
    "task": "mine",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{ctx}}",
    "doc_to_choice": "{{words}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def harness_task(folder: Path, **changes: object) -> Path:
    """The questions as a task of the harness, which joins context and choice by a space itself."""
    rows = [{"ctx": row["ctx"], "words": [word[1:] for word in row["choices"]], "gold": row["gold"]} for row in ROWS]
    file = write(folder, rows)
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(HARNESS | {"dataset_kwargs": {"data_files": {"test": str(file)}}} | changes)
    )
    return folder / "mine.yaml"


def test_a_file_is_judged_as_the_harness_judges_its_task(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    (tmp_path / "harness").mkdir()
    task = ChoiceTask(task=str(harness_task(tmp_path / "harness")))
    check_tasks(Evaluate(data=["x"], tasks=[task]), online=True)
    verdicts = set()
    for seed in range(4):
        model = tiny_model()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        theirs, ours = ask(model, tokenizer, task), ask(model, tokenizer, ChoiceTask(path=str(write(tmp_path))))
        assert theirs == ours
        verdicts |= {tuple(ours.correct), tuple(ours.correct_norm)}
    assert len(verdicts) >= 3, "one verdict alone would hide a mistake"
    assert len(ask(model, tokenizer, task.model_copy(update={"limit": 2})).gold) == 2


def test_tasks_of_the_harness_that_are_refused(tmp_path, monkeypatch) -> None:
    from lm_eval.tasks import TaskManager

    from transmla.measure import harness

    monkeypatch.setattr(harness, "_manager", lambda file: TaskManager(include_defaults=False))
    check = lambda task: check_tasks(Evaluate(data=["x"], tasks=[task]), online=True)  # noqa: E731
    with pytest.raises(RecipeError, match="evaluate.tasks.0: lm-eval-harness has no task 'arc_esy'"):
        check("arc_esy")
    generating = {
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["."]},
    }
    with pytest.raises(RecipeError, match="no task of choices"):
        check(str(harness_task(tmp_path, **generating)))
    with pytest.raises(RecipeError, match="cannot load the data"):
        check(str(harness_task(tmp_path, dataset_kwargs={"data_files": {"test": str(tmp_path / "none.jsonl")}})))


def test_a_missing_harness_is_refused_only_where_it_is_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transmla.measure.tasks.find_spec", lambda name: None)
    check_tasks(Evaluate(data=["x"], tasks=[str(write(tmp_path))]), online=False)
    with pytest.raises(RecipeError, match=r"evaluate.tasks.0: arc_easy needs lm-eval-harness; pip install 'lm-eval"):
        check_tasks(Evaluate(data=["x"], tasks=["arc_easy"]), online=False)


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "is empty"),
        (b'\n{"ctx": "a", "choices": [" b", " c"], "gold": 2}', "line 2 cannot be read: gold 2 is no index"),
        (b'{"ctx": "a", "choices": [" b", " c"], "gold": "1"}', "gold '1' is no index"),
        (b'{"ctx": "a", "choices": [" b"], "gold": 0}', "two texts or more"),
        (b'{"ctx": "a", "choices": [" b", " "], "gold": 0}', "two texts or more"),
        (b'{"ctx": "a", "gold": 0}', "a row is"),
        (b'{"ctx": "a"', "line 1 cannot be read"),
        (gzip.compress(json.dumps(ROWS[0]).encode(), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_broken_files(content: bytes, reason: str, tmp_path) -> None:
    file = tmp_path / ("q.jsonl.gz" if content[:2] == b"\x1f\x8b" else "q.jsonl")
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=reason):
        read_questions(ChoiceTask(path=str(file)), "evaluate.tasks.0")
    with pytest.raises(RecipeError, match="no such file"):
        read_questions(ChoiceTask(path=str(tmp_path / "none.jsonl")), "evaluate.tasks.0")


@pytest.mark.parametrize("choices", ['[" a", " a"]', '[" a", "a ", " b"]'])
def test_equal_choices(choices: str, tmp_path) -> None:
    file = tmp_path / "q.jsonl"
    good = '{"ctx": "x", "choices": [" a", " b"], "gold": 0}\n'
    file.write_text(good + f'{{"ctx": "x", "choices": {choices}, "gold": 0}}\n' + good)
    with pytest.raises(RecipeError, match="line 2 .*two of its choices are the same text"):
        read_questions(ChoiceTask(path=str(file), limit=1), "evaluate.tasks.0")


def test_a_mark_before_the_first_line(tmp_path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"ctx": "x", "choices": [" a", " b"], "gold": 0}\n')
    assert read_questions(ChoiceTask(path=str(file)), "evaluate.tasks.0")[0].ctx == "x"


def test_names_of_tasks() -> None:
    assert [
        ChoiceTask.model_validate(entry).label
        for entry in ("arc_easy", "a/b.jsonl.gz", {"path": "a.jsonl", "name": "x"})
    ] == [
        "arc_easy",
        "b",
        "x",
    ]
    for wrong in (
        {},
        {"task": "a", "path": "b.jsonl"},
        {"path": "a.csv"},
        {"path": "average.jsonl"},
        {"path": "a.jsonl", "num_fewshot": 1},
    ):
        with pytest.raises(ValueError):
            ChoiceTask.model_validate(wrong)
    with pytest.raises(ValueError, match="two tasks are called a"):
        Evaluate(data=["x"], tasks=["a", "a.jsonl"])

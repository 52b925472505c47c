"""Conversations: what a row must be, and that a chat template leaves nothing of it out of what is learnt."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from tests.chat_families import family_tokenizer, letters_tokenizer
from tests.conftest import tiny_model
from transmla.data.documents import documents
from transmla.data.loading import load_one
from transmla.data.rows import token_rows
from transmla.data.windows import token_windows
from transmla.errors import RecipeError
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe
from transmla.recipe.stages import OnPolicy, Sft
from transmla.recover.on_policy import prompt_ids
from transmla.recover.stage import build_trainer, trainer_config

ANSWERS = ["<think>\nTwo and two: 4.\n</think>\n\nThe answer is 4.", "<think>\nSix.\n</think>\n\n6."]
TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
FAMILIES = ("deepseek_r1_distill", "qwen2_5", "qwen3")
END = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "qwen2_5": "<|im_end|>\n", "qwen3": "<|im_end|>\n"}


def learnt(data: dict, tokenizer: PreTrainedTokenizerBase, folder: Path, **trainer: object) -> tuple[str, str]:
    """Of the first row that trl gets: its text, and the text of the tokens that carry a label."""
    stage = Sft(kind="sft", data=["unused"], tokens=64, trainer=dict(max_length=512, **trainer))
    config = trainer_config(stage, folder, seed=0, device="cpu", dtype=torch.float32, processes=1)
    row = token_rows(Dataset.from_dict(data), tokenizer, config)[0]
    scored = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(scored)


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_are_learnt(family: str, tmp_path) -> None:
    """R1's traces as messages, and as prompt with completion; `pytest -s` shows the tokens that carry a label."""
    tokenizer = family_tokenizer(family)
    whole, scored = learnt({"messages": [TURNS]}, tokenizer, tmp_path)
    assert whole == scored and all(whole.count(answer + END[family]) == 1 for answer in ANSWERS)
    _, said = learnt({"messages": [TURNS]}, tokenizer, tmp_path, assistant_only_loss=True)
    assert all(answer + END[family] in said for answer in ANSWERS) and "2+2?" not in said
    # R1's template opens the thought itself where a model is asked to answer.
    opened = "<think>\n" if family == "deepseek_r1_distill" else ""
    for before in (1, 3):
        text, completion = learnt({"prompt": [TURNS[:before]], "completion": [TURNS[before:]]}, tokenizer, tmp_path)
        wanted = whole.partition(TURNS[before - 1]["content"])[2].partition("<think>")[1:]
        assert completion == "".join(wanted).removeprefix(opened) and text == whole
        print(f"{family}, completion of a prompt of {before}: {completion!r}")
    print(f"{family}, messages: {scored!r}\n{family}, messages, assistant_only_loss: {said!r}")


@pytest.mark.parametrize("trainer", [{}, {"assistant_only_loss": True}, {"completion_only_loss": False}])
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_conversations_are_trls_own(column: str, trainer: dict, tmp_path) -> None:
    """Where a template leaves nothing out: rows as trl makes them, and trl takes ours."""
    tokenizer = family_tokenizer("qwen2_5")
    plain = [turn | {"content": turn["content"].rpartition("\n")[2]} for turn in TURNS]
    data = Dataset.from_dict(
        {"messages": [plain, plain[:2]]}
        if column == "messages"
        else {"prompt": [plain[:1], plain[:3]], "completion": [plain[1:2], plain[3:]]}
    )
    if column == "messages" and "completion_only_loss" in trainer:
        return
    stage = Sft(kind="sft", data=["x"], tokens=64, trainer=dict(max_length=512, packing=False, **trainer))
    config = trainer_config(stage, tmp_path, seed=0, device="cpu", dtype=torch.float32, processes=1)
    model = tiny_model(vocab_size=len(tokenizer))
    theirs = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer).train_dataset
    ours = build_trainer(stage, model, None, tokenizer, config, data, scales=[]).train_dataset
    columns = ["input_ids", "labels"]
    assert ours.select_columns(columns).to_list() == theirs.select_columns(columns).to_list()
    assert (-100 in ours[0]["labels"]) == (column == "completion" and not trainer or "assistant_only_loss" in trainer)


def test_keys_of_a_trainer_that_do_not_fit_the_data(tmp_path) -> None:
    tokenizer = letters_tokenizer(["</s>"], template="{% for m in messages %}{{ m.content }}{% endfor %}", eos="</s>")
    for data, trainer, words in (
        ({"text": ["a"]}, {"assistant_only_loss": True}, "assistant_only_loss: it is for conversations"),
        ({"prompt": ["a"], "completion": ["b"]}, {"assistant_only_loss": True}, "it is for conversations"),
        ({"messages": [TURNS]}, {"assistant_only_loss": True}, "assistant_only_loss: the chat template does not mark"),
        ({"text": ["a"]}, {"completion_only_loss": True}, "completion_only_loss: it is for prompts with completions"),
        ({"messages": [TURNS]}, {"chat_template_path": "gone.jinja"}, "chat_template_path: gone.jinja is no file"),
    ):
        with pytest.raises(RecipeError, match=f"recover.N.trainer.*{words}"):
            learnt(data, tokenizer, tmp_path, **trainer)
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert learnt({"messages": [TURNS[:1]]}, tokenizer, tmp_path, chat_template_path=str(file))[0] == "<2+2?>"


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_are_measured(family: str) -> None:
    """In calibration and evaluation, with one end token after each conversation."""
    tokenizer = family_tokenizer(family)
    data = Dataset.from_dict({"messages": [TURNS[:2], TURNS]})
    found = [tokenizer.decode(ids) for ids in documents(data, tokenizer, ended=True)]
    assert all(text.count(ANSWERS[0]) == 1 and text.endswith(END[family]) for text in found)
    assert all(text.count(tokenizer.eos_token * 2) == 0 for text in found) and ANSWERS[1] in found[1]
    windows = token_windows(data, tokenizer, tokens=64, length=64)
    assert tokenizer.decode(windows[0]) in "".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_in_a_key_of_their_own(family: str, tmp_path) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}, *TURNS[2:]]
    if family == "qwen2_5":
        with pytest.raises(RecipeError, match="row 1: .*leaves out the reasoning_content of turn 2 .*into the content"):
            learnt({"messages": [turns]}, family_tokenizer(family), tmp_path)
    else:
        text, _ = learnt({"messages": [turns]}, family_tokenizer(family), tmp_path)
        assert "<think>\nTwo and two.\n</think>\n\nIt is 4." in text


def test_prompts_are_put_as_to_a_model(tmp_path) -> None:
    """On its own text a student sees of earlier thoughts what a user's template shows of them."""
    stage = OnPolicy(kind="on_policy", data=["unused"], tokens=64, prompt_tokens=99, max_new_tokens=9)
    tokenizer = family_tokenizer("qwen3")
    (ids,) = prompt_ids(stage, Dataset.from_dict({"messages": [TURNS]}), tokenizer, "k")
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>assistant\n") and "Two and two" not in text and "The answer is 4." in text
    refusing = letters_tokenizer(["</s>"], template="{{ raise_exception('Only one turn') }}", eos="</s>")
    with pytest.raises(RecipeError, match="k: row 1: the chat template refuses it: Only one turn"):
        prompt_ids(stage, Dataset.from_dict({"messages": [TURNS]}), refusing, "k")


ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
FIND = {"type": "function", "function": {"name": "find", "arguments": {"place": "sea", "depth": {"metres": 2}}}}
CALLS = [
    TURNS[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "name": "add", "content": '{"sum": 4}'},
    {"role": "assistant", "content": "", "tool_calls": [FIND]},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "struct"])
def test_tools_arrive_and_null_keys_do_not(form: str, tmp_path) -> None:
    rows = [{"messages": CALLS, "tools": [ADD, FIND]}, {"messages": TURNS, "tools": None}]
    definition = tmp_path / "d.yaml"
    definition.write_text(f"path: a.{form}\ncolumns: {{messages: messages}}\n")
    if form == "struct":  # as another dataset has it: every tool call with the keys of all
        data = Dataset.from_list(rows)
        assert data[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["place"] is None
    else:
        if form == "jsonl":
            (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        data = load_one(str(definition), "k")
    for family in ("qwen2_5", "qwen3"):
        text, _ = learnt(data.select([0]).to_dict(), family_tokenizer(family), tmp_path)
        assert '{"name": "add", "arguments": {"a": 2}}' in text and "null" not in text
        assert '"arguments": {"place": "sea", "depth": {"metres": 2}}' in text and '"description": "Adds."' in text
    with pytest.raises(RecipeError, match="row 1: .*chat template (leaves out|refuses)"):
        learnt(data.select([0]).to_dict(), family_tokenizer("deepseek_r1_distill"), tmp_path)
    if form == "jsonl":
        definition.write_text("path: a.jsonl\ncolumns: {messages: messages}\ntools: null\n")
        text, _ = learnt(load_one(str(definition), "k").to_dict(), family_tokenizer("qwen3"), tmp_path)
        assert "Adds." not in text


def test_tools_that_a_template_does_not_show(tmp_path) -> None:
    data = {"messages": [TURNS], "tools": [json.dumps([ADD])]}
    with pytest.raises(RecipeError, match=r"leaves out the tools \(add\).*tools: null"):
        learnt(data, family_tokenizer("deepseek_r1_distill"), tmp_path)


@pytest.mark.parametrize("adds", ["$A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("end", ["", "</s>"])
def test_exactly_one_end_token(adds: str, end: str, tmp_path) -> None:
    """Whether it stands in the text, the tokenizer adds it, or both."""
    tokenizer = letters_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", adds=adds)
    start = "<s>" if adds.startswith("<s>") else ""
    text, scored = learnt({"text": ["ab" + end]}, tokenizer, tmp_path)
    assert text == scored == f"{start}ab</s>"
    text, scored = learnt({"prompt": ["ab"], "completion": ["cd" + end]}, tokenizer, tmp_path)
    assert text == f"{start}abcd</s>" and scored == "cd</s>"
    data = Dataset.from_dict({"text": ["ab" + end, "cd"]})
    (one, other) = documents(data, tokenizer, ended=True)
    assert tokenizer.decode(one) == f"{start}ab</s>" and tokenizer.decode(other) == f"{start}cd</s>"
    assert tokenizer.decode(list(documents(data, tokenizer))[1]) == f"{start}cd"  # a prefix does not end


FAULTS = {
    "ShareGPT's roles": ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
                         "turn 1 has the role 'human'; add it to turns.roles of the definition, as {human: user}"),
    "a role after a system": ([{"role": "system", "content": "a"}, {"role": "gpt", "content": "b"}],
                              "turn 2 has the role 'gpt'; add it to turns.roles of the definition, as {gpt: assist"),
    "ShareGPT's keys": ([{"from": "human", "value": "a"}], "turns: {role: from, content: value, roles: {human: user"),
    "a string of JSON": (json.dumps(TURNS), "the conversation is text"),
    "an object": ({"role": "user"}, "the conversation is an object"),
    "a turn that is text": (["2+2?"], "turn 1 is text"),
    "no content": ([TURNS[0], {"role": "assistant", "content": None}], "turn 2 (assistant) has no content"),
    "a number": ([{"role": "user", "content": 5}], "turn 1 (user): its content is a number (5), not text"),
    "no role": ([{"content": "a"}], "turn 1 has the keys content"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_a_conversation_that_is_none(fault: str, column: str, tmp_path) -> None:
    wrong, words = FAULTS[fault]
    good, bad = {"messages": TURNS}, {"messages": wrong}
    columns = "{messages: messages}"
    if column == "completion":
        if not isinstance(wrong, list):
            return
        good, bad = ({"prompt": TURNS[:1], "completion": row["messages"]} for row in (good, bad))
        columns = "{prompt: prompt, completion: completion}"
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    (tmp_path / "d.yaml").write_text(f"path: a.jsonl\ncolumns: {columns}\n")
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe("debug", ["device=cpu", f"recover.1.data=['{tmp_path}/d.yaml']"]))
    assert str(caught.value).startswith(f"recover.1.data: {tmp_path}/a.jsonl, row 2: ") and words in str(caught.value)


def test_empty_conversations_are_left_out(tmp_path) -> None:
    rows = [{"messages": TURNS[:2]}, {"messages": None}, {"messages": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.yaml").write_text("path: a.jsonl\ncolumns: {messages: messages}\n")
    said: list[str] = []
    assert load_one(str(tmp_path / "d.yaml"), "k", say=said.append).to_list() == [{"messages": TURNS[:2]}]
    assert "2 of 3 rows" in said[0]

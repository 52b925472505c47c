"""On-policy distillation on trl's trainer: the loss, what falls, resuming, prompts."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback

from tests.conftest import settings, tiny_model, windows
from tests.unit.test_recover import tokenizer
from transmla.cli import main
from transmla.convert.conversion import convert_model
from transmla.errors import RecipeError
from transmla.modeling.student import ATTENTION
from transmla.recipe.budget import steps_of
from transmla.recipe.stages import OnPolicy
from transmla.recipe.validation import validate_recipe
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.on_policy import (
    build_on_policy,
    on_policy_config,
    prompt_ids,
    prompt_order,
    run_on_policy,
    train_on_policy,
)

VOCAB = 260


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def converted():
    """A teacher and its student, which lost much of the cache."""
    teacher = tiny_model(vocab_size=VOCAB)
    return teacher, convert_model(teacher, settings(qk_rope_head_dim=8, kv_lora_rank=8), torch.cat(windows())).student


def text(count: int = 60) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    letters = torch.randint(97, 122, (count, 9), generator=generator).tolist()
    return Dataset.from_dict({"text": [bytes(row).decode() for row in letters]})


def stage_of(
    *,
    steps: int = 4,
    batch: int = 4,
    accumulate: int = 1,
    train: str = "all",
    beta: float = 1.0,
    temperature: float = 1.0,
    **trainer: object,
) -> OnPolicy:
    fields = dict(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_grad_norm=0.0,
    )
    return OnPolicy(
        kind="on_policy",
        data=["unused"],
        train=train,
        beta=beta,
        temperature=temperature,
        prompt_tokens=6,
        max_new_tokens=10,
        tokens=steps * batch * accumulate * 16,
        trainer=fields | trainer,
    )


def make(stage: OnPolicy, converted, words, folder: Path, dtype: torch.dtype = torch.float32):
    teacher, student = (copy.deepcopy(model).to(dtype) for model in converted)
    student.generation_config.eos_token_id = list(range(40))  # continuations of a random model end at different lengths
    config = on_policy_config(stage, folder, seed=0, device="cpu", dtype=dtype, processes=1)
    return build_on_policy(stage, student, teacher, words, config, text())


def divergence(student, teacher, batch: dict, beta: float, temperature: float) -> torch.Tensor:
    """Sum over sampled tokens, from whole float64 distributions, each row by itself and without its padding."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat((prompt, completion))[None]
        part = slice(len(prompt) - 1, -1)
        log_s, log_t = (
            F.log_softmax(model(ids, use_cache=False).logits[0, part].double() / temperature, -1)
            for model in (student, teacher)
        )
        if beta == 1.0:
            total = total + (log_s.exp() * (log_s - log_t)).sum()
        elif beta == 0.0:
            total = total + (log_t.exp() * (log_t - log_s)).sum()
        else:  # arXiv:2306.13649, eq. 1: beta KL(T | M) + (1 - beta) KL(S | M), M = beta T + (1 - beta) S
            log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
            total = total + (beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)).sum()
    return total


@pytest.mark.parametrize("beta,temperature", [(1.0, 1.0), (0.0, 1.0), (0.3, 1.0), (1.0, 1.7)])
def test_the_loss_is_the_divergence_on_the_students_samples(
    beta: float, temperature: float, converted, words, tmp_path
) -> None:
    trainer = make(stage_of(beta=beta, temperature=temperature, batch=6), converted, words, tmp_path)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(6)])
    count = int(batch["completion_mask"].sum())
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 2 and count > 12
    loss = trainer.compute_loss(trainer.model, batch).detach()
    student, teacher = copy.deepcopy(trainer.model).double(), copy.deepcopy(trainer.teacher_model).double()
    for model in (student, teacher):
        vars(model).pop("forward", None)
        model.forward = type(model).forward.__get__(model)
    expected = divergence(student, teacher, batch, beta, temperature).detach() / count
    assert float(expected) > 0.01
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_accumulation_is_a_mean_over_the_global_batchs_tokens(converted, words, tmp_path) -> None:
    """One step of plain gradient descent, in four micro-batches of different numbers of sampled tokens."""
    stage = stage_of(steps=1, batch=2, accumulate=4, optim="sgd", learning_rate=0.5)
    trainer = make(stage, converted, words, tmp_path)
    seen = []
    original = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (seen.append(inputs), original(model, inputs, **kwargs))[1]
    before = copy.deepcopy(converted[1])
    trainer.train()
    counts = [int(batch["completion_mask"].sum()) for batch in seen]
    assert len(counts) == 4 and len(set(counts)) > 1
    before.requires_grad_(True)
    (sum(divergence(before, converted[0], batch, 1.0, 1.0) for batch in seen) / sum(counts)).backward()
    new = dict(trainer.model.named_parameters())
    change = torch.cat([(new[name] - value).flatten() for name, value in before.named_parameters()]).detach()
    wanted = torch.cat([-0.5 * value.grad.flatten() for value in before.parameters()])
    assert (change - wanted).norm() < 1e-4 * wanted.norm()


def test_the_reverse_kl_falls(converted, words, tmp_path) -> None:
    """On continuations that the student writes after training, not only on those it trained on."""
    stage = stage_of(steps=20, batch=8, train="attention", learning_rate=3e-3)

    def measure(trainer) -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            batch = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(32)])
            return float(trainer.compute_loss(trainer.model, batch))

    trainer = make(stage, converted, words, tmp_path)
    trunk = {name: value.clone() for name, value in trainer.model.named_parameters() if ATTENTION not in name}
    before = measure(trainer)
    trainer.train()
    assert measure(trainer) < 0.75 * before
    assert len([line for line in trainer.state.log_history if "loss" in line]) == 20
    assert all(torch.equal(value, trunk[name]) for name, value in trainer.model.named_parameters() if name in trunk)


@pytest.mark.parametrize("train", ["attention", "all"])
def test_stopped_and_resumed_equals_straight(train: str, converted, words, tmp_path) -> None:
    """Bitwise: the same prompts, samples and weights, from a whole checkpoint."""

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                raise Killed

    stage = stage_of(steps=8, batch=2, accumulate=2, train=train, save_steps=3)
    straight = make(stage, converted, words, tmp_path / "straight")
    whole = run_on_policy(straight, torch.float32)
    stopped = make(stage, converted, words, tmp_path / "stopped")
    stopped.add_callback(Kill())
    with pytest.raises(Killed):
        run_on_policy(stopped, torch.float32)
    resumed = make(stage, converted, words, tmp_path / "stopped")
    rest = run_on_policy(resumed, torch.float32, last_checkpoint(tmp_path / "stopped"))
    assert rest["resumed_from"].endswith("checkpoint-3") and whole["resumed_from"] is None
    losses = [[line["loss"] for line in result["log"] if "loss" in line] for result in (whole, rest)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert whole["tokens"] == rest["tokens"] >= 8 * 4 * 7
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_torso_of_a_checkpoint_is_not_resumed_from(converted, words, tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def dying(self, folder: str) -> None:
        raise Killed

    monkeypatch.setattr("transformers.Trainer._save_rng_state", dying)
    with pytest.raises(Killed):
        run_on_policy(make(stage_of(steps=4, save_steps=2), converted, words, tmp_path), torch.float32)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("train", ["attention", "all"])
def test_bfloat16_and_what_is_left_behind(train: str, converted, words, tmp_path) -> None:
    """Trained weights are float32 meanwhile; afterwards both models, their settings and the tokenizer are as before."""
    teacher, student = (copy.deepcopy(model).bfloat16() for model in converted)
    words = copy.deepcopy(words)
    words.pad_token = None
    student.config.pad_token_id = None
    teacher.generation_config.pad_token_id = None
    student.generation_config = teacher.generation_config  # as conversion leaves them
    generation = teacher.generation_config.to_dict()
    before = student.state_dict()["model.layers.0.self_attn.o_proj.weight"].clone()
    stage = stage_of(steps=2, train=train, learning_rate=1e-2)
    result = train_on_policy(
        stage,
        student,
        teacher,
        words,
        text(),
        tmp_path,
        key="k",
        seed=0,
        device="cpu",
        dtype=torch.bfloat16,
        processes=1,
    )
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in result["log"] if "loss" in line)
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16} and not student.training
    assert not torch.equal(before, student.state_dict()["model.layers.0.self_attn.o_proj.weight"])
    assert "forward" not in vars(student) and "forward" not in vars(teacher)
    assert student.config.pad_token_id is None and words.pad_token is None
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict() == generation
    assert student(torch.ones(1, 4, dtype=torch.long)).logits.dtype == torch.bfloat16


def test_prompts_end_before_the_last_answer() -> None:
    class Chat:
        eos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

        def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
            return "".join(turn["content"] for turn in messages) + ">" * add_generation_prompt

    def spelled(rows: dict, prompt_tokens: int = 6) -> list[str]:
        stage = stage_of().model_copy(update={"prompt_tokens": prompt_tokens})
        return ["".join(map(chr, ids)) for ids in prompt_ids(stage, Dataset.from_dict(rows), Chat(), "recover.0.data")]

    user, assistant = ({"role": role, "content": role[:2]} for role in ("user", "assistant"))
    chats = [[user, assistant], [user, assistant, user, assistant], [assistant], [user], [user, assistant, user]]
    assert spelled({"messages": chats}) == ["us>", "us>"]  # the second is 7 tokens long; the last ends in a question
    assert spelled({"messages": chats}, 7) == ["us>", "usasus>", "us>"]
    assert spelled({"prompt": ["abc", "abcdefgh"], "completion": ["d", "e"]}) == ["\x01abc"]
    assert spelled({"prompt": [[user]], "completion": [[assistant]]}) == ["us>"]
    long = "abcdefghijklmnopqrstuvwxyz"  # pieces of 16 with the first token, whose first 6 are prompts
    assert spelled({"text": ["ab", long]}) == ["\x01abcde", "pqrstu"]
    with pytest.raises(RecipeError, match="recover.0.data: no prompt.*prompt_tokens 6"):
        spelled({"text": ["ab"]})


def test_every_prompt_comes_before_any_comes_again() -> None:
    prompts = [[index] for index in range(10)]
    order = [prompt for (prompt,) in prompt_order(prompts, 25, 0)["prompt"]]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert order != [prompt for (prompt,) in prompt_order(prompts, 25, 1)["prompt"]]


def test_keys_and_steps() -> None:
    stage = {"kind": "on_policy", "data": ["a"], "tokens": 10_000, "prompt_tokens": 30, "max_new_tokens": 20}
    tree = {
        "name": "n",
        "model": {"source": "s"},
        "convert": {"calibration": {"data": ["a"]}},
        "evaluate": {"data": ["x"]},
    }
    trainer = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "top_p": 0.9}
    recipe = validate_recipe(tree | {"recover": [stage | {"trainer": trainer}]})
    assert steps_of(recipe.recover[0], 5) == 10_000 // (50 * 4 * 2 * 5)
    for key, reason in (
        ("beta", "recover.N.beta"),
        ("max_length", "not a key of trl's DistillationConfig"),
        ("top_p", "number"),
    ):
        with pytest.raises(RecipeError, match=reason):
            validate_recipe(tree | {"recover": [stage | {"trainer": {key: "x"}}]})


def test_the_stage_in_a_recipe(tmp_path, capsys) -> None:
    import yaml

    from transmla.recipe.names import share

    tree = yaml.safe_load((share("recipes") / "debug.yaml").read_text())
    trainer = {"per_device_train_batch_size": 4, "learning_rate": 1.0e-3, "logging_steps": 1, "save_steps": 2}
    tree["recover"] = [
        tree["recover"][0] | {"tokens": 1024},
        {
            "kind": "on_policy",
            "data": ["sample_train"],
            "tokens": 512,
            "prompt_tokens": 16,
            "max_new_tokens": 16,
            "trainer": trainer,
        },
    ]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    words = [f"recipe={tmp_path}/mine.yaml", "device=cpu", "threads=1", f"output_dir={tmp_path}/out"]
    assert main(["recover", *words, "recover.1.max_new_tokens=500"]) == 2
    assert "recover.1.prompt_tokens + max_new_tokens: 516 is above the 512 positions" in capsys.readouterr().err
    assert main(["recover", *words, "dry_run=true"]) == 0
    assert "recover.1    on_policy: 512 tokens of sample_train, 4 steps" in capsys.readouterr().out
    assert main(["recover", *words]) == 0
    record = json.loads((tmp_path / "out" / "recovered" / "transmla.json").read_text())
    assert record["name"] == "recover.1 on_policy" and 4 * 4 * 17 <= record["tokens"] <= 512
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["export"]["max_abs_logprob_diff"] < 1e-3

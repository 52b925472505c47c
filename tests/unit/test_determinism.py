"""`deterministic: true`: what it switches, what it refuses and replaces, and that it changes nothing else."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from tests.conftest import tiny_config
from tests.unit.test_recover import make_trainer
from transmla.errors import RecipeError
from transmla.generate.sampler import _running_sum
from transmla.geometry import derive_geometry
from transmla.modeling.determinism import WORKSPACE, is_deterministic, use_deterministic, written_once
from transmla.modeling.kernels import fused, packed
from transmla.plan import determinism_checks
from transmla.plan.determinism_checks import check_determinism
from transmla.recipe.compose import load_recipe
from transmla.recover import trainer as trainer_module
from transmla.recover.arguments import common_arguments
from transmla.recover.rehearsal import rehearse


@pytest.fixture(autouse=True)
def _off_again(monkeypatch: pytest.MonkeyPatch):
    for name in (WORKSPACE, "NCCL_ALGO"):
        monkeypatch.setenv(name, "x")  # so that it is taken away again
        monkeypatch.delenv(name)
    yield
    use_deterministic(False)


def test_what_it_switches() -> None:
    use_deterministic(True)
    assert is_deterministic() and torch._inductor.config.deterministic and torch.backends.cudnn.deterministic
    assert os.environ[WORKSPACE] == ":4096:8" and os.environ["NCCL_ALGO"] == "Ring"
    with written_once():
        assert not is_deterministic()
    assert is_deterministic()
    use_deterministic(False)
    assert not is_deterministic() and not torch._inductor.config.deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    use_deterministic(True)
    assert os.environ[WORKSPACE] == ":16:8"


def checked(*overrides: str, device: str = "cuda") -> list[str]:
    recipe = load_recipe("debug", ["deterministic=true", *overrides])
    config = tiny_config(vocab_size=260)
    return check_determinism(recipe, config, derive_geometry(config, recipe.convert), device, torch.bfloat16)


@pytest.fixture
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


ON_POLICY = (
    "recover=[{kind: on_policy, data: [sample_train], tokens: 20000, prompt_tokens: 16, max_new_tokens: 16, "
    "trainer: {top_p: 0.9}}]"
)
SFT = "recover=[{kind: sft, data: [sample_train], tokens: 9000, %s}]"
TEXT = "write=[{kind: text, name: own, tokens: 1000, engine: %s}]"


@pytest.mark.parametrize(
    "override, key",
    [
        ("recover.0.trainer.dataloader_in_order=false", "recover.0.trainer.dataloader_in_order"),
        (TEXT % "vllm", "write.0.engine"),
        (ON_POLICY, "recover.0.trainer.top_p"),
        (SFT % "compile: true, trainer: {packing: false}", "recover.0.compile"),
        (SFT % "compile: true, attention: mask", "recover.0.compile"),
        ("recover.0.attention=cudnn", "recover.0.attention"),
    ],
)
def test_what_is_refused(override: str, key: str, _card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism_checks, "why_not_ordered", lambda *_: "it adds in any order")
    with pytest.raises(RecipeError) as error:
        checked(override)
    assert error.value.key == key


def test_another_workspace_is_refused(_card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(RecipeError, match=WORKSPACE):
        checked()


def test_what_is_replaced(_card) -> None:
    kept = "keep_teacher: true, trainer: {packing_strategy: wrapped, max_length: 128}"
    found = checked(f"recover=[{{kind: distill, data: [sample_train], tokens: 9000, {kept}}}]", TEXT % "auto")
    assert [line.split(":")[0] for line in found] == ["recover.0.keep_teacher", "write"]
    assert checked() == []


@pytest.mark.parametrize(
    "override",
    [
        "recover.0.compile=true",
        SFT % "compile: true, trainer: {packing_strategy: wrapped}",
        SFT % "trainer: {packing: false}",
        "recover.1.attention=flash",
    ],
)
def test_what_passes(override: str, _card) -> None:
    assert checked(override) == []


def test_nothing_is_checked_without_the_key() -> None:
    recipe = load_recipe("debug", [TEXT % "vllm"])
    assert check_determinism(recipe, tiny_config(), None, "cuda", torch.bfloat16) == []  # type: ignore[arg-type]


def test_running_sums_of_integers_are_those_of_numbers() -> None:
    probabilities = torch.rand(3, 5000).softmax(-1).sort(-1, descending=True)[0]
    plain = _running_sum(probabilities)
    use_deterministic(True)
    assert torch.allclose(_running_sum(probabilities), plain, atol=2e-6)
    assert torch.equal(_running_sum(probabilities.flip(-1))[:, -1], _running_sum(probabilities)[:, -1])  # in any order


def test_attention_on_a_gpu_goes_by_kernels_with_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cuDNN PyTorch itself thinks so; FlashAttention-2 has equal widths and no mask."""
    assert SDPBackend.CUDNN_ATTENTION not in fused.ORDERED_PRIORITY
    calls: list = []

    def computed(query, key, value, mask, *rest, **named):
        calls.append(value.shape[-1])
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    monkeypatch.setattr(fused.F, "scaled_dot_product_attention", computed)
    query, value = torch.zeros(1, 2, 4, 24, device="meta"), torch.zeros(1, 2, 4, 16, device="meta")
    for wanted, expected in ((False, 16), (True, 24)):
        use_deterministic(wanted)
        assert fused.sdpa(query, query, value, None, 1.0, 0.0).shape == (1, 4, 2, 16)
        assert calls[-1] == expected
    fused.sdpa(query, query, value, torch.zeros(4, 4, device="meta"), 1.0, 0.0)
    assert calls[-1] == 16


@pytest.mark.parametrize("reason", [None, "it adds in any order"])
def test_cudnn_computes_packed_documents_where_it_adds_in_one_order(reason, monkeypatch) -> None:
    asked: list = []
    monkeypatch.setattr(packed, "has_cudnn", lambda device: True)
    monkeypatch.setattr(packed, "why_not_ordered", lambda *given: (asked.append(given), reason)[1])
    query, value = torch.empty(6, 4, 16), torch.empty(6, 4, 8)
    assert packed._by_cudnn(query, value, packed.LONG_ONES) and not asked
    use_deterministic(True)
    assert packed._by_cudnn(query, value, packed.LONG_ONES) is (reason is None)
    assert asked == [(query.device, torch.float32, 16, 8)]
    assert not packed._by_cudnn(query, value, packed.ALWAYS_FLASH)


def test_ddp_keeps_its_buckets(tmp_path: Path) -> None:
    stage = load_recipe("debug", []).recover[1]
    arguments = dict(seed=0, device="cpu", dtype=torch.float32, processes=4)
    assert "ddp_find_unused_parameters" not in common_arguments(stage, tmp_path, **arguments)
    use_deterministic(True)
    assert common_arguments(stage, tmp_path, **arguments)["ddp_find_unused_parameters"] is True


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_a_rehearsal_leaves_nothing_behind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses, same weights, same count of tokens as without; it is before the first step alone."""
    rehearsed: list = []
    monkeypatch.setattr(trainer_module, "rehearse", lambda *given: (rehearsed.append(0), rehearse(*given)))
    found = []
    for wanted in (False, True):
        trainer = make_trainer(kind, tmp_path / str(wanted))
        assert not trainer.rehearses
        trainer.rehearses = wanted
        trainer.train()
        log = [(line.get("loss"), line.get("num_tokens")) for line in trainer.state.log_history]
        found.append((log, [value.clone() for value in trainer.student.parameters()]))
    assert len(rehearsed) == 1
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_the_teacher_reads_every_batch(tmp_path: Path) -> None:
    fields = dict(stage={"keep_teacher": True}, packing_strategy="wrapped")
    assert make_trainer("distill", tmp_path / "kept", **fields).states is not None
    use_deterministic(True)
    trainer = make_trainer("distill", tmp_path / "read", **fields)
    assert trainer.states is None and trainer.means.endswith("deterministic")

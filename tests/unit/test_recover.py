"""Trainers: loss normalisation over accumulation and packing, resuming, what is trained."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.conftest import settings, tiny_model, windows
from transmla.convert.conversion import convert_model
from transmla.modeling.student import ATTENTION
from transmla.recipe.model_source import ModelSource
from transmla.recipe.stages import Distill, Layerwise, Sft
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.stage import build_trainer, run_stage, trainer_config
from transmla.sources.random_model import make_random_model

LENGTH = 24
PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.5,
}  # weights change by the gradient itself: a wrong factor is a wrong change


def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    config = dict(
        model_type="llama",
        vocab_size=260,
        hidden_size=16,
        num_attention_heads=1,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    make_random_model(ModelSource(source="random", config=config), folder)
    return AutoTokenizer.from_pretrained(folder)


def documents() -> list[list[int]]:
    """Documents of 5 to 24 tokens."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(5, LENGTH + 1, (64,), generator=generator).tolist()
    return [torch.randint(1, 97, (size,), generator=generator).tolist() for size in sizes]


def make_trainer(
    kind: str,
    folder: Path,
    *,
    steps: int = 4,
    batch: int = 2,
    accumulate: int = 1,
    processes: int = 1,
    dtype: torch.dtype = torch.float32,
    stage: dict | None = None,
    student=None,  # of an earlier stage
    convert: dict | None = None,  # settings of the conversion
    **trainer: object,
):
    torch.manual_seed(0)
    teacher = tiny_model(dtype=dtype)
    section = settings(qk_rope_head_dim=8, kv_lora_rank=24, **(convert or {}))
    done = convert_model(teacher, section, torch.cat(windows()))
    statistics = done.statistics
    student = copy.deepcopy(done.student) if student is None else student
    defaults = dict(
        max_length=LENGTH,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        max_grad_norm=0.0,
    )
    fields = dict(data=["unused"], tokens=steps * batch * accumulate * processes * LENGTH, trainer=defaults | trainer)
    kinds = {"layerwise": Layerwise, "distill": Distill, "sft": Sft}
    default = {} if kind == "layerwise" else {"train": "all"}
    stage = kinds[kind](kind=kind, **fields | default | (stage or {}))
    config = trainer_config(stage, folder, seed=0, device="cpu", dtype=dtype, processes=processes)
    data = Dataset.from_dict({"input_ids": documents(), "labels": documents()})
    scales = [layer.output_mean_square for layer in statistics]
    return build_trainer(
        stage, student, None if kind == "sft" else teacher, tokenizer(folder / "tokenizer"), config, data, scales=scales
    )


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_accumulation_does_not_change_the_loss(kind: str, tmp_path) -> None:
    """The same global batch in one piece or in four: same losses, same weights."""
    runs = {}
    for name, batch, accumulate in (("whole", 8, 1), ("parts", 2, 4)):
        trainer = make_trainer(kind, tmp_path / name, batch=batch, accumulate=accumulate, packing=False, **PLAIN)
        before = [value.detach().clone() for value in trainer.model.parameters()]
        trainer.train()
        change = [(new - old).flatten() for new, old in zip(trainer.model.parameters(), before, strict=True)]
        runs[name] = (losses(trainer), torch.cat(change).detach())
    assert len(runs["whole"][0]) == 4
    torch.testing.assert_close(runs["whole"][0], runs["parts"][0], rtol=1e-5, atol=1e-7)
    assert (runs["whole"][1] - runs["parts"][1]).norm() < 1e-4 * runs["whole"][1].norm()


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_packed_equals_unpacked_loss(kind: str, tmp_path) -> None:
    """The mean over tokens of the same documents, packed into rows or one a row."""
    sums = {}
    for packing in (False, True):
        trainer = make_trainer(kind, tmp_path / str(packing), batch=4, packing=packing)
        total = count = 0.0
        for batch in trainer.get_train_dataloader():
            with torch.no_grad():
                out = trainer.model(inputs=batch, objective=True)
            total, count = total + out["total"].double(), count + int(out["tokens"])
        sums[packing] = (float(total), count)
    assert sums[False][1] == sums[True][1]
    assert sums[False][0] == pytest.approx(sums[True][0], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "stage"), [("layerwise", {}), ("distill", {}), ("distill", {"muon_learning_rate": 1.5})]
)
def test_stopped_and_resumed_equals_straight(kind: str, stage: dict, tmp_path) -> None:
    """Bitwise: losses and weights of eight steps, and of five, a kill, and the rest."""
    straight = make_trainer(kind, tmp_path / "straight", steps=8, save_steps=4, stage=stage)
    run_stage(straight, torch.float32)

    stopped = make_trainer(kind, tmp_path / "stopped", steps=8, save_steps=4, stage=stage)

    class Killed(BaseException):
        pass

    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    stopped.add_callback(Kill())
    with pytest.raises(Killed):
        stopped.train()
    resumed = make_trainer(kind, tmp_path / "stopped", steps=8, save_steps=4, stage=stage)
    result = run_stage(resumed, torch.float32, last_checkpoint(tmp_path / "stopped"))
    assert result["resumed_from"].endswith("checkpoint-4")
    assert losses(resumed) == losses(straight)
    assert result["tokens"] == straight._total_train_tokens
    for (name, one), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_only_attention_learns_and_the_trunk_is_shared(tmp_path) -> None:
    trainer = make_trainer("layerwise", tmp_path)
    teacher = dict(trainer.teacher.named_parameters())
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    for name in before:
        if ATTENTION not in name:
            assert trainer.model.get_parameter(name).data_ptr() == teacher[name].data_ptr()
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) == (ATTENTION not in name), name


@pytest.mark.parametrize("kind", ["layerwise", "distill"])
def test_training_lowers_the_loss(kind: str, tmp_path) -> None:
    trainer = make_trainer(kind, tmp_path, steps=24, batch=4, learning_rate=3e-3)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < 0.8 * sum(history[:4])
    assert all("tokens_per_second" in line for line in trainer.state.log_history[1:] if "loss" in line)


@pytest.mark.parametrize("kind", ["layerwise", "distill"])
def test_bfloat16_training_keeps_float32_masters_and_one_format(kind: str, tmp_path) -> None:
    """Small steps are not lost in rounding, and the student that is saved has one number format."""
    trainer = make_trainer(kind, tmp_path, dtype=torch.bfloat16, steps=8, learning_rate=1e-4)
    learning = [value for value in trainer.model.parameters() if value.requires_grad]
    assert {value.dtype for value in learning} == {torch.float32}
    if kind == "layerwise":
        assert {value.dtype for value in trainer.model.parameters() if not value.requires_grad} == {torch.bfloat16}
    run_stage(trainer, torch.bfloat16)
    assert {value.dtype for value in trainer.model.parameters()} == {torch.bfloat16}
    assert trainer.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(loss > 0 for loss in losses(trainer))


def test_layerwise_loss_is_the_mean_over_layers(tmp_path) -> None:
    """Against attention outputs collected by hand."""
    trainer = make_trainer("layerwise", tmp_path, packing=False)
    row = torch.tensor([documents()[0]])
    seen = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out, index=index: seen.update({index: (kwargs["hidden_states"], out[0])}),
            with_kwargs=True,
        )
        for index, layer in enumerate(trainer.teacher.model.layers)
    ]
    with torch.no_grad():
        trainer.teacher.model(row)
    for handle in handles:
        handle.remove()
    student = trainer.model
    rotation = student.model.rotary_emb(row.float(), torch.arange(row.shape[1])[None])
    expected = 0.0
    for index, (x, out) in seen.items():
        with torch.no_grad():
            own, _ = student.model.layers[index].self_attn(x, position_embeddings=rotation)
        expected += float((own - out).square().sum()) / trainer.scales[index] / len(seen)
    got = trainer.objective(student, {"input_ids": row, "attention_mask": torch.ones_like(row)})
    assert got.total.item() == pytest.approx(expected, rel=1e-5)
    assert int(got.tokens) == row.numel()

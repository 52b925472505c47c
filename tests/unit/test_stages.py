"""Kinds of stages: what they minimise, what they train, what is left of adapters."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from tests.conftest import FULL, settings, tiny_model, windows
from tests.unit.test_recover import documents, losses, make_trainer
from transmla.convert.conversion import convert_model
from transmla.measure import attention_taps as taps
from transmla.measure.attention_errors import attention_errors
from transmla.measure.attention_taps import attention_divergence
from transmla.modeling.student import ATTENTION
from transmla.recover.checkpoints import last_checkpoint
from transmla.recover.collator import CountingCollator, kept_of
from transmla.recover.stage import run_stage


def row() -> dict[str, torch.Tensor]:
    tokens = torch.tensor([documents()[0]])
    return {"input_ids": tokens, "labels": tokens.clone()}


def test_sft_is_the_cross_entropy_of_unmasked_labels(tmp_path) -> None:
    trainer = make_trainer("sft", tmp_path)
    batch = row()
    batch["labels"][:, :4] = -100
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"]).logits[0, :-1]
        expected = F.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100, reduction="sum")
        got = trainer.objective(trainer.model, batch)
    assert int(got.tokens) == batch["input_ids"].shape[1] - 4
    torch.testing.assert_close(got.total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "stage, term",
    [
        ({"divergence": "reverse_kl"}, lambda p, q: (q * (q / p).log()).sum()),
        (
            {"divergence": "jsd", "beta": 0.3},
            lambda p, q: (
                0.3 * (p * (p / (0.3 * p + 0.7 * q)).log()).sum() + 0.7 * (q * (q / (0.3 * p + 0.7 * q)).log()).sum()
            ),
        ),
        ({"temperature": 2.0}, None),
        ({"cross_entropy": 0.25}, lambda p, q: 0.75 * (p * (p / q).log()).sum()),
    ],
    ids=["reverse", "jsd", "temperature", "mixture"],
)
def test_distillation_is_what_the_recipe_says(stage, term, tmp_path) -> None:
    trainer = make_trainer("distill", tmp_path, stage=stage)
    batch = row()
    with torch.no_grad():
        ours, theirs = (m(batch["input_ids"]).logits[0, :-1].double() for m in (trainer.model, trainer.teacher))
        got = float(trainer.objective(trainer.model, batch).total)
    temperature = stage.get("temperature", 1.0)
    p, q = (F.softmax(x / temperature, -1) for x in (theirs, ours))
    expected = (temperature**2 * (p * (p / q).log()).sum()) if term is None else term(p, q)
    if "cross_entropy" in stage:
        expected = expected + 0.25 * F.cross_entropy(ours, batch["labels"][0, 1:], reduction="sum")
    assert got == pytest.approx(float(expected), rel=1e-5)


def test_temperature_moves_linearly(tmp_path) -> None:
    trainer = make_trainer("distill", tmp_path, steps=5, stage={"temperature": 3.0, "final_temperature": 1.0})
    seen = []
    for step in range(5):
        trainer.state.global_step = step
        seen.append(trainer.temperature())
    assert seen == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0])


@pytest.mark.parametrize("kind", ["layerwise", "distill", "sft"])
def test_adapters_learn_and_are_merged(kind: str, tmp_path) -> None:
    """The merged student is the adapted one, only its attentions have changed, and nothing of peft is left."""
    trainer, again = (
        make_trainer(kind, tmp_path / name, stage={"train": "lora"}, steps=24, batch=4, learning_rate=3e-3)
        for name in ("adapted", "merged")
    )
    before = {name: value.detach().clone() for name, value in trainer.student.state_dict().items()}
    learning = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    tokens = row()["input_ids"]
    trainer.train()
    history = losses(trainer)
    with torch.no_grad():
        adapted = trainer.student.eval()(tokens).logits
    run_stage(again, torch.float32)
    student = again.student
    assert losses(again) == history
    assert set(student.state_dict()) == {name.replace(".base_layer", "") for name in before if "lora_" not in name}
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
    for name, value in student.state_dict().items():
        old = before[name if name in before else name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(value, old) == (ATTENTION not in name), name
    assert sum(history[-4:]) < sum(history[:4])


class Killed(BaseException):
    """What an interrupted run dies of."""


class KillAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


RELATIVE = {"train": "all", "trunk_learning_rate": 0.5, "relative_learning_rate": True}


@pytest.mark.parametrize(
    ("stage", "rate"), [({"train": "lora"}, 1e-3), (RELATIVE, 0.7)]
)  # two steps of 0.7 change every size
def test_parameters_of_their_own_resume_bitwise(stage: dict, rate: float, tmp_path) -> None:
    """Adapters; and rates by the sizes that weights had at the stage's start, not in the checkpoint."""
    options = dict(stage=stage, steps=4, save_steps=2, learning_rate=rate)
    straight = make_trainer("distill", tmp_path / "straight", **options)
    run_stage(straight, torch.float32)
    stopped = make_trainer("distill", tmp_path / "stopped", **options)
    stopped.add_callback(KillAtThree())
    with pytest.raises(Killed):
        stopped.train()
    resumed = make_trainer("distill", tmp_path / "stopped", **options)
    checkpoint = last_checkpoint(tmp_path / "stopped")
    assert run_stage(resumed, torch.float32, checkpoint)["resumed_from"].endswith("checkpoint-2")
    assert losses(resumed) == losses(straight)
    for (name, one), other in zip(straight.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, other), name


def by_hand(trainer, tokens, *, stream: str, hidden: float) -> list[float]:
    """Errors by layer, walking through both models one layer at a time."""
    teacher, student = trainer.teacher, trainer.student
    positions = torch.arange(tokens.shape[1])[None]
    turn = teacher.model.rotary_emb(torch.zeros(1), positions)
    own_turn = student.model.rotary_emb(torch.zeros(1), positions)
    theirs = ours = teacher.model.embed_tokens(tokens)
    found = []
    for index, (one, other) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        start = theirs if stream == "teacher" else ours
        expected, _ = one.self_attn(one.input_layernorm(theirs), position_embeddings=turn, attention_mask=None)
        got, _ = other.self_attn(other.input_layernorm(start), position_embeddings=own_turn)
        theirs = theirs + expected
        theirs = theirs + one.mlp(one.post_attention_layernorm(theirs))
        after = start + got
        after = after + other.mlp(other.post_attention_layernorm(after))
        ours = after
        error = (got - expected).square().sum() + hidden * (after - theirs).square().sum()
        found.append(float(error) / trainer.scales[index])
    return found


@pytest.mark.parametrize("stream", ["teacher", "student"])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_transfer_against_a_walk_by_hand(stream: str, hidden: float, tmp_path) -> None:
    trainer = make_trainer("layerwise", tmp_path)
    tokens = row()["input_ids"]
    with torch.no_grad():
        expected = by_hand(trainer, tokens, stream=stream, hidden=hidden)
    got = attention_errors(
        trainer.teacher, trainer.student, {"input_ids": tokens}, trainer.scales, stream=stream, hidden=hidden
    )
    assert got.tolist() == pytest.approx(expected, rel=1e-4)
    # An attention answers for its own layer alone: the last layer's error has no gradient in the first.
    first = next(trainer.student.model.layers[0].self_attn.parameters())
    assert torch.autograd.grad(got[-1], first, retain_graph=True)[0].abs().max() == 0  # all errors are one stack
    assert torch.autograd.grad(got[0], first)[0].abs().max() > 0


@torch.no_grad()
def attention_maps(trainer, tokens, mask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention weights of teacher and student by layer, [B, H, T, T], both on the teacher's stream, by eager
    attention."""
    teacher, student = copy.deepcopy(trainer.teacher), copy.deepcopy(trainer.student)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    positions = torch.arange(tokens.shape[1])[None]
    turns = [model.model.rotary_emb(torch.zeros(1), positions) for model in (teacher, student)]
    hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1) | (mask[:, None, None] == 0)
    penalty = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    stream, found = teacher.model.embed_tokens(tokens), []
    for one, other in zip(teacher.model.layers, student.model.layers, strict=True):
        x = one.input_layernorm(stream)
        maps = [
            layer.self_attn(x, position_embeddings=turn, attention_mask=penalty)[1]
            for layer, turn in zip((one, other), turns, strict=True)
        ]
        found.append(tuple(maps))
        stream = stream + one.self_attn(x, position_embeddings=turns[0], attention_mask=penalty)[0]
        stream = stream + one.mlp(one.post_attention_layernorm(stream))
    return found


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("queries", [4, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_logits_against_attention_maps(
    padded: bool, queries: int, hidden: float, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(taps, "QUERIES", queries)
    trainer = make_trainer("layerwise", tmp_path)
    tokens = torch.randint(1, 97, (2, 19))
    mask = torch.ones_like(tokens)
    mask[1, 13:] = 1 - int(padded)
    batch = {"input_ids": tokens} | ({"attention_mask": mask} if padded else {})
    models = trainer.teacher, trainer.student, batch, trainer.scales
    kernel = trainer.student.config._attn_implementation
    plain = attention_errors(*models, hidden=hidden)
    got = attention_errors(*models, hidden=hidden, logits=0.7) - plain
    assert trainer.student.config._attn_implementation == trainer.teacher.config._attn_implementation == kernel
    chosen = taps.chosen_queries(19, tokens.device)
    assert len(chosen) == {4: 4, 128: 19}[queries] and chosen[-1] == 18
    for index, (p, q) in enumerate(attention_maps(trainer, tokens, mask)):
        p, q = p[:, :, chosen].double(), q[:, :, chosen].double()
        kl = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1).mean(1)[mask[:, chosen] == 1].mean()
        assert got[index].item() == pytest.approx(0.7 * float(kl * mask.sum()), rel=1e-4)
    query = trainer.student.model.layers[0].self_attn.q_proj.weight
    assert torch.autograd.grad(got[0], query)[0].abs().max() > 0


def test_attention_logits_of_padding_on_the_left_are_numbers(tmp_path) -> None:
    """A padding token's query sees nothing; neither the loss nor a gradient may become NaN of it."""
    trainer = make_trainer("layerwise", tmp_path)
    tokens = torch.randint(1, 97, (2, 19))
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    errors = attention_errors(trainer.teacher, trainer.student, batch, trainer.scales, logits=1.0)
    errors.sum().backward()
    assert errors.isfinite().all()
    for name, value in trainer.student.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), name
    logits = torch.randn(1, 2, 3, 4)
    assert torch.equal(
        attention_divergence(logits, -logits, torch.zeros(1, 1, 3, 4, dtype=torch.bool)), torch.zeros(1, 3)
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_exact_student_attends_as_its_teacher(family: str) -> None:
    """Biases, windows and caps included; a student that is not exact does not."""
    fields = {"sliding_window": 8} if family == "gemma2" else {}
    teacher = tiny_model(family, groups=1, **fields)
    tokens = torch.randint(1, 97, (2, 19))
    for convert, low, high in ((FULL, -1e-6, 1e-6), (dict(qk_rope_head_dim=8, kv_lora_rank=16), 1e-2, 10.0)):
        student = convert_model(teacher, settings(**convert, refit=False), torch.cat(windows())).student
        with torch.no_grad():
            batch = {"input_ids": tokens}
            both = [attention_errors(teacher, student, batch, [1.0, 1.0], logits=weight) for weight in (0.0, 1.0)]
        assert all(low <= value <= high for value in ((both[1] - both[0]) / tokens.numel()).tolist())


@pytest.mark.parametrize(
    "stage",
    [{"stream": "student"}, {"hidden": 0.5}, {"stream": "student", "hidden": 0.5, "logits": 0.1}, {"logits": 1.0}],
)
def test_transfer_learns_on_either_stream(stage, tmp_path) -> None:
    trainer = make_trainer("layerwise", tmp_path, stage=stage, steps=24, batch=4, learning_rate=3e-3)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < 0.8 * sum(history[:4])


def test_trunk_learns_at_a_rate_of_its_own(tmp_path) -> None:
    """One plain SGD step: attentions change as without the key, everything else by the share of that."""
    from tests.unit.test_recover import PLAIN

    changes = []
    for share in (1.0, 0.25):
        trainer = make_trainer("distill", tmp_path / str(share), steps=1, stage={"trunk_learning_rate": share}, **PLAIN)
        before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
        trainer.train()
        changes.append({name: value.detach() - before[name] for name, value in trainer.student.named_parameters()})
    for name, whole in changes[0].items():
        share = 1.0 if ATTENTION in name else 0.25
        assert whole.abs().max() > 0
        torch.testing.assert_close(changes[1][name], share * whole, rtol=1e-3, atol=1e-6)


def test_rates_relative_to_the_weights(tmp_path) -> None:
    """One plain SGD step: every matrix changes by its own size times what it changes otherwise; vectors by the
    median."""
    from tests.unit.test_recover import PLAIN

    changes = []
    for relative in (False, True):
        stage = {"relative_learning_rate": relative, "train": "all", "trunk_learning_rate": 0.5}
        trainer = make_trainer("distill", tmp_path / str(relative), steps=1, stage=stage, **PLAIN)
        before = {name: value.detach().clone() for name, value in trainer.student.named_parameters()}
        trainer.train()
        changes.append({name: value.detach() - before[name] for name, value in trainer.student.named_parameters()})
    sizes = {name: float(value.square().mean().sqrt()) for name, value in before.items() if value.ndim == 2}
    for name, plain in changes[0].items():
        assert plain.abs().max() > 0
        ratio = float((changes[1][name] * plain).sum() / plain.square().sum())
        wanted = sizes.get(name, sorted(sizes.values())[(len(sizes) - 1) // 2])
        assert ratio == pytest.approx(wanted, rel=0.2)  # rounded to steps of 1.41
        torch.testing.assert_close(changes[1][name], ratio * plain, rtol=1e-3, atol=1e-7)
    assert max(sizes.values()) > 1.5 * min(sizes.values())


@pytest.mark.parametrize("kind", ["layerwise", "distill"])
def test_compiled_layers_compute_the_same(kind: str, tmp_path) -> None:
    """Through another backend than the default, which would need a compiler: graphs are cut and guarded in the same
    way."""
    plain = make_trainer(kind, tmp_path / "plain", steps=2, packing=False)
    plain.train()
    with pytest.MonkeyPatch.context() as patch:
        original = torch.compile
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        patch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
        compiled = make_trainer(kind, tmp_path / "compiled", steps=2, packing=False, stage={"compile": True})
        compiled.train()
    assert 2 <= len(graphs) <= 8, "one graph a kind of layer and mode, not one a layer and step"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    student = compiled.student
    from transmla.recover.compiling import plain_layers

    plain_layers(student, compiled.teacher)
    assert not any("forward" in vars(module) for module in student.model.modules())


def test_merging_leaves_the_teacher_alone(tmp_path) -> None:
    """Adapters on the MLPs, whose weights student and teacher share in float32."""
    stage = {"train": "lora", "lora": {"r": 4, "alpha": 8, "targets": "all"}}
    trainer = make_trainer("distill", tmp_path, stage=stage, steps=4, learning_rate=1e-2)
    before = {name: value.detach().clone() for name, value in trainer.teacher.named_parameters()}
    run_stage(trainer, torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.named_parameters())
    changed = [
        name
        for name, value in trainer.student.named_parameters()
        if name in before and not torch.equal(value, before[name])
    ]
    assert any("mlp" in name for name in changed)


def test_a_batch_knows_its_scored_positions_and_drops_an_idle_mask(tmp_path) -> None:
    tokens = torch.arange(10).view(2, 5)
    labels = tokens.clone()
    labels[0, :3] = labels[1, 2] = -100
    mask = torch.ones(2, 5, dtype=torch.long)
    batch = CountingCollator(lambda rows: {"labels": labels, "attention_mask": mask})([])
    assert "attention_mask" not in batch
    values = torch.randn(2, 4, 3)
    assert torch.equal(kept_of(values, batch["kept"]), values[labels[:, 1:] != -100])
    assert torch.equal(kept_of(values, torch.arange(8)), values.flatten(0, 1))
    mask[1, 0] = 0
    assert CountingCollator(lambda rows: {"labels": labels, "attention_mask": mask})([])["attention_mask"] is mask


@pytest.mark.parametrize("kind", ["distill", "sft"])
def test_what_the_collator_says_changes_nothing(kind: str, tmp_path) -> None:
    trainer = make_trainer(kind, tmp_path)
    rows = [{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in documents()[:2]]
    batch = trainer.data_collator(rows)
    assert "kept" in batch
    found = [
        trainer.objective(trainer.model, inputs) for inputs in (batch, {k: v for k, v in batch.items() if k != "kept"})
    ]
    assert found[0].total.item() == found[1].total.item() and int(found[0].tokens) == int(found[1].tokens)


def test_a_student_goes_on_to_another_stage_under_autocast(tmp_path) -> None:
    """Accelerate marks what it has prepared, and would leave the second stage's products in float32."""
    first = make_trainer("distill", tmp_path / "a", steps=1, dtype=torch.bfloat16)
    run_stage(first, torch.bfloat16)
    second = make_trainer("distill", tmp_path / "b", steps=1, dtype=torch.bfloat16, student=first.student)
    projection = second.student.model.layers[0].self_attn.q_proj
    seen = []
    projection.register_forward_hook(lambda module, args, out: seen.append((module.weight.dtype, out.dtype)))
    second.train()
    assert seen == [(torch.float32, torch.bfloat16)]

"""The stages of a recipe's `recover` list: what each kind trains, on what, and against which loss.

Part of the schema in `transmla.recipe`; nothing here loads a model or a dataset.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeGuard, get_args

from pydantic import Field, field_validator, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Dimension, Factor, Length, Number, Share, Temperature, Tokens
from transmla.recipe.data_lists import DataList
from transmla.recipe.folder_name import PathText
from transmla.recipe.model_source import ModelSource
from transmla.recipe.trainer_keys import check_kind, check_trainer_key


class Stage(Section):
    """What every recovery stage has. `trainer` holds keys of trl's SFTConfig, checked against that class."""

    data: DataList
    tokens: Tokens  # training budget in tokens; the number of steps follows from it
    trainer: dict[str, Any] = {}
    trainer_config: ClassVar[str] = "SFTConfig"

    @field_validator("trainer")
    @classmethod
    def _known_trainer_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = {key: check_trainer_key(key, item, cls.trainer_config) for key, item in value.items()}
        check_kind(found, get_args(cls.model_fields["kind"].annotation)[0])
        return found


class Lora(Section):
    """Low-rank adapters (peft's LoraConfig), merged into the weights when the stage ends."""

    r: Dimension = 32
    alpha: Dimension = 64
    dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["attention", "all"] = "attention"  # linear layers of the attentions, or those of the MLPs too


class TrainerStage(Stage):
    """What the stages of this project's own trainers have besides.

    compile: the layers of student and teacher; `auto`: where it pays (transmla.recover.compiling.why_not).
    attention: what computes it over packed documents: cuDNN's kernel, FlashAttention's, or any by a mask; `auto`: the
        fastest that there is (transmla.modeling.kernels.packed).
    relative_learning_rate: the learning rate is a share of every weight's size, its root mean square when the stage
        begins, so that one rate fits models of large and of small weights: AdamW moves a weight by about its learning
        rate a step.
    muon_learning_rate: of the matrices of the layers, as a share of the learning rate that they have; Muon trains them,
        AdamW the rest. None: AdamW trains everything.
    """

    train: Literal["attention", "all", "lora"]
    compile: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "cudnn", "flash", "mask"] = "auto"
    relative_learning_rate: bool = False
    muon_learning_rate: Factor | None = None
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _no_idle_keys(self) -> TrainerStage:
        """A key that does nothing is a mistake, and would make a finished stage again when it changes."""
        if self.chosen("lora") and self.train != "lora":
            raise ValueError("lora is for train: lora; leave one of them out, or set train")
        if self.chosen("trunk_learning_rate") and self.train != "all":
            raise ValueError("trunk_learning_rate is for train: all, where the trunk learns too")
        if self.relative_learning_rate and self.train == "lora":
            raise ValueError("relative_learning_rate is for weights; adapters begin at zero and have no size")
        if self.muon_learning_rate is not None:
            self._check_muon()
        return self

    def _check_muon(self) -> None:
        """Muon trains whole matrices, and AdamW what is beside them."""
        if self.train == "lora":
            raise ValueError("muon_learning_rate is for the matrices of the layers, not for adapters; leave it out")
        if self.relative_learning_rate:
            raise ValueError(
                "Muon's steps have a size of their own; leave out muon_learning_rate or relative_learning_rate"
            )
        optimizer = self.trainer.get("optim", BESIDE_MUON[0])
        if optimizer not in BESIDE_MUON:
            raise ValueError(
                f"muon_learning_rate: beside Muon the rest is trained by AdamW, not {optimizer}; use trainer.optim: "
                f"{' or '.join(BESIDE_MUON)}"
            )
        if self.trainer.get("optim_args"):
            raise ValueError("muon_learning_rate: trainer.optim_args are not read beside Muon; leave them out")


BESIDE_MUON = ("adamw_torch_fused", "adamw_torch")  # values of trainer.optim

Weight = Annotated[Number, Field(ge=0.0, le=1e6)]

QUERIES = 128  # of a row whose attention `logits` compares; all of them would be a T×T matrix a head


class Layerwise(TrainerStage):
    """Attention transfer: every student attention towards the output of the teacher's, all layers at once.

    stream: whose residual stream the student's attentions read: the teacher's own, or the student's, where every layer
        answers for what the ones below it have left wrong.
    hidden: weight of the error of the residual stream after the layer, beside that of the attention's output.
    logits: weight of the divergence between the attention distributions, KL(teacher ‖ student) in nats, mean over heads
        and a sample of the queries.
    """

    kind: Literal["layerwise"]
    train: Literal["attention", "lora"] = "attention"
    stream: Literal["teacher", "student"] = "teacher"
    hidden: Weight = 0.0
    logits: Weight = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Layerwise:
        if self.logits and self.compile is True:
            raise ValueError(
                "logits are read inside the attentions, where a compiled one cannot be looked into; use compile: false"
            )
        if self.trainer.get("gradient_checkpointing") and (self.stream == "student" or self.hidden or self.logits):
            raise ValueError(
                "errors taken inside the layers cannot be recomputed; use trainer.gradient_checkpointing: false"
            )
        if self.train == "lora" and self.lora.targets == "all" and not self.hidden:
            raise ValueError(
                "lora.targets all: adapters of the MLPs learn from the stream after the layer alone; set hidden"
            )
        return self


class Record(Section):
    """What `transmla record` keeps of the teacher's next-token distribution.

    dtype: of the log-probabilities. bfloat16 has an eighth of float16's digits in the same bytes: near the end of
        recovery some rows' gradients are lost in it.
    folder: where it lies; None: below the output directory. A recording depends on source, text and packing alone, so
        that several conversions of one source may share it.
    """

    top_k: Dimension = 64
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    folder: PathText | None = None


class Distill(TrainerStage):
    """Divergence to the teacher's next-token distribution, in part cross-entropy of the text if wanted.

    divergence, beta: as in transmla.recover.divergence. temperature: of both models, in the loss;
        final_temperature: what it has become, linearly, in the last step.
    cross_entropy: share of the loss of tokens that no model wrote; synthetic_cross_entropy: of all tokens.
    trunk_learning_rate: of the weights outside the attentions, as a share of the learning rate; with `train: all`.
    teacher: `source`, what `transmla record` wrote of it, or another model of the same tokenizer, whose vocabulary may
        be padded otherwise.
    keep_teacher: the teacher's final hidden states stay on the device, so that it reads every row once, however often
        the student does; with `packing_strategy: wrapped`, whose rows are of one length. Of one process: of several,
        each would meet other rows in every pass, and the teacher reads them all.
    """

    kind: Literal["distill"]
    train: Literal["attention", "all", "lora"] = "attention"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.5
    temperature: Temperature = 1.0
    final_temperature: Temperature | None = None
    cross_entropy: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    synthetic_cross_entropy: bool = False
    trunk_learning_rate: Factor = 1.0
    teacher: Literal["source", "recorded"] | ModelSource = "source"
    keep_teacher: bool = False
    record: Record = Record()

    @model_validator(mode="after")
    def _recorded_at_one(self) -> Distill:
        if self.chosen("beta") and self.divergence != "jsd":
            raise ValueError("beta is for divergence: jsd")
        if self.teacher == "recorded" and (self.temperature, self.final_temperature or 1.0) != (1.0, 1.0):
            raise ValueError(
                "a recorded teacher has its largest probabilities at temperature 1 only; use temperature: 1"
            )
        if self.keep_teacher and self.teacher == "recorded":
            raise ValueError("a recorded teacher is on disk already; leave keep_teacher out")
        if self.synthetic_cross_entropy and not self.cross_entropy:
            raise ValueError(
                "synthetic_cross_entropy says of which tokens the cross-entropy is; set cross_entropy, or leave it out"
            )
        if self.keep_teacher and self.trainer.get("packing_strategy") != "wrapped":
            raise ValueError("keep_teacher needs rows of one length; use trainer.packing_strategy: wrapped")
        for key, needed in (("packing", True), ("padding_free", False), ("pad_to_multiple_of", None)):
            if self.keep_teacher and self.trainer.get(key, needed) != needed:
                raise ValueError(f"keep_teacher needs rows of one length; leave trainer.{key} out")
        return self


class Sft(TrainerStage):
    """Cross-entropy of texts, chats or traces, without a teacher."""

    kind: Literal["sft"]
    train: Literal["attention", "all", "lora"] = "all"
    trunk_learning_rate: Factor = 1.0


class OnPolicy(Stage):
    """Divergence from the teacher on the student's own continuations (arXiv:2306.13649), by trl's DistillationTrainer.

    prompts: of the data's conversations, all but the last turn of the assistant; `prompt` columns as they are; of text,
        the first prompt_tokens of every piece of prompt_tokens + max_new_tokens. Longer prompts are left out.
    tokens: the budget counts prompt_tokens + max_new_tokens for every continuation, however long it becomes.
    temperature: of sampling, and of both distributions in the divergence.
    beta: 1 is KL(student | teacher), 0 is KL(teacher | student), between them the generalised Jensen-Shannon
        divergence.
    trainer: keys of trl's DistillationConfig.
    """

    kind: Literal["on_policy"]
    train: Literal["attention", "all"] = "attention"
    prompt_tokens: Length = 512
    max_new_tokens: Length = 512
    temperature: Temperature = 1.0
    beta: Share = 1.0
    trainer_config: ClassVar[str] = "DistillationConfig"


STAGES = {"layerwise": Layerwise, "distill": Distill, "sft": Sft, "on_policy": OnPolicy}

AnyStage = Annotated[Layerwise | Distill | Sft | OnPolicy, Field(discriminator="kind")]


def is_recorded(stage: AnyStage) -> TypeGuard[Distill]:
    """Whether a stage learns from what `transmla record` kept of its teacher."""
    return stage.kind == "distill" and stage.teacher == "recorded"


def other_teacher(stage: AnyStage) -> ModelSource | None:
    """A stage's teacher where that is a model of its own, else None."""
    return stage.teacher if stage.kind == "distill" and isinstance(stage.teacher, ModelSource) else None

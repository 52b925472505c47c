"""The sections of a recipe that have a model write: `write`, and the `solve` of `evaluate`.

Part of the schema in `transmla.recipe`; nothing here loads a model or a dataset.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from transmla.recipe.base import Section
from transmla.recipe.bounds import Batch, Count, Length, Number, SamplingTemperature, Seed, Skipped, Tokens, Whole
from transmla.recipe.folder_name import FolderName, PathText

Samples = Annotated[Whole, Field(gt=0, le=10**4)]

IN_BOX = "{problem}\n\nReason step by step, and put the final answer within \\boxed{}."

IN_TAGS = "{problem}\n\nReason step by step, and put the final answer between <answer> and </answer>."


class Problems(Section):
    """Problems whose answers can be checked; a string is short for `data`.

    data: a data definition with the columns `problem` and `answer`, checked by math-verify.
    generator: a dataset of reasoning-gym, scored by its own score_answer; `size`, `seed` and `config` are its
        arguments.
    system: a system message before the problem.
    prompt: the user's message around `{problem}`; by default one that asks for \\boxed{} (data) or <answer>
        (generator).
    think: how a reply with reasoning looks, as "<think>\\n{thought}\\n</think>". The reply is begun with what stands
        before `{thought}`, unless the chat template does so itself; the answer is what follows on what stands behind
        it.
    """

    data: PathText | None = None
    generator: str | None = None
    size: Annotated[Whole, Field(gt=0, le=10**5)] = 500
    seed: Seed = 0
    config: dict[str, Any] = {}
    system: str | None = None
    prompt: str | None = None
    think: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, tree: Any) -> Any:
        return {"data": tree} if isinstance(tree, str) else tree

    @model_validator(mode="after")
    def _complete(self) -> Problems:
        if (self.data is None) == (self.generator is None):
            raise ValueError("give exactly one of data and generator")
        if self.data is not None and any(map(self.chosen, ("size", "seed", "config"))):
            raise ValueError("size, seed and config are for a generator; use skip and limit beside problems")
        if clash := {"size", "seed"} & set(self.config):
            raise ValueError(f"config.{min(clash)}: write {min(clash)} beside generator, not in its config")
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise ValueError("prompt must contain {problem}")
        if self.think is not None and not all(part.strip() for part in self.think.partition("{thought}")):
            raise ValueError("think must be an opening tag, {thought} and a closing tag")
        return self

    @property
    def asked(self) -> str:
        """The user's message around `{problem}`."""
        return self.prompt or (IN_BOX if self.generator is None else IN_TAGS)


class Sampling(Section):
    """How text is drawn from a model. temperature: 0 is greedy. batch_size: texts at a time, part of what seeds
    mean."""

    max_new_tokens: Length = 512
    temperature: SamplingTemperature = 1.0
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Batch = 32


class Writing(Sampling):
    """What every entry of `write` has: a name, by which `@NAME` in a `data` list means the text.

    engine: `auto` is vllm where it is installed and one process has a GPU, else transformers.
    """

    name: FolderName
    engine: Literal["auto", "transformers", "vllm"] = "auto"


def _check_samples(samples: int, temperature: float) -> None:
    if samples > 1 and temperature == 0:
        raise ValueError("several samples at temperature 0 are the same text; raise temperature")


class Traces(Writing):
    """Replies of the teacher to problems, kept where the checker accepts them.

    samples: replies to a problem. skip, limit: which problems.
    keep: `accepted` by the checker; `finished`, whatever ended by itself; `all`, also what was cut off.
    format: the columns that are written: `completion` (prompt and completion, exactly as they were drawn), `messages`,
        or `text` (prompt and completion in one), so that a stage can mix them with data of the same kind.
    """

    kind: Literal["traces"]
    problems: Problems
    samples: Samples = 1
    skip: Skipped = 0
    limit: Count | None = None
    keep: Literal["accepted", "finished", "all"] = "accepted"
    format: Literal["completion", "messages", "text"] = "completion"

    @model_validator(mode="after")
    def _random(self) -> Traces:
        _check_samples(self.samples, self.temperature)
        return self


class Text(Writing):
    """Text that the teacher writes by itself.

    tokens: at least so many are drawn. prefix_data, prefix_tokens: what is written is begun with so many tokens of
        these datasets, of a text from a random place, of a conversation the first ones, by the recipe's seed; 0: with
        the tokenizer's start (or end) token alone. `@NAME` among them is the text of an entry before this one.
    cues: texts of which one, drawn for every prefix, follows it, as "\\nQuestion:" has the teacher ask and answer about
        what stands before; an empty one has it go on. One with `{}` has the prefix there: "Question: What is
        {}?\\nAnswer:".
    """

    kind: Literal["text"]
    tokens: Tokens
    prefix_data: list[PathText] = []
    prefix_tokens: Annotated[Whole, Field(ge=0, le=2**22)] = 0
    cues: list[str] = []

    @model_validator(mode="after")
    def _prefix(self) -> Text:
        if bool(self.prefix_data) != bool(self.prefix_tokens):
            raise ValueError("prefix_data and prefix_tokens belong together; give both or neither")
        if self.temperature == 0 and not self.prefix_tokens:
            raise ValueError("without a prefix every text at temperature 0 is the same; raise temperature")
        return self


def is_synthetic(entry: Traces | Text) -> bool:
    """Whether what is written is text of the model's own, which nobody chose: not the replies that a checker accepted,
    nor conversations and completions, whose cross-entropy somebody asked for by their columns."""
    return isinstance(entry, Text) or (entry.format == "text" and entry.keep != "accepted")


WRITINGS = {"traces": Traces, "text": Text}

AnyWriting = Annotated[Traces | Text, Field(discriminator="kind")]


class Solve(Sampling):
    """Accuracy on problems. skip, limit: which problems.

    samples: replies to a problem, whose share of right ones is what counts. One greedy reply by default; several, drawn
        at a temperature, tell two models apart with fewer problems.
    """

    name: FolderName
    problems: Problems
    skip: Skipped = 0
    limit: Count | None = None
    samples: Samples = 1
    temperature: SamplingTemperature = 0.0

    @model_validator(mode="after")
    def _random(self) -> Solve:
        _check_samples(self.samples, self.temperature)
        return self

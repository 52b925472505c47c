"""The part of a run in which models write: the entries of `write`, and the replies that `evaluate.solve` checks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmla.artifacts import fingerprint, is_current
from transmla.data.draw import Parts, all_of, draw, enough, until
from transmla.data.generate import ModelSampler, Sampler, VllmSampler
from transmla.data.problems import ProblemSet, load_problems, normal
from transmla.data.write import DATA, DEFINITION, Questions, Starts, write_text, write_traces
from transmla.entries import Part, data_names
from transmla.errors import RecipeError
from transmla.evaluate.solve import questions, score
from transmla.fingerprints import Fingerprints
from transmla.maker import Maker
from transmla.recipe_write import AnyWriting, Sampling, Solve, Text, Traces
from transmla.sources import load_model


class Writer(Maker):
    """What a run does with models that write; generation is split over the processes, the first puts it together."""

    out: Path
    digests: Fingerprints
    source_folder: Path
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    device: str

    def write(self) -> None:
        """Everything that the recipe's `write` names."""
        for index, entry in enumerate(self.recipe.write):
            folder, digest = self.out / "written" / entry.name, self.digests.written(entry.name)
            if self._is_current(folder, digest):
                self.say(f"[write {entry.name}] unchanged, skipped")
            elif isinstance(entry, Traces):
                self._write_traces(entry, f"write.{index}", folder, digest)
            else:
                self._write_text(entry, f"write.{index}", folder, digest)

    def _write_traces(self, entry: Traces, key: str, folder: Path, digest: str) -> None:
        if entry.format == "messages" and self.tokenizer.chat_template is None:
            raise RecipeError(f"{key}.format", "messages need a chat template, which the tokenizer lacks; use completion or text")
        found = load_problems(entry.problems, f"{key}.problems", skip=entry.skip, limit=entry.limit)
        asked = Questions(found, entry.problems, self.tokenizer, samples=entry.samples, batch_size=entry.batch_size)
        self._require_room(asked, entry, key)
        parts = self._drawing(entry)

        def before() -> None:
            self.say(f"[write {entry.name}] {len(asked.prompts):,} replies to {len(found.problems):,} problems")
            draw(
                parts, lambda: self._sampler(entry), asked.prompts_of, all_of(len(asked.plan)), entry,
                seed=self.recipe.seed, name=entry.name, state=self.state,
            )

        def build(scratch: Path, record: dict[str, Any]) -> None:
            samples = asked.ordered(parts.samples(batch) for batch in range(len(asked.plan)))
            counts = write_traces(asked, samples, entry, self._heldout, scratch)
            record |= self._counted(counts, entry, parts)
            if not counts["kept"]:
                raise RecipeError(
                    f"{key}.keep",
                    f"of {counts['written']} replies {counts['finished']} ended by themselves and {counts['accepted']} were "
                    "accepted, none is left; raise max_new_tokens, or take other problems",
                )

        self._make(folder, digest, f"write {entry.name}", build, before)

    def _write_text(self, entry: Text, key: str, folder: Path, digest: str) -> None:
        found = entry.model_copy(update={"prefix_data": self._names(entry.prefix_data, f"{key}.prefix_data")})
        starts = Starts(found, self.tokenizer, seed=self.recipe.seed, key=key)
        parts = self._drawing(entry)

        def before() -> None:
            self.say(f"[write {entry.name}] {entry.tokens:,} tokens of the teacher's own text")
            draw(
                parts, lambda: self._sampler(entry), starts.prompts_of, until(entry.tokens, self.state.num_processes), entry,
                seed=self.recipe.seed, name=entry.name, state=self.state,
            )

        def build(scratch: Path, record: dict[str, Any]) -> None:
            count = enough(parts.index(), entry.tokens)
            assert count is not None, "they were just drawn"
            drawn = ((starts.prompts_of(batch), parts.samples(batch)) for batch in range(count))
            counts = write_text(starts, drawn, scratch)
            record |= self._counted(counts, entry, parts)

        self._make(folder, digest, f"write {entry.name}", build, before)

    def _counted(self, counts: dict[str, int], entry: AnyWriting, parts: Parts) -> dict[str, Any]:
        written = counts | {"drawing_seconds": parts.seconds()}
        return {"written": written, "tokens": counts["tokens"], "engine": self._engine(entry)}

    def _drawing(self, entry: AnyWriting) -> Parts:
        """The samples of an entry as they were drawn. They are kept: another `keep`, `format` or number of tokens
        costs no generation."""
        inputs = [self.digests.drawing(entry.name), self._engine(entry)]
        for name in entry.prefix_data if isinstance(entry, Text) else ():
            if name.startswith("@"):  # the prompts are made of it again when the text is put together: settings are not enough
                with (self.out / "written" / name.removeprefix("@") / DATA).open("rb") as file:
                    inputs.append(hashlib.file_digest(file, "sha256").hexdigest())
        digest = fingerprint(inputs)
        return Parts(self.out / "written" / f"{entry.name}.parts", digest)

    def _engine(self, entry: AnyWriting) -> str:
        alone = self.prepared.device == "cuda" and self.state.num_processes == 1
        return ("vllm" if alone and find_spec("vllm") else "transformers") if entry.engine == "auto" else entry.engine

    def _sampler(self, entry: AnyWriting) -> Sampler:
        if self._engine(entry) == "transformers":
            return ModelSampler(self.teacher, self.tokenizer)
        return VllmSampler(self.source_folder, self.tokenizer, self.prepared.dtype, self._positions)

    @property
    def _positions(self) -> int:
        return self.prepared.config.max_position_embeddings

    def _require_room(self, asked: Questions, settings: Sampling, key: str) -> None:
        longest = max(len(prompt) for prompt in asked.prompts)
        if longest + settings.max_new_tokens > self._positions:
            raise RecipeError(
                f"{key}.max_new_tokens",
                f"{settings.max_new_tokens} after a prompt of {longest} tokens is above the {self._positions} positions of "
                "the model; lower it",
            )

    @cached_property
    def _heldout(self) -> set[str]:
        """The questions that are evaluated on."""
        return {normal(problem.question) for found in self._exams.values() for problem in found.problems}

    @cached_property
    def _exams(self) -> dict[str, ProblemSet]:
        """The problems of `evaluate.solve` by name."""
        return {
            entry.name: load_problems(
                entry.problems, f"evaluate.solve.{index}.problems", skip=entry.skip, limit=entry.limit
            )
            for index, entry in enumerate(self.recipe.evaluate.solve)
        }

    def _names(self, data: Sequence[str | Part], key: str) -> list[str | Part]:
        """A `data` list with every `@NAME` replaced by the definition of what was written.

        Raises:
            RecipeError: it was not written yet, or under other settings.
        """
        found: list[str | Part] = []
        for entry, name in zip(data, data_names(data), strict=True):
            name = self._written(name, key) if name.startswith("@") else name
            found.append(name if isinstance(entry, str) else entry.model_copy(update={"name": name}))
        return found

    def _written(self, name: str, key: str) -> str:
        folder = self.out / "written" / name.removeprefix("@")
        if not is_current(folder, self.digests.written(name.removeprefix("@"))):
            raise RecipeError(key, f"{name} is not written, or of other settings; run transmla traces recipe=... first")
        return str(folder / DEFINITION)

    def _replies(self, name: str, entry: Solve) -> tuple[Questions, Parts]:
        """The prompts of an evaluation and where the replies of a model are kept."""
        asked = questions(self._exams[entry.name], entry, self.tokenizer)
        folder = self.out / "evaluation" / f"{name}.parts" / entry.name
        return asked, Parts(folder, self.digests.replies(name, entry.name))

    def _answer(self, name: str, folder: Path | None) -> None:
        """Have a model answer the problems of `evaluate.solve`, on all processes. folder: None is the teacher."""
        model: list[PreTrainedModel] = []

        def sampler() -> Sampler:
            if not model:
                model.append(self.teacher if folder is None else load_model(folder, self.prepared.dtype, self.device))
            return ModelSampler(model[0], self.tokenizer)

        for index, entry in enumerate(self.recipe.evaluate.solve):
            asked, parts = self._replies(name, entry)
            self._require_room(asked, entry, f"evaluate.solve.{index}")
            draw(
                parts, sampler, asked.prompts_of, all_of(len(asked.plan)), entry,
                seed=self.recipe.seed, name=entry.name, state=self.state,
            )

    def _score(self, name: str) -> dict[str, Any]:
        """The accuracies of a model whose replies are there, by name of the entry."""
        found = {}
        for entry in self.recipe.evaluate.solve:
            asked, parts = self._replies(name, entry)
            samples = asked.ordered(parts.samples(batch) for batch in range(len(asked.plan)))
            found[entry.name] = score(asked, samples) | {"drawing_seconds": parts.seconds()}
        return found

"""The stage `write`: text and traces that the teacher writes, for any list of `data`."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from transmla.errors import RecipeError
from transmla.files import PARTIAL, scratch_folder
from transmla.generate.problems import load_problems, normal
from transmla.generate.prompts import ProblemPrompts, TextPrompts
from transmla.generate.sampler import ModelSampler, Sampler
from transmla.generate.text_rows import TRACE_COUNTS, TextRows, definition_of, trace_rows
from transmla.generate.vllm_sampler import VllmSampler
from transmla.recipe.writing import AnyWriting, Sampling, Text, Traces
from transmla.run.artifacts import make, unchanged
from transmla.run.context import Run
from transmla.run.datasets import DEFINITION, ROWS, resolve
from transmla.run.fingerprints import fingerprint
from transmla.run.lineage import texts_to_make
from transmla.run.sampled_batches import SampledBatches, all_of, sample_missing, until
from transmla.run.written_rows import WrittenRows, save_rows


def write(run: Run) -> None:
    """Everything that the recipe's `write` names; generation is split over the processes, the first puts it
    together."""
    _write(run, {entry.name for entry in run.recipe.write})


def write_where_needed(run: Run) -> None:
    """What of the recipe's `write` is read by what is to be made, or by nothing."""
    _write(run, texts_to_make(run))


def _write(run: Run, names: set[str]) -> None:
    for index, entry in enumerate(run.recipe.write):
        folder, digest = run.paths.written(entry.name), run.digests.written(entry.name)
        if unchanged(run, folder, digest, f"write {entry.name}"):
            continue
        if entry.name not in names:
            run.say(f"[write {entry.name}] not there, and not needed: what is made of it is current")
        elif isinstance(entry, Traces):
            _write_traces(run, entry, f"write.{index}", folder, digest)
        else:
            _write_text(run, entry, f"write.{index}", folder, digest)


def _write_traces(run: Run, entry: Traces, key: str, folder: Path, digest: str) -> None:
    if entry.format == "messages" and run.tokenizer.chat_template is None:
        raise RecipeError(
            f"{key}.format", "messages need a chat template, which the tokenizer lacks; use completion or text"
        )
    found = load_problems(entry.problems, f"{key}.problems", skip=entry.skip, limit=entry.limit)
    asked = ProblemPrompts(found, entry.problems, run.tokenizer, samples=entry.samples, batch_size=entry.batch_size)
    require_room(run, asked, entry, key)
    batches = _batches_of(run, entry)

    def before() -> None:
        run.say(f"[write {entry.name}] {len(asked.prompts):,} replies to {len(found.problems):,} problems")
        sample_missing(
            batches,
            lambda: _sampler(run, entry),
            asked.prompts_of,
            all_of(len(asked.plan)),
            entry,
            seed=run.recipe.seed,
            name=entry.name,
            state=run.state,
        )

    def build(scratch: Path, metadata: dict[str, Any]) -> None:
        samples = asked.ordered(batches.samples(batch) for batch in range(len(asked.plan)))
        counts = dict.fromkeys(TRACE_COUNTS, 0)
        save_rows(trace_rows(asked, samples, entry, _heldout(run), counts), scratch / ROWS)
        _save_definition(entry, scratch)
        metadata |= _counted(run, counts, entry, batches)
        if not counts["kept"]:
            raise RecipeError(
                f"{key}.keep",
                f"of {counts['written']} replies {counts['finished']} ended by themselves and "
                f"{counts['accepted']} were "
                "accepted, none is left; raise max_new_tokens, or take other problems",
            )

    make(run, folder, digest, f"write {entry.name}", build, before)


def _write_text(run: Run, entry: Text, key: str, folder: Path, digest: str) -> None:
    resolved = entry.model_copy(update={"prefix_data": resolve(run, entry.prefix_data, f"{key}.prefix_data")})
    prompts = TextPrompts(resolved, run.tokenizer, seed=run.recipe.seed, key=key)
    batches = _batches_of(run, entry)
    beside = folder.with_name(f"{PARTIAL}-rows-{folder.name}")
    with (
        scratch_folder(beside) if run.state.is_main_process else nullcontext(beside) as place,
        WrittenRows(place / ROWS, TextRows(prompts), batches, entry.tokens) as written,
    ):

        def before() -> None:
            run.say(f"[write {entry.name}] {entry.tokens:,} tokens of the teacher's own text")
            sample_missing(
                batches,
                lambda: _sampler(run, entry),
                prompts.prompts_of,
                until(entry.tokens, run.state.num_processes),
                entry,
                seed=run.recipe.seed,
                name=entry.name,
                state=run.state,
                stored=written.follow,
            )

        def build(scratch: Path, metadata: dict[str, Any]) -> None:
            os.replace(written.finish(), scratch / ROWS)
            _save_definition(entry, scratch)
            metadata |= _counted(run, written.rows.counts, entry, batches)

        make(run, folder, digest, f"write {entry.name}", build, before)


def _save_definition(entry: AnyWriting, folder: Path) -> None:
    """Beside the rows the data definition by which stages, and other recipes, read them."""
    (folder / DEFINITION).write_text(yaml.safe_dump(definition_of(entry, ROWS)))


def _counted(run: Run, counts: dict[str, int], entry: AnyWriting, batches: SampledBatches) -> dict[str, Any]:
    written = counts | {"sampling_seconds": batches.seconds()}
    return {"written": written, "tokens": counts["tokens"], "engine": _engine(run, entry)}


def _batches_of(run: Run, entry: AnyWriting) -> SampledBatches:
    """The samples of an entry as they came. They are kept: another `keep`, `format` or number of tokens costs no
    generation."""
    inputs = [run.digests.samples(entry.name), _engine(run, entry)]
    for name in entry.prefix_data if isinstance(entry, Text) else ():
        if name.startswith(
            "@"
        ):  # the prompts are made of it again when the text is put together: settings are not enough
            with (run.paths.written(name.removeprefix("@")) / ROWS).open("rb") as file:
                inputs.append(hashlib.file_digest(file, "sha256").hexdigest())
    return SampledBatches(run.paths.samples(entry.name), fingerprint(inputs))


def _engine(run: Run, entry: AnyWriting) -> str:
    alone = run.prepared.device == "cuda" and run.state.num_processes == 1 and not run.recipe.deterministic
    return ("vllm" if alone and find_spec("vllm") else "transformers") if entry.engine == "auto" else entry.engine


def _sampler(run: Run, entry: AnyWriting) -> Sampler:
    if _engine(run, entry) == "transformers":
        return ModelSampler(run.teacher, run.tokenizer)
    return VllmSampler(run.source_folder, run.tokenizer, run.dtype, run.positions)


def require_room(run: Run, asked: ProblemPrompts, settings: Sampling, key: str) -> None:
    """Refuse replies that would not fit into the model's positions.

    Raises:
        RecipeError: the longest prompt and max_new_tokens together do not.
    """
    longest = max(len(prompt) for prompt in asked.prompts)
    if longest + settings.max_new_tokens > run.positions:
        raise RecipeError(
            f"{key}.max_new_tokens",
            f"{settings.max_new_tokens} after a prompt of {longest} tokens is above the {run.positions} positions of "
            "the model; lower it",
        )


def _heldout(run: Run) -> set[str]:
    """The questions that are evaluated on."""
    return {normal(problem.question) for found in run.exams.values() for problem in found.problems}

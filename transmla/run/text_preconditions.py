"""What can be refused of data once the tokenizer is there, before any weight is loaded.

Every dataset of a stage that is to run is loaded, as the stage will load it, and its rows are put to the tokenizer: an
evaluation that is too short, or a conversation that the chat template refuses, is not found after a day of training.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from transmla.data.conversations import tools_of
from transmla.data.definition import find_definition, local_files
from transmla.data.documents import documents
from transmla.data.labelled import Labeller
from transmla.data.loading import load_one
from transmla.data.mixture import passing
from transmla.data.records import Record, records
from transmla.data.windows import named_windows
from transmla.errors import RecipeError
from transmla.generate.problems import load_problems, prompt_text
from transmla.generate.prompts import TextPrompts
from transmla.recipe.budget import ROW_LENGTH
from transmla.recipe.data_lists import Part, data_names
from transmla.recipe.stages import AnyStage
from transmla.recipe.writing import Problems, Sampling, Text, Traces
from transmla.recover.on_policy import prompt_turns, prompts_of
from transmla.run.artifacts import current
from transmla.run.context import Run

RENDERED = 10_000  # conversations of a dataset that are put to the chat template; the others are when they are loaded

RENDERED_BYTES = 64_000_000  # of a dataset's files


def check_writing(run: Run, names: set[str] | None = None) -> None:
    """Refuse entries of `write` whose prompts cannot be made, or leave no room for what is written.

    Args:
        names: of the entries to look at; None: of all.

    Raises:
        RecipeError: the first of them.
    """
    for index, entry in enumerate(run.recipe.write):
        key = f"write.{index}"
        if names is not None and entry.name not in names:
            continue
        if current(run, run.paths.written(entry.name), run.digests.written(entry.name)):
            continue
        if isinstance(entry, Traces):
            if entry.format == "messages" and run.tokenizer.chat_template is None:
                raise RecipeError(
                    f"{key}.format", "messages need a chat template, which the tokenizer lacks; use completion or text"
                )
            _check_room(run, entry, entry.problems, key, skip=entry.skip, limit=entry.limit)
        else:
            _check_prefixes(run, entry, key)


def check_calibration(run: Run) -> None:
    """Refuse calibration text that cannot be read or fills no window.

    Raises:
        RecipeError: the first thing that is wrong.
    """
    section, key = run.recipe.convert.calibration, "convert.calibration"
    if not current(run, run.paths.converted, run.digests.convert):
        _check_list(run, section.data, f"{key}.data", Labeller(run.tokenizer, {}, set(), key=key))
        _check_window(run, section.data, key, section.max_length)


def check_training(run: Run, stages: set[int]) -> None:
    """Refuse training data that cannot be read, does not fit the trainer, or fills no row.

    Args:
        stages: that are to be trained.

    Raises:
        RecipeError: the first thing that is wrong.
    """
    for index, stage in enumerate(run.recipe.recover):
        if index in stages:
            _check_stage(run, stage, f"recover.{index}")


def check_evaluation_text(run: Run) -> None:
    """Refuse text, prompts and problems of `evaluate` that no model could be asked.

    Raises:
        RecipeError: the first thing that is wrong.
    """
    section = run.recipe.evaluate
    run.prepared.evaluation.require()
    if current(run, run.paths.evaluation("teacher"), run.digests.evaluation("teacher")):
        return
    labeller = Labeller(run.tokenizer, {}, set(), key="evaluate")
    for name in section.data:
        _check_list(run, [name], "evaluate.data", labeller)
        _check_window(run, [name], "evaluate", section.max_length)
    for index, prompt in enumerate(section.prompts):
        length = len(run.tokenizer(prompt, verbose=False)["input_ids"])
        if not prompt or not length:
            raise RecipeError(f"evaluate.prompts.{index}", "it is empty; write what the model shall go on from")
        if length + section.max_new_tokens > run.positions:
            raise RecipeError(
                "evaluate.max_new_tokens",
                f"{section.max_new_tokens} after a prompt of {length} tokens is above the {run.positions} positions "
                "of the model; lower it",
            )
    for index, entry in enumerate(section.solve):
        key = f"evaluate.solve.{index}"
        _check_room(run, entry, entry.problems, key, skip=entry.skip, limit=entry.limit)


def _check_stage(run: Run, stage: AnyStage, key: str) -> None:
    names = [name for name in data_names(stage.data) if not name.startswith("@")]
    columns: set[str] = set()
    kind = run.prepared.kinds[f"{key}.data"]
    columns = {"text": {"text"}, "messages": {"messages"}, "completion": {"prompt", "completion"}}[kind]
    trainer = {} if stage.kind == "on_policy" else stage.trainer
    labeller = Labeller(run.tokenizer, trainer, columns, key=key)
    loaded = _check_list(run, stage.data, f"{key}.data", labeller, prompts_only=stage.kind == "on_policy")
    plain = any("text" in data.column_names or _is_plain(data) for data in loaded)
    if stage.kind == "sft" and labeller.end is None and (plain or len(names) < len(stage.data)):
        raise RecipeError(
            f"{key}.trainer.eos_token",
            "the tokenizer has no end token, and sft teaches when to end; name one of its tokens",
        )
    padding = run.tokenizer.pad_token or stage.trainer.get("pad_token") or labeller.end
    if stage.kind != "on_policy" and padding is None:
        raise RecipeError(
            f"{key}.trainer.pad_token", "the tokenizer has neither padding nor end token; name one of its tokens"
        )
    if len(names) < len(stage.data):
        return  # what the recipe writes is not there yet
    if stage.kind == "on_policy":
        if not any(True for data in loaded for _ in prompts_of(stage, data, run.tokenizer, f"{key}.data")):
            raise RecipeError(
                f"{key}.data",
                f"no prompt can be made with prompt_tokens {stage.prompt_tokens}; raise it for conversations, lower "
                "it for text",
            )
    elif kind == "text":
        _check_row(run, loaded, key, int(stage.trainer.get("max_length", ROW_LENGTH)))


def _is_plain(data: Dataset) -> bool:
    """Whether prompts and completions are text, not conversations."""
    return "prompt" in data.column_names and isinstance(data[0]["prompt"], str)


def _check_list(
    run: Run, data: Sequence[str | Part], key: str, labeller: Labeller, *, prompts_only: bool = False
) -> list[Dataset]:
    """Load the datasets of a list but for what the recipe writes, and put their conversations to the chat template."""
    found = []
    for entry, name in zip(data, data_names(data), strict=True):
        if name.startswith("@"):
            continue
        loaded = load_one(name, key)
        if "messages" in loaded.column_names or ("prompt" in loaded.column_names and not _is_plain(loaded)):
            if run.tokenizer.chat_template is None and labeller.tokenizer.chat_template is None:
                raise RecipeError(key, "it is of conversations, and the tokenizer has no chat template; use text")
            _check_conversations(run, name, loaded, key, labeller, prompts_only=prompts_only)
        if isinstance(entry, Part) and (entry.min_tokens or entry.max_tokens):
            next(passing(entry, loaded, key, run.tokenizer), None)
        found.append(loaded)
    return found


def _check_conversations(
    run: Run, name: str, loaded: Dataset, key: str, labeller: Labeller, *, prompts_only: bool
) -> None:
    definition, folder = find_definition(name, key)
    _ = labeller.template  # a template that marks nothing is no fault of the first row
    kept = other = seen = 0
    if definition.hub is None:
        rows = records(definition, local_files(definition, folder, key), limit=RENDERED_BYTES)
    else:
        rows = ((f"{definition.hub}, row {number}", row) for number, row in enumerate(loaded, 1))
    for place, row in rows:
        if seen == RENDERED:
            break
        if not any(row.values()):
            continue
        seen += 1
        try:
            if prompts_only:
                _put(labeller, row)
                continue
            prompt, whole = labeller.rendered(row)
        except ValueError as error:
            raise RecipeError(key, f"{place}: {error}") from None
        kept += whole.kept
        other += not whole.text.startswith(prompt)
    for count, what in (
        (kept, "the chat template would drop a part of them (thoughts); it is kept in what is learnt"),
        (other, "put to a model, the prompt ends otherwise (in an open thought, say) than here before its completion"),
    ):
        if count:
            run.say(f"[data] {key}: {count:,} of the first {seen:,} conversations of {name}: {what}")


def _put(labeller: Labeller, row: Record) -> None:
    """Put the prompt of a row to the chat template; who answers sees of it what the template shows."""
    prompt = prompt_turns(row)
    if prompt:
        labeller.template.put(prompt, tools_of(row))


def _check_window(run: Run, data: Sequence[str | Part], key: str, length: int) -> None:
    """Text that the recipe has must fill a window; of mixtures, and with what it writes, that is seen later."""
    if all(isinstance(entry, str) and not entry.startswith("@") for entry in data):
        named_windows(data, key, run.tokenizer, tokens=length, length=length)


def _check_row(run: Run, loaded: list[Dataset], key: str, length: int) -> None:
    tokens = 0
    for data in loaded:
        for document in documents(data, run.tokenizer, ended=True):
            tokens += len(document)
            if tokens >= length:
                return
    raise RecipeError(
        f"{key}.data",
        f"the text has {tokens} tokens, fewer than one row of {length}; name more, or lower trainer.max_length",
    )


def _check_prefixes(run: Run, entry: Text, key: str) -> None:
    written = [name for name in entry.prefix_data if name.startswith("@")]
    others = [name for name in entry.prefix_data if name not in written]
    _check_list(run, others, f"{key}.prefix_data", Labeller(run.tokenizer, {}, set(), key=key))
    if not written:
        TextPrompts(entry, run.tokenizer, seed=run.recipe.seed, key=key)


def _check_room(run: Run, settings: Sampling, problems: Problems, key: str, *, skip: int, limit: int | None) -> None:
    """The longest prompt and what follows it must fit into the model's positions."""
    found = load_problems(problems, f"{key}.problems", skip=skip, limit=limit)
    try:
        texts = [prompt_text(problem, problems, run.tokenizer)[0] for problem in found.problems]
    except ValueError as error:
        raise RecipeError(f"{key}.problems", str(error)) from None
    longest = max(map(len, run.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    if longest + settings.max_new_tokens > run.positions:
        raise RecipeError(
            f"{key}.max_new_tokens",
            f"{settings.max_new_tokens} after a prompt of {longest} tokens is above the {run.positions} positions of "
            "the model; lower it",
        )

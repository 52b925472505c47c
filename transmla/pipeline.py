"""The stages of a recipe in order: what is current is skipped, what is not is made again, nothing is half there."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transmla.artifacts import is_current, publishing, versions
from transmla.data.mixture import load_mixture
from transmla.data.windows import named_windows
from transmla.entries import Part
from transmla.errors import RecipeError
from transmla.evaluate.report import MODELS, write_report
from transmla.evaluate.summary import figures, missed
from transmla.fingerprints import Fingerprints
from transmla.hardware import peak_memory, reset_peak_memory, use_cores
from transmla.plan import count_parameters, training_memory
from transmla.preflight import Prepared
from transmla.recipe_stages import AnyStage
from transmla.recordings import Recordings, is_recorded
from transmla.sources import check_facts, fetch, load_model
from transmla.teachers import Teachers
from transmla.writing import Writer


class Pipeline(Writer, Recordings, Teachers):
    """One run of one recipe. Work that one process does is done by the first; the others wait."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe
        self.out = prepared.output
        # A process may wait for the first one's calibration or evaluation: longer than the default timeouts.
        self.state = PartialState(cpu=prepared.device == "cpu", timeout=timedelta(hours=24))
        self.digests = Fingerprints(prepared)
        self.missed: list[str] = []  # thresholds of the recipe, after `evaluate`
        set_seed(self.recipe.seed)
        if prepared.device == "cpu":
            use_cores(self.recipe.threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if self.state.num_processes > 1:
            with self.state.main_process_first():  # one process downloads, the others find it in the cache
                _ = self.source_folder

    @cached_property
    def source_folder(self) -> Path:
        folder = fetch(self.recipe.model)
        check_facts(self.recipe.model, AutoConfig.from_pretrained(folder))
        return folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.source_folder)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return load_model(self.source_folder, self.prepared.dtype, self.device)

    @property
    def device(self) -> str:
        return str(self.state.device)

    @property
    def student_folder(self) -> Path:
        """The newest student: recovered, or converted where the recipe has no recovery."""
        return self.out / ("recovered" if self.recipe.recover else "converted")

    def stage_folder(self, index: int) -> Path:
        """The last stage's result is `recovered`; earlier ones are kept below `stages`."""
        last = index == len(self.recipe.recover) - 1
        return self.out / "recovered" if last else self.out / "stages" / f"{index}_{self.recipe.recover[index].kind}"

    def run(self) -> None:
        """Everything: write, convert, recover, export with verification, evaluate, report."""
        self.check_teachers()
        self.check_templates()
        self.check_recordings()
        self.write()
        self.convert()
        self.recover()
        self.export()
        self.evaluate()

    def convert(self) -> None:
        """Stage one: the student before any training."""
        from transmla.convert.convert import convert_model

        if self.prepared.notice:
            self.say(f"[convert] {self.prepared.notice}")

        def build(scratch: Path, record: dict[str, Any]) -> None:
            windows = self._calibration_windows()
            done = convert_model(self.teacher, self.recipe.convert, windows)
            record |= {"tokens": windows.numel()} | done.record()
            for line in done.notes():
                self.say(f"[convert] {line}")
            self._save_converted(done.student, done.output_scales, scratch)

        self._make(self.out / "converted", self.digests.convert, "convert", build)

    def recover(self) -> None:
        """The recovery stages; each starts from the one before."""
        for index, stage in enumerate(self.recipe.recover):
            self._keep_earlier_result(index)
            folder, digest = self.stage_folder(index), self.digests.stage(index)
            label = f"recover.{index} {stage.kind}"
            if self._is_current(folder, digest):
                self.say(f"[{label}] unchanged, skipped")
                continue
            self._train(index, folder, digest, label)

    def _keep_earlier_result(self, index: int) -> None:
        """A recipe that was lengthened: what was `recovered` is now an earlier stage, and still good."""
        folder = self.stage_folder(index)
        if folder.name == "recovered" or not self._is_current(self.out / "recovered", self.digests.stage(index)):
            return
        if self.state.is_main_process and not is_current(folder, self.digests.stage(index)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(self.out / "recovered", folder)
        self.state.wait_for_everyone()

    def _train(self, index: int, folder: Path, digest: str, label: str) -> None:
        from transmla.recover.run import build_trainer, run_stage, tensorboard_folder, trainer_config

        stage = self.recipe.recover[index]
        work = self.out / "checkpoints" / f"{index}_{stage.kind}"
        if self.state.is_main_process:
            marker, wanted = work / "fingerprint", f"{digest} {self.state.num_processes}"
            if work.is_dir() and (not marker.is_file() or marker.read_text() != wanted):
                shutil.rmtree(work)  # checkpoints of other settings, or of another number of processes
            work.mkdir(parents=True, exist_ok=True)
            marker.write_text(wanted)
        self.state.wait_for_everyone()
        self.say(f"[{label}] ...")
        started = time.monotonic()
        reset_peak_memory(self.prepared.device)
        before = self.stage_folder(index - 1) if index else self.out / "converted"
        settings = {
            "seed": self.recipe.seed,
            "device": self.prepared.device,
            "dtype": self.prepared.dtype,
            "processes": self.state.num_processes,
        }
        key = f"recover.{index}.data"
        data = load_mixture(self._names(stage.data, key), key, self.tokenizer, self.recipe.seed)
        student = load_model(before, self.prepared.dtype, self.device)
        with tensorboard_folder(self.out / "logs"):
            if stage.kind == "on_policy":
                from transmla.recover.on_policy import train_on_policy

                result = train_on_policy(stage, student, self.teacher, self.tokenizer, data, work, key=key, **settings)
            else:
                config = trainer_config(stage, work, **settings)
                if getattr(stage, "keep_teacher", False) and self.state.num_processes > 1:
                    self.say(f"[{label}] keep_teacher is for one process; of {self.state.num_processes}, the teacher reads every batch")
                trainer = build_trainer(
                    stage, student, self._teacher_of(stage), self.tokenizer, config, data,
                    scales=self._scales(), reserve=self._training_memory(stage), key=f"recover.{index}",
                )
                if is_recorded(stage):
                    self._read_recording(index, trainer)
                result = run_stage(trainer, self.prepared.dtype)
                del trainer
        if self.state.is_main_process:
            record = {"name": label, "fingerprint": digest, "versions": versions(), **result}
            record["processes"] = self.state.num_processes
            with publishing(folder, record) as scratch:
                self._save_recipe(scratch)
                self._save_student(student, scratch)
                record["seconds"] = round(time.monotonic() - started, 1)
                record["peak_memory_bytes"] = peak_memory(self.prepared.device)
            self.say(f"[{label}] {record['seconds']} s")
            shutil.rmtree(work)
        self.state.wait_for_everyone()
        del student
        gc.collect()

    def _training_memory(self, stage: AnyStage) -> int:
        """Rough bytes that a stage needs of a device, counted without weights."""
        config = self.prepared.config
        return training_memory(stage, count_parameters(config, self.prepared.geometry), config, self.prepared.dtype)

    def export(self) -> None:
        """The final checkpoint, published only when a fresh process agrees with the student."""
        self._require(self.student_folder, self.digests.student, "export")

        def build(scratch: Path, record: dict[str, Any]) -> None:
            from transmla.export.publish import write_checkpoint, write_student

            chosen = self.prepared.export
            if not chosen.stock:
                self.say(f"[export] {chosen.describe(self.recipe.export)}")
            student = load_model(self.student_folder, self.prepared.dtype, "cpu")
            write = write_checkpoint if chosen.stock else write_student
            write(student, self.tokenizer, self.recipe.export, self._export_dtype(), scratch)
            del student  # one model in memory at a time
            record["format"] = chosen.name
            record["max_abs_logprob_diff"] = self._check_reload(scratch)

        self._make(self.out / "exported", self.digests.export, "export", build)

    def verify(self) -> None:
        """Check an existing export again."""
        self._require(self.out / "exported", self.digests.export, "verify")
        if self.state.is_main_process:
            difference = self._check_reload(self.out / "exported")
            self.say(f"[verify] max |difference of log-probabilities| {difference:.2e}")
        self.state.wait_for_everyone()

    def _export_dtype(self) -> torch.dtype:
        wanted = self.recipe.export.dtype
        return self.prepared.dtype if wanted == "auto" else getattr(torch, wanted)

    def _check_reload(self, folder: Path) -> float:
        """Compare the checkpoint in a fresh process with the student; both multiply in float32."""
        from transmla.export.publish import verify_export

        section = self.recipe.export.verify
        length = min(section.tokens, self.recipe.evaluate.max_length)
        tokens = self._windows(self.recipe.evaluate.data[:1], "evaluate", section.tokens, length)
        student = load_model(self.student_folder, torch.float32, "cpu")
        return verify_export(folder, student, tokens, section, self._export_dtype(), stock=self.prepared.export.stock)

    def evaluate(self) -> None:
        """Quality of every model that is there, then the report."""
        for name in self._current_models():
            folder = None if name == "teacher" else self.out / name

            def build(scratch: Path, record: dict[str, Any], name: str = name, folder: Path | None = folder) -> None:
                self._evaluate_one(name, folder, scratch, record)
                record["solve"] = self._score(name)
                for line in figures(record):
                    self.say(f"[evaluate {name}] {line}")

            answer = partial(self._answer, name, folder)
            self._make(self.out / "evaluation" / name, self.digests.evaluation(name), f"evaluate {name}", build, answer)
        found: list[list[str]] = [[]]
        if self.state.is_main_process:
            report = write_report(self.out, self.recipe, self.prepared.geometry, self._current_artifacts())
            self.say((self.out / "report.md").read_text())
            found = [missed(report)]
        self.missed = broadcast_object_list(found)[0]

    def _current_models(self) -> list[str]:
        """The models that are there and of the recipe's present settings."""
        digests = {"converted": self.digests.convert, "exported": self.digests.export}
        if self.recipe.recover:
            digests["recovered"] = self.digests.student
        found = ["teacher"]
        for name in MODELS[1:]:
            if name in digests and self._is_current(self.out / name, digests[name]):
                found.append(name)
            elif name in digests:
                self.say(f"[evaluate {name}] missing or of other settings, left out")
        return found

    def _current_artifacts(self) -> dict[str, Path]:
        """Folders of all artifacts that belong to the present settings, by the name of their stage."""
        wanted = {
            f"write {entry.name}": (self.out / "written" / entry.name, self.digests.written(entry.name))
            for entry in self.recipe.write
        }
        wanted["convert"] = (self.out / "converted", self.digests.convert)
        for index, stage in enumerate(self.recipe.recover):
            wanted[f"recover.{index} {stage.kind}"] = (self.stage_folder(index), self.digests.stage(index))
        wanted["export"] = (self.out / "exported", self.digests.export)
        for name in MODELS:
            wanted[f"evaluate {name}"] = (self.out / "evaluation" / name, self.digests.evaluation(name))
        return {name: folder for name, (folder, digest) in wanted.items() if is_current(folder, digest)}

    def _evaluate_one(self, name: str, folder: Path | None, scratch: Path, record: dict[str, Any]) -> None:
        from transmla.evaluate.models import (
            continue_prompts,
            evaluate_student,
            evaluate_teacher,
            layer_errors,
            reference_file,
        )
        from transmla.evaluate.tasks import evaluate_tasks

        section, reference = self.recipe.evaluate, self.out / "evaluation" / "teacher"
        if folder is None:
            model = self.teacher
            windows = {
                dataset: self._windows([dataset], "evaluate", section.tokens, section.max_length)
                for dataset in section.data
            }
            record["quality"] = evaluate_teacher(model, windows, section, scratch)
        else:
            model = load_model(folder, self.prepared.dtype, self.device)
            record["quality"] = evaluate_student(model, name, section, reference)
        if section.tasks:
            record["tasks"] = evaluate_tasks(model, self.tokenizer, section, name, scratch)
        if name in ("teacher", "exported"):
            record["continuations"] = continue_prompts(model, self.tokenizer, section)
        else:
            window = load_file(reference_file(reference, section.data[0]))["windows"][:1]
            record["layer_errors"] = layer_errors(self.teacher, model, window, self._scales())

    def _windows(
        self, data: Sequence[str | Part], key: str, tokens: int, length: int, seed: int | None = None
    ) -> Tensor:
        data, mixing = self._names(data, f"{key}.data"), self.recipe.seed
        return named_windows(data, key, self.tokenizer, tokens=tokens, length=length, seed=seed, mixing_seed=mixing)

    def _calibration_windows(self) -> Tensor:
        text = self.recipe.convert.calibration
        seed = self.recipe.seed if text.sample == "random" else None
        return self._windows(text.data, "convert.calibration", text.tokens, text.max_length, seed)

    def _save_student(self, student: PreTrainedModel, folder: Path) -> None:
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _save_converted(self, student: PreTrainedModel, scales: list[float], folder: Path) -> None:
        """The student, and E|o|² of every source attention, by which layerwise errors are divided."""
        self._save_student(student, folder)
        save_file({"output_mean_square": torch.tensor(scales, dtype=torch.float64)}, folder / "statistics.safetensors")

    def _scales(self) -> list[float]:
        return load_file(self.out / "converted" / "statistics.safetensors")["output_mean_square"].tolist()

    def _require(self, folder: Path, digest: str, verb: str) -> None:
        if not is_current(folder, digest):
            raise RecipeError(
                "recipe", f"{verb} needs {folder}, which is missing or of other settings; run recover.py recipe=... first"
            )

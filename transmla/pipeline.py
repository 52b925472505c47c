"""The stages of a recipe in order: what is current is skipped, what is not is made again, nothing is half there."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate import PartialState
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from transmla import __version__
from transmla.artifacts import RECORD, fingerprint, is_current, publishing, read_record
from transmla.data.sources import find_definition, load_many, local_files
from transmla.data.windows import token_windows
from transmla.errors import RecipeError
from transmla.evaluate.perplexity import compare, final_hidden
from transmla.evaluate.report import write_report
from transmla.hardware import peak_memory, reset_peak_memory, use_cores
from transmla.preflight import Prepared
from transmla.sources import check_facts, fetch, identity, load_model

MODELS = ("teacher", "converted", "recovered", "exported")
# Max |Δ log-probability| of a reload. In bfloat16 the weights that the eps trick scales are rounded a second time.
DEFAULT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}


class Pipeline:
    """One run of one recipe. Work that one process does is done by the first; the others wait."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe = prepared.recipe
        self.out = prepared.output
        # A process may wait for the first one's calibration or evaluation: longer than the default timeouts.
        self.state = PartialState(cpu=prepared.device == "cpu", timeout=timedelta(hours=24))
        set_seed(self.recipe.seed)
        if prepared.device == "cpu":
            use_cores(self.recipe.threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    # ---- what stages are made from ----

    @cached_property
    def source_folder(self) -> Path:
        with self.state.main_process_first():
            return fetch(self.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.source_folder)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        model = load_model(self.source_folder, self.prepared.dtype, self.device)
        check_facts(self.recipe.model, model.config)
        return model

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

    # ---- fingerprints: settings and inputs of every stage ----

    def _data_identity(self, names: list[str], key: str) -> list[Any]:
        found = []
        for name in names:
            definition, folder = find_definition(name, key)
            files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in local_files(definition, folder, key)]
            found.append([definition.model_dump(mode="json", exclude={"about", "licence"}), files])
        return found

    @cached_property
    def convert_digest(self) -> str:
        section = self.recipe.convert
        return fingerprint(
            {
                "source": identity(self.recipe.model),
                "geometry": asdict(self.prepared.geometry),
                "convert": section.model_dump(mode="json"),
                "data": self._data_identity(section.calibration.data, "convert.calibration.data"),
                "dtype": str(self.prepared.dtype),
                "seed": self.recipe.seed,
            }
        )

    def stage_digest(self, index: int) -> str:
        """Fingerprint of recovery stage `index` (-1: the conversion)."""
        if index < 0:
            return self.convert_digest
        stage = self.recipe.recover[index]
        settings = stage.model_dump(mode="json")
        for unimportant in ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm"):
            settings["trainer"].pop(unimportant, None)
        return fingerprint(
            {
                "input": self.stage_digest(index - 1),
                "stage": settings,
                "data": self._data_identity(stage.data, f"recover.{index}.data"),
                "processes": self.state.num_processes,
            }
        )

    @property
    def student_digest(self) -> str:
        return self.stage_digest(len(self.recipe.recover) - 1)

    @property
    def export_digest(self) -> str:
        return fingerprint({"input": self.student_digest, "export": self.recipe.export.model_dump(mode="json")})

    def evaluation_digest(self, model: str) -> str:
        """Fingerprint of one model's evaluation."""
        section = self.recipe.evaluate
        inputs = {
            "teacher": identity(self.recipe.model),
            "converted": self.convert_digest,
            "recovered": self.student_digest,
            "exported": self.export_digest,
        }
        return fingerprint(
            {
                "input": inputs[model],
                "evaluate": section.model_dump(mode="json"),
                "data": self._data_identity(section.data, "evaluate.data"),
                "dtype": str(self.prepared.dtype),
            }
        )

    # ---- running ----

    def say(self, text: str) -> None:
        self.state.print(text, flush=True)

    def _make(self, folder: Path, digest: str, label: str, build: Callable[[Path, dict[str, Any]], None]) -> bool:
        """Make an artifact on the first process unless it is current; returns whether it was made."""
        if is_current(folder, digest):
            self.say(f"[{label}] unchanged, skipped")
            return False
        self.say(f"[{label}] ...")
        if self.state.is_main_process:
            started = time.monotonic()
            reset_peak_memory(self.prepared.device)
            record: dict[str, Any] = {"name": label, "fingerprint": digest, "versions": versions()}
            with publishing(folder, record) as scratch:
                self._save_recipe(scratch)
                build(scratch, record)
                record["seconds"] = round(time.monotonic() - started, 1)
                record["peak_memory_bytes"] = peak_memory(self.prepared.device)
            self.say(f"[{label}] {record['seconds']} s")
        self.state.wait_for_everyone()
        return True

    def _save_recipe(self, folder: Path) -> None:
        OmegaConf.save(OmegaConf.create(self.recipe.model_dump(mode="json", exclude={"dry_run"})), folder / "recipe.yaml")

    def run(self) -> None:
        """Everything: convert, recover, export with verification, evaluate, report."""
        self.convert()
        self.recover()
        self.export()
        self.evaluate()

    def convert(self) -> None:
        """Stage one: the student before any training."""
        from transmla.convert.convert import convert_model

        def build(scratch: Path, record: dict[str, Any]) -> None:
            settings = self.recipe.convert
            windows = self._windows(settings.calibration.data, "convert.calibration", settings.calibration)
            groups = windows.split(settings.calibration.batch_size)
            student, statistics = convert_model(
                self.teacher, self.prepared.geometry, settings, groups, batches=len(groups)
            )
            record["tokens"] = windows.numel()
            self._save_student(student, scratch)
            scales = torch.tensor([layer.output_mean_square for layer in statistics], dtype=torch.float64)
            save_file({"output_mean_square": scales}, scratch / "statistics.safetensors")

        self._make(self.out / "converted", self.convert_digest, "convert", build)

    def recover(self) -> None:
        """The recovery stages; each starts from the one before."""
        for index, stage in enumerate(self.recipe.recover):
            self._keep_earlier_result(index)
            folder, digest = self.stage_folder(index), self.stage_digest(index)
            label = f"recover.{index} {stage.kind}"
            if is_current(folder, digest):
                self.say(f"[{label}] unchanged, skipped")
                continue
            self._train(index, folder, digest, label)

    def _keep_earlier_result(self, index: int) -> None:
        """A recipe that was lengthened: what was `recovered` is now an earlier stage, and still good."""
        folder = self.stage_folder(index)
        if folder.name == "recovered" or not is_current(self.out / "recovered", self.stage_digest(index)):
            return
        if self.state.is_main_process and not is_current(folder, self.stage_digest(index)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(self.out / "recovered", folder)
        self.state.wait_for_everyone()

    def _train(self, index: int, folder: Path, digest: str, label: str) -> None:
        from transmla.recover.run import build_trainer, run_stage, trainer_config

        stage = self.recipe.recover[index]
        work = self.out / "checkpoints" / f"{index}_{stage.kind}"
        if self.state.is_main_process:
            marker = work / "fingerprint"
            if work.is_dir() and (not marker.is_file() or marker.read_text() != digest):
                shutil.rmtree(work)  # checkpoints of other settings
            work.mkdir(parents=True, exist_ok=True)
            marker.write_text(digest)
        self.state.wait_for_everyone()
        self.say(f"[{label}] ...")
        # transformers takes the folder of TensorBoard's files from here alone; checkpoints do not outlive the stage.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.out / "logs"))
        started = time.monotonic()
        reset_peak_memory(self.prepared.device)
        before = self.stage_folder(index - 1) if index else self.out / "converted"
        config = trainer_config(
            stage,
            work,
            seed=self.recipe.seed,
            device=self.prepared.device,
            dtype=self.prepared.dtype,
            processes=self.state.num_processes,
        )
        trainer = build_trainer(
            stage,
            load_model(before, self.prepared.dtype, self.device),
            self.teacher,
            self.tokenizer,
            config,
            scales=self._scales(),
            key=f"recover.{index}",
        )
        result = run_stage(trainer, self.prepared.dtype)
        if self.state.is_main_process:
            record = {"name": label, "fingerprint": digest, "versions": versions(), **result}
            with publishing(folder, record) as scratch:
                self._save_recipe(scratch)
                self._save_student(trainer.model, scratch)
                record["seconds"] = round(time.monotonic() - started, 1)
                record["peak_memory_bytes"] = peak_memory(self.prepared.device)
            self.say(f"[{label}] {record['seconds']} s")
            shutil.rmtree(work)
        self.state.wait_for_everyone()
        del trainer
        gc.collect()

    def export(self) -> None:
        """The stock checkpoint, published only when a fresh process agrees with the student."""
        self._require(self.student_folder, self.student_digest, "export")

        def build(scratch: Path, record: dict[str, Any]) -> None:
            from transmla.export.deepseek import deepseek_config, export_state

            section = self.recipe.export
            student = load_model(self.student_folder, self.prepared.dtype, "cpu")
            dtype = self._export_dtype()
            config = deepseek_config(student.config, section.layout, dtype)
            state = export_state(student, section.layout, dtype)
            with torch.device("meta"):
                model = transformers.DeepseekV3ForCausalLM(config)
            expected = set(model.state_dict())
            assert expected == set(state), f"names differ: {sorted(expected ^ set(state))[:4]}"
            model.load_state_dict(state, assign=True, strict=True)
            model.generation_config = GenerationConfig.from_dict(student.generation_config.to_dict())
            model.save_pretrained(scratch, max_shard_size=section.max_shard_size)
            self.tokenizer.save_pretrained(scratch)
            del model, state, student
            record["format"] = "deepseek_v3"
            record["max_abs_logprob_diff"] = self._verify(scratch)

        self._make(self.out / "exported", self.export_digest, "export", build)

    def verify(self) -> None:
        """Check an existing export again."""
        self._require(self.out / "exported", self.export_digest, "verify")
        if self.state.is_main_process:
            difference = self._verify(self.out / "exported")
            self.say(f"[verify] max |difference of log-probabilities| {difference:.2e}")
        self.state.wait_for_everyone()

    def _export_dtype(self) -> torch.dtype:
        wanted = self.recipe.export.dtype
        return self.prepared.dtype if wanted == "auto" else getattr(torch, wanted)

    @torch.no_grad()
    def _verify(self, folder: Path) -> float:
        """Compare stock transformers in a fresh process with the student; both multiply in float32.

        Raises:
            RuntimeError: the difference is above the tolerance.
        """
        from transmla.export.verify import score_in_fresh_process

        section = self.recipe.export.verify
        length = min(section.tokens, self.recipe.evaluate.max_length)
        data = load_many(self.recipe.evaluate.data[:1], "evaluate.data")
        tokens = token_windows(data, self.tokenizer, tokens=section.tokens, length=length)
        student = load_model(self.student_folder, torch.float32, "cpu")
        own = torch.cat([student(row[None]).logits.log_softmax(-1) for row in tokens])
        del student  # one model in memory at a time
        scratch = self.out / ".partial-verify"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            save_file({"input_ids": tokens}, scratch / "tokens.safetensors")
            score_in_fresh_process(folder, scratch / "tokens.safetensors", scratch / "scores.safetensors", "cpu")
            scores = load_file(scratch / "scores.safetensors")["log_probs"]
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        difference = float((own - scores).abs().max())
        tolerance = section.tolerance or DEFAULT_TOLERANCE[self._export_dtype()]
        if not difference <= tolerance:  # a NaN fails too
            raise RuntimeError(
                f"export.verify: log-probabilities of the exported model differ by {difference:.3g} from the student's, "
                f"tolerance {tolerance:.3g}; nothing was published"
            )
        return difference

    # ---- evaluation ----

    def evaluate(self) -> None:
        """Quality of every model that is there, then the report."""
        folders = {
            "teacher": None,
            "converted": self.out / "converted",
            "recovered": self.out / "recovered",
            "exported": self.out / "exported",
        }
        if not self.recipe.recover:
            del folders["recovered"]
        for name, folder in folders.items():
            if folder is not None and not folder.is_dir():
                continue
            target = self.out / "evaluation" / name
            self._make(
                target,
                self.evaluation_digest(name),
                f"evaluate {name}",
                lambda scratch, record, name=name, folder=folder: self._evaluate_one(name, folder, scratch, record),
            )
        if self.state.is_main_process:
            write_report(self.out, self.recipe, self.prepared.geometry)
            self.say((self.out / "report.md").read_text())
        self.state.wait_for_everyone()

    def _evaluate_one(self, name: str, folder: Path | None, scratch: Path, record: dict[str, Any]) -> None:
        section = self.recipe.evaluate
        model = self.teacher if folder is None else load_model(folder, self.prepared.dtype, self.device)
        head = model.get_output_embeddings().weight.detach()
        quality = {}
        for dataset in section.data:
            file = f"{dataset.replace('/', '_')}.safetensors"
            if folder is None:
                windows = self._windows([dataset], "evaluate", section)
                hidden = reference = final_hidden(model, windows, section.batch_size, f"{name} on {dataset}")
                save_file({"windows": windows, "hidden": hidden, "head": head.cpu().clone()}, scratch / file)
                reference_head = head
            else:
                saved = load_file(self.out / "evaluation" / "teacher" / file)
                windows, reference = saved["windows"], saved["hidden"]
                hidden = final_hidden(model, windows, section.batch_size, f"{name} on {dataset}")
                reference_head = saved["head"].to(head.device)
            quality[dataset] = asdict(compare(windows, hidden, head, reference, reference_head))
        record["quality"] = quality
        record["continuations"] = self._continue(model) if name in ("teacher", "exported") else {}
        if name in ("converted", "recovered"):
            record["layer_errors"] = self._layer_errors(model, section.data[0])

    @torch.no_grad()
    def _layer_errors(self, student: PreTrainedModel, dataset: str) -> list[float]:
        """Normalised output error of every attention on the first window of a dataset."""
        from transmla.recover.layerwise import attention_errors

        file = f"{dataset.replace('/', '_')}.safetensors"
        window = load_file(self.out / "evaluation" / "teacher" / file)["windows"][:1].to(self.device)
        scales = self._scales()
        return (attention_errors(self.teacher, student, {"input_ids": window}, scales) / window.numel()).tolist()

    def _continue(self, model: PreTrainedModel) -> dict[str, str]:
        """Greedy continuations of the recipe's prompts."""
        texts = {}
        for prompt in self.recipe.evaluate.prompts:
            tokens = self.tokenizer(prompt, return_tensors="pt").to(model.device)
            out = model.generate(
                **tokens,
                max_new_tokens=self.recipe.evaluate.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
            texts[prompt] = self.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    # ---- small things ----

    def _windows(self, names: list[str], key: str, section: Any) -> Tensor:
        try:
            return token_windows(
                load_many(names, f"{key}.data"), self.tokenizer, tokens=section.tokens, length=section.max_length
            )
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"{key}.data", str(error)) from None

    def _save_student(self, student: PreTrainedModel, folder: Path) -> None:
        student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _scales(self) -> list[float]:
        return load_file(self.out / "converted" / "statistics.safetensors")["output_mean_square"].tolist()

    def _require(self, folder: Path, digest: str, verb: str) -> None:
        if not is_current(folder, digest):
            raise RecipeError(
                "recipe", f"{verb} needs {folder}, which is missing or of other settings; run recover.py recipe=... first"
            )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "transmla": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def records(out: Path) -> dict[str, dict[str, Any]]:
    """All records below an output directory by relative path, for tests and tools."""
    return {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in sorted(out.rglob(RECORD))}


__all__ = ["MODELS", "Pipeline", "read_record", "records", "versions"]

"""What a key of trl's configuration can mean in a stage, where the class itself takes more than that."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from transmla.recipe.bounds import Batch, Length, Number, Whole


def _steps(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("give a whole number of steps, or a share of all steps below 1")
    return value


def _template_file(path: str) -> str:
    if not path.endswith((".jinja", ".j2")):
        raise ValueError(
            "give a .jinja file; the template of another tokenizer would bring tokens that the model lacks"
        )
    return path


def _known(*names: str) -> AfterValidator:
    def check(value: dict[str, Any] | None) -> dict[str, Any] | None:
        unknown = next((name for name in value or {} if name not in names), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is not used here; there are: {', '.join(names)}")
        return value

    return AfterValidator(check)


def _not_reentrant(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value and value.get("use_reentrant"):
        raise ValueError("use_reentrant gives frozen embeddings no gradient behind them, so that nothing would train")
    return value


_Steps = Annotated[Number, Field(gt=0.0, le=1e9), AfterValidator(_steps)]
_Beta = Annotated[Number, Field(ge=0.0, lt=1.0)]
_Share = Annotated[Number, Field(ge=0.0, le=1.0)]
_Workers = Annotated[Whole, Field(ge=0, le=256)]
_Level = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]

# Keys for which the type that trl states is all there is to say, or which are tried out before weights load
# (transmla.plan.trainer_checks).
AS_TRL_SAYS = {"lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "tf32", "gradient_checkpointing"}
AS_TRL_SAYS |= {"logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "disable_tqdm", "report_to"}
AS_TRL_SAYS |= {"run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
AS_TRL_SAYS |= {"enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "full_determinism", "debug"}
AS_TRL_SAYS |= {"dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"}
AS_TRL_SAYS |= {"ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "skip_memory_metrics"}
AS_TRL_SAYS |= {"eos_token", "pad_token", "shuffle_dataset", "packing", "padding_free", "activation_offloading"}
AS_TRL_SAYS |= {"completion_only_loss", "assistant_only_loss"}
AS_TRL_SAYS |= {"disable_dropout", "generation_kwargs", "cache_implementation", "log_completions", "log_unique_prompts"}

VALUES: dict[str, Any] = {
    "per_device_train_batch_size": Batch,
    "gradient_accumulation_steps": Batch,
    "max_length": Annotated[Whole, Field(ge=2, le=2**22)],
    "learning_rate": Annotated[Number, Field(gt=1e-12, le=10.0)],
    "warmup_steps": Annotated[Number, Field(ge=0.0, le=1e9), AfterValidator(_steps)],
    "weight_decay": Annotated[Number, Field(ge=0.0, le=10.0)],
    "adam_beta1": _Beta,
    "adam_beta2": _Beta,
    "adam_epsilon": Annotated[Number, Field(gt=0.0, le=1.0)],
    "max_grad_norm": Annotated[Number, Field(ge=0.0, le=1e6)],
    "neftune_noise_alpha": Annotated[Number, Field(gt=0.0, le=1000.0)] | None,
    "gradient_checkpointing_kwargs": Annotated[
        dict[str, Any] | None,
        _known("use_reentrant", "preserve_rng_state", "selective", "every_n_layers", "offload"),
        AfterValidator(_not_reentrant),
    ],
    "torch_empty_cache_steps": Annotated[Whole, Field(gt=0, le=10**9)] | None,
    "logging_strategy": Literal["steps", "epoch", "no"],
    "logging_steps": _Steps,
    "log_level": _Level,
    "log_level_replica": _Level,
    "save_strategy": Literal["steps", "epoch", "no"],
    "save_steps": _Steps,
    "save_total_limit": Annotated[Whole, Field(gt=0, le=10**6)] | None,
    "accelerator_config": Annotated[
        dict[str, Any] | None, _known("non_blocking", "even_batches", "use_seedable_sampler")
    ],
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "dataloader_num_workers": _Workers,
    "dataloader_prefetch_factor": Annotated[Whole, Field(gt=0, le=1000)] | None,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "dataset_num_proc": Annotated[Whole, Field(gt=0, le=256)] | None,
    "ddp_bucket_cap_mb": Annotated[Whole, Field(gt=0, le=10**6)] | None,
    "chat_template_path": Annotated[str, AfterValidator(_template_file)] | None,
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "truncation_mode": Literal["keep_start", "keep_end"],
    "pad_to_multiple_of": Annotated[Whole, Field(gt=0, le=2**16)] | Literal["auto"] | None,
    "top_p": Annotated[Number, Field(gt=0.0, le=1.0)],
    "top_k": Annotated[Whole, Field(ge=0, le=2**20)],
    "min_p": _Share | None,
    "repetition_penalty": Annotated[Number, Field(ge=0.01, le=100.0)],
    "num_completions_to_print": Length | None,
}

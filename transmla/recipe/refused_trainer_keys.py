"""Keys of trl's configurations that do nothing here, or harm, with what does it instead."""

from __future__ import annotations

_LAUNCH = "the launch file decides that; give accelerate launch a --config_file"
_EVALUATE = "nothing is evaluated while a stage trains; use the recipe's evaluate"
_HUB = "checkpoints are not uploaded; upload exported/ when it is made"
_COMPILE = "a stage has a key of its own for it; use recover.N.compile"
_TEACHER = "the losses are this project's own and do not use it; leave it out"
_VLLM = "the student writes with transformers, as its attention is unknown to vLLM; leave it out"

# A key at its default is no mistake, as a file of settings may list all of them.
REFUSED: dict[str, str] = {
    # processes and devices
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ds3_gather_for_generation"), _LAUNCH),
    **dict.fromkeys(("ddp_backend", "ddp_timeout", "local_rank"), _LAUNCH),
    # evaluation
    **dict.fromkeys(("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"), _EVALUATE),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATE),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_packing"), _EVALUATE),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "do_predict"), _EVALUATE),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _EVALUATE),
    # the hub
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _HUB),
    "hub_private_repo": _HUB,
    "hub_token": "a secret has no place in a recipe, which is saved with every result; set HF_TOKEN, or hf auth login",
    "trust_remote_code": "code of a repository is never run; leave it out",
    # loss and model
    **dict.fromkeys(("label_smoothing_factor", "router_aux_loss_coef", "label_names", "use_cache"), _TEACHER),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _TEACHER),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    "activation_checkpointing": "use trainer.gradient_checkpointing, which the memory estimate knows",
    "activation_checkpointing_kwargs": "use trainer.gradient_checkpointing_kwargs",
    "optim_target_modules": "GaLore and APOLLO are not supported, as weights are grouped by their rates; use optim",
    # rows and batches
    "auto_find_batch_size": "the number of steps follows from the batch; set trainer.per_device_train_batch_size",
    "remove_unused_columns": "the trainers choose the columns themselves; leave it out",
    "length_column_name": "rows have no such column; leave it out",
    "dataset_kwargs": "rows are always prepared; leave it out",
    "include_num_input_tokens_seen": "tokens are always counted (num_tokens in the log); leave it out",
    "chat_template_kwargs": "prompts are token ids when the trainer gets them; put the values into the template",
    "max_tool_calling_iterations": "no tool is called while the student writes; leave it out",
    # checkpoints
    "save_only_model": "a stage could not go on from such a checkpoint; use save_total_limit to save room",
    "save_on_each_node": "a checkpoint is written once, into a folder that all processes share; leave it out",
    "ignore_data_skip": "an interrupted stage would see its first rows twice; leave it out",
    # generation
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode"), _VLLM),
    **dict.fromkeys(("vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host"), _VLLM),
    **dict.fromkeys(("vllm_server_port", "vllm_server_timeout", "vllm_group_port"), _VLLM),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"), _VLLM),
}

# Keys that some kinds of stage alone do not use.
BY_KIND: dict[str, dict[str, str]] = {
    "layerwise": {
        "completion_only_loss": "every token counts in a layerwise stage, whatever its label; leave it out",
        "assistant_only_loss": "every token counts in a layerwise stage, whatever its label; leave it out",
        "neftune_noise_alpha": "the teacher reads the same embeddings without the noise; use it in an sft stage",
    },
    "distill": {
        "neftune_noise_alpha": "the teacher reads the same embeddings without the noise; use it in an sft stage",
    },
    "sft": {},
    "on_policy": {
        "neftune_noise_alpha": "the teacher reads the same embeddings without the noise; use it in an sft stage",
        "train_sampling_strategy": "prompts come in the order of the seed, each once before any again; leave it out",
    },
}

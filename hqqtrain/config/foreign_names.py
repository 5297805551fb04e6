"""Names that other fine-tuning tools give to our settings, so that an error can name our key.

The names are those of transformers, PEFT, TRL, axolotl, LLaMA-Factory, Unsloth, AutoGPTQ, AutoAWQ
and bitsandbytes.
"""

FOREIGN_NAMES = {
    # model
    "model_name_or_path": "model.name_or_path", "model_name": "model.name_or_path",
    "model_id": "model.name_or_path", "model_path": "model.name_or_path",
    "base_model": "model.name_or_path", "base_model_name_or_path": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path", "model_revision": "model.revision",
    # quantization
    "bits": "quant.nbits", "wbits": "quant.nbits", "w_bit": "quant.nbits",
    "w_bits": "quant.nbits", "weight_bits": "quant.nbits", "num_bits": "quant.nbits",
    "n_bits": "quant.nbits", "quantization_bit": "quant.nbits", "load_in_4bit": "quant.nbits=4",
    "load_in_8bit": "quant.nbits=8", "load_in_16bit": "quant.nbits=null",
    "groupsize": "quant.group_size",
    "q_group_size": "quant.group_size", "w_group_size": "quant.group_size",
    "bnb_4bit_compute_dtype": "quant.compute_dtype", "modules_to_not_convert": "quant.skip",
    "skip_modules": "quant.skip",
    "llm_int8_skip_modules": "quant.skip",
    # adapter
    "lora_r": "adapter.r", "lora_rank": "adapter.r", "rank": "adapter.r",
    "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules", "lora_target_modules": "adapter.target_modules",
    "use_rslora": "adapter.kind=rslora", "peft_use_rslora": "adapter.kind=rslora",
    "use_peft": "adapter.kind=lora", "finetuning_type": "adapter.kind",
    "full_finetuning": "adapter.kind", "adapter": "adapter.kind",
    "lora_target_linear": "adapter.target_modules=all-linear",
    "finetune_attention_modules": "adapter.target_modules",
    "finetune_mlp_modules": "adapter.target_modules",
    "peft_layers_to_transform": "adapter.target_modules",
    "layers_to_transform": "adapter.target_modules", "init_lora_weights": "adapter.init",
    "adapter_name_or_path": "adapter.init_from", "lora_model_dir": "adapter.init_from",
    "peft_model_id": "adapter.init_from", "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    # tokens
    "tokens": "data.add_tokens", "add_special_tokens": "data.add_tokens",
    "new_special_tokens": "data.add_tokens", "additional_special_tokens": "data.add_tokens",
    "extra_special_tokens": "data.add_tokens", "special_tokens": "data.add_tokens",
    "setup_chat_format": "data.add_tokens=auto", "resize_vocab": "data.add_tokens",
    "trainable_token_indices": "data.add_tokens",
    # training
    "learning_rate": "optim.lr", "lr_rate": "optim.lr", "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule", "scheduler": "optim.schedule",
    "warmup": "optim.warmup_steps", "warmup_ratio": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps", "optimizer": "optim.name", "optim": "optim.name",
    "optimizer_type": "optim.name", "wd": "optim.weight_decay", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "n_epochs": "train.epochs", "epoch": "train.epochs",
    "steps": "train.max_steps", "num_steps": "train.max_steps",
    "max_train_steps": "train.max_steps", "train_steps": "train.max_steps",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_accumulation": "train.global_batch_size", "grad_accum": "train.global_batch_size",
    "batch_size": "train.global_batch_size", "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "eval_batch_size": "train.micro_batch_size", "max_seq_length": "train.max_seq_len",
    "max_length": "train.max_seq_len", "seq_len": "train.max_seq_len",
    "seq_length": "train.max_seq_len", "sequence_len": "train.max_seq_len",
    "sequence_length": "train.max_seq_len", "cutoff_len": "train.max_seq_len",
    "block_size": "train.max_seq_len", "context_length": "train.max_seq_len",
    "model_max_length": "train.max_seq_len", "sample_packing": "train.packing",
    "neat_packing": "train.packing", "packing_strategy": "train.packing",
    "padding_free": "train.packing",
    "gradient_checkpointing": "train.activation_checkpointing",
    "use_gradient_checkpointing": "train.activation_checkpointing",
    "activation_checkpoint": "train.activation_checkpointing",
    "gradient_clipping": "train.max_grad_norm", "clip_grad": "train.max_grad_norm",
    "early_stopping": "train.early_stopping_patience",
    "patience": "train.early_stopping_patience",
    "bf16": "train.precision=bf16", "fp16": "train.precision=fp16",
    "mixed_precision": "train.precision", "torch_dtype": "train.precision",
    "dtype": "train.precision", "random_seed": "train.seed", "data_seed": "train.seed",
    "random_state": "train.seed", "loss_type": "train.objective", "do_train": "task=finetune",
    "merge_lora": "task=export",
    # data and evaluation
    "dataset": "data.source", "datasets": "data.source", "dataset_name": "data.source",
    "dataset_path": "data.source", "data_path": "data.source", "train_file": "data.source",
    "train_data": "data.source", "train_dataset": "data.source", "dataset_dir": "data.source",
    "data_files": "data.source", "pretraining_dataset": "data.source",
    "dataset_config": "data.source", "dataset_config_name": "data.source",
    "interleave_probs": "data.source", "mix_strategy": "data.source",
    "dataset_type": "data.format", "dataset_format": "data.format",
    "data_format": "data.format", "formatting": "data.format", "stage": "data.format",
    "file_format": "data.file_type",
    "file_ext": "data.file_type", "dataset_text_field": "data.text_field",
    "text_column": "data.text_field",
    "text_column_name": "data.text_field", "validation_file": "eval.source",
    "assistant_only_loss": "data.loss_on=assistant", "train_on_inputs": "data.loss_on",
    "completion_only_loss": "data.loss_on=completion", "train_on_prompt": "data.loss_on",
    "train_on_responses_only": "data.loss_on=assistant", "chat_template": "data.chat_template",
    "train_on_completions": "data.loss_on=completion", "chat_template_path": "data.chat_template",
    "template": "data.chat_template", "chat_template_jinja": "data.chat_template",
    "instruction_part": "data.loss_on=assistant", "response_part": "data.loss_on=assistant",
    "roles_to_train": "data.loss_on", "mask_history": "data.loss_on=last",
    "excess_length_strategy": "data.on_long", "truncation_mode": "data.on_long",
    "streaming": "data.streaming",
    "buffer_size": "data.shuffle_buffer", "shuffle_buffer_size": "data.shuffle_buffer",
    "dataset_num_proc": "data.workers", "preprocessing_num_workers": "data.workers",
    "dataset_processes": "data.workers", "num_proc": "data.workers",
    "dataset_prepared_path": "data.cache_dir", "tokenized_path": "data.cache_dir",
    "overwrite_cache": "data.cache_dir", "test_datasets": "eval.source",
    "eval_dataset": "eval.source", "val_dataset": "eval.source", "eval_steps": "eval.every",
    "eval_strategy": "eval.every", "evaluation_strategy": "eval.every",
    "evals_per_epoch": "eval.every",
    "val_set_size": "data.validation", "validation_split": "data.validation",
    "validation_split_percentage": "data.validation", "val_size": "data.validation",
    "test_size": "data.validation",
    # generation
    "max_new_tokens": "generate.max_new_tokens", "max_tokens": "generate.max_new_tokens",
    "num_predict": "generate.max_new_tokens", "n_predict": "generate.max_new_tokens",
    "temperature": "generate.temperature", "temp": "generate.temperature",
    "do_sample": "generate.temperature=0", "top_k": "generate.top_k", "top_p": "generate.top_p",
    "min_p": "generate.min_p", "repetition_penalty": "generate.repetition_penalty",
    "repeat_penalty": "generate.repetition_penalty", "prompt": "generate.prompt",
    "prompts": "generate.prompt", "prompt_file": "generate.prompts_file",
    "system_prompt": "generate.system", "system_message": "generate.system",
    "default_system": "generate.system",
    # hub
    "push_to_hub": "hub.push", "hub_model_id": "hub.push", "push_to_hub_model_id": "hub.push",
    "save_to_hub": "hub.push", "hub_strategy": "hub.push", "hf_path": "hub.push",
    "hub_private_repo": "hub.private", "hf_hub_private": "hub.private",
    # distribution, output and tracking
    "fsdp": "parallel.strategy=fsdp2", "deepspeed": "parallel.strategy=zero3",
    "zero_stage": "parallel.strategy=zero3", "ddp": "parallel.strategy=ddp",
    "cpu_offload": "parallel.offload",
    "activation_offloading": "train.activation_checkpointing=offload",
    "output_dir": "run.root", "logging_dir": "run.root",
    "export_dir": "run.root", "overwrite_output_dir": "run.resume=never",
    "run_name": "run.name", "wandb_run_name": "run.name", "wandb_name": "run.name",
    "resume_from_checkpoint": "run.resume",
    "save_steps": "ckpt.every", "save_strategy": "ckpt.every", "save_every": "ckpt.every",
    "checkpoint_every": "ckpt.every", "saves_per_epoch": "ckpt.every",
    "save_total_limit": "ckpt.keep_last",
    "load_best_model_at_end": "ckpt.load_best=true",
    "report_to": "track.backends", "wandb_project": "track.project",
    "wandb_entity": "track.entity", "num_nodes": "launch.nodes", "nnodes": "launch.nodes",
}  # fmt: skip
"""Name in another tool -> our key, with its value where the name implies one."""

NEEDLESS_NAMES = {
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "use_flash_attention_2"),
        "transformers chooses the attention, as attn_implementation in config.json says",
    ),
    **dict.fromkeys(
        ("max_samples", "max_train_samples"),
        "all rows are used; train.max_steps limits the training",
    ),
    **dict.fromkeys(
        ("eval_sample_packing", "eval_packing"),
        "held-out text is measured in windows, as eval.protocol says",
    ),
    **dict.fromkeys(
        ("pad_to_sequence_len", "pad_to_multiple_of"), "a batch is padded to its longest sequence"
    ),
    **dict.fromkeys(
        ("shuffle_dataset", "shuffle_merged_datasets"), "sequences are shuffled, by train.seed"
    ),
    **dict.fromkeys(
        ("split", "dataset_split", "train_split", "dataset_train_split", "dataset_test_split"),
        "splits are told by the names of files and of the splits of a data set; data.source can "
        "name a single file, and data.validation is the share that is held out otherwise",
    ),
    **dict.fromkeys(
        ("hub_token", "push_to_hub_token", "hf_token", "hf_hub_token", "hub.token"),
        "the token is that of `hf auth login`, or of the environment variable HF_TOKEN",
    ),
    "logging_steps": "every step is logged",
    "plot_loss": "report/ has the plots of every run",
    "trust_remote_code": "code of a model or of a data set is never run",
}
"""Name in another tool, or with the group in which it means this -> why we have no such key."""

_IN_GROUPS = {
    "model.name": "model.name_or_path", "model.id": "model.name_or_path",
    "model.path": "model.name_or_path", "data.path": "data.source", "data.name": "data.source",
    "data.type": "data.format", "data.ds_type": "data.file_type",
    "data.file": "data.source", "data.files": "data.source", "data.train": "data.source",
    "eval.path": "eval.source", "eval.data": "eval.source", "eval.steps": "eval.every",
    "eval.interval": "eval.every", "ckpt.steps": "ckpt.every", "ckpt.interval": "ckpt.every",
}  # fmt: skip
"""Names that mean one of our keys only as a key of this group."""

_REMARKS = {
    "hub.push": "a repository, user/name, which gets the results when the run is done",
    "train.global_batch_size": "accumulation is derived from it, train.micro_batch_size and the "
    "number of processes",
    "train.micro_batch_size": "train.global_batch_size sets the sequences of a step",
    "optim.warmup_steps": "a number of steps",
    "do_sample": "without sampling; above 0 with it",
    "data.validation": "a share of the texts, below 1",
    "adapter.kind": "the quantized base stays frozen, so there is no full fine-tuning",
    "stage": "chat for sft, text for pt; preference training, such as dpo, is not supported",
    "interleave_probs": "a list, in which each source has a path and a weight",
    "mix_strategy": "a list, in which each source has a path, and a weight or repeats",
    "dataset_config": "written as name:configuration",
    "dataset_config_name": "written as name:configuration",
    "overwrite_cache": "a folder; changed data are tokenized again in any case",
    "evals_per_epoch": "a number of steps between evaluations",
    "saves_per_epoch": "a number of steps between checkpoints",
    "peft_layers_to_transform": "globs, such as model.layers.3.*",
    "layers_to_transform": "globs, such as model.layers.3.*",
}
"""Our key, or a name of another tool -> how the two differ."""


def reason_to_leave_out(name: str) -> str | None:
    """Return why there is no key for the dotted `name` of another tool; None if there may be."""
    name = name.lower().replace("-", "_")
    return NEEDLESS_NAMES.get(name) or NEEDLESS_NAMES.get(name.rpartition(".")[2])


def our_name(name: str) -> str | None:
    """Return our key for the dotted `name` of another tool, with a remark; None if unknown."""
    name = name.lower().replace("-", "_")
    last = name.rpartition(".")[2]
    ours = _IN_GROUPS.get(name) or FOREIGN_NAMES.get(last)
    remark = _REMARKS.get(last) or _REMARKS.get(ours or "")
    return f"'{ours}' ({remark})" if remark else f"'{ours}'" if ours else None

"""What options of other trainers mean here: names of HF Trainer, TRL, LLaMA-Factory, ms-swift and 2U1's finetune.

    python names.py                     writes the table at the end of docs/migrating.md

Each name is accepted as one of ours (SAME), accepted without effect (NO_EFFECT), accepted for some values (BY_VALUE),
or answered with a sentence (ANSWERS, REMOVED).
"""

from pathlib import Path

from model import UserError, nearest

SAME = {  # ours: theirs
    "model_id": "model_name_or_path model base_model",
    "model_ckpt": "adapter adapter_name_or_path adapters",
    "video": "video_path",
    "data_path": "dataset",
    "eval_data_path": "eval_path eval_dataset val_dataset",
    "overwrite": "overwrite_output_dir",
    "lora_rank": "lora_r",
    "freeze_vision_tower": "freeze_vit",
    "vision_lr": "vision_tower_lr vit_lr",
    "merger_lr": "mm_projector_lr aligner_lr",
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs",
    "per_device_train_batch_size": "batch_size micro_batch_size",
    "fps": "video_fps",
    "nframes": "num_frames",
    "min_frames": "fps_min_frames",
    "max_frames": "fps_max_frames video_maxlen",
    "image_min_pixels": "min_pixels",
    "image_max_pixels": "max_pixels",
    "max_seq_length": "max_length cutoff_len model_max_length",
    "rewards": "reward_funcs",
}
NO_EFFECT = {  # why: theirs
    "the (T, V) logits are never held here, so Liger has nothing to replace":
        "use_liger use_liger_kernel use_liger_loss enable_liger_kernel",
    "attention is PyTorch's own": "disable_flash_attn2 attn_implementation attn_impl flash_attn",
    "clips are read when they are needed, no column is dropped":
        "remove_unused_columns lazy_preprocess preprocessing_num_workers dataset_num_proc overwrite_cache",
    "samples are always packed and never see each other": "packing neat_packing padding_free group_by_length",
    "the script and the checkpoint say it": "template trust_remote_code model_type do_train do_eval",
    "metrics.jsonl has every step, report.html the curves; a run is named by its output_dir":
        "logging_first_step logging_strategy logging_dir run_name plot_loss",
    "the best checkpoint by accuracy always stays": "load_best_model_at_end metric_for_best_model",
    "checkpoints are safetensors and hold the optimizer's state": "save_safetensors save_only_model",
    "DeepSpeed's launcher and ZeRO-2 need no such setting": "ddp_find_unused_parameters ddp_timeout",
    "recomputation goes block by block": "gradient_checkpointing_kwargs vit_gradient_checkpointing",
    "the built-in decoder takes as many clips at a time as memory holds":
        "use_vllm vllm_mode vllm_gpu_memory_utilization per_device_eval_batch_size",
}  # fmt: skip
OFF = ("none", "null", "false", "")
BY_VALUE = {  # theirs: ({value: our option, or "" for no effect}, what to say of other values)
    "resume_from_checkpoint": (dict.fromkeys(OFF, "") | {"true": "resume=true"},
        "a run is resumed in its own folder, from its last checkpoint: --output_dir RUN --resume True"),
    "eval_strategy evaluation_strategy": ({"steps": "", "no": "eval_data_path=none"},
        "evaluations come every --eval_steps N steps"),
    "optim": (dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), ""), "the optimizer is AdamW"),
    "torch_dtype dtype": ({"auto": "", "bfloat16": "bf16=true", "float16": "fp16=true", "float32": "bf16=false"},
        "expected auto, bfloat16, float16 or float32"),
    "freeze_merger freeze_multi_modal_projector": ({"true": "tune_merger=false", "false": "tune_merger=true"},
        "expected True or False"),
    "lora_target target_modules": ({"all": "", "all-linear": ""},
        "--llm_lora, --vision_lora, --merger_lora and --lora_namespan_exclude choose the layers"),
    "finetuning_type train_type": ({"lora": "lora_enable=true"},
        "for all weights --lora_enable False --freeze_llm False --freeze_vision_tower False --tune_merger True"),
    "stage rlhf_type": ({"sft": "", "grpo": ""}, "this repository has SFT (train_sft.py) and GRPO (train_grpo.py)"),
    "loss_type": ({"dapo": "aggregation=token", "grpo": "aggregation=sequence", "dr_grpo": "aggregation=constant"},
        "--aggregation, --scale_rewards and --importance_sampling_level make up the loss"),
    "load_in_4bit": ({"true": "base_dtype=nf4", "false": ""}, "expected True or False"),
    "load_in_8bit": ({"true": "base_dtype=int8", "false": ""}, "expected True or False"),
    "quantization_bit quant_bits": ({"none": "", "8": "base_dtype=int8", "4": "base_dtype=nf4"},
        "--base_dtype int8, fp8 or nf4"),
}  # fmt: skip
ANSWERS = {  # what to do: theirs
    "download the dataset and give its file: --data_path FILE.json": "dataset_name dataset_dir",
    "split the dataset first: --eval_data_path FILE.json, or val.json beside --data_path":
        "val_size split_dataset_ratio",
    "cut the dataset's file, or stop earlier by --max_steps": "max_samples",
    "a sample is never cut: --max_seq_length with --overlong rebudget (fewer frames) or drop (left out)":
        "truncation_strategy max_prompt_length",
    "the end of the schedule is --min_lr_ratio, a share of the peak": "lr_scheduler_kwargs min_lr",
    "the merger gets adapters by --merger_lora True, or is trained whole by --tune_merger True": "freeze_aligner",
    "whole components are trained by --tune_merger True, --freeze_llm False, --freeze_vision_tower False":
        "modules_to_save",
    "not supported; of LoRA's variants --use_rslora True is": "use_dora",
    "several GPUs share the work by DeepSpeed ZeRO-2: deepspeed --num_gpus N": "fsdp sequence_parallel_size",
    "rewards of your own: --rewards my_rewards.py:name": "external_plugins",
    "an update takes --per_device_train_batch_size completions; --num_iterations repeats it":
        "steps_per_generation generation_batch_size",
}  # fmt: skip
REMOVED = {  # what to do: options that were here once
    "--base_dtype nf4 or int8 makes the frozen base small, --num_gpus N shares the rest by ZeRO-2":
        "partition_weights offload_weights",
    "use data parallelism, for a long video on a small card --offload_activations True": "sequence_parallel",
    "each rank samples its own prompts, as many at a time as memory holds": "rollout_rows",
    "--dry_run True prints the memory that a run needs": "dry_run_gib",
    "--max_resample N samples further prompts until enough groups differ in accuracy": "oversample",
    "adapters of both key styles are read; for use elsewhere: python lora.py merge ADAPTER OUT": "keys",
    "a merged model has the files of its base, one each": "shard_gb",
    "whole components are trained by --tune_merger, --freeze_llm and --freeze_vision_tower": "lora_bias",
    "python assets/make_tiny.py clips draws what the tiny base learns from": "base_coordinates",
    "balls vary in size, colour and speed, so that only motion tells the class": "style",
    "any regular file that a record names is read": "allow_outside_files",
    "download the files first, and name them in the records":
        "allow_remote_files remote_folder remote_max_mb remote_seconds",
}  # fmt: skip
SYNONYMS = {name: ours for ours, names in SAME.items() for name in names.split()}
NAMES = {name: ("value", meaning) for names, meaning in BY_VALUE.items() for name in names.split()}
for _kind, _table in (("same", SAME), ("none", NO_EFFECT), ("answer", ANSWERS), ("removed", REMOVED)):
    NAMES |= {name: (_kind, meaning) for meaning, names in _table.items() for name in names.split()}


def translate(name, value):
    """(our option or "", its value, [note]) for a name of another trainer; a name that is in no table is returned as it
    is. UserError for one that is answered with a sentence."""
    kind, meaning = NAMES.get(name, ("unknown", ""))
    word = str(value).lower()
    if kind == "unknown":
        return name, value, []
    if kind == "same":
        return meaning, value, [f"--{name} is --{meaning} here"]
    if kind == "none":
        return "", None, [f"--{name} has no effect: {meaning}"]
    if kind == "removed":
        raise UserError(f"was removed; {meaning}")
    choices, otherwise = meaning if kind == "value" else (dict.fromkeys(OFF, ""), meaning)
    if word not in choices:
        raise UserError(f"{value!r} is not an option here; {otherwise}")
    option, _, ours = choices[word].partition("=")
    is_so = f"is --{option} {ours} here" if option else "has no effect: it is so already"
    return option, ours, [f"--{name} {value} {is_so}"]


def suggestion(name, names):
    """A hint: at most three options that hold all words of `name` and few others, or the one spelt almost like it. ""
    otherwise: a wrong guess is worse than none."""
    words = set(name.split("_"))
    close = [other for other in names if words <= (theirs := set(other.split("_"))) and len(theirs) <= len(words) + 2]
    if 0 < len(close) <= 3:
        return f"; did you mean {' or '.join(sorted(close))}?"
    return nearest(name, names, cutoff=0.85)


TABLE = "\n| theirs | here |\n|---|---|\n"  # the text above it in docs/migrating.md is written by hand


def rows():
    """The table's rows: (names, meaning)."""
    yield from ((names, f"`--{ours}`") for ours, names in SAME.items())
    for names, (choices, otherwise) in BY_VALUE.items():
        pairs = [f"{value or 'empty'}: {f'`--{ours}`' if ours else 'no effect'}" for value, ours in choices.items()]
        yield names, f"{', '.join(pairs)}; else {otherwise}"
    yield from ((names, f"no effect: {why}") for why, names in NO_EFFECT.items())
    yield from ((names, answer) for answer, names in ANSWERS.items())
    yield from ((names, f"was removed; {answer}") for answer, names in REMOVED.items())


def migrating(text):
    """docs/migrating.md with the table as it is now."""
    flags = lambda names: ", ".join(f"`--{name}`" for name in names.split())
    return text.partition(TABLE)[0] + TABLE + "".join(f"| {flags(names)} | {meaning} |\n" for names, meaning in rows())


if __name__ == "__main__":
    page = Path(__file__).with_name("docs") / "migrating.md"
    page.write_text(migrating(page.read_text(encoding="utf-8")), encoding="utf-8")

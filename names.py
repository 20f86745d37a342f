"""What options of other trainers mean here: names of HF Trainer, TRL, LLaMA-Factory, ms-swift and 2U1's finetune.

    python names.py > docs/migrating.md

Each name is accepted as one of ours ("same"), accepted without effect ("none"), accepted for some values ("value"), or
answered with a sentence ("answer").
"""

from model import UserError, nearest

SAME = {  # ours: theirs
    "model_id": "model_name_or_path model base_model",
    "model_ckpt": "adapter adapter_name_or_path adapters",
    "video": "video_path",
    "data_path": "dataset",
    "eval_data_path": "eval_path eval_dataset val_dataset",
    "image_folder": "media_dir",
    "overwrite": "overwrite_output_dir",
    "lora_enable": "use_peft use_lora",
    "lora_rank": "lora_r",
    "freeze_llm": "freeze_language_model",
    "freeze_vision_tower": "freeze_vit",
    "tune_merger": "tune_mm_mlp",
    "vision_lr": "vision_tower_lr mm_vision_tower_lr vit_lr",
    "merger_lr": "mm_projector_lr aligner_lr",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "num_train_epochs": "epochs num_epochs",
    "max_steps": "max_train_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size per_gpu_train_batch_size",
    "max_grad_norm": "gradient_clipping clip_grad",
    "fps": "video_fps",
    "nframes": "num_frames",
    "min_frames": "fps_min_frames video_min_frames",
    "max_frames": "fps_max_frames video_max_frames video_maxlen",
    "image_min_pixels": "min_pixels",
    "image_max_pixels": "max_pixels",
    "max_seq_length": "max_length cutoff_len model_max_length max_seq_len",
    "dataloader_num_workers": "num_workers",
    "rewards": "reward_funcs",
    "mask_truncated_completions": "overlong_filter",
    "output_dir": "export_dir",
}
NO_EFFECT = {  # why: theirs
    "the (T, V) logits are never held here, so Liger has nothing to replace":
        "use_liger use_liger_kernel use_liger_loss enable_liger_kernel",
    "attention is PyTorch's own, the flash-attn package is never used":
        "disable_flash_attn2 attn_implementation attn_impl flash_attn use_flash_attention_2",
    "clips are read when they are needed": "lazy_preprocess lazy_tokenize streaming preprocessing_num_workers "
        "dataset_num_proc overwrite_cache",
    "samples are no table, no column is dropped": "remove_unused_columns",
    "samples are always packed without padding and never see each other":
        "packing neat_packing padding_free group_by_length",
    "an evaluation decodes as many clips at a time as memory holds": "per_device_eval_batch_size",
    "the checkpoint's own chat template and code are used": "template chat_template trust_remote_code",
    "samples are drawn anew each epoch, in an order that follows --seed": "shuffle_dataset data_seed",
    "metrics.jsonl has every step, report.html the curves; a run is named by its output_dir":
        "logging_first_step logging_strategy logging_dir run_name plot_loss",
    "the best checkpoint by accuracy on the held-out set always stays": "load_best_model_at_end metric_for_best_model",
    "checkpoints are safetensors and hold the optimizer's state": "save_safetensors save_only_model",
    "the script says what is trained": "do_train do_eval",
    "DeepSpeed's launcher and ZeRO-2 need no such setting": "ddp_find_unused_parameters ddp_timeout",
    "recomputation goes block by block, in the vision tower too":
        "gradient_checkpointing_kwargs vit_gradient_checkpointing",
    "rollouts are sampled by the built-in decoder": "use_vllm vllm_mode vllm_gpu_memory_utilization",
    "dropout is off in GRPO": "disable_dropout",
    "the architecture is read from the checkpoint's config.json": "model_type",
}  # fmt: skip
OFF = ("none", "null", "false", "")
BY_VALUE = {  # theirs: ({value: our option, or "" for no effect}, what to say of other values)
    "resume_from_checkpoint": (dict.fromkeys(OFF, "") | {"true": "resume=true"},
        "a run is resumed in its own folder, from its last checkpoint: --output_dir RUN --resume True"),
    "eval_strategy evaluation_strategy": ({"steps": "", "no": "eval_data_path=none"},
        "evaluations come every --eval_steps N steps"),
    "optim": (dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), ""), "the optimizer is AdamW"),
    "torch_dtype dtype": ({"auto": "", "bfloat16": "bf16=true", "float16": "fp16=true", "float32": "bf16=false"},
        "expected auto, bfloat16, float16 or float32"),
    "freeze_merger freeze_multi_modal_projector": ({"true": "tune_merger=false", "false": "tune_merger=true"},
        "expected True or False"),
    "lora_target lora_target_modules target_modules": ({"all": "", "all-linear": ""},
        "--llm_lora, --vision_lora, --merger_lora and --lora_namespan_exclude choose the layers"),
    "finetuning_type tuner_type train_type": ({"lora": "lora_enable=true"},
        "for all weights --lora_enable False --freeze_llm False --freeze_vision_tower False --tune_merger True"),
    "stage rlhf_type": ({"sft": "", "grpo": ""},
        "this repository has SFT (train_sft.py) and GRPO (train_grpo.py)"),
    "loss_type": ({"dapo": "aggregation=token", "grpo": "aggregation=sequence", "dr_grpo": "aggregation=constant"},
        "--aggregation, --scale_rewards and --importance_sampling_level make up the loss"),
    "load_in_4bit": ({"true": "base_dtype=nf4", "false": ""}, "expected True or False"),
    "load_in_8bit": ({"true": "base_dtype=int8", "false": ""}, "expected True or False"),
    "bits quantization_bit quant_bits": ({"16": "", "none": "", "8": "base_dtype=int8", "4": "base_dtype=nf4"},
        "--base_dtype int8, fp8 or nf4"),
}  # fmt: skip
ANSWERS = {  # what to do: theirs
    "download the dataset and give its file: --data_path FILE.json": "dataset_name",
    "give the dataset's file, not its name in dataset_info.json: --data_path DIR/FILE.json": "dataset_dir",
    "split the dataset first: --eval_data_path FILE.json, or val.json beside --data_path":
        "val_size split_dataset_ratio",
    "cut the dataset's file, or stop earlier by --max_steps": "max_samples",
    "a sample is never cut: --max_seq_length with --overlong rebudget (fewer frames) or drop (left out)":
        "truncation_strategy max_prompt_length",
    "the end of the schedule is --min_lr_ratio, a share of the peak": "lr_scheduler_kwargs min_lr",
    "the merger gets adapters by --merger_lora True, or is trained whole by --tune_merger True": "freeze_aligner",
    "whole components are trained by --tune_merger True, --freeze_llm False, --freeze_vision_tower False":
        "modules_to_save",
    "DoRA is not supported; --use_rslora True is": "use_dora",
    "not supported": "neftune_noise_alpha label_smoothing_factor",
    "several GPUs share the work by DeepSpeed ZeRO-2: deepspeed --num_gpus N": "fsdp sequence_parallel_size",
    "hide the GPUs instead: CUDA_VISIBLE_DEVICES= python ...": "use_cpu no_cuda",
    "set it in the environment: HF_HOME for the cache, WANDB_PROJECT for the project": "cache_dir wandb_project",
    "upload the adapter's folder yourself: hf upload NAME FOLDER": "push_to_hub",
    "merge afterwards: python lora.py merge ADAPTER OUT": "merge_lora",
    "rewards of your own: --rewards my_rewards.py:name": "external_plugins",
    "an update takes --per_device_train_batch_size completions; --num_iterations repeats it":
        "steps_per_generation generation_batch_size",
    "the reference never moves: --reference start or base": "sync_ref_model ref_model",
    "--sampler_is_cap C truncates the importance weights": "vllm_importance_sampling_correction",
    "--max_resample N samples further prompts until enough groups differ in accuracy": "dynamic_sample",
}  # fmt: skip
REMOVED = {  # what to do: options that were here once
    "--base_dtype nf4 or int8 makes the frozen base small, --num_gpus N shares the rest by ZeRO-2":
        "partition_weights offload_weights",
    "use data parallelism, for a long video on a small card --offload_activations True": "sequence_parallel",
    "each rank samples its own prompts, as many at a time as memory holds": "rollout_rows",
    "--dry_run True prints the memory that a run needs": "dry_run_gib",
    "--max_resample N samples further prompts until enough groups differ in accuracy": "oversample",
    "adapters of both key styles are read; for use elsewhere: python lora.py merge ADAPTER OUT": "keys",
    "python assets/make_tiny.py clips draws what the tiny base learns from": "base_coordinates",
    "balls vary in size, colour and speed, so that only motion tells the class": "style",
    "rollouts.jsonl has every completion, report.html shows them": "log_completions",
    "any regular file that a record names is read": "allow_outside_files",
    "download the files first, and name them in the records":
        "allow_remote_files remote_folder remote_max_mb remote_seconds",
}  # fmt: skip
COMMANDS = {  # docs/migrating.md's last table
    "make audit": "`pip install pip-audit && pip-audit --disable-pip -r requirements.lock`",
    "`lora.py convert`": "both key styles are read, the newer is written; for use elsewhere `python lora.py merge`",
    "generate.py: preview.png, preview.gif": "`python data.py CLIP --preview out.png`",
    "`rollout_halved`, `idle`, `traffic` in metrics.jsonl": "`oom_retries`; torch's profiler shows the others",
    "exit code 75 of a lost machine": "its launcher ends the other ranks, after ten minutes where it is silent",
    "configs/qwen_SIZE_METHOD_MEMORY.py": "configs/SIZE_METHOD.py, with other cards' values in its comments",
    "bench/sft.py, rollout.py, grpo.py, data.py and others": "`python bench/step.py`, `python bench/loading.py`; "
        "findings of the others are in dev/LOG.md",
}  # fmt: skip
NAMES = {name: ("value", meaning) for names, meaning in BY_VALUE.items() for name in names.split()}
for _kind, _groups in (("same", SAME), ("none", NO_EFFECT), ("answer", ANSWERS), ("removed", REMOVED)):
    NAMES |= {name: (_kind, meaning) for meaning, names in _groups.items() for name in names.split()}
SYNONYMS = {name: ours for ours, names in SAME.items() for name in names.split()}


def translate(name, value):
    """(our option or "", its value, note) for a name in NAMES. UserError for one that is answered with a sentence."""
    kind, meaning = NAMES[name]
    already = "", None, f"--{name} {value} has no effect: it is so already"
    if kind == "same":
        return meaning, value, f"--{name} is --{meaning} here"
    if kind == "none":
        return "", None, f"--{name} has no effect: {meaning}"
    if kind == "removed":
        raise UserError(f"was removed; {meaning}")
    if kind == "answer":
        if str(value).lower() in OFF:
            return already
        raise UserError(f"not an option here; {meaning}")
    choices, otherwise = meaning
    if str(value).lower() not in choices:
        raise UserError(f"{value!r} is not supported; {otherwise}")
    option, _, ours = choices[str(value).lower()].partition("=")
    return (option, ours, f"--{name} {value} is --{option} {ours} here") if option else already


def suggestion(name, names):
    """A hint: at most three options that hold all words of `name` (a single word: as their last), that `name` begins or
    ends with, or the one spelt almost like it. "" otherwise: a wrong guess is worse than none."""
    words = name.split("_")
    split = {other: other.split("_") for other in names}
    if len(words) == 1:
        close = [other for other, theirs in split.items() if name == theirs[-1] and len(theirs) <= 3]
    else:
        close = [o for o, theirs in split.items() if set(words) <= set(theirs) and len(theirs) <= len(words) + 2]
        close = close or [o for o in names if "_" in o and (name.startswith(f"{o}_") or name.endswith(f"_{o}"))]
    if 0 < len(close) <= 3:
        return f"; did you mean {' or '.join(sorted(close))}?"
    return nearest(name, names, cutoff=0.85)


# -- docs/migrating.md

HEAD = """\
# Migrating

Written by `python names.py > docs/migrating.md`: what options of other trainers, and removed ones, mean here. Options
of the same name mean the same. These are understood too, on the command line and in a `--config` file, which may be
theirs if it is flat (.yaml, .json, .toml). A run's first lines say what became of each.

Every flag of the original project's commands works under its own name: `video_generator.py` is `generate.py`,
`src/training/train.py` is `train_sft.py`, `src/training/train_grpo.py` is `train_grpo.py`, `scripts/demo.py` is
`infer.py` (`--base_model`, `--video_path`, `--prompt` are accepted).

```bash
deepspeed train_sft.py --use_liger True --deepspeed configs/zero2_offload.json --model_id Qwen/Qwen2.5-VL-3B-Instruct \\
  --data_path ./data/synthetic_videos/train.json --image_folder ./data/synthetic_videos/videos \\
  --freeze_vision_tower True --freeze_llm True --tune_merger False --bf16 True --lora_enable True --vision_lora True \\
  --lora_rank 64 --lora_alpha 64 --lora_dropout 0.05 --num_lora_modules -1 \\
  --lora_namespan_exclude "['lm_head','embed_tokens']" --output_dir output/video_lora --num_train_epochs 1 \\
  --per_device_train_batch_size 1 --gradient_accumulation_steps 5 --video_max_pixels 4096 --fps 1 \\
  --learning_rate 2e-4 --warmup_ratio 0.03 --lr_scheduler_type cosine --gradient_checkpointing True --save_steps 5
```

| theirs | here |
|---|---|
"""


COMMANDS_HEAD = """
Commands and files that were removed:

| removed | instead |
|---|---|
"""


def migrating():
    """The text of docs/migrating.md."""
    rows = [(names, f"`--{ours}`") for ours, names in SAME.items()]
    for names, (choices, otherwise) in BY_VALUE.items():
        pairs = [f"{value or 'empty'}: {f'`--{ours}`' if ours else 'no effect'}" for value, ours in choices.items()]
        rows.append((names, f"{', '.join(pairs)}; else {otherwise}"))
    rows += [(names, f"no effect: {why}") for why, names in NO_EFFECT.items()]
    rows += [(names, answer) for answer, names in ANSWERS.items()]
    rows += [(names, f"was removed; {answer}") for answer, names in REMOVED.items()]
    flags = lambda names: ", ".join(f"`--{name}`" for name in names.split())
    text = HEAD + "".join(f"| {flags(names)} | {meaning} |\n" for names, meaning in rows)
    return text + COMMANDS_HEAD + "".join(f"| {what} | {instead} |\n" for what, instead in COMMANDS.items())


if __name__ == "__main__":
    print(migrating(), end="")

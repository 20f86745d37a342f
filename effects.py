"""Which options have no effect, beside the others that are given, and why. Each script says so when it starts.

config.py holds the options, and which values are wrong. Standard library only: --help must not wait for torch.
"""

import os

from config import GRPO, Adapter, CommonTrain, Generate, Infer, LoraArgs, VideoArgs, size_flags


def inert(cfg):
    """One line for each option that was given but has no effect here, and why; and for each default of the embedded
    model that another model is about to get."""
    told = [(name, why) for name, no_effect, why in _effects(cfg) if no_effect and name in cfg.given]
    lines = [f"--{name} has no effect: {why}" for name, why in told]
    if isinstance(cfg, VideoArgs) and cfg.model_id != type(cfg)().model_id:
        if not {"nframes", "fps", "video_max_pixels", "video_resized_height"} & cfg.given:
            view = f"{cfg.nframes} frames of {cfg.video_max_pixels} pixels"
            lines.append(f"clips are read as for the embedded model, {view}: see --fps, --nframes, --video_max_pixels")
        if hasattr(cfg, "learning_rate") and "learning_rate" not in cfg.given:
            lines.append(f"--learning_rate {cfg.learning_rate:g} suits the embedded model; the 3B takes 2e-4")
    return lines


def _effects(cfg):
    """(option, whether it has no effect, why) for everything this repo accepts."""
    for cls, effects in _EFFECTS:
        if isinstance(cfg, cls):
            yield from effects(cfg)


def _is_set(value):
    return value not in (None, 0, "", -1)


def _other_trainers(cfg):
    yield "use_liger", True, "the loss never holds (T, V) logits here, there is nothing for Liger's kernels to replace"
    yield "disable_flash_attn2", True, "attention is PyTorch's own, the flash-attn package is never used"
    yield "lazy_preprocess", True, "clips are always read when they are needed, and kept (cache_mb)"
    yield "remove_unused_columns", True, "samples are no table, no column is dropped"


def _video(cfg):
    yield "fps", _is_set(cfg.nframes), "nframes is given too and decides"
    for name in ("min_frames", "max_frames"):
        yield name, _is_set(cfg.nframes), f"nframes {cfg.nframes} decides; --nframes none turns it off"
    for kind in ("video", "image"):
        for name in size_flags(kind)[:2]:
            given = _is_set(getattr(cfg, f"{kind}_resized_height"))
            yield name, given, f"{kind}_resized_height and _width are given and decide"


def _lora(cfg):
    names = ("llm_lora", "vision_lora", "merger_lora", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora")
    for name in (*names, "lora_bias", "num_lora_modules", "lora_namespan_exclude"):
        yield name, not cfg.lora_enable, "lora_enable is False"
    yield "merger_lora", cfg.tune_merger, "tune_merger trains the merger whole"
    full = not {"lm_head", "embed_tokens"} <= set(cfg.lora_namespan_exclude)
    yield "lora_namespan_exclude", full, "as to lm_head and embed_tokens: they never carry adapters here, named or not"


def _train(cfg):
    vision = (cfg.lora_enable and cfg.vision_lora) or not cfg.freeze_vision_tower
    merger = (cfg.lora_enable and cfg.merger_lora) or cfg.tune_merger
    yield "vision_lr", not vision, "nothing in the vision tower is trained"
    yield "merger_lr", not merger, "nothing in the merger is trained"
    yield "num_train_epochs", _is_set(cfg.max_steps), "max_steps is given and decides"
    yield "warmup_ratio", _is_set(cfg.warmup_steps), "warmup_steps is given and decides"
    yield "save_steps", cfg.save_strategy != "steps", "save_strategy is not steps"
    yield "cuda_graphs", cfg.sequence_parallel > 1, "there are none with --sequence_parallel"
    yield "cuda_graphs", cfg.partition_weights, "partition_weights brings a layer's weights only when it computes"
    yield "dry_run_gib", not cfg.dry_run, "it is for a plan (--dry_run)"
    yield "model_ckpt", not cfg.lora_enable and cfg.model_ckpt, "lora_enable is False: no adapter is loaded"
    yield "min_lr_ratio", cfg.lr_scheduler_type == "constant", "the constant schedule does not fall"
    for name in ("eval_steps", "eval_samples", "max_new_tokens"):
        yield name, cfg.eval_data_path is None, "eval_data_path is none: nothing is evaluated"


def _grpo(cfg):
    yield "rollout_rows", os.environ.get("WORLD_SIZE", "1") == "1", "one rank samples as many as its memory holds"
    yield "lora_dropout", True, "it is off in GRPO: the policy that is updated must be the one that was sampled"
    for name in ("reference", "use_bias_correction_kl"):
        yield name, cfg.beta == 0, "beta is 0, there is no KL"
    for name in ("epsilon", "epsilon_high"):
        yield name, cfg.num_iterations == 1, "one update a set of rollouts (num_iterations 1): every ratio is 1"


def _generate(cfg):
    drawn = cfg.from_folder is None
    for name in ("num_samples", "task", "frame_size", "video_length", "style"):
        yield name, not drawn, "clips are not drawn, all of --from_folder are taken"
    for name in ("augment", "augment_prob"):
        yield name, not drawn, "clips of --from_folder are not changed"
    for name in ("question", "num_options", "hard_negatives"):
        yield name, drawn, "it is for --from_folder; drawn clips have their own question"
    yield "augment_prob", drawn and not cfg.augment, "no --augment is given"
    yield "base_coordinates", not drawn or cfg.task != "base", "it is for --task base"
    for name in ("cot_source", "cot_model", "cot_workers", "cot_coordinates"):
        yield name, not cfg.cot, "answers have no chain of thought without --cot"
    openai = cfg.cot_source == "openai" or (cfg.cot_source == "auto" and bool(os.environ.get("OPENAI_API_KEY")))
    for name in ("cot_model", "cot_workers"):
        yield name, cfg.cot and not openai, "chains are made from the trajectory, no server is asked"
    yield "cot_coordinates", cfg.cot and openai, "chains come from a server, not from the trajectory"


def _adapter(cfg):
    yield "output_dir", cfg.command == "check", "check writes nothing"
    yield "shard_gb", cfg.command != "merge", "it is for merge"
    yield "keys", cfg.command != "convert", "it is for convert"


def _infer(cfg):
    for name in ("top_p", "top_k"):
        yield name, cfg.temperature == 0, "temperature 0 takes the likeliest token"
    for name in ("controls", "max_samples", "batch_size"):
        yield name, cfg.data_path is None, "it is for a dataset (--data_path), not for one clip"
    for name in ("question", "prompt"):
        yield name, cfg.data_path is not None, "a dataset brings its own questions"


_EFFECTS = (  # told in this order
    (CommonTrain, _other_trainers),
    (VideoArgs, _video),
    (LoraArgs, _lora),
    (CommonTrain, _train),
    (GRPO, _grpo),
    (Generate, _generate),
    (Adapter, _adapter),
    (Infer, _infer),
)

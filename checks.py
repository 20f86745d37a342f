"""What the options of config.py may be, and which of them have no effect beside the others.

An option is named here once, whichever script has it. None, where the type allows it, is always accepted.
"""

import math
import types
import typing

from model import UserError, nearest

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
AT_LEAST = {
    0: "beta cache_mb cot_coordinates dataloader_num_workers eval_controls eval_steps max_grad_norm "
       "max_resample seed temperature top_k warmup_steps "
       "weight_decay workers",
    1: "cot_workers eval_samples gradient_accumulation_steps image_max_pixels image_min_pixels "
       "image_resized_height image_resized_width logging_steps lora_rank max_completion_length max_new_tokens "
       "max_samples max_seq_length num_iterations pack_tokens per_device_train_batch_size save_steps "
       "save_total_limit video_max_pixels video_min_pixels video_resized_height video_resized_width",
    2: "max_frames min_frames nframes num_generations num_options num_samples video_length",
    16: "frame_size",
}  # fmt: skip
RANGES = [  # options, what they may be, in words
    ("adam_epsilon epsilon epsilon_high fps learning_rate lora_alpha merger_lr num_train_epochs repetition_penalty "
     "sampler_is_cap shard_gb top_p vision_lr", lambda value: value > 0, "a number above 0"),
    ("augment_prob max_skip_share min_lr_ratio top_p warmup_ratio",
     lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ("adam_beta1 adam_beta2 lora_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("max_steps num_lora_modules", lambda value: value == -1 or value > 0, "-1 (all) or a count above 0"),
    ("split", lambda value: 0 < value < 1, "a share between 0 and 1, both excluded"),
    ("num_options", lambda value: value <= 8, "at most 8"),
    *((names, lambda value, low=low: value >= low, f"at least {low}") for low, names in AT_LEAST.items()),
]  # fmt: skip
WORDS = {"augment": "blur crop", "controls": "none reversed shuffled blank", "report_to": "none tensorboard wandb"}


# -- Types


def split_list(text):
    """'a,b', "['a', 'b']" or '[a,b]' -> ['a', 'b']; '' -> []."""
    items = (item.strip(" '\"") for item in text.strip().strip("[]()").split(","))
    return [item for item in items if item]


def type_name(kind):
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(typing.get_args(kind))
    if kind is bool:
        return "True or False"
    if is_union(kind):
        return " | ".join("none" if each is type(None) else type_name(each) for each in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def is_union(kind):
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def convert(value, kind):
    """A text, or a value of a config file, as a value of the type `kind`. ValueError, KeyError or TypeError
    where it is none."""
    inner, origin, text = typing.get_args(kind), typing.get_origin(kind), str(value)
    if is_union(kind):
        if type(None) in inner and text.lower() in ("none", "null"):
            return None
        return text if text == "auto" and typing.Literal["auto"] in inner else convert(value, inner[0])
    if origin is list:
        return [convert(item, inner[0]) for item in (split_list(value) if isinstance(value, str) else value)]
    if isinstance(value, list | tuple | dict) or (origin is typing.Literal and text not in inner):
        raise ValueError(value)
    if kind is bool:
        return BOOLS[text.lower()]
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(value)
    return text if origin is typing.Literal else kind(text)


def typed_value(value, kind, where):
    """convert(), with a UserError that begins with `where`."""
    try:
        return convert(value, kind)
    except (ValueError, KeyError, TypeError):
        words = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        expected = f"{'one of ' if words else ''}{type_name(kind)}{nearest(value, words)}"
        raise UserError(f"{where}: found {value!r}, expected {expected}") from None


# -- Ranges, and options that contradict each other


def require(ok, name, value, expected):
    if not ok:
        raise UserError(f"--{name}: found {value!r}, expected {expected}")


def check(cfg):
    """UserError for a value out of its range, and for options that contradict each other."""
    for names, ok, expected in RANGES:
        for name in names.split():
            value = getattr(cfg, name, None)
            require(value in (None, "auto") or ok(value), name, value, expected)
    for name, words in WORDS.items():
        for word in split_list(getattr(cfg, name, None) or ""):
            hint = nearest(word, words.split())
            require(word in words.split(), name, word, f"names out of {', '.join(words.split())}{hint}")
    if hasattr(cfg, "fps"):
        check_sizes(cfg)
    if hasattr(cfg, "lora_enable"):
        check_trained(cfg)
    if hasattr(cfg, "resume"):
        require(not (cfg.bf16 and cfg.fp16), "fp16", True, "False while --bf16 is True: choose one")
        require(not (cfg.resume and cfg.overwrite), "resume", True, "False while --overwrite is True: choose one")
    if hasattr(cfg, "num_generations"):
        check_groups(cfg)
    if hasattr(cfg, "video"):
        require(not (cfg.question and cfg.prompt), "prompt", cfg.prompt, "to stand alone: --question says the same")
        require(not (cfg.video and cfg.data_path), "data_path", cfg.data_path, "to stand alone: one clip or a dataset")
    if hasattr(cfg, "command"):
        check_command(cfg)
    for name in ("files", "runs"):
        if getattr(cfg, name, None) == []:
            raise UserError(f"--{name}: none given, expected at least one: {type(cfg).__doc__}")


def check_sizes(cfg):
    low, high = cfg.min_frames, cfg.max_frames
    require(low <= high, "min_frames", low, f"at most max_frames {high}")
    for kind in ("video", "image"):
        low, high = getattr(cfg, f"{kind}_min_pixels"), getattr(cfg, f"{kind}_max_pixels")
        ordered = low is None or high is None or low <= high
        require(ordered, f"{kind}_min_pixels", low, f"at most {kind}_max_pixels {high}")
        height, width = getattr(cfg, f"{kind}_resized_height"), getattr(cfg, f"{kind}_resized_width")
        expected = f"given together with --{kind}_resized_width ({width!r})"
        require((height is None) == (width is None), f"{kind}_resized_height", height, expected)


def check_trained(cfg):
    whole = not cfg.freeze_llm or not cfg.freeze_vision_tower or cfg.tune_merger
    adapted = cfg.llm_lora or cfg.vision_lora or (cfg.merger_lora and not cfg.tune_merger)
    if getattr(cfg, "base_dtype", "bf16") != "bf16":
        expected = "bf16 without --lora_enable or --freeze_llm: a low-bit base is frozen, only adapters learn on it"
        require(cfg.lora_enable and cfg.freeze_llm, "base_dtype", cfg.base_dtype, expected)
    if not cfg.lora_enable:
        require(whole, "lora_enable", False, "True, or a component that is not frozen: nothing is left to train")
        return
    require(adapted, "lora_enable", True, "False, or one of llm_lora, vision_lora, merger_lora")
    for lora, freeze in (("llm_lora", "freeze_llm"), ("vision_lora", "freeze_vision_tower")):
        expected = f"True while {lora} is on (either adapters or all its weights): add --{lora} False"
        require(not getattr(cfg, lora) or getattr(cfg, freeze), freeze, False, expected)


def check_groups(cfg):
    require(cfg.temperature > 0, "temperature", cfg.temperature, "a number above 0")
    size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    expected = f"a divisor of per_device_train_batch_size x gradient_accumulation_steps = {size}: groups are whole"
    require(size % cfg.num_generations == 0, "num_generations", cfg.num_generations, expected)
    frozen = cfg.lora_enable and cfg.freeze_llm and cfg.freeze_vision_tower and not cfg.tune_merger
    expected = "start: once the base's own weights are trained, no copy of them is left to compare with"
    kept = frozen and cfg.lora_bias == "none"
    require(cfg.reference == "start" or kept, "reference", cfg.reference, expected)
    count, weights = len(split_list(cfg.rewards)), cfg.reward_weights
    require(count, "rewards", cfg.rewards, "at least one name")
    require(weights is None or len(weights) == count, "reward_weights", weights, f"{count} numbers, one a reward")


def check_command(cfg):
    commands = ("merge", "check")
    if cfg.command == "convert":
        raise UserError("lora.py convert: was removed; both key styles are read, for use elsewhere: lora.py merge")
    expected = f"merge or check, as in python lora.py check output/video_lora{nearest(cfg.command, commands)}"
    require(cfg.command in commands, "command", cfg.command, expected)
    expected = f"an adapter's folder: python lora.py {cfg.command} output/video_lora"
    require(cfg.model_ckpt is not None, "model_ckpt", cfg.model_ckpt, expected)
    expected = f"a new folder to write: python lora.py merge {cfg.model_ckpt} OUT"
    require(cfg.output_dir or cfg.command != "merge", "output_dir", cfg.output_dir, expected)


# -- Options that have no effect. Script: options, when, why

IGNORED = [
    ("train", "offload_activations", lambda c: c.gradient_checkpointing is False,
     "it is the inputs of recomputed blocks that wait; see --gradient_checkpointing"),
    ("train", "cuda_graphs", lambda c: c.cuda_graphs and c.offload_activations,
     "--offload_activations moves tensors to the host, which no graph can"),
    ("train", "num_train_epochs", lambda c: c.max_steps != -1, "max_steps decides"),
    ("", "fps min_frames max_frames", lambda c: c.nframes is not None, "nframes decides; --nframes none frees it"),
    ("train", "lora_rank lora_alpha lora_dropout lora_bias llm_lora vision_lora merger_lora model_ckpt",
     lambda c: not c.lora_enable, "lora_enable is False"),
    ("train_grpo", "lora_dropout", lambda c: True,
     "it is off in GRPO, so that the sampler is the policy that is trained"),
    ("train_grpo", "epsilon epsilon_high", lambda c: c.num_iterations == 1,
     "one update a set of rollouts: ratios are 1"),
    ("infer", "output controls max_samples", lambda c: not (c.data_path or c.benchmark),
     "it is for a dataset (--data_path)"),
    ("generate", "num_samples task frame_size video_length augment augment_prob",
     lambda c: c.from_folder is not None, "clips of --from_folder are used as they are"),
    ("generate", "question num_options hard_negatives", lambda c: c.from_folder is None, "it is for --from_folder"),
    ("generate", "cot_source cot_model cot_workers cot_coordinates", lambda c: not c.cot, "there is no --cot"),
]  # fmt: skip


def ignored_options(cfg):
    """One line for each option that was given under another name or has no effect."""
    lines, script = list(cfg.notes), type(cfg).__doc__.removeprefix("python ")
    for start, names, applies, why in IGNORED:
        given = [name for name in names.split() if name in cfg.given]
        if given and script.startswith(start) and applies(cfg):
            lines += [f"--{name} has no effect: {why}" for name in given]
    return lines

"""What the options of config.py may be, and which of them have no effect beside the others.

An option is named here once, whichever script has it. None, where the type allows it, is always accepted.
"""

import math
import types
import typing

from model import UserError, nearest

# lora.py convert and --keys, which are gone
CONVERT = "adapters of both key styles are read here; for use elsewhere: python lora.py merge ADAPTER OUT"
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
AT_LEAST = {
    0: "beta cache_mb cot_coordinates dataloader_num_workers eval_controls eval_steps log_completions max_grad_norm "
       "max_resample seed temperature top_k warmup_steps "
       "weight_decay workers",
    1: "cot_workers eval_samples gradient_accumulation_steps image_max_pixels image_min_pixels "
       "image_resized_height image_resized_width logging_steps lora_rank max_completion_length max_new_tokens "
       "max_samples max_seq_length num_iterations pack_tokens per_device_train_batch_size save_steps "
       "save_total_limit video_max_pixels video_min_pixels video_resized_height video_resized_width",
    2: "max_frames min_frames nframes num_generations num_options num_samples video_length",
    16: "frame_size",
}  # fmt: skip
ABOVE_0 = "adam_epsilon epsilon epsilon_high fps learning_rate lora_alpha merger_lr num_train_epochs " \
          "repetition_penalty sampler_is_cap shard_gb top_p vision_lr"  # fmt: skip
AT_MOST_1 = "augment_prob max_skip_share min_lr_ratio top_p warmup_ratio"  # from 0
BELOW_1 = "adam_beta1 adam_beta2 lora_dropout"  # from 0
ALL_OR_SOME = "max_steps num_lora_modules"  # -1 or above 0
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
    """A text, or an object of a config file, as a value of the type `kind`. An int is a float too, a bool is no int.
    ValueError or KeyError where it is none."""
    inner, is_text = typing.get_args(kind), isinstance(value, str)
    if is_union(kind):
        if type(None) in inner and (value is None or (is_text and value.lower() in ("none", "null"))):
            return None
        return value if value == "auto" and typing.Literal["auto"] in inner else convert(value, inner[0])
    if typing.get_origin(kind) is list:
        if not isinstance(value, str | list | tuple):
            raise ValueError(value)
        return [convert(item, inner[0]) for item in (split_list(value) if is_text else value)]
    if typing.get_origin(kind) is typing.Literal:
        kind = str
        if value not in inner:
            raise ValueError(value)
    if kind is bool and is_text:
        return BOOLS[value.lower()]
    if is_text:
        value = kind(value)
    elif isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(value)
    if kind is float and not math.isfinite(value):
        raise ValueError(value)
    return value


def typed_value(value, kind, where):
    """convert(), with a UserError that begins with `where`."""
    try:
        return convert(value, kind)
    except (ValueError, KeyError):
        words = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        expected = f"{'one of ' if words else ''}{type_name(kind)}{nearest(value, words)}"
        raise UserError(f"{where}: found {value!r}, expected {expected}") from None


# -- Ranges, and options that contradict each other


def require(ok, name, value, expected):
    if not ok:
        raise UserError(f"--{name}: found {value!r}, expected {expected}")


def check(cfg):
    """UserError for a value out of its range, and for options that contradict each other."""
    check_values(cfg)
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
        require(getattr(cfg, name, None) != [], name, [], f"one at least: {type(cfg).__doc__}")


def check_values(cfg):
    def each(names, ok, expected):
        for name in names.split():
            value = getattr(cfg, name, None)
            require(value in (None, "auto") or ok(value), name, value, expected)

    for low, names in AT_LEAST.items():
        each(names, lambda value, low=low: value >= low, f"at least {low}")
    each(ABOVE_0, lambda value: value > 0, "a number above 0")
    each(AT_MOST_1, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    each(BELOW_1, lambda value: 0 <= value < 1, "at least 0 and below 1")
    each(ALL_OR_SOME, lambda value: value == -1 or value > 0, "-1 (all) or a count above 0")
    each("split", lambda value: 0 < value < 1, "a share between 0 and 1, both excluded")
    each("num_options", lambda value: value <= 8, "at most 8")
    for name, words in WORDS.items():
        choices = words.split()
        wrong = [word for word in split_list(getattr(cfg, name, None) or "") if word not in choices]
        hint = nearest(wrong[0], choices) if wrong else ""
        each(name, lambda _, wrong=wrong: not wrong, f"names out of {', '.join(choices)}, separated by commas{hint}")


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
    if getattr(cfg, "base_dtype", "bf16") != "bf16":
        expected = "bf16 without --lora_enable or --freeze_llm: a low-bit base is frozen, only adapters learn on it"
        require(cfg.lora_enable and cfg.freeze_llm, "base_dtype", cfg.base_dtype, expected)
    if not cfg.lora_enable:
        trained = not cfg.freeze_llm or not cfg.freeze_vision_tower or cfg.tune_merger
        require(trained, "lora_enable", False, "True, or a component that is not frozen: nothing is left to train")
        return
    for lora, freeze in (("llm_lora", "freeze_llm"), ("vision_lora", "freeze_vision_tower")):
        clash = getattr(cfg, lora) and not getattr(cfg, freeze)
        expected = f"True while {lora} is on (either adapters or all its weights): add --{lora} False"
        require(not clash, freeze, False, expected)
    some = cfg.llm_lora or cfg.vision_lora or (cfg.merger_lora and not cfg.tune_merger)
    require(some, "lora_enable", True, "False, or one of llm_lora, vision_lora, merger_lora")


def check_groups(cfg):
    require(cfg.temperature > 0, "temperature", cfg.temperature, "a number above 0")
    size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    text = f"a divisor of per_device_train_batch_size x gradient_accumulation_steps = {size}: groups are whole"
    require(size % cfg.num_generations == 0, "num_generations", cfg.num_generations, text)
    frozen = cfg.lora_enable and cfg.freeze_llm and cfg.freeze_vision_tower and not cfg.tune_merger
    expected = "start: once the base's own weights are trained, no copy of them is left to compare with"
    kept = frozen and cfg.lora_bias == "none"
    require(cfg.reference == "start" or kept, "reference", cfg.reference, expected)
    names, weights = split_list(cfg.rewards), cfg.reward_weights
    require(bool(names), "rewards", cfg.rewards, "at least one name")
    one_each = weights is None or len(weights) == len(names)
    require(one_each, "reward_weights", weights, f"{len(names)} numbers, one a reward")


def check_command(cfg):
    if cfg.command == "convert":
        raise UserError(f"convert: was removed; {CONVERT}")
    commands = ("merge", "check")
    require(cfg.command in commands, "command", cfg.command, f"merge or check{nearest(cfg.command, commands)}")
    expected = f"an adapter's folder: python lora.py {cfg.command} output/video_lora"
    require(cfg.adapter is not None, "adapter", cfg.adapter, expected)
    expected = f"a new folder to write: python lora.py merge {cfg.adapter} OUT"
    require(cfg.output_dir or cfg.command != "merge", "output_dir", cfg.output_dir, expected)


# -- Options that have no effect. Script: options, when, why

IGNORED = [
    ("train", "offload_activations", lambda c: c.gradient_checkpointing is False,
     "it is the inputs of recomputed blocks that wait; see --gradient_checkpointing"),
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
    """One line for each option that was given under another name or has no effect, and for each default of the tiny
    model that is about to be used with another one."""
    lines = list(cfg.notes)
    script = (type(cfg).__doc__ or "").removeprefix("python ")
    for start, names, applies, why in IGNORED:
        given = [name for name in names.split() if name in cfg.given]
        if given and script.startswith(start) and applies(cfg):
            lines += [f"--{name} has no effect: {why}" for name in given]
    if hasattr(cfg, "fps") and cfg.model_id != type(cfg)().model_id:
        if not {"nframes", "fps", "video_max_pixels", "video_resized_height"} & set(cfg.given):
            view = f"{cfg.nframes} frames of {cfg.video_max_pixels} pixels"
            lines.append(f"clips are read as for the tiny model, {view}: see --fps, --nframes, --video_max_pixels")
        if hasattr(cfg, "learning_rate") and "learning_rate" not in cfg.given:
            lines.append(f"--learning_rate {cfg.learning_rate:g} suits the tiny model; the 3B takes 2e-4")
    return lines

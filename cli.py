"""A dataclass as a command line: its defaults, then --config files, then flags. The comment behind a field is its help.

config.py holds the options, names.toml what other trainers call them, the tables here what they may be. Nothing imports
torch: --help must not wait for it.
"""

import inspect
import json
import math
import re
import runpy
import shutil
import sys
import textwrap
import tomllib
import types
import typing
from dataclasses import asdict as as_dict
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml  # transformers brings it

from model import UserError, nearest, nearest_path
from names import SYNONYMS, suggestion, translate

# What --help shows, of the options that a script has; --help all shows the others too
MAIN = """video question json files runs output command model_id model_ckpt data_path eval_data_path output_dir
    overwrite resume dry_run rewards num_generations max_completion_length temperature beta learning_rate lora_rank
    num_train_epochs max_steps per_device_train_batch_size pack_tokens gradient_checkpointing fps nframes
    video_max_pixels eval_steps controls max_samples num_samples split from_folder
    num_options frame_size video_length augment cot benchmark""".split()
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

# -- What options may be: the tables name each once, whichever script has it

LIMITS = [  # numbers that may be something else than above 0
    ("beta cache_mb cot_coordinates dataloader_num_workers eval_controls eval_steps max_grad_norm "
     "max_resample seed temperature top_k warmup_steps "
     "weight_decay workers", "at least 0", lambda v: v >= 0),
    ("max_frames min_frames nframes num_generations", "at least 2", lambda v: v >= 2),
    ("num_options", "2 to 8", lambda v: 2 <= v <= 8),
    ("num_samples video_length", "at least 8", lambda v: v >= 8),  # a clip of each class; enough to judge the motion
    ("frame_size", "at least 40", lambda v: v >= 40),  # as wide as the largest ball
    ("adam_beta1 adam_beta2 augment_prob lora_dropout max_skip_share min_lr_ratio split top_p warmup_ratio",
     "a number from 0 to 1", lambda v: 0 <= v <= 1),
    ("max_steps num_lora_modules", "-1 (all) or a count above 0", lambda v: v == -1 or v > 0),
]  # fmt: skip
LISTS = {"augment": "blur crop", "controls": "none reversed shuffled blank", "report_to": "none tensorboard wandb"}
RULES = [  # an option, and another that tells the scripts; what is expected of it; whether c, a config, is so
    ("freeze_llm", "True, or --llm_lora False: either adapters or all of its weights",
     lambda c: c.freeze_llm or not (c.lora_enable and c.llm_lora)),
    ("freeze_vision_tower", "True, or --vision_lora False: either adapters or all of its weights",
     lambda c: c.freeze_vision_tower or not (c.lora_enable and c.vision_lora)),
    ("lora_enable", "True, or a component that is not frozen: nothing is left to train",
     lambda c: c.lora_enable or trains_base(c)),
    ("base_dtype lora_enable", "bf16 without --lora_enable or --freeze_llm: low-bit weights stay frozen",
     lambda c: c.base_dtype == "bf16" or (c.lora_enable and c.freeze_llm)),
    ("head_dtype lora_enable", "bf16 without --lora_enable or --freeze_llm: low-bit weights stay frozen",
     lambda c: c.head_dtype == "bf16" or (c.lora_enable and c.freeze_llm)),
    ("offload_embedding lora_enable", "False without --lora_enable or --freeze_llm: weights on the host stay frozen",
     lambda c: not c.offload_embedding or (c.lora_enable and c.freeze_llm)),
    ("fp16", "False beside --bf16", lambda c: not (c.bf16 and c.fp16)),
    ("resume", "False beside --overwrite", lambda c: not (c.resume and c.overwrite)),
    ("temperature beta", "a number above 0", lambda c: c.temperature > 0),
    ("num_generations", "a divisor of per_device_train_batch_size {c.per_device_train_batch_size} x "
     "gradient_accumulation_steps {c.gradient_accumulation_steps}: groups are whole",
     lambda c: c.per_device_train_batch_size * c.gradient_accumulation_steps % c.num_generations == 0),
    ("reference", "start: of a base that is trained itself no copy is left",
     lambda c: c.reference == "start" or (c.lora_enable and not trains_base(c))),
    ("reward_weights", "one number for each of --rewards {c.rewards}",
     lambda c: c.reward_weights is None or len(c.reward_weights) == len(split_list(c.rewards))),
    ("prompt", "none beside --question, which says the same", lambda c: not (c.question and c.prompt)),
    ("video", "none beside --data_path: one clip or a dataset", lambda c: not (c.video and c.data_path)),
    ("frame_size", "an even number, as yuv420p needs", lambda c: c.frame_size % 2 == 0),
    ("command", "merge or check (convert was removed: merge instead), as in {c.__doc__}",
     lambda c: c.command in ("merge", "check")),
    ("model_ckpt command", "an adapter's folder, as in {c.__doc__}", lambda c: c.model_ckpt),
    ("output_dir command", "a new folder, as in {c.__doc__}", lambda c: c.output_dir or c.command == "check"),
    ("files", "at least one, as in {c.__doc__}", lambda c: c.files),
    ("runs", "at least one, as in {c.__doc__}", lambda c: c.runs),
]  # fmt: skip
IGNORED = [  # options that may have been given to a script that has the first, why they have no effect, when
    ("num_train_epochs", "max_steps decides", lambda c: c.max_steps != -1),
    ("fps min_frames max_frames", "nframes decides; --nframes none frees it", lambda c: c.nframes is not None),
    ("lora_rank lora_alpha lora_dropout model_ckpt", "lora_enable is False", lambda c: not c.lora_enable),
    ("lora_dropout", "it is off in GRPO: the sampler is the policy", lambda c: hasattr(c, "num_generations")),
    ("epsilon epsilon_high", "one update a set of rollouts: ratios are 1", lambda c: c.num_iterations == 1),
    ("controls output max_samples", "it is for a dataset (--data_path)", lambda c: not (c.data_path or c.benchmark)),
    ("num_samples task frame_size video_length augment", "it is for drawn clips", lambda c: c.from_folder is not None),
    ("hard_negatives question num_options", "it is for --from_folder", lambda c: c.from_folder is None),
    ("cot_source cot_model cot_workers cot_coordinates", "there is no --cot", lambda c: not c.cot),
]


def trains_base(c):
    """Whether some of the base's own weights are trained."""
    return not c.freeze_llm or not c.freeze_vision_tower or c.tune_merger


def require(ok, name, value, expected):
    if not ok:
        raise UserError(f"--{name}: got {value!r}, expected {expected}")


def check(c):
    """UserError for a value of a config that is out of its range, and for options that contradict each other."""
    limits = {name: (expected, ok) for names, expected, ok in LIMITS for name in names.split()}
    for name, value in as_dict(c).items():
        if type(value) in (int, float):
            expected, ok = limits.get(name, ("a number above 0", lambda v: v > 0))
            require(ok(value), name, value, expected)
        allowed = LISTS.get(name, "").split()
        for word in split_list(value or "") if allowed else []:
            require(word in allowed, name, word, f"names out of {', '.join(allowed)}{nearest(word, allowed)}")
    for names, expected, ok in RULES:
        if all(hasattr(c, name) for name in names.split()):
            name = names.split()[0]
            require(ok(c), name, getattr(c, name), expected.format(c=c))


def ignored_options(c):
    """One line for each option that was given under another name or has no effect."""
    lines = list(c.notes)
    for names, why, applies in IGNORED:
        given = [name for name in names.split() if name in c.given]
        if given and hasattr(c, names.split()[0]) and applies(c):
            lines += [f"--{name} has no effect: {why}" for name in given]
    return lines


# -- Values


def kinds_of(cls):
    """{field: type} of a dataclass."""
    return {f.name: f.type for f in fields(cls)}


def split_list(text):
    """'a,b', "['a', 'b']" or '[a,b]' -> ['a', 'b']; '' -> []."""
    items = (item.strip(" '\"") for item in text.strip().strip("[]()").split(","))
    return [item for item in items if item]


def type_name(kind):
    inner, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Literal:
        return ", ".join(inner)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("none" if each is type(None) else type_name(each) for each in inner)
    return {bool: "True or False"}.get(kind) or getattr(kind, "__name__", str(kind))


def convert(text, kind):
    """A text as a value of the type `kind`. ValueError or KeyError where it is none."""
    inner, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if type(None) in inner and text.lower() in ("none", "null"):
            return None
        return text if text == "auto" and typing.Literal["auto"] in inner else convert(text, inner[0])
    if origin is list:
        return [convert(item, inner[0]) for item in split_list(text)]
    if kind is bool:
        return BOOLS[text.lower()]
    value = text if origin is typing.Literal else kind(text)
    if (origin is typing.Literal and text not in inner) or (kind is float and not math.isfinite(value)):
        raise ValueError(text)
    return value


def typed_value(cls, name, value, where):
    """A text, or a config file's value, as one of the type of the field `name`. UserError that begins with `where`."""
    kind = kinds_of(cls)[name]
    try:
        if typing.get_origin(kind) is list and isinstance(value, list | tuple):
            return [convert(str(item), typing.get_args(kind)[0]) for item in value]
        return convert(str(value), kind)
    except (ValueError, KeyError):
        hint = nearest(value, typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else ""
        raise UserError(f"{where}{name}: got {value!r}, expected {type_name(kind)}{hint}") from None


def from_file(cls, name, value, path):
    return typed_value(cls, name, value, f"{path}: ")


def resolve(cls, name, value, where):
    """(field or "", its value, notes) of a name that a command line or a config file gives a value. UserError,
    beginning with `where`, for a name that means nothing here and for a value of the wrong type."""
    kinds, field, notes = kinds_of(cls), name.replace("-", "_"), []
    if field not in kinds:
        try:
            field, value, notes = translate(field, value)
        except UserError as error:
            raise UserError(f"{where}{name}: {error}") from None
    if field and field not in kinds:
        hint = suggestion(field, kinds) or "; --help all lists them"
        raise UserError(f"{where}{name}: no such option of {script_of(cls)}{hint}")
    return field, typed_value(cls, field, value, where) if field else None, notes


# -- Config files, and defaults that follow the model

# What the user's own Python, or a parser, may raise
BROKEN = (SyntaxError, NameError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError, LookupError)
BROKEN += (yaml.YAMLError,)


def load_file(cls, path):
    """{name: value} of a config file. Of YAML texts, to be read as on the command line. Of Python the variables without
    a leading _, or the defaults that a copy of config.py has changed."""
    if path.suffix == ".py":
        space = runpy.run_path(str(path))
        if is_dataclass(space.get(cls.__name__)):
            mine, theirs = as_dict(cls()), as_dict(space[cls.__name__]())
            return {name: value for name, value in theirs.items() if name not in mine or mine[name] != value}
        skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
        return {name: value for name, value in space.items() if name[0] != "_" and not isinstance(value, skip)}
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".json", ".toml"):
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    return yaml.load(text, Loader=yaml.BaseLoader)


def read_config(cls, path):
    """[(name, value, where: file and line)] of a config file."""
    if not path.is_file() or path.suffix not in (".py", ".yaml", ".yml", ".json", ".toml"):
        problem = "is no .py, .yaml, .json or .toml file" if path.is_file() else "does not exist"
        raise UserError(f"--config: {str(path)!r} {problem}{nearest_path(path)}")
    try:
        values = dict(load_file(cls, path))
    except BROKEN as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--config {path}: cannot be read as settings: {reason}") from error
    words, lines = [], path.read_text(encoding="utf-8").splitlines()
    for name, value in values.items():
        line = next((f"line {n}: " for n, text in enumerate(lines, 1) if text.lstrip(' {"').startswith(name)), "")
        words.append((name, value, f"{path}: {line}"))
    return words


WIDTHS = {3: 1024, 7: 3584, 32: 5120}  # billions of parameters: the least hidden size that counts as such a model


def sizes_up_to(model_id):
    """The keys of WIDTHS that a model reaches, by its config.json, or by its hub id for nothing is downloaded here."""
    file, named = Path(model_id) / "config.json", re.search(r"/.*-(\d+)B\b", model_id)
    if not file.exists():
        return [size for size in WIDTHS if named and size <= int(named[1])]
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return [size for size in WIDTHS if WIDTHS[size] <= raw.get("text_config", raw)["hidden_size"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # whoever loads the model says what is wrong
        return []


def follow_model(cfg):
    """Set what was not given to what suits a large model, as its file in configs/ has it, and note that."""
    script, folder = "grpo" if hasattr(cfg, "num_generations") else "sft", Path(__file__).with_name("configs")
    paths = [folder / f"{size}b_{script}.py" for size in sizes_up_to(cfg.model_id)]
    for path in [path for path in paths if path.exists()][-1:]:
        values = load_file(type(cfg), path)
        values = {name: values[name] for name in values if hasattr(cfg, name) and name not in {*cfg.given, "model_id"}}
        for name, value in values.items():
            setattr(cfg, name, value)
        cfg.settle(cfg.given)
        chosen = ", ".join(f"{name} {getattr(cfg, name)}" for name in values)
        cfg.notes += (f"chosen by the model, as in configs/{path.name}: {chosen}",)


# -- The command line


def script_of(cls):
    """train_sft.py for SFT: the docstring is an example of its command line."""
    return cls.__doc__.split()[1]


def help_text(cls, every):
    """What --help prints: the options in MAIN, in that order; every: all of them, under the headings of config.py."""
    rows, width = {}, shutil.get_terminal_size().columns
    for klass in reversed(cls.__mro__[:-1]):
        heading = "options"
        for line in inspect.getsource(klass).splitlines():
            if line.startswith("    # -- "):
                heading = line[9:]
            elif (match := re.match(r"    (\w+): .*?  # (.*)", line)) and match[1] in kinds_of(cls):
                name, comment = match.groups()  # a subclass's comment stays under the heading of its base
                rows[name] = rows.get(name, (heading,))[0], comment
    if not every:
        rows = {name: ("main options; --help all lists every one", rows[name][1]) for name in MAIN if name in rows}
    lines, before = (
        [f"usage: python {script_of(cls)} [--config FILE] [--name value ...]", f"example: {cls.__doc__}"],
        "",
    )
    for name, (heading, comment) in rows.items():
        lines += ["", f"{heading}:"] if heading != before else []
        option = f"  --{name} {type_name(kinds_of(cls)[name])}"
        text = f"{option:<32}  {comment} (default {getattr(cls(), name)!r})"
        lines += textwrap.wrap(text, width, subsequent_indent=" " * 34)
        before = heading
    return "\n".join(lines)


def read_argv(cls, argv):
    """([(name, value, "--")], config files, words left over) of a command line."""
    kinds = kinds_of(cls) | {"config": str, "local_rank": str}  # the deepspeed launcher inserts --local_rank
    positional = [f.name for f in fields(cls) if f.metadata.get("positional")]  # they need no flag
    words, bare, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            bare.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        theirs = name.replace("-", "_")
        kind = kinds.get(theirs) or kinds.get(SYNONYMS.get(theirs))
        if not equals:
            is_switch = kind is bool or bool in typing.get_args(kind) or (kind is None and positional)
            if rest and not rest[0].startswith("--") and (not is_switch or rest[0].lower() in {*BOOLS, "none", "auto"}):
                value = rest.pop(0)
            elif is_switch or kind is None:
                value = "true"
            else:
                raise UserError(f"--{name}: got no value, expected {type_name(kind)}")
        words.append((name, value, "--"))
    for name in positional[: len(bare)]:
        is_list = typing.get_origin(kinds[name]) is list  # the last one, it takes all that follow
        words.append((name, bare if is_list else bare.pop(0), "--"))
        bare = [] if is_list else bare
    files = [Path(value) for name, value, _ in words if name == "config"]
    return [word for word in words if word[0].replace("-", "_") not in ("config", "local_rank")], files, bare


def parse(cls, argv=None):
    """An instance of the dataclass cls: its defaults or the model's, then each --config file, then the flags of argv.

    Its `given` is the set of names that were set, its `notes` say what became of other trainers' names. UserError for
    unknown names, wrong types and values that check() refuses. --help prints the main options, --help all all of them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"--help", "-h"} & set(argv):
        print(help_text(cls, every="all" in argv))
        raise SystemExit(0)
    words, files, bare = read_argv(cls, argv)
    cfg = cls()
    for layer in [*(read_config(cls, path) for path in files), words]:
        settings = {}
        for name, value, where in layer:
            field, value, notes = resolve(cls, name, value, where)
            settings |= {field: value} if field else {}
            cfg.notes += tuple(notes)
        for name, value in settings.items():
            setattr(cfg, name, value)
        cfg.given |= set(settings)
        cfg.settle(settings)
    if bare:
        raise UserError(f"got {bare[0]!r} without a flag; expected --name value or --name=value (--help lists them)")
    if hasattr(cfg, "fps"):
        follow_model(cfg)
    cfg.check()
    return cfg


def changed(cfg):
    """The fields that differ from their defaults, for the lines printed at the start."""
    default = as_dict(type(cfg)())
    return {name: value for name, value in as_dict(cfg).items() if value != default[name]}

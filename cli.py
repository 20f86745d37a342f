"""A dataclass as a command line: its defaults, then --config files, then flags. The comment behind a field is its help.

config.py holds the options with their types, names.toml what other trainers call them, the tables here which options
contradict each other or have no effect. Nothing imports torch: --help must not wait for it.
"""

import inspect
import json
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
from functools import cache
from pathlib import Path

import yaml  # transformers brings it
from pydantic import TypeAdapter, ValidationError  # DeepSpeed brings it

from model import UserError, nearest, nearest_path
from names import NAMES, SYNONYMS, translate

# What --help shows, of the options that a script has; --help all shows the others too
MAIN = """video question json files runs output command model_id model_ckpt data_path eval_data_path output_dir
    overwrite resume dry_run rewards num_generations max_completion_length temperature beta learning_rate lora_rank
    num_train_epochs max_steps per_device_train_batch_size pack_tokens gradient_checkpointing fps nframes
    video_max_pixels eval_steps controls max_samples num_samples split from_folder
    num_options frame_size video_length augment cot benchmark""".split()
SWITCH = ("true", "false", "1", "0", "yes", "no", "none", "auto")  # what may follow one; other words are their own

# -- Options beside each other: the tables name each once, whichever script has it

FROZEN = "its default without adapters or beside --freeze_llm False: such weights stay frozen, no whole model is saved"
EITHER = "either adapters or all weights are trained, expected"
RULES = [  # an option, and another that tells the scripts; what is expected of it, or all of a message with that word;
    # whether c, a config, is so
    ("freeze_llm", f"--freeze_llm False beside --llm_lora True: {EITHER} --llm_lora False or --freeze_llm True",
     lambda c: c.freeze_llm or not (c.lora_enable and c.llm_lora)),
    ("freeze_vision_tower", f"--freeze_vision_tower False beside --vision_lora True: {EITHER} --vision_lora False or "
     "--freeze_vision_tower True", lambda c: c.freeze_vision_tower or not (c.lora_enable and c.vision_lora)),
    ("base_dtype lora_enable", FROZEN, lambda c: c.base_dtype == "bf16" or freezes_base(c)),
    ("head_dtype lora_enable", FROZEN, lambda c: c.head_dtype == "bf16" or freezes_base(c)),
    ("offload_embedding lora_enable", FROZEN, lambda c: not c.offload_embedding or freezes_base(c)),
    ("fp16", "--fp16 True beside --bf16 True, expected one of them at most", lambda c: not (c.bf16 and c.fp16)),
    ("resume", "--resume beside --overwrite, expected one of them: to go on with the run, or to start anew",
     lambda c: not (c.resume and c.overwrite)),
    ("temperature beta", "a number above 0", lambda c: c.temperature > 0),
    ("num_generations", "a divisor of per_device_train_batch_size {c.per_device_train_batch_size} x "
     "gradient_accumulation_steps {c.gradient_accumulation_steps}: groups are whole",
     lambda c: c.per_device_train_batch_size * c.gradient_accumulation_steps % c.num_generations == 0),
    ("reference", "start: of a base that is trained itself no copy is left",
     lambda c: c.reference == "start" or all([c.lora_enable, c.freeze_llm, c.freeze_vision_tower, not c.tune_merger])),
    ("reward_weights", "one number for each of --rewards {c.rewards}",
     lambda c: c.reward_weights is None or len(c.reward_weights) == len(split_list(c.rewards))),
    ("prompt", "none beside --question, which says the same", lambda c: not (c.question and c.prompt)),
    ("video", "none beside --data_path: one clip or a dataset", lambda c: not (c.video and c.data_path)),
    ("command", "merge or check (convert was removed: merge instead), as in {c.__doc__}",
     lambda c: c.command in ("merge", "check")),
    ("model_ckpt command", "an adapter's folder, as in {c.__doc__}", lambda c: c.model_ckpt),
    ("output_dir command", "a new folder, as in {c.__doc__}", lambda c: c.output_dir or c.command == "check"),
    ("output_dir", "a folder's name; is a shell's variable unset?", lambda c: c.output_dir != ""),
    ("model_id fps", "a folder or a hub id; is a shell's variable unset?", lambda c: c.model_id != ""),
    ("preview", "a .png to write", lambda c: (c.preview or ".png").lower().endswith(".png")),
    ("files", "no file given, expected at least one, as in {c.__doc__}", lambda c: c.files),
    ("runs", "no run given, expected at least one, as in {c.__doc__}", lambda c: c.runs),
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


def freezes_base(c):
    """Whether c trains adapters beside a frozen language model: checkpoints do without the base's weights."""
    has_adapters = c.llm_lora or c.vision_lora or (c.merger_lora and not c.tune_merger)
    return c.lora_enable and c.freeze_llm and has_adapters


def require(ok, name, value, expected):
    if not ok:
        raise UserError(f"--{name}: got {value!r}, expected {expected}")


def check(c):
    """UserError for a value of a config that its type refuses, and for options that contradict each other."""
    for f in fields(c):
        value, expected = getattr(c, f.name), "a number above 0"
        ok = lambda v: type(v) not in (int, float) or v > 0
        for kind in (f.type, *typing.get_args(f.type)):
            expected, ok = getattr(kind, "__metadata__", (expected, ok))
        require(value is None or ok(value), f.name, value, expected)
    for names, expected, ok in RULES:
        if all(hasattr(c, name) for name in names.split()):
            name, expected = names.split()[0], expected.format(c=c)
            if "expected" in expected and not ok(c):
                raise UserError(expected)
            require(ok(c), name, getattr(c, name), expected)


def ignored_options(c):
    """One line for each option that was given under another name or has no effect."""
    lines = list(c.notes)
    for names, why, applies in IGNORED:
        given = [name for name in names.split() if name in c.given]
        if given and hasattr(c, names.split()[0]) and applies(c):
            lines += [f"--{name} has no effect: {why}" for name in given]
    return lines


# -- Values


kinds_of = cache(typing.get_type_hints)  # class -> {option: type, without what limits its values}


def split_list(text):
    """'a,b', "['a', 'b']" or '[a,b]' -> ['a', 'b']; '' -> []."""
    items = (item.strip(" '\"") for item in text.strip().strip("[]()").split(","))
    return [item for item in items if item]


def type_name(kind):
    """What --help and messages call a type."""
    inner, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is typing.Literal:
        return ", ".join(inner)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_name(each) for each in inner)
    return {bool: "True or False", types.NoneType: "none"}.get(kind, kind.__name__)


def from_file(cls, name, value, path):
    """A text, or a config file's value, as one of the field's type. path: where it stands, "" for the command line."""
    kind = kinds_of(cls)[name]
    text = str(value)
    if types.NoneType in typing.get_args(kind) and text.lower() in ("none", "null", "~"):
        return None
    if "list" in type_name(kind):
        text = [str(item) for item in value] if isinstance(value, list | tuple) else split_list(text)
    try:
        return TypeAdapter(kind, config={"allow_inf_nan": False}).validate_python(text)
    except ValidationError:
        where = f"{path}: {name}" if path else f"--{name}"
        hint = nearest(value, typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else ""
        raise UserError(f"{where}: got {value!r}, expected {type_name(kind)}{hint}") from None


# -- Config files, and defaults that follow the model

# What the user's own Python, or a parser, may raise
BROKEN = (SyntaxError, NameError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError, LookupError)
BROKEN += (AssertionError, RuntimeError, OSError, SystemExit)


def load_file(cls, path):
    """{name: value} of a config file. Of YAML texts, to be read as on the command line. Of Python the variables without
    a leading _, or the defaults that a copy of config.py has changed."""
    if path.suffix != ".py":
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before it
        load = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix)
        values = load(text) if load else yaml.load(text, Loader=yaml.BaseLoader)
        if not isinstance(values, dict):
            raise TypeError(f"got {values!r:.40}, expected names with values")
        return values
    space = runpy.run_path(str(path))
    if is_dataclass(space.get(cls.__name__)):
        ours, theirs = as_dict(cls()).items(), as_dict(space[cls.__name__]())
        return {name: value for name, value in theirs.items() if (name, value) not in ours}
    is_setting = lambda name, value: name[0] != "_" and not callable(value) and type(value) is not types.ModuleType
    return {name: value for name, value in space.items() if is_setting(name, value)}


def read_config(cls, path):
    """[(name, value, where: file and line)] of a config file."""
    if not path.is_file() or path.suffix not in (".py", ".yaml", ".yml", ".json", ".toml"):
        problem = "is no .py, .yaml, .json or .toml file" if path.exists() else "does not exist"
        raise UserError(f"--config: {str(path)!r} {problem}{nearest_path(path)}")
    try:
        values = load_file(cls, path)
    except (*BROKEN, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--config {path}: cannot be read as settings: {reason}") from error
    lines = path.read_text(encoding="utf-8").splitlines()
    is_of = lambda name, line: re.match(rf"""[\s{{["']*{re.escape(name)}\b""", line)
    line_of = lambda name: next((n for n, line in enumerate(lines, 1) if is_of(name, line)), 1)
    return [(name.replace("-", "_"), value, f"{path}: line {line_of(name)}") for name, value in values.items()]


WIDTHS = {3: 1024, 7: 3584, 32: 5120}  # billions of parameters: the least hidden size that counts as such a model


def follow_model(cfg):
    """Set what was not given to what suits a large model, as its file in configs/ has it, and note that. Its size is
    read from config.json or from the hub id: nothing is downloaded here."""
    file, script = Path(cfg.model_id) / "config.json", "grpo" if hasattr(cfg, "num_generations") else "sft"
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")  # who loads the model says what is wrong with it
        width = max(map(int, re.findall(r'"hidden_size": *(\d+)', text)), default=0)  # the tower's is smaller
        sizes = [size for size in WIDTHS if WIDTHS[size] <= width]
    else:
        if any(file.with_name(name).is_file() for name in ("adapter_config.json", "run.json")):
            problem = f"--model_id: {cfg.model_id} is the folder of an adapter or a run, expected a base model"
            raise UserError(f"{problem}; an adapter is given by --model_ckpt {cfg.model_id}")
        named = re.search(r"/.*-(\d+)B\b", cfg.model_id)
        sizes = [size for size in WIDTHS if named and size <= int(named[1])]
    for size in sizes[-1:]:
        path = Path(__file__).with_name("configs") / f"{size}b_{script}.py"
        values, given = load_file(type(cfg), path), {*cfg.given, "model_id"}
        if not (hasattr(cfg, "lora_enable") and freezes_base(cfg)):
            given |= {"base_dtype", "head_dtype", "offload_embedding"}
        values = {name: value for name, value in values.items() if hasattr(cfg, name) and name not in given}
        vars(cfg).update(values)
        cfg.settle(cfg.given)
        chosen = ", ".join(f"{name} {getattr(cfg, name)}" for name in values)
        cfg.notes += (f"chosen by the model, as in configs/{path.name}: {chosen}",)


# -- The command line


def help_text(cls, every):
    """What --help prints: the options in MAIN, in that order; every: all of them, under the headings of config.py."""
    kinds, comments, before = kinds_of(cls), {}, None
    for klass in reversed(cls.__mro__[:-1]):
        heading = "options"
        for line in inspect.getsource(klass).splitlines():
            if line.startswith("    # -- "):
                heading = line[9:]
            elif match := re.match(r"    (\w+): .*?  # (.*)", line):
                name, comment = match.groups()  # a subclass's comment stays under the heading of its base
                comments[name] = comments.get(name, (heading,))[0], comment
    script = cls.__doc__.split()[1]  # the docstring is an example of its command line
    lines = [f"usage: python {script} [--config FILE] [--name value ...]", f"example: {cls.__doc__}"]
    for name in kinds if every else [name for name in MAIN if name in kinds]:
        heading, comment = comments[name]
        heading = heading if every else "main options; --help all lists every one"
        if heading != before:
            lines += ["", f"{heading}:"]
        before = heading
        option = f"  --{name} {type_name(kinds[name])}"
        text = f"{option:<32}  {comment} (default {getattr(cls(), name)!r})"
        lines += textwrap.wrap(text, shutil.get_terminal_size().columns, subsequent_indent=" " * 34)
    return "\n".join(lines)


def read_argv(cls, argv):
    """([(name, value, "")], words without a flag) of a command line."""
    kinds = kinds_of(cls) | {"config": str, "local_rank": str}  # the deepspeed launcher inserts --local_rank
    positional = [f for f in fields(cls) if f.metadata.get("positional")]  # they need no flag
    words, bare, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            bare.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(SYNONYMS.get(name, name))
        is_switch = bool in (kind, *typing.get_args(kind)) or (kind is None and positional)
        if not equals:
            follows = rest[0].lower() if rest and not rest[0].startswith("--") else None
            table, meaning = NAMES.get(name, ("", ""))
            known = follows in SWITCH or (table == "by_value" and follows in meaning)
            if follows is not None and (not is_switch or known or not positional):
                value = rest.pop(0)
            elif is_switch or kind is None:
                value = "true"
            else:
                raise UserError(f"--{name}: got no value, expected {type_name(kind)}")
        words.append((name, value, ""))
    flags = {SYNONYMS.get(name, name): value for name, value, _ in words}
    for f in positional[: len(bare)]:
        is_list = typing.get_origin(f.type) is list  # the last one, it takes all that follow
        value, bare = (bare, []) if is_list else (bare[0], bare[1:])
        if flags.get(f.name, value) != value:
            raise UserError(f"--{f.name}: got {flags[f.name]!r}, and {value!r} without a flag; expected one of them")
        words.append((f.name, value, ""))
    return words, bare


def apply(cfg, words):
    """Set what [(name, value, file and line or "")] says, in our names or another trainer's. UserError for a name that
    means nothing here and for a value of the wrong type."""
    cls, kinds, settings = type(cfg), kinds_of(type(cfg)), {}
    for name, value, where in words:
        ours, note = name, ""
        try:
            if name not in kinds and name in NAMES:
                ours, value, note = translate(name, value)
            if ours not in kinds and (ours or not note):
                hint = nearest(ours, kinds, cutoff=0.85) or "; --help all lists them"
                raise UserError(f"no such option of {cls.__doc__.split()[1]}{hint}")
        except UserError as error:
            raise UserError(f"{where}: {name}: {error}" if where else f"--{name}: {error}") from None
        cfg.notes += (note,) if note else ()
        if ours:
            settings[ours] = from_file(cls, ours, value, where)
    vars(cfg).update(settings)
    cfg.given |= settings.keys()
    cfg.settle(settings)


def parse(cls, argv=None):
    """An instance of the dataclass cls: its defaults or the model's, then each --config file, then the flags of argv.
    Its `given` are the names that were set, its `notes` say what became of other trainers' names. UserError for unknown
    names, wrong types and values that check() refuses."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"--help", "-h"} & set(argv):
        print(help_text(cls, every="all" in argv))
        raise SystemExit(0)
    words, bare = read_argv(cls, argv)
    cfg = cls()
    for name, value, _ in words:
        if name == "config":
            apply(cfg, read_config(cls, Path(value)))
    apply(cfg, [word for word in words if word[0] not in ("config", "local_rank")])
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

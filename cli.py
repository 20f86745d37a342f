"""A dataclass as a command line: its defaults, then --config files, then flags. The comment behind a field is its help.

config.py holds the options, checks.py what they may be, names.py what other trainers call them. Standard library only:
--help must not wait for torch.
"""

import argparse
import dataclasses
import inspect
import json
import re
import runpy
import sys
import tomllib
import types
import typing
from pathlib import Path

from checks import BOOLS, type_name, typed_value
from model import UserError, nearest_path
from names import NAMES, SYNONYMS, suggestion, translate

# What --help shows, of the options that a script has; --help all shows the others too
MAIN = """video question json files runs output command model_id model_ckpt data_path eval_data_path output_dir
    overwrite resume dry_run rewards num_generations max_completion_length temperature beta learning_rate lora_rank
    num_train_epochs max_steps per_device_train_batch_size pack_tokens gradient_checkpointing fps nframes
    video_max_pixels eval_steps controls max_samples num_samples split from_folder
    num_options frame_size video_length augment cot benchmark""".split()


as_dict = dataclasses.asdict  # all fields, as JSON can hold them


def kinds_of(cls):
    """{field: type} of a dataclass."""
    return {f.name: f.type for f in dataclasses.fields(cls)}


def from_file(cls, name, value, path):
    """A value from a file, as a value of the type of the field `name`."""
    return typed_value(value, kinds_of(cls)[name], f"{path}: {name}")


# -- Names


def script_of(cls):
    """train_sft.py for SFT: the docstring is an example of its command line."""
    return cls.__doc__.split()[1]


def resolve(cls, name, value, where):
    """(field or "", value, note) for a name that a command line or a config file gives a value. UserError, beginning
    with `where`, for a name that means nothing here."""
    fields, plain = kinds_of(cls), name.replace("-", "_")
    if plain in fields:
        return plain, value, ""
    if plain in NAMES and ("model_id" in fields or NAMES[plain][0] == "answer"):
        try:
            field, value, note = translate(plain, value)
        except UserError as error:
            raise UserError(f"{where}{name}: {error}") from None
        if not field or field in fields:
            return field, value, note
    hint = suggestion(plain, fields) or "; --help all lists them"
    raise UserError(f"{where}{name}: no such option of {script_of(cls)}{hint}")


# -- Config files

# What the user's own Python, or a parser, may raise
BROKEN = (SyntaxError, NameError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError, LookupError)


def load_file(cls, path, text):
    """{name: value} of a file: YAML's values are texts, read as on the command line; names with a leading _ are the
    file's own in Python, which may also be a copy of config.py with other defaults."""
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml  # transformers brings it

        try:
            return yaml.load(text, Loader=yaml.BaseLoader)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    space = runpy.run_path(str(path))
    if dataclasses.is_dataclass(space.get(cls.__name__)):  # a copy of config.py
        mine, theirs = as_dict(cls()), dataclasses.asdict(space[cls.__name__]())
        return {name: value for name, value in theirs.items() if name not in mine or mine[name] != value}
    skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {name: value for name, value in space.items() if name[0] != "_" and not isinstance(value, skip)}


def read_config(cls, path):
    """({name: value}, notes) of a config file. UserError, with the line, for a name that means nothing here and for a
    value of the wrong type."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config: no file {str(path)!r}{nearest_path(path)}")
    if path.resolve() == Path(inspect.getfile(cls)).resolve():
        return {}, []
    if path.suffix not in (".py", ".yaml", ".yml", ".json", ".toml"):
        raise UserError(f"--config: {path} is a {path.suffix or 'nameless'} file, expected .py, .yaml, .json or .toml")
    try:
        given = load_file(cls, path, text := path.read_text(encoding="utf-8"))
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: cannot be read: {type(error).__name__}: {reason}") from error
    if not given or not isinstance(given, dict):
        raise UserError(f"--config: {path} sets nothing, expected assignments such as learning_rate = 1e-4")
    settings, notes = {}, []
    for name, value in given.items():
        match = re.search(rf"(?m)(?:^|[{{,])\s*[\[\"']?{re.escape(name)}\b", text)
        where = f"{path}: " + (f"line {text.count(chr(10), 0, match.end()) + 1}: " if match else "")
        field, value, note = resolve(cls, name, value, where)
        notes += [note] * bool(note)
        if field:
            settings[field] = typed_value(value, kinds_of(cls)[field], f"{where}{name}")
    return settings, notes


# -- Defaults that follow the model

CONFIGS = Path(__file__).with_name("configs")
WIDTHS = {32: 5120, 7: 3584, 3: 1024}  # billions of parameters: the least hidden size that we count as such a model


def billions(model_id):
    """The size of a model as a key of WIDTHS, 0 for a tiny one, by its config.json, or by a hub id, for nothing is
    downloaded here."""
    file = Path(model_id) / "config.json"
    if not file.exists():
        named = re.search(r"/.*-(\d+)B\b", model_id)
        return next((size for size in WIDTHS if named and int(named[1]) >= size), 0)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return next((size for size, least in WIDTHS.items() if raw.get("text_config", raw)["hidden_size"] >= least), 0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # whoever loads the model says what is wrong
        return 0


def follow_model(cfg):
    """Set what was not given to what suits a large model, as its file in configs/ has it, and note that."""
    size, kinds = billions(cfg.model_id), kinds_of(type(cfg))
    if not size:
        return
    script = "grpo" if "num_generations" in kinds else "sft"
    path = next(path for path in (CONFIGS / f"{n}b_{script}.py" for n in WIDTHS if n <= size) if path.exists())
    values = load_file(type(cfg), path, path.read_text(encoding="utf-8"))
    values = {name: value for name, value in values.items() if name in kinds and name not in {*cfg.given, "model_id"}}
    for name, value in values.items():
        setattr(cfg, name, value)
    cfg.settle(cfg.given)
    if values:
        chosen = ", ".join(f"{name} {getattr(cfg, name)}" for name in values)
        cfg.notes += (f"chosen by the model, as in configs/{path.name}: {chosen}",)


# -- The command line


def documented(cls):
    """[(heading, [(field, comment)])] of a dataclass and its bases, from their source, in the field's first group."""
    groups, comments = {}, {}
    for klass in cls.__mro__[:-1]:
        heading = ""
        for line in inspect.getsource(klass).splitlines():
            if line.startswith("    # -- "):
                heading = line[9:]
            elif (match := re.match(r"    (\w+): .*?  # (.*)", line)) and match[1] in kinds_of(cls):
                name, comment = match.groups()
                comments.setdefault(name, comment)  # a subclass speaks before its bases
                first = [k for k in cls.__mro__ if name in getattr(k, "__annotations__", {})][-1]
                if first is klass:
                    groups.setdefault(heading, []).append(name)
    return [(heading, [(name, comments[name]) for name in names]) for heading, names in groups.items()]


def help_text(cls, every):
    """What --help prints: the options in MAIN, in that order; every: all of them in groups, for --help all."""
    positional = "".join(f"[{f.name}] " for f in dataclasses.fields(cls) if f.metadata.get("positional"))
    usage = f"python {script_of(cls)} {positional}[--name value ...]"
    more = f"example: {cls.__doc__}" + ("" if every else "\n--help all lists every option")
    shape = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34)
    parser = argparse.ArgumentParser(usage=usage, description=more, formatter_class=shape, add_help=False)
    parser.add_argument("--config", metavar="FILE", help="settings: .py, .yaml, .json or .toml; several in their order")
    default, kinds, groups = cls(), kinds_of(cls), documented(cls)
    if not every:
        comments = {name: comment for _, fields in groups for name, comment in fields}
        groups = [("main options", [(name, comments[name]) for name in MAIN if name in comments])]
    for heading, fields in groups:
        group = parser.add_argument_group(heading)
        for name, comment in fields:
            text = f"{comment} (default {getattr(default, name)!r})".replace("%", "%%")
            group.add_argument(f"--{name}", help=text, metavar=type_name(kinds[name]))
    return parser.format_help()


def read_argv(cls, argv):
    """({field: value}, config files, notes) of a command line. UserError for what it does not know."""
    kinds = kinds_of(cls)
    positional = [f.name for f in dataclasses.fields(cls) if f.metadata.get("positional")]
    settings, files, notes, bare, rest = {}, [], [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if arg.strip() in ("", "\\", "#"):
            why = "a backslash continues a shell line only as its very last character"
            raise UserError(f"found an argument {arg!r}: {why}; remove what stands behind it, the rest was not read")
        if not arg.startswith("--"):
            bare.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        theirs = name.replace("-", "_")
        plain = SYNONYMS.get(theirs, theirs) if theirs not in kinds else theirs
        kind = str if plain in ("config", "local_rank") else kinds.get(plain)
        if not equals:
            is_switch = kind is bool or bool in typing.get_args(kind) or (kind is None and positional)
            words = {*BOOLS, "none", "auto"} if kind is not bool else BOOLS
            if rest and not rest[0].startswith("--") and (not is_switch or rest[0].lower() in words):
                value = rest.pop(0)
                while theirs in SYNONYMS and not positional and rest and not rest[0].startswith("--"):
                    value += f",{rest.pop(0)}"  # lists of other trainers are separated by blanks
            elif is_switch or kind is None:
                value = "true"
            else:
                raise UserError(f"--{name}: found no value, expected {type_name(kind)}")
        if plain == "config":
            files.append(value)
        elif plain != "local_rank":  # the deepspeed launcher inserts it
            field, value, note = resolve(cls, name, value, "--")
            notes += [note] * bool(note)
            if field:
                settings[field] = typed_value(value, kinds[field], f"--{name}")
    for name in positional:
        if bare and typing.get_origin(kinds[name]) is list:  # the last one takes all that follow
            settings[name], bare = bare, []
        elif bare:
            settings[name] = bare.pop(0)
    if bare:
        raise UserError(f"found {bare[0]!r} without a flag; expected --name value or --name=value (--help lists them)")
    return settings, files, notes


def parse(cls, argv=None):
    """An instance of the dataclass cls: its defaults or the model's, then each --config file, then the flags of argv.

    Its `given` is the set of names that were set, its `notes` say what became of other trainers' names. UserError for
    unknown names, wrong types and values that check() refuses. --help prints the main options, --help all all of them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"--help", "-h"} & set(argv):
        print(help_text(cls, every="all" in argv))
        raise SystemExit(0)
    flags, files, notes = read_argv(cls, argv)
    cfg, cfg_notes = cls(), []
    for settings, more in [*(read_config(cls, path) for path in files), (flags, notes)]:
        for name, value in settings.items():
            setattr(cfg, name, value)
        cfg.given |= set(settings)
        cfg_notes += more
        cfg.settle(settings)
    cfg.notes = tuple(cfg_notes)
    if hasattr(cfg, "fps"):
        follow_model(cfg)
    cfg.check()
    return cfg


def changed(cfg):
    """The fields that differ from their defaults, for the lines printed at the start."""
    default = as_dict(type(cfg)())
    return {name: value for name, value in as_dict(cfg).items() if value != default[name]}

"""What a training command means that leaves things open: the run, adapter, model and dataset made last in this folder.

    cfg = follow(parse(SFT))

Each choice is a note, a line at the start of the run. What is given by a flag or a --config file always counts.
"""

import sys
from pathlib import Path

from checkpoint import ADAPTER, RUN, STATE, find_adapter, read_json, script_of
from cli import follow_model, from_file
from config import LoraArgs, as_dict
from model import UserError, nearest_path
from records import data_files
from script import command

# What a resumed run cannot change: its weights have these shapes, this scale, and are trained beside this base
FIXED = as_dict(LoraArgs()).keys() - {"lora_dropout"} | {"base_dtype", "head_dtype"}


def follow(cfg):
    """cfg with what the command line leaves open settled by what was made last in this folder; its notes say how."""
    script = Path(sys.argv[0]).stem
    if cfg.resume and "output_dir" not in cfg.given:
        runs = [file.parent for file in by_age("output", RUN) if script_of(file.parent) == script]
        cfg.output_dir = str(runs[-1]) if runs else cfg.output_dir
    path = Path(cfg.output_dir) / RUN
    if cfg.resume and not path.exists():
        cfg.notes += (f"--resume: no run in {cfg.output_dir}, a new one begins{nearest_path(cfg.output_dir)}",)
    if cfg.resume and path.exists():
        take_options(cfg, path, script)
    elif not cfg.lora_enable:
        cfg.model_ckpt = None
    elif cfg.model_ckpt is not None:
        take_adapter(cfg)
    if not cfg.data_path:
        take_dataset(cfg)
    cfg.check()
    return cfg


def take_options(cfg, path, script):
    """--resume: the run's own options, by its run.json, for all that was not given."""
    run, ours = read_json(path), as_dict(cfg)
    if (owner := script_of(path.parent)) != script:
        raise UserError(f"--resume: {cfg.output_dir} is a run of {owner}.py, not of {script}.py")
    known = {"head_dtype": "bf16", "offload_embedding": False} | run["config"]  # an older run has none of the two
    theirs = {name: known[name] for name in ours.keys() & known.keys()}
    new = {name for name in theirs.keys() & cfg.given if theirs[name] != ours[name]}
    for name in new & FIXED:
        what = f"got {ours[name]!r}, expected {theirs[name]!r} as in {cfg.output_dir}"
        raise UserError(f"--{name}: {what}: a resumed run cannot change it; leave it out, or begin another run")
    vars(cfg).update(theirs)
    cfg.settle(new)  # a new --fps is not held up by the run's nframes
    own = cfg.given - {"model_ckpt"} | {"resume", "overwrite", "output_dir"}
    vars(cfg).update({name: ours[name] for name in own})
    cfg.notes += (f"--resume: {cfg.output_dir}, with its own options where none are given",)
    if "model_ckpt" in cfg.given:
        cfg.notes += ("--model_ckpt has no effect: a resumed run has a copy of the adapter that it began with",)


def take_adapter(cfg):
    """The adapter that model_ckpt means, "" being the newest SFT run's or none, and the base that it was made for."""
    newest, adapter = cfg.model_ckpt == "", find_adapter(cfg.model_ckpt, script="train_sft")
    cfg.model_ckpt = adapter and str(adapter)
    if adapter is None:
        cfg.notes += ("no adapter under output/: a new one",)
        return
    if newest:
        cfg.notes += (f"--model_ckpt {adapter}, of the run made last",)
    config = read_json(adapter / ADAPTER[0])
    base = config.get("base_model_name_or_path")
    is_other = base and Path(base).resolve() != Path(cfg.model_id).resolve()
    if is_other and "model_id" not in cfg.given:
        cfg.model_id = base
        cfg.notes += (f"--model_id {base}, which the adapter was made for",)
        follow_model(cfg)
    elif is_other and newest:
        problem = f"--model_id {cfg.model_id}: the newest adapter, {adapter}, was made for {base}"
        raise UserError(f"{problem}; give --model_ckpt FOLDER, or --model_ckpt none for a new adapter")
    for name in ("base_dtype", "head_dtype"):  # the adapter's beats what suits the model
        kind = config.get(name, "bf16")
        if name not in cfg.given and kind != getattr(cfg, name):
            setattr(cfg, name, from_file(type(cfg), name, kind, adapter))
            cfg.notes += (f"--{name} {kind}, which the adapter was trained on",)


def take_dataset(cfg):
    """What the adapter was trained on, else the newest under data/, whose name the output_dir takes."""
    state, files = Path(cfg.model_ckpt or "") / STATE, by_age("data", "train.json")
    if state.exists():
        cfg.data_path, why = read_json(state)["config"]["data_path"], "which the adapter was trained on"
    elif files:
        cfg.data_path, why = str(files[-1]), "the dataset made last"
    else:
        make = "make one by python generate.py --num_samples 1400, of your own clips by --from_folder DIR"
        raise UserError(f"--data_path: no dataset under data/; {make}; or give --data_path FILE")
    cfg.notes += (f"--data_path {cfg.data_path}, {why}",)
    name = Path(data_files(cfg.data_path)[0][0]).resolve().parent.name
    if "output_dir" not in cfg.given and not cfg.resume and name != "synthetic_videos":
        cfg.output_dir = cfg.output_dir.replace("video", name)  # output/video_lora is of the drawn clips
        cfg.notes += (f"--output_dir {cfg.output_dir}, after the dataset",)


def grpo_command(adapter, model_ckpt):
    """Lines for infer.py to end with, about the adapter that --model_ckpt means: after an SFT run, how GRPO goes on."""
    if adapter and script_of(adapter.parent) == "train_sft":
        yield "next: " + command("train_grpo.py", *(["--model_ckpt", model_ckpt] if model_ckpt else []))


def by_age(folder, name):
    """folder/*/name, the newest last."""
    return sorted(Path(folder).glob(f"*/{name}"), key=lambda file: file.stat().st_mtime)

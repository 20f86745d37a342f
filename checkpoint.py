"""Checkpoints that are whole or absent, and finding them again.

    output_dir/                        run.json: config, versions, machine; data.json: summary of the data
        metrics.jsonl, rollouts.jsonl  a line each step; completions (SFT: some answers)
        start_adapter/                 the adapter that the run began with, if it was given one
        adapter_*                      links to those of the best checkpoint (best.json), else of the newest
        checkpoint-N/                  an adapter as PEFT has it, or a whole model in Hugging Face form
            optimizer-*.safetensors    fp32 weights and AdamW moments, whole tensors by name, for any number of ranks
            trainer_state.json         step, position in the data, what the loop keeps
            manifest.json              size and SHA-256 of every file: written last, checked on load

A checkpoint is written under a temporary name, flushed to the disk and renamed. Nothing in it is a pickle.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from model import UserError, nearest_path

MANIFEST, STATE, BEST, RUN = "manifest.json", "trainer_state.json", "best.json", "run.json"
METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them


# -- Files


def sync(path):
    """Flush a file or folder to the disk: a rename may otherwise become visible before what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_file(path, data):
    """Bytes into a file: all of them, or it stays as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def write_json(path, value):
    write_file(Path(path), (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path):
    """The object in a JSON file. UserError if it is not there, not JSON, or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{value!r:.40} is no object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected JSON; take another file or checkpoint") from None


def append_lines(path, rows):
    """Add a line for each object to a .jsonl: all of them, or none and UserError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(text) < len(text):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        why = f"cannot be written ({error.strerror}); the last checkpoint is intact: free some space, then --resume"
        raise UserError(f"{path}: {why}") from None


def cut_after(path, step, again=lambda row: False):
    """Drop from a .jsonl what the resumed run writes again: the lines of later steps, a last line cut short, and of
    this step those that `again` is true of."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)  # of text it would split at U+2028 too
        rows = [(line, json.loads(line)) for line in lines if line.endswith(b"\n")]
        keep = [line for line, row in rows if row["step"] < step or (row["step"] == step and not again(row))]
        write_file(path, b"".join(keep))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path):
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


# -- Folders


def write_whole(folder, fill):
    """fill(temporary folder) makes a checkpoint's files; they appear as `folder`, in place of what stood there, only
    when complete."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        write_json(temporary / MANIFEST, {str(path.relative_to(temporary)): fingerprint(path) for path in files})
        for path in [*files, temporary]:
            sync(path)
        remove(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(folder):
    """Delete a checkpoint; killed halfway, it leaves a hidden rest and never a half checkpoint."""
    if folder.exists():
        rest = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(rest, ignore_errors=True)
        folder.rename(rest)
        shutil.rmtree(rest)


def what_is_broken(folder):
    """Why a checkpoint cannot be trusted, in words; None if every file of its manifest is there, byte for byte."""
    try:
        listed = dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        listed = {}
    for name, expected in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if fingerprint(folder / name) != expected:
            return f"{name} does not have the size and SHA-256 of the manifest"
    return None if listed else f"{MANIFEST} is missing, or does not list files with their bytes and sha256"


def step_of(folder):
    """checkpoint-12 -> 12"""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(run_folder):
    """Its checkpoint-N folders, oldest step first, whole or not."""
    folders = Path(run_folder).glob("checkpoint-*")
    return sorted((path for path in folders if path.name.removeprefix("checkpoint-").isdigit()), key=step_of)


def newest_checkpoint(run_folder):
    """The newest whole checkpoint of a run, or None. A broken one is named on stderr and passed over."""
    for folder in reversed(checkpoints(run_folder)):
        fault = what_is_broken(folder)
        if fault is None:
            return folder
        print(f"{folder}: broken checkpoint passed over: {fault}", file=sys.stderr)
    return None


def best_checkpoint(run_folder):
    """The checkpoint that best.json names, if it stands, else None."""
    path = Path(run_folder) / BEST
    folder = path.with_name(f"checkpoint-{read_json(path)['step']}") if path.exists() else None
    return folder if folder and folder.is_dir() else None


def rotate(run_folder, limit):
    """Delete the oldest checkpoints beyond `limit` (None = keep all). The best one stays and is not counted, nor is one
    that a signal left: it goes as soon as there is a newer one, so that a stopped run ends with the same ones."""
    best, every = best_checkpoint(run_folder), checkpoints(run_folder)
    counted = [folder for folder in every if folder != best and not was_stopped(folder)]
    stopped = [folder for folder in every[:-1] if folder != best and was_stopped(folder)]
    for folder in stopped + (counted[:-limit] if limit else []):
        remove(folder)


def was_stopped(folder):
    try:
        return read_json(folder / STATE).get("stopped")
    except UserError:
        return False  # a broken one


def link_adapter(run_folder):
    """Link the adapter of a run's best checkpoint, else of its newest, into the run's folder: PEFT loads it there."""
    folder = best_checkpoint(run_folder) or next(reversed(checkpoints(run_folder)), None)
    for name in ADAPTER if folder else ():
        if (folder / name).is_file():  # no whole model
            temporary = run_folder / f".{name}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(folder.name) / name)
            except OSError:  # a file system without links
                shutil.copyfile(folder / name, temporary)
            temporary.rename(run_folder / name)


def script_of(folder):
    """Name of the script whose run is in the folder; None where it has none, or one of others."""
    return read_json(folder / RUN).get("script") if (folder / RUN).exists() else None


def find_adapter(path, script=None):
    """The adapter's folder that --model_ckpt means: an adapter (ours, or PEFT's); a checkpoint-N; a run, for its best
    checkpoint, or its newest if none was evaluated; "" for the run under output/ that saved one last, of this script if
    one is named, or None."""
    if path == "":
        runs = {file.parents[1] for file in Path("output").rglob("checkpoint-*/adapter_config.json")}
        if script:
            runs = {run for run in runs if script_of(run) == script}
        if not runs:
            return None
        path = max(runs, key=lambda run: max(folder.stat().st_mtime for folder in run.glob("checkpoint-*")))
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder, expected an adapter, a checkpoint or a run{nearest_path(path)}")
    is_run = (path / RUN).is_file() or not (path / ADAPTER[0]).is_file()  # others leave an adapter beside checkpoints
    if is_run and checkpoints(path):
        path = best_checkpoint(path) or newest_checkpoint(path) or checkpoints(path)[-1]
    if (path / MANIFEST).exists() and (fault := what_is_broken(path)):
        raise UserError(f"{path}: broken checkpoint: {fault}; take another one")
    if not (path / ADAPTER[0]).is_file():
        is_model = (path / "config.json").is_file()
        what = "a whole model is given as --model_id" if is_model else "expected an adapter or a run"
        raise UserError(f"{path}: no adapter_config.json in it; {what}")
    return path


# -- Optimizer state, by parameter name, through DeepSpeed's own getters and setters. torch and deepspeed are imported
# where they are needed: infer.py and lora.py find adapters without them.

SHARD_BYTES = 2 << 30  # of optimizer state held in memory at a time while saving
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, in torch


def trained(engine, updates):
    """[(name, parameter)] that are trained. After an update DeepSpeed is shown where their moments lie: by itself it
    looks once, and at one of several groups."""
    if updates:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def optimizer_state(engine, updates):
    """Yields (key/name, whole fp32 tensor on the CPU): weights, and moments if an update was made. Every rank must run
    it to its end: the getters meet in a reduction."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, param in trained(engine, updates):
        yield f"weight/{name}", safe_get_full_fp32_param(param).cpu()
        for key in MOMENTS if updates else ():
            yield f"{key}/{name}", safe_get_full_optimizer_state(param, key).cpu()


def save_state(state, folder):
    """Write what optimizer_state yields into folder, as optimizer-00000.safetensors and so on."""
    from safetensors.torch import save_file

    shard, number = {}, 0
    for name, tensor in state:
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or Inf")
        shard[name] = tensor.contiguous()
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / f"optimizer-{number:05d}.safetensors")
            shard, number = {}, number + 1
    save_file(shard, folder / f"optimizer-{number:05d}.safetensors")


def load_state(engine, adamw, folder, updates):
    """Put weights and moments back. adamw: the torch optimizer that the engine was built with; updates: how many it had
    made. UserError if this model trains other tensors."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from safetensors import safe_open

    for flat in (p for group in adamw.param_groups for p in group["params"] if updates):  # this rank's share
        adamw.state[flat] = {key: torch.zeros_like(flat.data) for key in MOMENTS}
        adamw.state[flat]["step"] = torch.tensor(float(updates), device=flat.device)
    shards = [safe_open(file, framework="pt") for file in sorted(folder.glob("optimizer-*.safetensors"))]
    shard_of = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 (a file handle, no dict)
    for name, param in trained(engine, updates):
        for key in ("weight", *MOMENTS) if updates else ("weight",):
            shard = shard_of.get(f"{key}/{name}")
            tensor = shard and shard.get_tensor(f"{key}/{name}")
            if tensor is None or tensor.shape != param.shape:
                raise UserError(f"{folder}: has no {name} as this model trains it; resume with that run's flags")
            if key == "weight":
                safe_set_full_fp32_param(param, tensor.to(param.device))
            else:
                safe_set_full_optimizer_state(param, tensor.to(param.device), key)
    engine.optimizer.update_lp_params()

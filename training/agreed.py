"""What must be the same on every machine of a run, compared once at its start: a few milliseconds, one line if not.

Paths may differ, what lies there may not. Of clips SAMPLED sizes are compared, not their contents.
"""

import hashlib
import os
from pathlib import Path

from config import as_dict
from dataset.places import ADDRESS, Places
from dataset.records import clip_name, record_name
from interop.saved import CONFIG, TENSORS
from model import UserError
from model.loading import resolve_folder
from training.checkpoint import MANIFEST, sha256
from training.meeting import check_equal, join
from training.runlog import machine, versions

SAMPLED = 64  # clips of a dataset that are looked at
NONE = "no file"
# Flags that may differ: folders and files, of which the contents are compared, and what a machine does in its own way
OWN = {"data_path", "eval_data_path", "image_folder", "remote_folder", "model_id", "model_ckpt", "output_dir"}
OWN |= {"deepspeed", "rewards", "cache_mb", "dataloader_num_workers", "local_files_only", "report_to", "logging_steps"}


def agree(cfg, dtype, records, held_out):
    """At launch: flags, precision, data. Returns lines on versions and GPUs that differ."""
    if join() is None:
        return []
    must = {f"--{name}": value for name, value in as_dict(cfg).items() if name not in OWN}
    must |= {"precision": str(dtype), "--deepspeed": digest(cfg.deepspeed)}
    must["training data"] = data(cfg, cfg.data_path, records)
    must["held-out data"] = data(cfg, cfg.eval_data_path, held_out)
    for name in getattr(cfg, "rewards", "").split(","):
        must[f"reward {Path(name).name}"] = digest(name.rpartition(":")[0])
    may = versions() | {"GPU": machine()["gpus"][:1]}
    return check_equal("launch", must, may)


def agree_on_checkpoint(folder):
    """--resume: rank 0 has found it whole; the others must have the same one."""
    found = digest(folder / MANIFEST)
    what = f"no {folder}" if found == NONE else f"{folder.name} with manifest {found[:8]}"
    check_equal("checkpoint", {"checkpoint to go on from": what})


def agree_on_start(cfg, adapter, total):
    """Before the first step: base model, adapter, number of steps."""
    if join() is None:
        return
    base = Path(resolve_folder(cfg.model_id, cfg.local_files_only))
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    files = [digest(Path(adapter) / name) for name in (CONFIG, TENSORS)] if adapter else "none"
    must = {"--model_id": f"config.json {digest(base / 'config.json')}, {weights:,} bytes of weights"}
    check_equal("start", must | {"adapter to start from": files, "steps": total})


def digest(path):
    """The first half of a file's SHA-256, or NONE."""
    return sha256(path)[:32] if path and os.path.isfile(path) else NONE


def data(cfg, path, records):
    """Number of records, the file, and the sizes of some clips."""
    if not path:
        return "none"
    places, sizes = Places(cfg), hashlib.sha256()
    for i in range(0, len(records), max(1, len(records) // SAMPLED)):
        sizes.update(f"{size_of_clip(places, records[i])} ".encode())
    return f"{len(records)} records, file {digest(path)[:8]}, clips {sizes.hexdigest()[:8]}"


def size_of_clip(places, record):
    """Bytes of the first file that a record names; None where it is not a file here, or not to be read."""
    name = clip_name(record)
    if name is None or ADDRESS.match(name):
        return None
    try:
        return os.path.getsize(places.locate(name, record_name(record)))
    except (UserError, OSError):
        return None

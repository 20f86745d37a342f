"""Checkpoints that are whole or absent, and finding them again.

    output_dir/
        run.json            config, versions, machine        best.json     step and accuracy of the best checkpoint
        metrics.jsonl       one line a step                  run.lock      held while a process trains here
        rollouts.jsonl      completions (SFT: some answers)  data.json     summary of the data, for report.html
        tensorboard/, wandb/       what --report_to asks for
        start_adapter/      the adapter that the run began with, if it was given one
        adapter_config.json, adapter_model.safetensors     links to those of the best checkpoint, else of the newest
        checkpoint-N/       adapter_config.json + adapter_model.safetensors, or a whole model in Hugging Face form
            optimizer-*.safetensors    fp32 weights and AdamW moments, whole tensors under their names: any number of
                                       ranks can read them
            trainer_state.json         step, position in the data, schedule, what the loop keeps
            manifest.json              size and SHA-256 of every file: written last, checked on load

A checkpoint is written under a temporary name, flushed to the disk and renamed. Nothing in it is a pickle.
The state of the optimizer goes through DeepSpeed's own getters and setters (deepspeed/utils/tensor_fragment.py), whole
tensors by their names.
"""

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


def sync(path):
    """Flush a file's or folder's data to the disk: a rename may otherwise become visible before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Whole or absent, as all that a resumed run relies on."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def read_json(path):
    """UserError if it is not there or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); take another checkpoint or start anew") from None


def append_lines(path, rows):
    """Add a line for each object to a .jsonl: all of them, or none and UserError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size, written = file.tell(), 0
            try:
                while written < len(text):
                    written += file.write(text[written:])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        why = f"cannot be written ({error.strerror}); the last checkpoint is intact: free some space, then --resume"
        raise UserError(f"{path}: {why}") from None


def cut_after(path, step, again=lambda row: False):
    """Drop from a .jsonl what the resumed run writes again: the lines of later steps, a last line cut short, and of
    this step those that `again` is true of."""
    if not path.exists():
        return
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):  # of text it would split at U+2028 too
        row = json.loads(line) if line.endswith(b"\n") else None
        if row is None or row["step"] > step or (row["step"] == step and again(row)):
            break
        lines.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(lines))
    sync(temporary)
    temporary.rename(path)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(folder, fill):
    """Write a checkpoint folder: fill(temporary folder) makes its files; it appears under its name only when complete.

    A folder that already stands there (a broken one, else nobody writes it again) is replaced.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        listed = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (temporary / MANIFEST).write_text(json.dumps(listed, indent=2) + "\n")
        for path in [*files, temporary / MANIFEST, temporary]:
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
        shutil.rmtree(rest, ignore_errors=True)


def what_is_broken(folder):
    """Why a checkpoint cannot be trusted, in words; None if every file of its manifest is there, byte for byte."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, KeyError):
        return f"{MANIFEST} is missing, or does not list files with their bytes and sha256"
    if not expected:
        return f"{MANIFEST} is empty"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if sha256(path) != digest:
            return f"{name} does not have the SHA-256 of the manifest"
    return None


def step_of(folder):
    """checkpoint-12 -> 12; -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdigit() else -1


def checkpoints(run_folder):
    """Its checkpoint-N folders, oldest step first, whole or not."""
    folders = [p for p in Path(run_folder).glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0]
    return sorted(folders, key=step_of)


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
    folder = Path(run_folder) / f"checkpoint-{read_json(path)['step']}" if path.exists() else None
    return folder if folder is not None and folder.is_dir() else None


def rotate(run_folder, limit):
    """Delete the oldest checkpoints beyond `limit` (None = keep all); the best one stays and is not counted. One that
    was written only for a signal goes as soon as there is a newer one: however often a run was stopped, it ends with
    the same checkpoints."""
    best, every = best_checkpoint(run_folder), checkpoints(run_folder)
    for folder in every[:-1]:
        if folder != best and only_for_stop(folder):
            remove(folder)
    others = [folder for folder in checkpoints(run_folder) if folder != best and not only_for_stop(folder)]
    for folder in others[:-limit] if limit else ():
        remove(folder)


def only_for_stop(folder):
    try:
        return read_json(folder / STATE).get("only_for_stop", False)
    except UserError:
        return False  # a broken one


def link_adapter(run_folder):
    """Link the adapter of a run's best checkpoint, else of its newest, into the run's folder: PEFT loads it there.
    Nothing where there is no checkpoint yet, or whole models."""
    folder = best_checkpoint(run_folder) or next(reversed(checkpoints(run_folder)), None)
    for name in ADAPTER if folder else ():
        if (folder / name).is_file():
            temporary = run_folder / f".{name}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(Path(folder.name) / name)
            except OSError:  # a file system without links
                shutil.copyfile(folder / name, temporary)
            temporary.rename(run_folder / name)


def find_adapter(path, output="output", besides=None, script=None):
    """The folder with the adapter that a user means by --model_ckpt.

    path: an adapter's folder (ours, or PEFT's); a checkpoint-N; a run's folder, for its best checkpoint, or its newest
    if none was evaluated; "" for the run under `output` that was saved last, the folder `besides` left out, or None.
    script: among these, runs of this script go first.
    Raises UserError that names what is there instead.
    """
    if path == "":
        runs = {file.parents[1] for file in Path(output).rglob("checkpoint-*/adapter_config.json")}
        runs = [run for run in runs if besides is None or run.resolve() != Path(besides).resolve()]
        runs = [run for run in runs if checkpoints(run)]
        scripts = {run: read_json(run / RUN).get("script") if (run / RUN).exists() else None for run in runs}
        runs = [run for run in runs if script and scripts[run] == script] or runs
        if not runs:
            return None
        return find_adapter(max(runs, key=lambda run: max(p.stat().st_mtime for p in checkpoints(run))))
    path = Path(path)
    is_run = (path / RUN).is_file() and checkpoints(path)  # its own adapter is a checkpoint's: link_adapter
    if (path / ADAPTER[0]).is_file() and not is_run:
        fault = what_is_broken(path) if (path / MANIFEST).exists() else None
        if fault:
            raise UserError(f"{path}: broken checkpoint: {fault}; take another one")
        return path
    if checkpoints(path):
        folder = best_checkpoint(path) or newest_checkpoint(path)
        if folder is None:
            raise UserError(f"{path}: no whole checkpoint in this run, expected one with an adapter")
        return find_adapter(folder)
    if (path / "config.json").is_file():
        raise UserError(f"{path}: holds a whole model, expected an adapter; a whole model is given as --model_id")
    if path.exists():
        raise UserError(f"{path}: no adapter_config.json and no checkpoint-N in it, expected an adapter or a run")
    there = ", ".join(p.name for p in checkpoints(path.parent)) or "no checkpoint"
    there = f"({path.parent} holds {there}){nearest_path(path)}"
    raise UserError(f"{path}: no such folder, expected an adapter, a checkpoint or a run {there}")


# -- Optimizer state, by parameter name. torch and deepspeed are imported where they are needed: infer.py and lora.py
# find adapters without them.

SHARD_BYTES = 2 << 30  # of optimizer state held in memory at a time while saving
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, in torch


class NotFiniteError(ArithmeticError):
    """A weight or moment that is NaN or Inf: such a state is not worth keeping."""


def trained(engine):
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def link_state(engine):
    """Let DeepSpeed see where the moments of each parameter lie. It links them once, when they are first asked for, and
    then only those of one parameter group; with several groups, or new moments, it must be done again."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_state(engine, updates):
    """Yields (key/name, whole fp32 tensor on the CPU): fp32 weights, and moments if an update was made. Every rank must
    run it to its end: the getters meet in a reduction."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if updates:
        link_state(engine)
    for name, param in trained(engine):
        yield f"weight/{name}", safe_get_full_fp32_param(param).cpu()
        for key in MOMENTS if updates else ():
            yield f"{key}/{name}", safe_get_full_optimizer_state(param, key).cpu()


def save_state(state, folder):
    """Write what optimizer_state yields into folder, as optimizer-00000.safetensors and so on."""
    from safetensors.torch import save_file

    shard, size, number = {}, 0, 0
    for name, tensor in state:
        if not tensor.isfinite().all():
            raise NotFiniteError(f"{name} holds NaN or Inf")
        shard[name], size = tensor.contiguous(), size + tensor.nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"optimizer-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"optimizer-{number:05d}.safetensors")


def save_weights(model, folder, cfg, whole):
    """The adapter in PEFT's form, or the whole model with the small files of its base."""
    from adapter_files import copy_small_files, save_adapter
    from model.loading import resolve_folder, save_model

    if whole:
        save_model(model, folder)
        copy_small_files(resolve_folder(cfg.model_id, cfg.local_files_only), folder)
    else:
        save_adapter(model, folder, cfg.model_id)


def load_state(engine, adamw, folder, updates):
    """Put weights and moments back. adamw: the torch optimizer that the engine was built with; updates: how many it had
    made. UserError if this model trains other tensors."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from safetensors import safe_open

    if updates:
        for flat in (p for group in adamw.param_groups for p in group["params"]):  # this rank's share of each group
            step = torch.tensor(float(updates), device=flat.device)
            adamw.state[flat] = {"step": step} | {key: torch.zeros_like(flat.data) for key in MOMENTS}
        link_state(engine)
    keys = ("weight", *MOMENTS) if updates else ("weight",)
    left = {f"{key}/{name}": (param, key) for name, param in trained(engine) for key in keys}
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                param, key = left.pop(name, (None, None))
                tensor = shard.get_tensor(name)
                if param is None or tensor.shape != param.shape:
                    here = "nothing of that name" if param is None else list(param.shape)
                    problem = f"{file}: {name} {list(tensor.shape)}: the model trains {here}"
                    raise UserError(f"{problem}; resume with that run's flags")
                if key == "weight":
                    safe_set_full_fp32_param(param, tensor.to(param.device))
                else:
                    safe_set_full_optimizer_state(param, tensor.to(param.device), key)
    if left:
        raise UserError(f"{folder}: has no {next(iter(left))}, which this model trains; resume with that run's flags")
    engine.optimizer.update_lp_params()

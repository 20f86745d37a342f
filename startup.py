"""What a training run does before its first step.

run = launch(cfg, records, held_out)             processes, device, the folder claimed, the checkpoint to go on from
model, processor = build_model(run)              base, adapter, what is trained; clips and chats
engine = start(run, model, processor, loader)    DeepSpeed ZeRO-2, state put back, the run's facts printed
"""

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import checkpoint
import console
import ranks
from adapter_files import load_adapter, trained_on
from checkpoint import ADAPTER, BEST, METRICS, ROLLOUTS, RUN, STATE, read_json, sha256, write_json
from config import as_dict, changed, ignored_options
from data import Processor, load_tokenizer
from engine import build_engine, init_distributed, precision, use_deterministic_kernels
from lora import inject, lora_layers, set_trainable, sizes
from memory import choose, is_grpo, largest_sample, summary
from model import UserError
from model.fast.graphs import GraphCache
from model.loading import ModelConfig, empty_model, formats_of, load_model, not_finite, place_all, resolve_folder
from records import clip_name, data_files
from report import data_question, dataset_summary, two_answers
from rollouts import Sampler
from script import command
from trainer import Run, warmup_steps, watch_signals

LOCK, START, DATA = "run.lock", "start_adapter", "data.json"
OURS = (RUN, BEST, METRICS, DATA, ROLLOUTS, "report.html", *ADAPTER)  # files that --overwrite removes
OF_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "num_lora_modules", "lora_namespan_exclude")


def launch(cfg, records, held_out, notes=()):
    """The Run: processes joined, device and precision chosen, the folder claimed; with --resume its checkpoint. Nothing
    in the folder is changed yet (start() does)."""
    console.trackers(cfg)  # their packages are there
    console.show_logged_warnings()
    device, folder = init_distributed(), Path(cfg.output_dir)
    rank, world = ranks.rank(), ranks.world_size()
    lock = claim(folder, cfg) if rank == 0 else None
    dtype, reason = precision(cfg, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
        use_deterministic_kernels(cfg.deterministic)
    torch.manual_seed(cfg.seed)  # the same on every rank: adapters start alike
    run = Run(cfg, Path(sys.argv[0]).stem, folder, device, dtype, reason, rank, world, lock, notes=list(notes))
    run.data_hash = data_hash(cfg.data_path)
    if cfg.resume:
        find_source(run)
    data = len(records), len(held_out), run.data_hash, data_hash(cfg.eval_data_path)
    every = ranks.gather((as_dict(cfg), data, dtype, run.step))
    problem = f"rank {rank} has other flags, data, precision or checkpoint than rank 0; start all with the same"
    ranks.raise_together(problem if every[rank] != every[0] else None)
    return run


def claim(folder, cfg):
    """Make the folder and lock it for this process; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another process trains there" if isinstance(error, BlockingIOError) else error.strerror
        raise UserError(f"--output_dir: {folder}: {why}; choose another folder") from None
    if problem := taken(folder, cfg):
        raise UserError(f"--output_dir: {problem}")
    return lock


def taken(folder, cfg):
    """What would be lost if this run began in the folder, and the ways out; None where that is nothing, or wanted. Of a
    run that was refused at its first step there is nothing to lose."""
    is_ours = (folder / RUN).exists()
    has_files = any((folder / name).exists() for name in (METRICS, ROLLOUTS, *ADAPTER))
    if cfg.overwrite or (cfg.resume and is_ours) or not (has_files or checkpoint.checkpoints(folder)):
        return None
    theirs = f"checkpoints or an adapter, and no {RUN}: another program's, or left where --overwrite was killed;"
    what = "a run; --resume goes on with it," if is_ours else theirs
    return f"{folder} already holds {what} --overwrite starts anew, another --output_dir keeps it"


def data_hash(text):
    """Of the files of a --data_path, with their weights."""
    files = [(sha256(path), weight) for path, weight in data_files(text or "") if os.path.isfile(path)]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def find_source(run):
    """--resume: the newest whole checkpoint, and where it left the run."""
    run.source, *_ = ranks.gather(checkpoint.newest_checkpoint(run.folder) if run.rank == 0 else None)
    where = f"going on from {run.source}" if run.source else f"no checkpoint in {run.folder} yet, starting anew"
    run.notes.append(f"--resume: {where}")
    if run.source:
        run.state = read_json(run.source / STATE)
        older = run.state.get("loop", {}).get("rounds", run.state["step"])  # where checkpoints had it until 2026-11-30
        run.state.setdefault("rounds", older)
        for name in ("step", "rounds", "updates", "best", "start_accuracy"):
            setattr(run, name, run.state[name])


# -- Model


def build_model(run):
    """(the base on its device with the adapter of --model_ckpt or a fresh one, the Processor of its clips and chats).
    When resuming, too, it is the model as the run began: GRPO takes its reference from it. start() puts the state back.
    """
    cfg = run.cfg
    model = load_model(cfg.model_id, run.device, run.dtype, cfg.local_files_only, **formats_of(cfg))
    run.adapter = first_adapter(cfg)
    run.notes += adapt(model, cfg, run.adapter)
    if names := not_finite(model):
        where = run.adapter if names[0].endswith("adapters") else cfg.model_id
        problem = f"{where}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}"
        raise UserError(f"{problem}; take another checkpoint, or download it again")
    model.ops.offload = cfg.offload_activations and run.device.type == "cuda"
    names = ("offload_activations", "offload_embedding") if run.device.type != "cuda" else ()
    run.notes += [f"--{name} has no effect: there is no GPU to free" for name in names if getattr(cfg, name)]
    if cfg.cuda_graphs and run.device.type == "cuda" and not cfg.offload_activations:
        model.ops.graphs = GraphCache(run.say, wait=True)
    processor = Processor(load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only)), model.config, cfg)
    run.sampler = Sampler(model, processor, cfg)
    return model, processor


def first_adapter(cfg):
    """The folder of the adapter that the run begins with, or began with; None for a fresh one."""
    begun = Path(cfg.output_dir) / START
    return begun if cfg.resume and begun.exists() else cfg.model_ckpt and Path(cfg.model_ckpt)


def adapt(model, cfg, folder):
    """Give the model the adapter of this folder, or a fresh one, and freeze what is not trained. Returns notes."""
    if folder is None:
        inject(model, cfg)
        set_trainable(model, cfg)
        return []
    given, kinds = load_adapter(model, folder), trained_on(read_json(Path(folder) / ADAPTER[0]))
    set_trainable(model, cfg)
    own = [name for name in OF_ADAPTER if name in cfg.given and getattr(cfg, name) != getattr(given, name)]
    notes = [f"--{name} has no effect: the adapter has its own" for name in own]
    for name, kind in kinds.items():
        if kind != getattr(model, name):
            notes.append(f"the adapter was trained with --{name} {kind} and goes on with {getattr(model, name)}")
    return [f"adapter of {folder}: rank {given.lora_rank}, alpha {given.lora_alpha:g}", *notes]


def start(run, model, processor, loader, records, held_out):
    """The engine with the state of the checkpoint put back; the folder made ready; the start-up lines printed."""
    cfg = run.cfg
    run.loader, run.total, run.question = loader, total_steps(cfg, loader), data_question(records)
    engine, adamw, notes = build_engine(model, cfg, run.device, run.dtype)
    run.notes += [*notes, *ignored_options(cfg)]
    if run.source:
        restore(run, engine, adamw)
    run.plan = choose(run, model, partial(largest_sample, run, records, processor))
    if loader.pack_tokens is not None:  # else micro-batches as given, or GRPO's prompts
        loader.pack_tokens = run.plan.pack_tokens
    judged = f"judged every {cfg.eval_steps} steps and at the end" if cfg.eval_steps else "judged at the end"
    if run.step < run.total or run.state.get("stopped"):  # not of a run that is done
        run.notes.append(f"{len(held_out):,} held-out samples, {judged}" if held_out else "no held-out samples")
    if run.rank == 0:
        lines = list(describe(cfg, model, processor, records, loader, run.world, run.notes))  # may refuse the data
        prepare_folder(run)
        write_json(run.folder / DATA, dataset_summary({"train": records, "held out": held_out}))
        where = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
        dtype = f"{str(run.dtype).removeprefix('torch.')} ({run.dtype_reason})"
        run.say(f"{run.script}: {cfg.model_id} -> {run.folder}: {run.step} of {run.total} steps are done")
        run.say(f"  precision  {dtype}; fp32 master weights; {where}, {torch.get_num_threads()} threads")
        for line in lines:
            run.say(line)
    run.next_command = ask_about(run, processor, (held_out or records)[0])
    watch_signals(run)
    return engine


def restore(run, engine, adamw):
    """Optimizer, loss scale, counts of what was left out, and what memory taught, as in the checkpoint."""
    cfg, loader, state, memory = run.cfg, run.loader, run.state, run.state["memory"]
    if loader.global_batch != state["global_batch"]:
        sizes = f"{cfg.per_device_train_batch_size} x {cfg.gradient_accumulation_steps} x {run.world} ranks"
        problem = f"that run had {state['global_batch']} samples or prompts a step, {sizes} make {loader.global_batch}"
        raise UserError(f"--resume: {problem}; change --gradient_accumulation_steps")
    checkpoint.load_state(engine, adamw, run.source, run.updates)
    if state["loss_scale"]:
        engine.optimizer.loss_scaler.cur_scale = state["loss_scale"]
    if state["config"]["data_path"] == cfg.data_path:
        loader.restore(state["skipped"])
        if state["data_hash"] != run.data_hash:
            run.notes.append(f"--resume: {cfg.data_path} was changed since that run: other samples, another order")
    run.sampler.oom_retries = memory["oom_retries"] if run.rank == 0 else 0
    run.sampler.max_tokens = memory["max_sampled_tokens"]


def prepare_folder(run):
    """Remove what an overwritten run left, or what a killed run wrote after its last checkpoint; write run.json."""
    folder, start = run.folder, run.folder / START
    for rest in folder.glob(".checkpoint-*"):
        shutil.rmtree(rest)
    if run.source is None and run.adapter:  # a copy: the adapter's run may delete it, or be the one that is overwritten
        copy = lambda to: [shutil.copyfile(run.adapter / name, to / name) for name in ADAPTER]
        checkpoint.write_whole(start, copy)
    elif run.source is None:
        checkpoint.remove(start)
    for other in checkpoint.checkpoints(folder):
        if checkpoint.step_of(other) > run.step:  # of an older run, or broken: the newest whole one is older
            checkpoint.remove(other)
    if run.source is None:
        for name in OURS:
            (folder / name).unlink(missing_ok=True)
        for name in console.TRACKERS:
            shutil.rmtree(folder / name, ignore_errors=True)
    stopped = run.state.get("stopped")  # this step's evaluation is made once more
    checkpoint.cut_after(folder / METRICS, run.step, lambda row: stopped and "evaluation" in row)
    checkpoint.cut_after(folder / ROLLOUTS, run.step, lambda row: stopped and "advantage" not in row)
    (folder / BEST).unlink(missing_ok=True)  # it may be of a checkpoint that was broken since
    if run.best:
        write_json(folder / BEST, run.best)
    checkpoint.link_adapter(folder)  # not to one that was removed
    known = read_json(folder / RUN) if (folder / RUN).exists() else {}
    facts = {"id": known.get("id", secrets.token_hex(4)), "script": run.script, "command": sys.argv}
    write_json(folder / RUN, facts | {"config": as_dict(run.cfg), "ranks": run.world} | environment())


def environment():
    """Versions and machine, for run.json."""
    packages = "torch transformers safetensors deepspeed numpy av".split()
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
    return {"versions": versions, "machine": machine}


# -- What is printed


def dry_run(cfg, make_loader, records):
    """--dry_run: print data, steps, memory and options without effect; nothing is run or written. The weights are not
    read: config.json and the tokenizer are enough. make_loader: the trainer's own."""
    if os.environ.get("RANK", "0") != "0":
        return
    world, folder = int(os.environ.get("WORLD_SIZE", "1")), resolve_folder(cfg.model_id, cfg.local_files_only, False)
    model = empty_model(ModelConfig.from_folder(folder), **formats_of(cfg))
    place_all(model)
    notes = [*adapt(model, cfg, first_adapter(cfg)), *ignored_options(cfg)]
    if problem := taken(Path(cfg.output_dir), cfg):
        notes.append(problem)
    processor = Processor(load_tokenizer(folder), model.config, cfg)
    loader = make_loader(cfg, records, processor, 0, world)
    print(f"plan of {Path(sys.argv[0]).name}: {cfg.model_id} -> {cfg.output_dir} (nothing is run or written)")
    print(*describe(cfg, model, processor, records, loader, world, notes), sep="\n")


def total_steps(cfg, loader):
    """Optimizer steps of the whole run."""
    return cfg.max_steps if cfg.max_steps > 0 else loader.num_steps(cfg.num_train_epochs)


def describe(cfg, model, processor, records, loader, world, notes):
    """The start-up lines: what differs from the defaults, what is trained, a step's arithmetic, schedule, data, memory,
    and the notes."""
    diff = " ".join(f"{name}={value}" for name, value in changed(cfg).items())
    numbers, whole = sizes(model), sum(parameter.numel() for parameter in empty_model(model.config).parameters())
    trained = sum(numbers[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield f"  changed    {diff or 'nothing, all defaults'}"
    yield f"  trained    {trained:,} of {whole:,} parameters ({100 * trained / whole:.3g} %)"
    batch, micro, total = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps, total_steps(cfg, loader)
    what = "completions" if is_grpo(cfg) else "samples"
    yield f"  a step     {batch} x {micro} micro-batches x {world} ranks = {batch * micro * world:,} {what}"
    end = cfg.learning_rate * (1 if cfg.lr_scheduler_type == "constant" else cfg.min_lr_ratio)
    rate = f"learning rate {cfg.learning_rate:g} at its peak, {end:g} at the end"
    yield f"  schedule   {cfg.lr_scheduler_type}: {total:,} steps, {warmup_steps(cfg, total):,} of them warm-up; {rate}"
    yield from summary(model, cfg, records, processor, loader, total, world)
    if loader.epoch_size != len(records):
        yield f"  note       an epoch draws {loader.epoch_size:,} samples, by the weights of --data_path"
    yield from (f"  note       {text}" for text in [*notes, *two_answers(records)])


def ask_about(run, processor, record):
    """The command that asks the run's model about a record's clip, as it can be typed; "" where it names no file."""
    try:
        name = clip_name(record)
        folder = run.cfg.image_folder or getattr(record, "folder", None)
        clip = os.path.relpath(processor.locate_file(name, folder)) if name else ""
    except UserError:  # of a broken record: named when it is read
        clip = ""
    newest = Path("output").resolve() in run.folder.resolve().parents  # infer.py takes the run made last there
    words = [] if newest else ["--model_ckpt", str(run.folder)]
    if not lora_layers(run.sampler.model):  # checkpoints are whole models
        last = run.folder / f"checkpoint-{max(run.step, run.total)}"
        words = ["--model_id", str(last), "--model_ckpt", "none"]
    return command("infer.py", clip, *words) if clip else ""

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

import autofit
import checkpoint
import console
import ranks
from adapter_files import CONFIG, TENSORS, load_adapter, trained_on
from checkpoint import BEST, METRICS, ROLLOUTS, RUN, STATE, find_adapter, read_json, sha256, write_json
from config import as_dict, changed, ignored_options
from data import Processor, load_tokenizer
from engine import build_engine, init_distributed, precision, use_deterministic_kernels
from lora import FLAT, inject, part_of, set_trainable, sizes
from memory import summary
from model import UserError
from model.fast.graphs import GraphCache
from model.loading import ModelConfig, load_model, not_finite, read_object, resolve_folder
from model.quantized import quantise_base, quantized_weights
from model.qwen import Qwen2_5_VL
from records import clip_name, data_files
from reporting.dataset import data_question, dataset_summary
from rollouts import Sampler
from script import command
from trackers import TRACKERS, check_installed
from trainer import Run, samples_per_step, total_steps, warmup_steps, watch_signals

LOCK, START, DATA = "run.lock", "start_adapter", "data.json"
# what --overwrite removes, beside checkpoints, START and TRACKERS
OURS = (RUN, BEST, METRICS, DATA, ROLLOUTS, "report.html", CONFIG, TENSORS)
# Flags that may differ between ranks: folders and files, whose contents are compared, and what a machine does its way
OWN_FLAGS = {"data_path", "eval_data_path", "image_folder", "model_id", "model_ckpt", "output_dir", "deepspeed",
             "rewards", "cache_mb", "dataloader_num_workers", "local_files_only", "report_to"}  # fmt: skip


def launch(cfg, records, held_out, notes=()):
    """The Run: processes joined, device and precision chosen, the folder claimed; with --resume its checkpoint.

    records, held_out: what the run is trained and judged on, the same on every rank. Nothing in the folder is changed
    yet (start() does). UserError if the folder holds something and neither --overwrite nor --resume is given, or if
    another process trains in it.
    """
    check_installed(cfg)
    console.show_logged_warnings()
    device = init_distributed()
    lock = message = None
    if ranks.rank() == 0:
        try:
            lock = claim(Path(cfg.output_dir), cfg)
        except UserError as error:
            message = str(error)
    ranks.raise_together(message)
    dtype, reason = precision(cfg, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
        use_deterministic_kernels(cfg.deterministic)
    torch.manual_seed(cfg.seed)  # the same on every rank: adapters start alike
    script, folder = Path(sys.argv[0]).stem, Path(cfg.output_dir)
    run = Run(cfg, script, folder, device, dtype, reason, ranks.rank(), ranks.world_size(), lock, notes=list(notes))
    if cfg.resume:
        find_source(run)
    assert_same_across_ranks(run, records, held_out)
    return run


def claim(folder, cfg):
    """Make the folder and lock it for this process; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = f"--output_dir: another process trains in {folder}"
        raise UserError(f"{problem}; wait for it or choose another") from None
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be written ({error.strerror}); choose another folder") from None
    others = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith("."))
    ended_at_the_start = set(others) <= {RUN, DATA, START}
    if others and not (ended_at_the_start or cfg.resume or cfg.overwrite):
        if RUN not in others:
            things = f"other things ({', '.join(others[:3])})"
            raise UserError(f"--output_dir: {folder} already holds {things}; give a new folder, or --overwrite")
        ways = "--resume goes on with it, --overwrite starts anew, another --output_dir keeps it"
        raise UserError(f"--output_dir: {folder} already holds a run; {ways}")
    return lock


def assert_same_across_ranks(run, records, held_out):
    """UserError on one rank, exit code 2 on all, if flags, data or the checkpoint differ between ranks."""
    cfg = run.cfg
    file = lambda path: sha256(path) if path and os.path.isfile(path) else None
    facts = {
        "flags": sorted((name, str(value)) for name, value in as_dict(cfg).items() if name not in OWN_FLAGS),
        "training data": (len(records), data_hash(cfg.data_path)),
        "held-out data": (len(held_out), data_hash(cfg.eval_data_path or "")),
        "--deepspeed": file(cfg.deepspeed),
        "rewards": [file(name.rpartition(":")[0]) for name in getattr(cfg, "rewards", "").split(",")],
        "precision": str(run.dtype),
        "checkpoint to go on from": run.source and (run.source.name, file(run.source / checkpoint.MANIFEST)),
    }
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    run.data_hash = hashes["training data"]
    first, *_ = ranks.gather(hashes)
    differing = [name for name in hashes if hashes[name] != first[name]]
    problem = f"rank {run.rank} differs from rank 0: {', '.join(differing)}; start all with the same flags and files"
    ranks.raise_together(problem if differing else None)


def data_hash(text):
    """Of the files of a --data_path and their weights; of one file alone, its own."""
    files = [(sha256(path), weight) for path, weight in data_files(text) if os.path.isfile(path)]
    return files[0][0] if len(files) == 1 and files[0][1] == 1 else files or None


def find_source(run):
    """--resume: the newest whole checkpoint, and what must follow it."""
    newest, *_ = ranks.gather(checkpoint.newest_checkpoint(run.folder) if run.rank == 0 else None)
    if newest is None:
        run.notes.append(f"--resume: no checkpoint in {run.folder} yet, starting at the beginning")
        return
    run.source = run.folder / newest.name
    run.state = read_json(run.source / STATE)
    run.step, run.updates, run.best = (run.state[name] for name in ("step", "updates", "best"))
    run.start_accuracy = run.state.get("start_accuracy")
    cfg, wanted, samples = run.cfg, run.state["samples_per_step"], samples_per_step(run)
    if samples != wanted:
        product = f"{cfg.per_device_train_batch_size} x {cfg.gradient_accumulation_steps} x {run.world} ranks"
        text = f"expected {wanted} samples a step as in that run, got {samples} ({product})"
        raise UserError(f"--resume: {text}; change --per_device_train_batch_size or --gradient_accumulation_steps")
    base = run.state["config"].get("base_dtype", "bf16")
    if base != cfg.base_dtype:
        raise UserError(f"--resume: the run trains on a {base} base, got --base_dtype {cfg.base_dtype}; give {base}")
    run.notes.append(f"--resume: going on from {run.source}")
    ignore = {"resume", "overwrite", "output_dir", "gradient_accumulation_steps", "per_device_train_batch_size",
              "model_ckpt"}  # fmt: skip
    now, before = as_dict(cfg), run.state["config"]
    for name in now.keys() & before.keys() - ignore:
        if now[name] != before[name]:
            run.notes.append(f"--resume: {name} was {before[name]!r} in that run and is {now[name]!r} now")


# -- Model


def build_model(run):
    """(the base on its device with the adapter of --model_ckpt or a fresh one, exactly what the flags name trained; the
    Processor of its clips and chats).

    When resuming, too, it is the model as the run began: GRPO takes its reference from it. start() puts the state back.
    """
    cfg = run.cfg
    model = load_model(cfg.model_id, run.device, run.dtype, cfg.local_files_only, cfg.base_dtype)
    begun = cfg.resume and (run.folder / RUN).exists()  # also a run without a checkpoint yet has its copy
    if begun and (run.folder / START).exists():
        run.adapter = run.folder / START
    elif not begun and cfg.model_ckpt is not None and cfg.lora_enable:
        run.adapter = find_adapter(cfg.model_ckpt)
    if run.adapter:
        given = load_adapter(model, run.adapter)
        if (base := trained_on(read_object(run.adapter / CONFIG))) != cfg.base_dtype:
            run.notes.append(f"the adapter was trained with --base_dtype {base} and goes on with {cfg.base_dtype}")
        run.notes.append(f"adapter of {run.adapter}: rank {given.lora_rank}, alpha {given.lora_alpha:g}")
        own = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "num_lora_modules", "lora_namespan_exclude")
        for name in own:
            if name in cfg.given and getattr(cfg, name) != getattr(given, name):
                run.notes.append(f"--{name} has no effect: the adapter has its own")
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    if names := not_finite(model):
        where = run.adapter if names[0].endswith("adapters") else cfg.model_id
        problem = f"{where}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}"
        raise UserError(f"{problem}; take another checkpoint, or download it again")
    model.ops.offload = cfg.offload_activations and run.device.type == "cuda"
    if cfg.offload_activations and not model.ops.offload:
        run.notes.append("--offload_activations has no effect: there is no GPU to free")
    if cfg.cuda_graphs and run.device.type == "cuda" and not cfg.offload_activations:
        model.ops.graphs = GraphCache(run.say)
    processor = Processor(load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only)), model.config, cfg)
    run.sampler = Sampler(model, processor, cfg)
    return model, processor


def start(run, model, processor, loader, records, held_out):
    """The engine with the state of the checkpoint put back; the folder made ready; the start-up lines printed."""
    cfg = run.cfg
    run.loader, run.total, run.question = loader, total_steps(cfg, loader), data_question(records)
    if loader.epoch_size != len(records):
        run.notes.append(f"an epoch draws {loader.epoch_size:,} samples, by the weights of --data_path")
    engine, adamw, notes = build_engine(model, cfg, run.device, run.dtype)
    run.notes += [*notes, *ignored_options(cfg)]
    if run.source:
        restore(run, engine, adamw)
    run.plan = autofit.choose(run, model, partial(autofit.sample_of, run, records, processor))
    if loader.pack_tokens is not None:  # else micro-batches as given, or GRPO's prompts
        loader.pack_tokens = run.plan.pack_tokens
    if run.rank == 0:
        try:
            prepare_folder(run)
        except OSError as error:
            problem = f"{run.folder}: cannot be written ({error.strerror}: {error.filename})"
            raise UserError(f"{problem}; free some space, or choose another --output_dir") from None
        lines = [*summary(model, cfg, records, processor, loader, run.total, run.world, 2)]
        for line in describe(run, model, lines, len(held_out)):
            run.say(line)
        write_json(run.folder / DATA, dataset_summary({"train": records, "held out": held_out}))
    run.next_command = ask_about(run, processor, (held_out or records)[0])
    watch_signals(run)
    return engine


def ask_about(run, processor, record):
    """The command that asks the run's model about a record's clip, as it can be typed; "" where it names no file."""
    try:
        name = clip_name(record)
        folder = run.cfg.image_folder or getattr(record, "folder", None)
        clip = os.path.relpath(processor.locate_file(name, folder, name)) if name else ""
    except UserError:  # of a broken record: named when it is read
        clip = ""
    words = ["infer.py", clip]
    if not run.cfg.lora_enable:  # checkpoints are whole models
        words += ["--model_id", str(run.folder / f"checkpoint-{run.total}"), "--model_ckpt", "none"]
    else:
        if Path("output").resolve() not in run.folder.resolve().parents:
            words += ["--model_ckpt", str(run.folder)]
        if run.cfg.model_id != type(run.cfg)().model_id:
            words += ["--model_id", run.cfg.model_id]
    return command(*words) if clip else ""


def restore(run, engine, adamw):
    """Optimizer, loss scale, counts of what was left out, and what memory taught, as in the checkpoint."""
    checkpoint.load_state(engine, adamw, run.source, run.updates)
    if run.state["loss_scale"]:
        engine.optimizer.loss_scaler.cur_scale = run.state["loss_scale"]
    if run.state["config"].get("data_path") == run.cfg.data_path:
        run.loader.restore(run.state["skipped"])
        if run.state.get("data_hash", run.data_hash) != run.data_hash:
            run.notes.append(f"--resume: {run.cfg.data_path} was changed since that run: other samples, another order")
    memory = run.state["memory"]
    run.sampler.oom_retries = memory["oom_retries"] if run.rank == 0 else 0
    run.sampler.max_tokens = memory["max_sampled_tokens"]


def prepare_folder(run):
    """Remove what an overwritten run left, or what a killed run wrote after its last checkpoint; write run.json."""
    for rest in run.folder.glob(".checkpoint-*"):
        shutil.rmtree(rest)
    if run.source is None:
        copy_start_adapter(run)  # before anything is removed: it may lie in the run that is overwritten
    for folder in checkpoint.checkpoints(run.folder):
        if checkpoint.step_of(folder) > run.step:  # of an older run, or broken: the newest whole one is older
            checkpoint.remove(folder)
    if run.source is None:
        for name in OURS:
            (run.folder / name).unlink(missing_ok=True)
        for name in TRACKERS:
            shutil.rmtree(run.folder / name, ignore_errors=True)
    due = run.loop_state("evaluation_due")  # its lines may be there: it was made, and the run killed before it saved
    checkpoint.cut_after(run.folder / METRICS, run.step, lambda row: due and "evaluation" in row)
    checkpoint.cut_after(run.folder / ROLLOUTS, run.step, lambda row: due and "advantage" not in row)
    if run.best:
        write_json(run.folder / BEST, run.best)
    else:
        (run.folder / BEST).unlink(missing_ok=True)  # of a checkpoint that was broken since
    checkpoint.link_adapter(run.folder)  # not to one that was removed
    known = read_json(run.folder / RUN) if (run.folder / RUN).exists() else {}
    facts = {"id": known.get("id", secrets.token_hex(4)), "script": run.script, "command": sys.argv}
    facts |= {"config": as_dict(run.cfg), "versions": versions(), "machine": machine() | {"ranks": run.world}}
    write_json(run.folder / RUN, facts)


def copy_start_adapter(run):
    """Copy the adapter that the run begins with: its own run may delete it before this one is resumed."""
    temporary = run.folder / f".{START}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if run.adapter:
        temporary.mkdir()
        for name in (CONFIG, TENSORS):
            shutil.copyfile(run.adapter / name, temporary / name)
    shutil.rmtree(run.folder / START, ignore_errors=True)
    if run.adapter:
        temporary.rename(run.folder / START)


# -- What is printed


def dry_run(cfg, make_loader, records):
    """--dry_run: print data, steps, memory and options without effect; nothing is run or written. The weights are not
    read: config.json and the tokenizer are enough. make_loader: the trainer's own."""
    if int(os.environ.get("RANK", "0")):
        return
    folder = resolve_folder(cfg.model_id, cfg.local_files_only, weights=False)
    with torch.device("meta"):
        model = Qwen2_5_VL(ModelConfig.from_folder(folder))
    quantise_base(model, cfg.base_dtype)
    if cfg.model_ckpt is not None and cfg.lora_enable:
        load_adapter(model, find_adapter(cfg.model_ckpt))
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processor = Processor(load_tokenizer(folder), model.config, cfg)
    loader = make_loader(cfg, records, processor, 0, world)
    print(f"plan of {Path(sys.argv[0]).name}: {cfg.model_id} -> {cfg.output_dir} (nothing is run or written)")
    for line in summary(model, cfg, records, processor, loader, total_steps(cfg, loader), world, 2):
        print(line)
    print(f"  trained    {trained_shares(model)}")
    for line in ignored_options(cfg):
        print(f"  note       {line}")
    if (Path(cfg.output_dir) / RUN).exists() and not (cfg.resume or cfg.overwrite):
        print(f"  note       {cfg.output_dir} holds a run: it will take --resume, --overwrite or another folder")


def describe(run, model, lines, held_out):
    """The start-up lines: what differs from the defaults, precision and why, what is trained, a step's arithmetic.
    held_out: how many samples."""
    cfg = run.cfg
    diff = " ".join(f"{name}={value}" for name, value in changed(cfg).items())
    where = f"CPU, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        where = torch.cuda.get_device_name(run.device)
    batch, micro, world = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps, run.world
    vision, merger = (cfg.learning_rate if rate is None else rate for rate in (cfg.vision_lr, cfg.merger_lr))
    warmup = warmup_steps(cfg, run.total)
    yield f"{run.script}: {cfg.model_id} -> {run.folder}"
    yield f"  changed    {diff or 'nothing, all defaults'}"
    yield f"  precision  {str(run.dtype).removeprefix('torch.')} ({run.dtype_reason}); fp32 master weights; {where}"
    yield f"  trained    {trained_shares(model)}"
    packed = f", in micro-batches of at most {run.plan.pack_tokens:,} tokens" if run.plan.pack_tokens else ""
    yield f"  a step     {batch} samples x {micro} x {world} ranks = {batch * micro * world} samples{packed}"
    rates = f"llm {cfg.learning_rate:g}, vision {vision:g}, merger {merger:g}"
    if run.step < run.total:
        yield f"  schedule   from step {run.step + 1}; {cfg.lr_scheduler_type}, {warmup} of warm-up; peak rates {rates}"
    else:
        yield f"  schedule   nothing is left of {run.total} steps; a larger --max_steps goes on"
    yield from lines
    when = f"evaluated every {cfg.eval_steps} steps and at the end" if cfg.eval_steps else "evaluated at the end"
    yield f"  held out   {f'{held_out:,} samples, {when}' if held_out else 'no samples: nothing is evaluated'}"
    for text in run.notes:
        yield f"  note       {text}"


def trained_shares(model):
    """ "76,800 of 297,680 parameters (25.8 %): vision 23.5 %, merger 20.7 %, llm 29.8 %"."""
    counts, numbers = {"vision": [0, 0], "merger": [0, 0], "llm": [0, 0]}, sizes(model)
    for name, parameter in model.named_parameters():
        counts[part_of(name)][0] += numbers[name] * parameter.requires_grad
        counts[part_of(name)][1] += numbers[name] * (not name.endswith(FLAT))  # of the model's own
    counts["llm"][1] += sum(weight.numel() for weight in quantized_weights(model).values())
    some, whole = (sum(column) for column in zip(*counts.values(), strict=True))
    shares = ", ".join(f"{part} {100 * mine / own:.3g} %" for part, (mine, own) in counts.items())
    return f"{some:,} of {whole:,} parameters ({100 * some / whole:.3g} %): {shares}"


def versions():
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a clone
    packages = ("torch", "transformers", "safetensors", "deepspeed", "numpy", "av")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed, "commit": commit}


def machine():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    return {**cpu, "threads": torch.get_num_threads(), "gpus": gpus, "system": platform.platform()}

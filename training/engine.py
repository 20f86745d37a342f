"""DeepSpeed ZeRO-2, driven directly: an update for any number of ranks and micro-batches, and its state by name.

What DeepSpeed 0.19.8 does, and what follows for us:
- backward divides by its own gradient_accumulation_steps (we say scale_wrt_gas=False) and gradients are averaged over
  the ranks (we multiply the loss by their number), so that sum / global count is the gradient of the one big batch;
- every backward reduces at once, so all ranks must make the same number of them, over the same parameters in the same
  order: a rank with fewer micro-batches adds blank ones of weight 0. Reducing at the end of a step alone ("stage": 1 in
  a --deepspeed file) sends as many times less and keeps all fp32 sums on every rank, 4 bytes a trained parameter, not
  4 / ranks. An adapter's traffic hides behind computing, so that would save memory's price for nothing;
- with overlap_comm a bucket of gradients is reduced on a stream of its own while the next one fills, the last one at
  the end of the pass with nothing beside it;
- a gradient whose norm is not finite skips the update, in every precision; the norm is then inf. In bf16 and fp16
  DeepSpeed looks at every tensor before that too; we take this out, since the norm is computed anyway;
- its own checkpoints are pickles, one a rank; ours are whole tensors under their names, for any number of ranks.
"""

import json
import logging
import os
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

# Before deepspeed is imported: it drives the CPU only where there is nothing else; left to guess, it warns.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from safetensors import safe_open
from safetensors.torch import save_file

from dataset.batch import pack
from lora import param_groups
from model import UserError
from training.meeting import join

BUCKET = 100_000_000  # elements reduced or gathered at a time at most; 200 to 400 MB of buffer
# As many with several ranks. A bucket travels while the next one fills, so only the last one is waited for: a tenth of
# the 165 M parameters of an r=64 adapter of the 3B, not two fifths; 100 MB of fp32 still fill a link.
SHARED_BUCKET = 25_000_000
SHARD_BYTES = 2 << 30  # of optimizer state held in memory at a time while saving
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, in torch


# Processes


# One process and its own port (0: whichever is free). Without these variables deepspeed looks for MPI.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_processes():
    """Join the other processes, or be the only one: `python x.py` and `deepspeed x.py` share one path.

    Returns this process's device.
    """
    if "RANK" not in os.environ:
        os.environ.update(ALONE)
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    else:  # the processes of a machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))
    # The shared-memory collectives are for inference; at first use they would be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # what it warns of, the loops tell themselves
    # One rank may write a large checkpoint while the others wait.
    backend, long = "nccl" if cuda else "gloo", timedelta(minutes=30)
    if met := join():
        device_id = torch.device("cuda", local) if cuda else None  # as deepspeed would
        world = {"store": met.store, "rank": met.rank, "world_size": len(met.hosts)}
        torch.distributed.init_process_group(backend, timeout=long, device_id=device_id, **world)
    deepspeed.init_distributed(backend, verbose=False, timeout=long)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def leave_processes():
    if met := join():
        met.leave(good_bye=True)
    deepspeed.comm.destroy_process_group()
    if os.environ["MASTER_PORT"] == ALONE["MASTER_PORT"]:
        for name in ALONE:
            del os.environ[name]


def launchers():
    """Ids of the processes that this rank shall not outlive: its launcher and, above that, the deepspeed command, which
    dies of a signal without a word to what it started. () for a process that was started by itself."""
    parent = os.getppid()
    if os.environ["MASTER_PORT"] == ALONE["MASTER_PORT"]:
        return ()
    try:
        command, stat = (Path(f"/proc/{parent}/{name}").read_bytes() for name in ("cmdline", "stat"))
    except OSError:
        return (parent,)
    above = int(stat.rpartition(b")")[2].split()[1])  # proc(5): the second field behind the name is the parent's id
    return (parent, above) if b"deepspeed.launcher" in command else (parent,)


def _reduce(values, device, op):
    if torch.distributed.get_world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, op)
    return total.tolist()


def global_sum(values, device):
    """[numbers of this rank] -> [their sums over all ranks], in one reduction."""
    return _reduce(values, device, torch.distributed.ReduceOp.SUM)


def global_max(values, device):
    return _reduce(values, device, torch.distributed.ReduceOp.MAX)


def gather(value):
    """[value of each rank], on every rank; anything that can be pickled."""
    if torch.distributed.get_world_size() == 1:
        return [value]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


# The engine


def precision(cfg, device):
    """(dtype of weights and activations, why)."""
    if cfg.fp16 and cfg.bf16:
        raise UserError("--fp16: found True beside --bf16 True, expected one of them")
    if cfg.fp16:
        if device.type == "cpu":
            raise UserError("--fp16: found True on a machine without a GPU, expected False; fp32 is the default there")
        return torch.float16, "--fp16, with loss scaling"
    if cfg.bf16 is not None:
        return (torch.bfloat16 if cfg.bf16 else torch.float32), f"--bf16 {cfg.bf16}"
    if device.type == "cpu":
        return torch.float32, "CPU: bf16 is slower there"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU computes in bf16"
    return torch.float32, "this GPU has no bf16; --fp16 True halves the memory"


def bucket_size(count, world):
    """Gradients reduced at a time, of `count`; a buffer of this size is made anew in every backward, two where traffic
    overlaps."""
    return min(count + 1024, BUCKET if world == 1 else SHARED_BUCKET)


def deepspeed_config(cfg, device, dtype, world, count):
    """Our ZeRO-2 settings with those of the --deepspeed file over them. count: parameters trained.

    Returns (config, notes to tell the user).
    """
    cuda = device.type == "cuda"
    gathered = min(count + 1024, BUCKET)
    zero = {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": cuda and world > 1,
        "reduce_scatter": cuda,  # gloo has none
        "reduce_bucket_size": bucket_size(count, world),
        "allgather_bucket_size": gathered + gathered % 2,
    }
    if cfg.offload_optimizer and cuda:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # ours to count: the boundary of a step is set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.max_grad_norm,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would halt the host before every forward pass
        "zero_allow_untested_optimizer": True,  # torch's own AdamW; its fused form runs on CPU memory too, so that
        "zero_force_ds_cpu_optimizer": False,  # offloading has no C++ to compile
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},  # micro-batches are summed in fp32
        "communication_data_type": "fp32",  # so are ranks
    }
    notes = ["--offload_optimizer has no effect: there is no GPU to free"] if cfg.offload_optimizer and not cuda else []
    if cfg.deepspeed:
        notes += merge(config, deepspeed_file(cfg.deepspeed), cfg.deepspeed)
    if config["zero_optimization"].get("stage") not in (1, 2):
        found = f"zero_optimization.stage is not 1 or 2 but {config['zero_optimization'].get('stage')}"
        raise UserError(f"{cfg.deepspeed}: {found}; what ZeRO-3 is for, --partition_weights True does here")
    return config, notes


def deepspeed_file(path):
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed: {path} cannot be read ({error.strerror}); without it you get ZeRO-2") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--deepspeed: {path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"--deepspeed: {path} holds no JSON object, expected DeepSpeed's settings")
    return found


# Keys of a DeepSpeed file that have a flag here, or no meaning in ZeRO-2.
ELSEWHERE = {
    "optimizer": "AdamW is set by --learning_rate, --adam_beta1 …",
    "scheduler": "the schedule is set by --lr_scheduler_type, --warmup_ratio",
    "train_batch_size": "see --per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "see --per_device_train_batch_size",
    "gradient_accumulation_steps": "see --gradient_accumulation_steps",
    "offload_param": "see --partition_weights, --offload_weights",
}


def merge(ours, theirs, source):
    """Put a DeepSpeed file's keys over ours, in place; "auto" means ours. Returns a note for each without effect."""
    notes = []
    for key, value in theirs.items():
        if value == "auto":
            continue
        if key in ELSEWHERE:
            notes.append(f"{source}: {key} has no effect: {ELSEWHERE[key]}")
        elif isinstance(value, dict):
            notes += merge(ours.setdefault(key, {}), value, source)
        else:
            ours[key] = value
    return notes


def build_engine(model, cfg, device, dtype):
    """model (its trained parameters require grad) -> (DeepSpeed engine over AdamW, notes to tell)."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    groups = param_groups(model, cfg)
    for group in groups:
        group["base_lr"] = group["lr"]  # the peak; lr follows the schedule
    config, notes = deepspeed_config(cfg, device, dtype, torch.distributed.get_world_size(), count)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon, fused=True)
    for p in model.parameters():  # DeepSpeed sends every tensor to the other ranks; a forward pass may widen some
        p.data = p.data.contiguous()
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    engine.optimizer.check_overflow = lambda partition_gradients: None  # step() asks the norm next
    engine.optimizer.check_grad_overflow = True  # whatever a --deepspeed file says: no NaN becomes a weight
    quiet(engine)
    if engine.optimizer.loss_scaler.dynamic:  # at its lowest scale: check_numbers ends the run, with its reason
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    engine.train()
    return engine, notes


def quiet(engine):
    """Let the host wait for the device once a step, and let engine.waiting, if it is set, see what the ranks wait for.

    DeepSpeed reads the gradient norm to decide on the update: that is the one wait, scaled_global_norm() below; what it
    makes of the norm is arithmetic on the host then. Where traffic overlaps it also halts the host at the end of every
    backward pass, so that no buffer is freed too early; ordering the two streams is enough for that. With the optimizer
    on the CPU it halts all the same: gradients are copied there.
    """
    zero, engine.waiting = engine.optimizer, None
    norm, reduce, finish = zero.scaled_global_norm, zero.average_tensor, zero.independent_gradient_partition_epilogue
    stop = lambda: engine.waiting.here() if engine.waiting else nullcontext()

    def average_tensor(tensor, *args):
        # A gradient larger than the bucket is reduced where it lies and freed while the other stream still writes to it
        # (0.19.8 sees to that with offloading only): its memory must wait for that stream.
        if tensor.is_cuda and zero.overlap_comm and tensor.numel() > zero.reduce_bucket_size:
            tensor.record_stream(zero.reduction_stream)
        with stop():
            return reduce(tensor, *args)

    def epilogue():
        zero.reduce_ipg_grads()
        with stop():
            torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        zero.overlap_comm = False  # nothing is left to overlap, and so nothing to halt for
        finish()
        zero.overlap_comm = True

    zero.scaled_global_norm = lambda: norm().cpu()
    zero.average_tensor = average_tensor
    if engine.device.type == "cuda" and zero.overlap_comm and zero.contiguous_gradients and not zero.cpu_offload:
        zero.independent_gradient_partition_epilogue = epilogue


def update(engine, micro_batches, loss_of, passes=None, send=None):
    """One optimizer step over this rank's micro-batches. Every rank must call it.

    loss_of(micro_batch): the micro-batch's share of the loss, already divided by the count over the whole global batch.
    passes: as many as every rank makes, this one with blank ones where it has fewer micro-batches; None: the ranks ask
    each other. send(): called when all passes are under way, before the host waits for the gradient norm.
    Returns (global gradient norm before clipping, whether the update was made: False if the gradient was not finite).
    """
    world = torch.distributed.get_world_size()
    micro_batches = list(micro_batches)
    if passes is None:
        passes = int(global_max([len(micro_batches)], engine.device)[0])
    assert len(micro_batches) <= passes, f"{len(micro_batches)} micro-batches in {passes} passes"
    doing = None
    try:
        for i in range(passes):
            doing = f"forward of pack {i + 1} of {passes}"
            if engine.waiting:
                engine.waiting.next_pass()
            engine.set_gradient_accumulation_boundary(i == passes - 1)
            if i < len(micro_batches):
                loss = loss_of(micro_batches[i])
            else:
                loss = 0.0 * engine(pack([]).to(engine.device)).sum()
            doing = f"backward of pack {i + 1} of {passes}"
            loss = loss * (1 + 0 * loss.detach())  # a loss that is not finite must not come with gradients that are
            engine.backward(loss * world, scale_wrt_gas=False)
        doing = "AdamW's step"
        if send:
            send()
        engine.step()
    except torch.OutOfMemoryError as error:
        error.add_note(doing)
        raise
    return float(engine.get_global_grad_norm()), engine.was_step_applied()


# The state, by parameter name. Each rank owns a run of the flat fp32 weights of each parameter group, and its moments;
# parameters know which piece of them is whose (_hp_mapping, deepspeed/utils/tensor_fragment.py).


def owned(zero, param, key):
    """This rank's piece of a parameter's state: (where in the flat parameter, view of it), or None if it has none.

    key: "weight" or one of MOMENTS.
    """
    place = param._hp_mapping
    if place is None:
        return None
    whole = zero.single_partition_of_fp32_groups[place.param_group_index]
    source = whole.data if key == "weight" else zero.optimizer.state[whole][key]
    mine, theirs = place.hp_fragment_address, place.lp_fragment_address
    return slice(theirs.start, theirs.start + theirs.numel), source.narrow(0, mine.start, mine.numel)


def trained(engine):
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def whole_state(engine):
    """Yields (key/name, whole fp32 tensor on the CPU): fp32 weights and moments. Every rank must run it to its end."""
    zero = engine.optimizer
    keys = ("weight", *MOMENTS) if updates_made(engine) else ("weight",)
    for name, param in trained(engine):
        for key in keys:
            full = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            piece = owned(zero, param, key)
            if piece is not None:
                full[piece[0]] = piece[1].to(param.device)
            torch.distributed.all_reduce(full)
            yield f"{key}/{name}", full.view(param.shape).cpu()


class NotFinite(ArithmeticError):
    """A weight or moment that is NaN or Inf: such a state is not worth keeping."""


def save_state(state, folder):
    """Write what whole_state yields into folder, as optimizer-00000.safetensors and so on."""
    shard, size, number = {}, 0, 0
    for name, tensor in state:
        if not tensor.isfinite().all():
            raise NotFinite(f"{name} holds NaN or Inf")
        shard[name], size = tensor, size + tensor.nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"optimizer-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"optimizer-{number:05d}.safetensors")


def updates_made(engine):
    """AdamW's own count of its updates: a skipped step is none."""
    state = engine.optimizer.optimizer.state.get(engine.optimizer.single_partition_of_fp32_groups[0], {})
    return int(state["step"]) if state else 0


def load_state(engine, folder, updates):
    """Put weights and moments back. updates: what updates_made() was. UserError if this model trains other tensors."""
    zero = engine.optimizer
    keys = ("weight", *MOMENTS) if updates else ("weight",)
    if updates:
        for flat in zero.single_partition_of_fp32_groups:
            step = torch.tensor(float(updates), device=flat.device)
            zero.optimizer.state[flat] = {"step": step} | {key: torch.zeros_like(flat.data) for key in MOMENTS}
    left = {f"{key}/{name}": (param, key) for name, param in trained(engine) for key in keys}
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                put_back(zero, left.pop(name, None), name, shard.get_tensor(name), file)
    if left:
        raise UserError(f"{folder}: has no {next(iter(left))}, which this model trains; resume with that run's flags")
    zero.update_lp_params()


def put_back(zero, place, name, tensor, file):
    if place is None or tensor.shape != place[0].shape:
        found = "nothing of that name" if place is None else list(place[0].shape)
        raise UserError(f"{file}: {name} {list(tensor.shape)}: the model trains {found}; resume with that run's flags")
    piece = owned(zero, *place)
    if piece is not None:
        piece[1].copy_(tensor.flatten()[piece[0]])

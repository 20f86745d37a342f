"""Processes, precision, and DeepSpeed ZeRO-2: `python x.py`, `deepspeed x.py` and torchrun share one path, on a CPU
(gloo) or GPUs (nccl).

What DeepSpeed does, and what follows for us:
- gradients are averaged over the ranks: trainer.update multiplies the loss by their number, and gets the sum;
- every backward pass reduces at once: all ranks make the same number of them, some over blank micro-batches;
- a gradient whose norm is not finite skips the update, in every precision; the norm is then inf;
- its own checkpoints are pickles, one a rank; ours are whole tensors under their names (checkpoint.py).
"""

import json
import logging
import os
import warnings
from datetime import timedelta

import torch

# Before deepspeed is imported: it drives the CPU only where there is nothing else; left to guess, it warns.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.compiler
from pydantic import ValidationError

import ranks
from checkpoint import read_json
from lora import param_groups
from model import UserError

# Its check of the optimizer imports Muon, whose functions it gives to torch.compile: 2.5 s for what never runs here
deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator

TIMEOUT = timedelta(minutes=10)  # a rank that is silent for so long ends the run
# Keys of a --deepspeed file: the first two are counted here, the last is of ZeRO-3
NOT_OBEYED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "offload_param")
# One process and any free port. Without these variables deepspeed looks for MPI.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def init_distributed():
    """Join the other processes, or be the only one. Returns this process's device."""
    if "RANK" not in os.environ:
        os.environ.update(ALONE)
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # the processes of a machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))
    # The shared-memory collectives are for inference; at first use they would be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # what it warns of, the loops print themselves
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=TIMEOUT)
    return device


def leave_processes():
    deepspeed.comm.destroy_process_group()


def use_deterministic_kernels(on):
    """Deterministic kernels on CUDA, or the fastest; an operation that has none raises a RuntimeError with its name."""
    if on:  # cuBLAS needs it before the first product: docs.nvidia.com/cuda/cublas, "Results reproducibility"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it has not written


def precision(cfg, device):
    """(dtype of weights and activations, why)."""
    if cfg.fp16 and (cfg.bf16 or device.type == "cpu"):
        raise UserError("--fp16: got True, expected False beside --bf16 True and on a machine without a GPU")
    if cfg.fp16:
        return torch.float16, "--fp16, with loss scaling"
    if cfg.bf16 is not None:
        return (torch.bfloat16 if cfg.bf16 else torch.float32), f"--bf16 {cfg.bf16}"
    if device.type == "cpu":
        return torch.float32, "CPU: bf16 is slower there"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU computes in bf16"
    return torch.float32, "this GPU has no bf16; --fp16 True halves the memory"


# -- DeepSpeed


def build_engine(model, cfg, device, dtype):
    """model (its trained parameters require grad) -> (DeepSpeed engine over AdamW, that AdamW, notes to print)."""
    groups = param_groups(model, cfg)
    for group in groups:
        group["base_lr"] = group["lr"]  # the peak; lr follows the schedule
    count = sum(p.numel() for group in groups for p in group["params"])
    config, notes = deepspeed_config(cfg, device, dtype, torch.distributed.get_world_size(), count)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon, fused=True)
    for p in model.parameters():  # DeepSpeed sends every tensor to the other ranks; a forward pass may widen some
        p.data = p.data.contiguous()
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--deepspeed: {cfg.deepspeed}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    optimizer = engine.optimizer
    optimizer.check_grad_overflow = True  # whatever a --deepspeed file says: no NaN becomes a weight
    if not optimizer.cpu_offload:
        # It looks at each gradient apart: 9 % of a short step on a GPU. The norm, checked next, shows the same.
        optimizer.check_overflow = lambda partition_gradients: None
    if optimizer.loss_scaler.dynamic:  # at its lowest scale: check_numbers ends the run, with its reason
        optimizer.loss_scaler.raise_error_at_min_scale = False
    engine.train()
    return engine, adamw, notes


def clear_gradients(engine):
    """After a backward pass that did not come to its end: no trace of this step's gradients is left. DeepSpeed throws
    everything away where a gradient is not finite, so it is given such a one. Alone only: ranks would have to agree."""
    scaler = engine.optimizer.loss_scaler
    before = dict(vars(scaler))  # the scale, and what it goes by
    if engine.optimizer.ready_for_gradients:  # it had begun to reduce them
        engine.optimizer.independent_gradient_partition_epilogue()
    engine.set_gradient_accumulation_boundary(True)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    engine.backward(float("nan") * sum(p.flatten()[0] for p in trained), scale_wrt_gas=False)
    engine.step()
    vars(scaler).update(before)
    assert not engine.was_step_applied(), "a gradient of NaN was applied"


def deepspeed_config(cfg, device, dtype, world, count):
    """(our ZeRO-2 settings with those of the --deepspeed file over them, notes to print). count: parameters trained."""
    cuda, notes, bucket = device.type == "cuda", [], min(count + 1024, ranks.bucket_size(world))
    config = {
        "train_micro_batch_size_per_gpu": 1,  # ours to count: the boundary of a step is set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.max_grad_norm,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would halt the host before every forward pass
        "zero_allow_untested_optimizer": True,  # torch's own AdamW; its fused form runs on CPU memory too, so that
        "zero_force_ds_cpu_optimizer": False,  # offloading has no C++ to compile
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": cuda,  # gloo has none
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},  # micro-batches are summed in fp32
        "communication_data_type": "fp32",  # so are ranks
    }
    if cfg.offload_optimizer and cuda:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    elif cfg.offload_optimizer:
        notes.append("--offload_optimizer has no effect: there is no GPU to free")
    if cfg.deepspeed:
        notes += override(config, read_json(cfg.deepspeed), cfg.deepspeed)
    if config["gradient_clipping"] != cfg.max_grad_norm:
        notes.append(f"--max_grad_norm has no effect: {cfg.deepspeed} says {config['gradient_clipping']}")
    for key, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config[key]["enabled"] != (dtype == kind):
            problem = f"{cfg.deepspeed}: {key}.enabled is {json.dumps(config[key]['enabled'])} in a {dtype} run"
            raise UserError(f"{problem}; write auto there, and give --{key}")
    if config["zero_optimization"]["stage"] not in (1, 2):
        raise UserError(f"{cfg.deepspeed}: zero_optimization.stage: expected 1 or 2, for ZeRO-1 or ZeRO-2")
    return config, notes


def override(ours, theirs, source, top=True):
    """Put a DeepSpeed file's keys over ours, in place; "auto" means ours. Returns notes of those without effect; in a
    section DeepSpeed itself refuses what it does not know."""
    if not isinstance(theirs, dict):
        raise UserError(f"{source} is {json.dumps(theirs)}, expected an object")
    notes = []
    for key, value in theirs.items():
        if value == "auto":
            continue
        if key in NOT_OBEYED or (top and key not in ours):
            notes.append(f"{source}: {key} has no effect; what can be set here is an option: --help all")
        elif isinstance(ours.get(key, value), dict):
            notes += override(ours.setdefault(key, {}), value, f"{source}: {key}", top=False)
        elif value is None or isinstance(value, dict):
            raise UserError(f"{source}: {key} is {json.dumps(value)}, expected a value; leave it out, or write auto")
        else:
            ours[key] = value
    return notes

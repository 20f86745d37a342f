"""How an update uses the memory of the GPU, so that no option has to be guessed: --pack_tokens auto and
--gradient_checkpointing auto.

The more blocks keep their activations, the less is computed twice; the fewer packs a step is cut into, the less is
waited for the host. memory.py's formula proposes what fits, a trial of the largest pack measures it. The choice is
printed, kept in checkpoints and obeyed by --resume. It changes no result beyond the order of sums.
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch

import memory
import ranks
from data import pack, pack_groups
from engine import clear_gradients
from memory import GIB, LOGITS, Counts, out_of_memory
from model import UserError
from model.packed import IGNORE
from model.qwen import target_logprobs

CPU_TOKENS = 8192  # of a pack on a CPU, where nothing is recomputed
FRAGMENTS = 0.04  # of the memory: what the allocator cannot use
TRIALS = 4
# Seconds of the host for a block that keeps its activations, and for one that is recomputed, forward and backward
# (3B, measured beside an H200); and the share of a GPU's product rate that a step reaches
HOST, RECOMPUTED_HOST, EFFICIENCY = 0.004, 0.0076, 0.47
PASS = 0.03  # seconds that a further pass costs besides
LOWER = "--offload_activations, --video_max_pixels or --nframes"


@dataclass
class Plan:
    pack_tokens: int | None  # of a micro-batch at most, which is one sample or group at least; None: as given
    kept: int  # blocks of tower and language model, the last so many, that keep their activations

    def apply(self, model):
        model.kept_blocks, model.gradient_checkpointing = self.kept, self.kept < num_blocks(model)


def num_blocks(model):
    return len(model.visual.blocks) + len(model.model.layers)


def choose(run, model, sample):
    """The Plan of a run, applied to the model: what is auto is chosen, or taken from the checkpoint that the run goes
    on from, as is what a shortage of memory made of a given one. Every rank must call it, with the optimizer's state in
    place. sample() -> ([(tokens, patches)] of samples, the largest Example), called where there is something to choose.
    """
    cfg, blocks, saved, before = run.cfg, num_blocks(model), run.state.get("plan"), run.state.get("config")
    auto_packs, auto_kept = cfg.pack_tokens == "auto", cfg.gradient_checkpointing == "auto"
    plan = Plan(CPU_TOKENS if auto_packs else cfg.pack_tokens, 0 if cfg.gradient_checkpointing is True else blocks)
    if saved:
        if auto_packs or before["pack_tokens"] == cfg.pack_tokens:
            plan.pack_tokens = saved["pack_tokens"] or plan.pack_tokens
        if auto_kept or before["gradient_checkpointing"] == cfg.gradient_checkpointing:
            plan.kept = saved["kept"]
    elif run.device.type == "cuda" and (auto_packs or auto_kept):
        plan = fit(run, model, *sample(), plan)
    plan.apply(model)
    return plan


def sample_of(run, records, processor):
    """([(tokens, patches)] of samples spread over the dataset, the largest that can be read), the same on all ranks."""
    answer = not hasattr(run.cfg, "num_generations")
    sizes, *_ = ranks.gather(memory.sample_sizes(records, processor, answer)[0] if run.rank == 0 else None)
    for number in sorted(sizes, key=sizes.get, reverse=True):
        try:
            return list(sizes.values()), processor.encode(records[number], answer=answer)
        except UserError:
            continue  # the loader will skip, count and name it
    raise UserError("no sample can be read; python data.py FILE says why")


def fit(run, model, lengths, example, given):
    """The fastest Plan that fits on every rank's GPU. given: the Plan of the options that are not auto."""
    cfg, device, counts = run.cfg, run.device, Counts.of(model)
    rate = float(ranks.gather_numbers(product_rate(device, run.dtype)).min())  # or ranks would choose apart
    options = candidates(model.config, counts, cfg, lengths, given, rate)
    room = float(ranks.gather_numbers(room_bytes(run, model, counts)).min())
    smallest = min(options, key=lambda option: option["bytes"])
    fitting = lambda scale: next((option for option in options if scale * option["bytes"] <= room), smallest)
    scale, tried = 1.0, None
    for _ in range(TRIALS):
        if fitting(scale) is tried:
            break
        tried = fitting(scale)
        used = float(ranks.gather_numbers(trial_bytes(run, model, example, tried)).max())
        scale = 1.2 * scale if used == math.inf else used / tried["bytes"]
    best = fitting(scale)
    plan, blocks = best["plan"], num_blocks(model)
    tokens = f"packs of at most {plan.pack_tokens:,} tokens" if plan.pack_tokens else "micro-batches as given"
    kept = f"about {best['passes']} a step; {plan.kept} of {blocks} blocks keep their activations"
    gib = f"{scale * best['bytes'] / GIB:.1f} GiB by a trial of the largest, {room / GIB:.1f} are free"
    run.notes.append(f"memory: {tokens}, {kept}: {gib}")
    return plan


def room_bytes(run, model, counts):
    """What the passes of this rank may take: of what the process may allocate, without fragments, what is not there
    already, nor will be: AdamW's moments come with the first step, gradients in each."""
    cfg, device, number = run.cfg, run.device, model.head_weight.element_size()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = min(torch.cuda.get_per_process_memory_fraction(device) * total, free + reserved)
    moments = 0 if cfg.offload_optimizer or run.source else 8 * counts.trained / run.world
    later = moments + memory.gradient_bytes(counts, cfg, run.world, number) + LOGITS
    return (1 - FRAGMENTS) * limit - reserved - later


def pass_flops(config, counts, tokens, patches, kept):
    """Of the frozen products, forward and backward, with what is computed again; two for a multiplication and its
    addition."""
    C, v, L = config.hidden_size, config.vision, config.num_hidden_layers
    heads, keys = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    layer = 2 * tokens * C * (2 * heads + keys + 3 * config.intermediate_size)
    block = 2 * patches * v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    layers = min(kept, L)
    blocks = min(kept - layers, v.depth)
    tower = (3 * v.depth - blocks) * block if counts.tower else v.depth * block
    return (3 * L - layers) * layer + tower


def candidates(config, counts, cfg, lengths, given, rate):
    """Every Plan with the bytes that its passes take by the formula, the fastest first. rate: products, FLOP/s."""
    units = memory.unit_sizes(cfg, lengths)  # (tokens, patches) of samples, or of groups
    mean, longest = statistics.fmean(tokens for tokens, _ in units), max(tokens for tokens, _ in units)
    density = max(patches / tokens for tokens, patches in units)
    step, blocks = memory.units_per_step(cfg), config.vision.depth + config.num_hidden_layers
    packs = {max(longest, math.ceil(math.ceil(step / n) * mean)): n for n in range(step, 0, -1)}  # tokens: passes
    if cfg.pack_tokens != "auto":
        whole = math.ceil(step * mean)
        tokens = given.pack_tokens or max(longest, whole // cfg.gradient_accumulation_steps)
        packs = {min(tokens, max(longest, whole)): math.ceil(whole / tokens)}
    options = []
    for tokens, passes in packs.items():
        for kept in range(blocks + 1) if cfg.gradient_checkpointing == "auto" else [given.kept]:
            size = memory.activation_bytes(config, counts, cfg, tokens, int(density * tokens), kept)
            flops = pass_flops(config, counts, tokens, int(density * tokens), kept)
            host = HOST * kept + RECOMPUTED_HOST * (blocks - kept)
            seconds = passes * (PASS + max(host, flops / (EFFICIENCY * rate)))
            plan = Plan(tokens if cfg.pack_tokens == "auto" else given.pack_tokens, kept)
            options.append({"plan": plan, "tokens": tokens, "passes": passes, "bytes": size, "seconds": seconds})
    return sorted(options, key=lambda option: option["seconds"])


# -- The trial


def product_rate(device, dtype):
    """FLOP/s of a product of 4096 x 4096 matrices."""
    a = torch.ones(4096, 4096, device=device, dtype=dtype)
    for _ in range(4):  # the first is no measure
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
    return 2 * 4096**3 / (time.perf_counter() - began)


def trial_bytes(run, model, example, option):
    """What a forward and a backward pass over the largest pack take, made of one sample or group again and again;
    infinity where memory runs out."""
    cfg, device = run.cfg, run.device
    group = getattr(cfg, "num_generations", 0)
    length = len(example) + group * getattr(cfg, "max_completion_length", 0)
    count = max(1, option["tokens"] // length)
    if group:
        packed = pack_groups([example] * count, [[[0] * cfg.max_completion_length] * group] * count)
    else:
        packed = pack([example] * count)
    option["plan"].apply(model)
    rows, trained = (packed.targets != IGNORE).nonzero()[:, 0], [p for p in model.parameters() if p.requires_grad]
    graphs, model.ops.graphs, before = model.ops.graphs, None, torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        packed = packed.to(device)
        hidden = model(packed, rows=rows)
        logprobs, *_ = target_logprobs(hidden, model.head_weight, packed.targets[rows.to(device)])
        torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
        used = (torch.cuda.max_memory_allocated(device) - before) * option["tokens"] / (count * length)
    except torch.OutOfMemoryError:
        used = math.inf
    packed = hidden = logprobs = None
    model.ops.graphs = graphs
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return used


# -- When memory runs out all the same


def shrink(run, engine, packs, step):
    """Memory ran out in a forward or backward pass of this step: its gradients are cleared and run.plan gets smaller,
    so that the step can be repeated. UserError where that is no use: a single sample is too much, or other ranks are in
    the middle of adding up gradients."""
    plan, largest = run.plan, max(packs, key=lambda packed: len(packed.input_ids))
    segments = largest.segments
    is_single = len(segments.q_lengths) <= (1 if segments.kv_index is None else 2)  # a prompt and one completion
    if run.world > 1 or (is_single and not plan.kept):
        raise out_of_memory(run.device, f"training step {step}", packs, LOWER)
    if is_single:
        plan.kept = 0
    else:
        plan.pack_tokens = len(largest.input_ids) // 2
    plan.apply(engine.module)
    clear_gradients(engine)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = "everything is recomputed" if is_single else f"packs of at most {plan.pack_tokens:,} tokens"
    run.warn(f"step {step}: out of GPU memory; it is repeated, from now on {smaller}: the same update")

"""GPU memory: a formula, and what --pack_tokens auto and --gradient_checkpointing auto choose by it.

The formula proposes, a trial of the largest pack decides. The choice is printed, kept in checkpoints and obeyed by
--resume. It changes no result but the order of sums.
"""

import math
import statistics
from dataclasses import dataclass

import torch

import ranks
from data import TooLong, check_share, pack, pack_groups
from lora import FLAT, sizes
from model import UserError
from model.packed import IGNORE
from model.quantized import quantized_weights
from model.qwen import LONG, PART, PIECE, target_logprobs
from records import sample_name

GIB = 2**30
CONTEXT = int(1.3 * GIB)  # of CUDA and its kernels, outside torch's allocator: measured on an H100, torch 2.11
LOGITS = int(0.25 * GIB)  # of one chunk of rows in float32, and the workspaces of cuBLAS
FRAGMENTS = 0.06  # of the memory: what the allocator cannot use
LOOKED_AT = 1000  # samples looked at for an estimate
CPU_TOKENS = 8192  # of a pack on a CPU, where nothing is recomputed
HOST = 3e6  # / hidden size: tokens that would take an H200 as long as a pass costs besides


@dataclass
class Plan:
    pack_tokens: int | None  # of a micro-batch at most, which is one sample or group at least; None: as given
    kept: int  # blocks of tower and language model, the last so many, that keep their activations

    def apply(self, model):
        model.kept_blocks, model.gradient_checkpointing = self.kept, self.kept < num_blocks(model)


def num_blocks(model):
    return len(model.visual.blocks) + len(model.model.layers)


def is_grpo(cfg):
    """Whether these are GRPO's options: a unit is a prompt with its completions."""
    return hasattr(cfg, "num_generations")


def units_per_step(cfg):
    """Of one rank: samples, or in GRPO groups, which no pack cuts."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // getattr(cfg, "num_generations", 1)


def unit_tokens(cfg, tokens):
    """Of a sample, or in GRPO of a prompt with all its completions."""
    return tokens + (cfg.num_generations * cfg.max_completion_length if is_grpo(cfg) else 0)


# -- The formula


def count(model):
    """How many numbers there are in the weights without adapters and what is in few bits, in adapters, and trained."""
    numbers = sizes(model)
    adapters = sum(number for name, number in numbers.items() if name.endswith(FLAT))
    trained = sum(numbers[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(numbers.values()) - adapters, adapters, trained


def activation_bytes(model, cfg, tokens, patches, kept):
    """What the passes of a micro-batch take at most. kept: as in Plan; the other blocks keep their input, with
    --offload_activations in host memory."""
    c, v, rank = model.config, model.config.vision, cfg.lora_rank if cfg.lora_enable else 0
    C, L, inner = c.hidden_size, c.num_hidden_layers, c.intermediate_size
    depth = v.depth if any(p.requires_grad for p in model.visual.blocks[-1].parameters()) else 0
    layers, blocks, inputs = min(kept, L), min(max(0, kept - L), depth), not cfg.offload_activations

    # language model: layers that keep everything, the others' inputs, and the layer that is computed again. Of a layer
    # (model/qwen.py) autograd keeps 4 C, x and the sum behind attention, each before and after its norm; attention's q
    # and result, k and v; the MLP's gate, up and their product; x A^T of 7 linears. In a pass back gradients are there
    # too: of x and the MLP's three, or 1.5 times a layer of about 8 C, which is no count but fits measured peaks
    attention = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    mlp = 3 * inner * min(tokens, PIECE)  # of a long sequence it is computed in pieces, and always again
    layer = tokens * (4 * C + attention + 7 * rank) + (mlp if tokens <= PIECE else 0)
    numbers = layers * layer + inputs * (L - layers) * tokens * C
    again = 1.5 * (8 * C * tokens + mlp) if layers < L else C * tokens + mlp

    # vision tower, of a patch; a long video goes through it a part at a time. A block has 5 linears, and keeps 10
    # widths: 4 as above, q and k turned, attention's result, and qkv's whole output, of which v is a view. 9 is fitted:
    # so much one more kept block adds to measured peaks, beside its input; 1.5 and 8 as above
    block = 9 * v.hidden_size + 3 * v.intermediate_size + 5 * rank
    block_again = 1.5 * (8 * v.hidden_size + 3 * v.intermediate_size)
    if depth and kept == 0 and patches > LONG:
        return 2 * int(patches // 4 * C + max(numbers + again, PART * (depth * v.hidden_size + block_again)))
    numbers += patches * (blocks * block + inputs * (depth - blocks) * v.hidden_size)
    if blocks < depth:
        again = max(again, patches * block_again)
    return 2 * int(numbers + again)


def estimate(model, cfg, lengths, world=1, kept=None):
    """{"update", in GRPO "sampling" too: bytes at the peak}. lengths: [(tokens, patches)] of samples. kept: as in Plan,
    if not by the options. Where one is auto, the least: one sample or group a pack, everything recomputed."""
    c, (base, adapters, trained), (longest, patches) = model.config, count(model), max(lengths)
    low_bit = sum(weight.codes.nbytes + weight.scales.nbytes for weight in quantized_weights(model).values())
    unit = tokens = unit_tokens(cfg, longest)
    if cfg.pack_tokens != "auto":
        several = unit * max(1, units_per_step(cfg) // cfg.gradient_accumulation_steps)
        tokens = max(unit, min(several, cfg.pack_tokens or several))
    if kept is None:
        kept = 0 if cfg.gradient_checkpointing else num_blocks(model)

    # all the time: bf16 weights, those that are trained once more in fp32 with two moments, the reference
    own = 0 if cfg.offload_optimizer else trained / world
    static = 2 * (base + adapters) + low_bit + 12 * own + CONTEXT + LOGITS
    if getattr(cfg, "beta", 0) and cfg.reference == "start":
        static += 2 * adapters
    # update: gradients summed in fp32, the bucket that is reduced, the gradient of the head, activations
    update = 4 * own + 2 * min(trained, ranks.bucket_size(world))
    update += 8 * c.vocab_size * c.hidden_size if model.head_weight.requires_grad else 0
    update += activation_bytes(model, cfg, tokens, patches * tokens // unit, kept)
    if not is_grpo(cfg):
        return {"update": static + update}
    # sampling: keys and values of all prompts and completions, and a copy of the decoder with the adapters merged in;
    # low-bit weights keep them apart
    prompts, keys = max(1, units_per_step(cfg)), 2 * c.num_key_value_heads * c.head_dim
    layer = 2 * c.num_attention_heads * c.head_dim + keys + 3 * c.intermediate_size
    cache = c.num_hidden_layers * keys * prompts * (longest + cfg.num_generations * cfg.max_completion_length)
    prefill = prompts * longest * (2 * c.hidden_size + layer)
    copy = adapters if model.base_dtype != "bf16" else c.num_hidden_layers * c.hidden_size * layer
    return {"update": static + update, "sampling": static + 2 * (copy + cache + prefill)}


# -- The lines that a run begins with, and that --dry_run prints


def sample_sizes(records, processor, answer):
    """{number: (tokens, patches)} of up to LOOKED_AT samples spread over the dataset, without what cannot be read.
    UserError where that alone is too much for a run: an old one is still there, that --overwrite would remove."""
    sizes, broken, most = {}, 0, min(LOOKED_AT, len(records))
    for number in (k * len(records) // most for k in range(most)):
        try:
            ids, _, plans = processor.layout(records[number], answer)
            sizes[number] = len(ids), sum(math.prod(plan.grid_thw) for plan in plans)
        except UserError as error:
            why, broken = f"{sample_name(records, number)}: {error}", broken + (not isinstance(error, TooLong))
    if not sizes:
        raise UserError(f"all samples are left out; the last: {why}")
    if broken:  # else there is no `why`
        check_share(broken, records, processor.args, why)
    return sizes


def summary(model, cfg, records, processor, loader, steps, world):
    """Data, steps, memory."""
    answer = not is_grpo(cfg)
    sizes = sample_sizes(records, processor, answer)
    lengths = [tokens for tokens, _ in sizes.values()]
    span = f"{min(lengths):,} to {max(lengths):,} {'tokens' if answer else 'prompt tokens'}"
    looked = f"{len(sizes):,} of {min(LOOKED_AT, len(records)):,} checked are readable"
    yield f"  data       {len(records):,} samples ({looked}): {span}, median {statistics.median(lengths):,.0f}"
    yield f"  steps      {steps:,}; {loader.steps_per_epoch:,} are an epoch"
    peaks = estimate(model, cfg, list(sizes.values()), world)
    each, most = ", ".join(f"{what} {size / GIB:.1f}" for what, size in peaks.items()), max(peaks.values())
    fills = "; auto fills what is free" if "auto" in (cfg.pack_tokens, cfg.gradient_checkpointing) else ""
    yield f"  memory     on a GPU in bf16 at least {most / GIB:.1f} GiB ({each}){fills}"
    whole = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else math.inf
    if most > 0.92 * whole:
        # 8 bits cost a 3B less than 4 do, larger models bear 4 (docs/gpus.md)
        ways, frozen = ["--offload_activations True", "a lower --video_max_pixels"], cfg.lora_enable and cfg.freeze_llm
        if frozen and cfg.head_dtype == "bf16" and not model.config.tie_word_embeddings:
            ways.insert(0, "--head_dtype int8, --offload_embedding True")
        if frozen and cfg.base_dtype == "bf16":
            ways.insert(0, f"--base_dtype {'nf4' if count(model)[0] > 6e9 else 'int8'}")
        yield f"             this GPU has {whole / GIB:.1f} GiB: try {', '.join(ways)}"


# -- The choice


def choose(run, model, sample):
    """The Plan of a run, applied to the model: on a GPU what is auto is chosen; a resumed run has its checkpoint's.
    Every rank must call it, with the optimizer's state in place. sample() -> the largest Example."""
    cfg = run.cfg
    given = {name: getattr(cfg, name) for name in ("pack_tokens", "gradient_checkpointing")}
    plan = Plan(cfg.pack_tokens, 0 if cfg.gradient_checkpointing is True else num_blocks(model))
    if run.state and given.items() <= run.state["config"].items():
        plan = Plan(**run.state["plan"])
    elif "auto" in given.values() and run.device.type == "cuda":
        plan = fit(run, model, sample(), plan)
    elif cfg.pack_tokens == "auto":
        plan.pack_tokens = CPU_TOKENS
    plan.apply(model)
    return plan


def largest_sample(run, records, processor):
    """The largest Example that can be read, of those looked at, the same on all ranks."""
    answer = not is_grpo(run.cfg)
    sizes, *_ = ranks.gather(sample_sizes(records, processor, answer) if run.rank == 0 else None)
    for number in sorted(sizes, key=sizes.get, reverse=True):
        try:
            return processor.encode(records[number], answer=answer)
        except UserError:
            continue
    raise UserError("no sample can be read; python data.py FILE says why")


def fit(run, model, example, given):
    """The fastest Plan that fits on every rank's GPU, by the formula as a trial corrects it."""
    cfg, total, step, options = run.cfg, num_blocks(model), units_per_step(run.cfg), []
    unit, patches = unit_tokens(cfg, len(example)), 0 if example.patches is None else len(example.patches)
    sizes = {math.ceil(step / passes): passes for passes in range(step, 0, -1)}  # of packs, in units
    if cfg.pack_tokens != "auto":
        sizes = {max(1, cfg.pack_tokens // unit if cfg.pack_tokens else step // cfg.gradient_accumulation_steps): 1}
    for units, passes in sizes.items():
        for kept in range(total + 1) if cfg.gradient_checkpointing == "auto" else [given.kept]:
            work = units * unit + HOST / model.config.hidden_size
            cost = passes * work * (3 - kept / total)  # 3: forward, back, again
            options.append((cost, activation_bytes(model, cfg, units * unit, units * patches, kept), units, kept))
    options.sort()
    room = float(ranks.gather_numbers(room_bytes(run, model)).min())
    smallest = min(options, key=lambda option: option[1])
    fitting = lambda scale: next((option for option in options if scale * option[1] <= room), smallest)
    _, size, units, kept = fitting(1.0)
    Plan(None, kept).apply(model)
    used = float(ranks.gather_numbers(trial_bytes(run, model, [example] * units)).max())
    scale = used / size if used < math.inf else 1.2
    _, size, units, kept = fitting(scale)
    what = f"packs of {units * unit:,} tokens; {kept} of {total} blocks keep their activations"
    run.notes.append(f"memory: {what}: {scale * size / GIB:.1f} GiB by a trial, {room / GIB:.1f} are free")
    return Plan(units * unit if cfg.pack_tokens == "auto" else cfg.pack_tokens, kept)


def room_bytes(run, model):
    """What the passes may take: of what this process may allocate, without fragments, what is not there already, nor
    will be: AdamW's moments come with the first step, gradients in each, a bucket of them once more in fp32."""
    torch.cuda.empty_cache()
    (free, total), reserved = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    limit = min(torch.cuda.get_per_process_memory_fraction() * total, free + reserved)
    *_, trained = count(model)
    state = 0 if run.cfg.offload_optimizer else (4 if run.source else 12) * trained / run.world
    return (1 - FRAGMENTS) * limit - reserved - state - 6 * min(trained, ranks.bucket_size(run.world)) - LOGITS


def trial_bytes(run, model, examples):
    """What a forward and a backward pass over these samples or groups take; infinity where memory runs out."""
    if is_grpo(run.cfg):
        group = [[0] * run.cfg.max_completion_length] * run.cfg.num_generations
        packed = pack_groups(examples, [group] * len(examples))
    else:
        packed = pack(examples)
    rows, trained = (packed.targets != IGNORE).nonzero()[:, 0], [p for p in model.parameters() if p.requires_grad]
    graphs, model.ops.graphs, before = model.ops.graphs, None, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        packed = packed.to(run.device)
        hidden = model(packed, rows=rows)
        logprobs, *_ = target_logprobs(hidden, model.head_weight, packed.targets[rows.to(run.device)])
        torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
        used = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        used = math.inf
    packed = hidden = logprobs = None
    model.ops.graphs = graphs
    torch.cuda.empty_cache()
    return used


def out_of_memory(device, doing, lower):
    """The UserError for an OutOfMemoryError. lower: the options that help."""
    most = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0
    used = f" ({most:.1f} GiB were in use at most)" if most else ""
    return UserError(f"out of GPU memory{used} while {doing}; {lower} lowers it; checkpoints are intact")

"""GPU memory: a formula of a dozen terms for --dry_run, and what --pack_tokens auto and --gradient_checkpointing auto
choose by it: the formula proposes, a trial of the largest pack decides.

The choice is printed, kept in checkpoints and obeyed by --resume. It changes no result but the order of sums.
"""

import math
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import ranks
from data import pack, pack_groups
from lora import FLAT, part_of, sizes
from model import UserError
from model.packed import IGNORE
from model.quantized import quantized_weights
from model.qwen import LONG, PART, PIECE, target_logprobs

GIB = 2**30
# Outside torch's allocator: the CUDA context and loaded kernels (1.2 to 1.3 GiB measured on an H100, torch 2.11); in it
# the workspaces of cuBLAS and the float32 logits of one chunk of rows
CONTEXT, LOGITS = int(1.3 * GIB), int(0.25 * GIB)
FRAGMENTS = 0.04  # of the memory: what the allocator cannot use
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


def units_per_step(cfg):
    """Of one rank: samples, or in GRPO groups, which no pack cuts."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // getattr(cfg, "num_generations", 1)


def unit_tokens(cfg, tokens):
    """Of a sample, or in GRPO of a prompt with all its completions."""
    return tokens + (cfg.num_generations * cfg.max_completion_length if hasattr(cfg, "num_generations") else 0)


# -- The formula


def count(model):
    """How many numbers a model's weights have: base (without adapters and what is in few bits), adapters, trained;
    low_bit: bytes of the weights in few bits; tower, head: whether they are trained."""
    numbers = sizes(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = sum(number for name, number in numbers.items() if name.endswith(FLAT))
    return SimpleNamespace(
        base=sum(numbers.values()) - adapters,
        adapters=adapters,
        trained=sum(numbers[name] for name in trained),
        low_bit=sum(w.codes.nbytes + w.scales.nbytes for w in quantized_weights(model).values()),
        tower=any(part_of(name) == "vision" for name in trained),
        head=model.head_weight.requires_grad,
    )


def activation_bytes(config, counts, cfg, tokens, patches, kept):
    """What the passes of a micro-batch take at most. kept: as in Plan; the other blocks keep their input, with
    --offload_activations in host memory."""
    C, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    v, depth = config.vision, config.vision.depth if counts.tower else 0
    heads, keys = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    rank = cfg.lora_rank * bool(counts.adapters)
    layer = tokens * (4 * C + 2 * heads + keys + 3 * inner * (tokens <= PIECE) + 7 * rank)
    block = 9 * v.hidden_size + 3 * v.intermediate_size + 5 * rank  # of a patch
    layers, on_card = min(kept, L), not cfg.offload_activations
    blocks = min(kept - layers, depth)
    numbers = layers * layer + (L - layers) * tokens * C * on_card
    mlp = 3 * inner * min(tokens, PIECE)  # a long sequence's is computed in pieces, and always again
    redone = 1.5 * (8 * C * tokens + mlp) if layers < L else C * tokens + mlp
    block_redone = 1.5 * (8 * v.hidden_size + 3 * v.intermediate_size)  # of a patch
    if depth and kept == 0 and patches > LONG:  # a long video goes through the tower a part at a time
        numbers += patches // 4 * C
        return 2 * int(max(numbers + redone, patches // 4 * C + PART * (depth * v.hidden_size + block_redone)))
    numbers += patches * (blocks * block + (depth - blocks) * v.hidden_size * on_card)
    if blocks < depth:
        redone = max(redone, patches * block_redone)
    return 2 * int(numbers + redone)


def estimate(model, cfg, lengths, world=1, kept=None):
    """{"update", in GRPO "sampling" too: bytes at the peak}. lengths: [(tokens, patches)] of samples. kept: as in Plan,
    if not by the options. Where one is auto, the least: one sample or group a pack, everything recomputed."""
    c, counts, (longest, patches) = model.config, count(model), max(lengths)
    unit = tokens = unit_tokens(cfg, longest)
    if cfg.pack_tokens != "auto":
        several = unit * max(1, units_per_step(cfg) // cfg.gradient_accumulation_steps)
        tokens = max(unit, min(several, cfg.pack_tokens or several))
    if kept is None:
        kept = 0 if cfg.gradient_checkpointing else num_blocks(model)
    # all the time: bf16 weights, trained ones once more in fp32 with two moments, the reference
    static = 2 * (counts.base + counts.adapters) + counts.low_bit + CONTEXT + LOGITS
    static += 0 if cfg.offload_optimizer else 12 * counts.trained / world
    static += 2 * counts.adapters if getattr(cfg, "beta", 0) and cfg.reference == "start" else 0
    # gradients: summed in fp32, beside the bucket that is reduced in fp32
    update = 0 if cfg.offload_optimizer else 4 * counts.trained / world
    update += 6 * min(counts.trained, ranks.BUCKET)
    update += 8 * c.vocab_size * c.hidden_size if counts.head else 0
    update += activation_bytes(c, counts, cfg, tokens, patches * tokens // unit, kept)
    if not hasattr(cfg, "num_generations"):
        return {"update": static + update}
    prompts, keys = max(1, units_per_step(cfg)), 2 * c.num_key_value_heads * c.head_dim
    layer = 2 * c.num_attention_heads * c.head_dim + keys + 3 * c.intermediate_size
    cache = c.num_hidden_layers * keys * prompts * (longest + cfg.num_generations * cfg.max_completion_length)
    prefill = prompts * longest * (2 * c.hidden_size + layer)
    # beside low-bit weights adapters stay apart, else they are merged into a copy of the decoder's weights
    copy = counts.adapters if model.base_dtype != "bf16" else c.num_hidden_layers * c.hidden_size * layer
    return {"update": static + update, "sampling": static + 2 * (copy + cache + prefill)}


def sample_sizes(records, processor, answer):
    """{number: (tokens, patches)} of up to LOOKED_AT samples spread over the dataset; without those that cannot be
    read, which the loader will skip, count and name."""
    sizes, most = {}, min(LOOKED_AT, len(records))
    for number in (k * len(records) // most for k in range(most)):
        try:
            ids, _, plans = processor.layout(records[number], answer)
            sizes[number] = len(ids), sum(math.prod(plan.grid_thw) for plan in plans)
        except UserError as error:
            why = error
    if not sizes:
        raise UserError(f"all samples are left out; the last: {why}")
    return sizes


def summary(model, cfg, records, processor, loader, steps, world):
    """The lines that a run begins with, and that --dry_run prints: data, steps, memory."""
    is_grpo = hasattr(cfg, "num_generations")
    sizes = sample_sizes(records, processor, answer=not is_grpo)
    tokens = [length for length, _ in sizes.values()]
    span = f"{min(tokens):,} to {max(tokens):,} {'prompt tokens' if is_grpo else 'tokens'}"
    looked = f"{len(sizes):,} of {min(LOOKED_AT, len(records)):,} checked are readable"
    yield f"  data       {len(records):,} samples ({looked}): {span}, median {statistics.median(tokens):,.0f}"
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
            ways.insert(0, "--base_dtype nf4" if count(model).base > 6e9 else "--base_dtype int8")
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
    answer = not hasattr(run.cfg, "num_generations")
    sizes, *_ = ranks.gather(sample_sizes(records, processor, answer) if run.rank == 0 else None)
    for number in sorted(sizes, key=sizes.get, reverse=True):
        try:
            return processor.encode(records[number], answer=answer)
        except UserError:
            continue
    raise UserError("no sample can be read; python data.py FILE says why")


def fit(run, model, example, given):
    """The fastest Plan that fits on every rank's GPU, by the formula as a trial corrects it."""
    cfg, config, counts, total = run.cfg, model.config, count(model), num_blocks(model)
    unit, patches = unit_tokens(cfg, len(example)), 0 if example.patches is None else len(example.patches)
    step, options = units_per_step(cfg), []
    sizes = {math.ceil(step / passes): passes for passes in range(step, 0, -1)}  # of packs, in units
    if cfg.pack_tokens != "auto":
        sizes = {max(1, cfg.pack_tokens // unit if cfg.pack_tokens else step // cfg.gradient_accumulation_steps): 1}
    for units, passes in sizes.items():
        for kept in range(total + 1) if cfg.gradient_checkpointing == "auto" else [given.kept]:
            cost = passes * (units * unit + HOST / config.hidden_size) * (3 - kept / total)  # 3: forward, back, again
            size = activation_bytes(config, counts, cfg, units * unit, units * patches, kept)
            options.append((cost, size, units, kept))
    options.sort()
    room = float(ranks.gather_numbers(room_bytes(run, counts)).min())
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


def room_bytes(run, counts):
    """What the passes may take: of what this process may allocate, without fragments, what is not there already, nor
    will be: AdamW's moments come with the first step, gradients in each."""
    torch.cuda.empty_cache()
    (free, total), reserved = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    limit = min(torch.cuda.get_per_process_memory_fraction() * total, free + reserved)
    state = 0 if run.cfg.offload_optimizer else (4 if run.source else 12) * counts.trained / run.world
    return (1 - FRAGMENTS) * limit - reserved - state - 6 * min(counts.trained, ranks.BUCKET) - LOGITS


def trial_bytes(run, model, examples):
    """What a forward and a backward pass over these samples or groups take; infinity where memory runs out."""
    if hasattr(run.cfg, "num_generations"):
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


# -- When memory runs out all the same


def shrink(run, engine, packs, step, repeatable=True):
    """Memory ran out in a pass of this step: its gradients are cleared and run.plan gets smaller, so that the step can
    be repeated. UserError where that is no use: a single sample is too much, or other ranks are in the middle of adding
    up gradients."""
    from engine import clear_gradients  # here, for infer.py needs no DeepSpeed

    plan, largest = run.plan, max(len(packed.input_ids) for packed in packs)
    is_single = plan.pack_tokens is not None and largest > plan.pack_tokens  # a sample, or a prompt and a completion
    if run.world > 1 or not repeatable or (is_single and plan.kept == 0):
        lower = "--offload_activations, --video_max_pixels or --nframes"
        raise out_of_memory(run.device, f"training step {step}", packs, lower)
    plan.pack_tokens, plan.kept = largest // 2, 0
    plan.apply(engine.module)
    clear_gradients(engine)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = f"packs of at most {plan.pack_tokens:,} tokens, everything recomputed"
    run.warn(f"step {step}: out of GPU memory; it is repeated, from now on {smaller}: the same update")


def out_of_memory(device, doing, packs, lower):
    """The UserError for an OutOfMemoryError. lower: the options that help."""
    tokens, most = [len(packed.input_ids) for packed in packs], ""
    if device.type == "cuda":
        most = f" ({torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB were in use at most)"
    batch = f"{sum(tokens):,} tokens in {len(packs)} packs, the largest {max(tokens, default=0):,}"
    return UserError(f"out of GPU memory{most} while {doing}; {batch}; {lower} lowers it; checkpoints are intact")

"""GPU memory of a run: a formula of a dozen terms, what --dry_run prints of it, and what to do when memory runs out.

The estimate is within some percent of measured peaks (dev/LOG.md). It knows the largest micro-batch by its tokens and
patches, which parts are trained, and recomputation; the allocator's fragments it does not know. autofit.py chooses by
it how large packs are, and how many blocks keep their activations.
"""

import math
import statistics
from dataclasses import dataclass

import torch

from lora import FLAT, part_of, sizes
from model import UserError
from model.quantized import quantized_weights
from model.qwen import LONG, PART

GIB = 2**30
# Outside torch's allocator: the CUDA context and loaded kernels (1.2 to 1.3 GiB measured on an H100, torch 2.11); in it
# the workspaces of cuBLAS and the float32 logits of one chunk of rows
CONTEXT, LOGITS = int(1.3 * GIB), int(0.25 * GIB)
LOOKED_AT = 1000  # samples whose size is found for an estimate


@dataclass
class Counts:
    """Numbers (not bytes) of a model's parts; `trained` those that get a gradient."""

    base: int = 0  # without adapters
    vision: int = 0  # trained, of the tower and the merger
    tower: int = 0  # trained, of the tower alone
    language: int = 0  # trained
    adapters: int = 0  # all, trained
    head: bool = False  # whether the head or embedding is trained
    low_bit: int = 0  # bytes, not numbers, of weights in few bits, which are not in `base`

    @classmethod
    def of(cls, model):
        counts, numbers = cls(), sizes(model)
        for name, parameter in model.named_parameters():
            is_adapter, part = name.endswith(FLAT), part_of(name)
            counts.base += 0 if is_adapter else numbers[name]
            if parameter.requires_grad:
                counts.adapters += numbers[name] * is_adapter
                counts.language += numbers[name] * (part == "llm")
                counts.vision += numbers[name] * (part != "llm")
                counts.tower += numbers[name] * (part == "vision")
        counts.head = model.head_weight.requires_grad
        counts.low_bit = sum(w.codes.nbytes + w.scales.nbytes for w in quantized_weights(model).values())
        return counts

    @property
    def trained(self):
        return self.language + self.vision

    @property
    def frozen(self):
        return self.base - (self.trained - self.adapters)


def activation_bytes(config, counts, cfg, tokens, patches, kept=0, number=2):
    """What the passes of a micro-batch take at most. kept: blocks of tower and language model, the last so many, that
    keep their activations; the others keep their input, with --offload_activations in host memory."""
    C, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    v, depth = config.vision, config.vision.depth if counts.tower else 0
    heads, keys = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    rank, vision_rank = (cfg.lora_rank * bool(n) for n in (counts.adapters, counts.tower))
    layer = tokens * (4 * C + 2 * heads + keys + 3 * inner + 7 * rank)
    block = (9 * v.hidden_size + 3 * v.intermediate_size + 5 * vision_rank) * bool(depth)  # of a patch
    layers, on_card = min(kept, L), not cfg.offload_activations
    blocks = min(kept - layers, depth)
    kept_bytes = layers * layer + (L - layers) * tokens * C * on_card
    redone = 1.5 * tokens * (8 * C + 3 * inner) if layers < L else tokens * (C + 3 * inner)
    if depth and blocks < depth and patches > LONG:  # a long video goes through the tower a part at a time
        kept_bytes += patches // 4 * C
        return number * int(max(kept_bytes + redone, patches // 4 * C + PART * depth * block))
    kept_bytes += patches * (blocks * block + (depth - blocks) * v.hidden_size * on_card)
    if blocks < depth:
        redone = max(redone, 1.5 * patches * (3 * v.intermediate_size + 8 * v.hidden_size))
    return number * int(kept_bytes + redone)


def gradient_bytes(counts, cfg, world, number):
    """Summed in float32, beside the bucket that is reduced."""
    summed = 0 if cfg.offload_optimizer else 4 * counts.trained / world
    return summed + number * min(counts.trained, 25e6 if world > 1 else 100e6)


def update_bytes(config, counts, cfg, tokens, patches, kept=0, world=1, number=2):
    """Peak of a training step. tokens, patches: of the largest micro-batch; number: bytes of a weight."""
    head = (4 + 2 * number) * config.vocab_size * config.hidden_size if counts.head else 0
    passes = activation_bytes(config, counts, cfg, tokens, patches, kept, number)
    return static_bytes(counts, cfg, world, number) + gradient_bytes(counts, cfg, world, number) + head + passes


def static_bytes(counts, cfg, world, number):
    """What is there all the time: weights, trained ones once more in fp32 with two moments, the reference."""
    state = 0 if cfg.offload_optimizer else 12 * counts.trained / world
    reference = number * counts.adapters if getattr(cfg, "beta", 0) and cfg.reference == "start" else 0
    return number * (counts.frozen + counts.trained) + counts.low_bit + state + reference


def sampling_bytes(config, counts, cfg, prompts, longest, group, new_tokens, number=2):
    """Peak of sampling `prompts` prompts of at most `longest` tokens, `group` completions each."""
    c, L = config, config.num_hidden_layers
    heads, keys = c.num_attention_heads * c.head_dim, 2 * c.num_key_value_heads * c.head_dim
    cache = L * keys * prompts * (longest + group * new_tokens)
    prefill = prompts * longest * (2 * c.hidden_size + 2 * heads + keys + 3 * c.intermediate_size)
    # beside low-bit weights adapters stay apart, else they are merged into a copy of the decoder's weights
    layer = c.hidden_size * (2 * heads + keys) + 3 * c.hidden_size * c.intermediate_size
    copy = counts.adapters if counts.low_bit else L * layer
    return static_bytes(counts, cfg, 1, number) + number * (copy + cache + prefill)


def unit_sizes(cfg, lengths):
    """[(tokens, patches)] of what a pack never cuts: a sample, or in GRPO a prompt with all its completions."""
    group = getattr(cfg, "num_generations", 0)
    more = group * cfg.max_completion_length if group else 0
    return [(tokens + more, patches) for tokens, patches in lengths]


def units_per_step(cfg):
    """Samples of one rank, or groups."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // getattr(cfg, "num_generations", 1)


def estimate(model, cfg, lengths, world=1, number=2):
    """{what: bytes}: the peak of an update, and of sampling in GRPO. lengths: [(tokens, patches)] of samples. Where an
    option is auto, the least: one sample or group a pack, everything recomputed."""
    counts, group = Counts.of(model), getattr(cfg, "num_generations", 0)
    units, (longest, _) = unit_sizes(cfg, lengths), max(lengths)
    tokens, patches = max(units)
    if cfg.pack_tokens != "auto":
        step = tokens * max(1, cfg.per_device_train_batch_size // max(1, group))
        least = longest + cfg.max_completion_length if group else tokens  # an explicit limit may cut a group
        whole, tokens = tokens, max(least, min(step, cfg.pack_tokens or step))
        patches = int(max(patches, patches * tokens / (whole if group else statistics.fmean(n for n, _ in lengths))))
    kept = 0 if cfg.gradient_checkpointing else len(model.visual.blocks) + len(model.model.layers)
    update = update_bytes(model.config, counts, cfg, tokens, patches, kept, world, number)
    peaks = {"update": update + CONTEXT + LOGITS}
    if group:
        prompts, limit = max(1, units_per_step(cfg)), cfg.max_completion_length
        sampling = sampling_bytes(model.config, counts, cfg, prompts, longest, group, limit, number)
        peaks["sampling"] = sampling + CONTEXT + LOGITS
    return peaks


# -- What a run will take, before it is started


def sample_sizes(records, processor, answer):
    """({number: (tokens, patches)} of up to LOOKED_AT samples spread over the dataset, {number: why} of those left
    out)."""
    count, sizes_of, left_out = len(records), {}, {}
    for i in sorted({k * count // min(LOOKED_AT, count) for k in range(min(LOOKED_AT, count))}):
        try:
            ids, _, plans = processor.layout(records[i], answer)
            sizes_of[i] = len(ids), sum(math.prod(plan.grid_thw) for plan in plans)
        except UserError as error:
            left_out[i] = str(error)
    if count and not sizes_of:
        raise UserError(f"all samples are left out; the first: {next(iter(left_out.values()))}")
    return sizes_of, left_out


def summary(model, cfg, records, processor, loader, steps, world, number):
    """The lines that a run begins with, and that --dry_run prints: data, steps, parameters, memory."""
    is_grpo = hasattr(cfg, "num_generations")
    sizes_of, left_out = sample_sizes(records, processor, answer=not is_grpo)
    tokens = [size for size, _ in sizes_of.values()]
    what = "prompt tokens" if is_grpo else "tokens"
    looked = f"{len(sizes_of) + len(left_out):,} of {len(records):,} looked at"
    yield f"  data       {len(records):,} samples ({looked}): {min(tokens):,} to {max(tokens):,} {what}, median " \
          f"{statistics.median(tokens):,.0f}"  # fmt: skip
    if left_out:
        first, why = next(iter(left_out.items()))
        yield f"             {len(left_out)} of them would be left out; the first: sample {first}: {why}"
    yield f"  steps      {loader.steps_per_epoch:,} an epoch, {steps:,} in all"
    peaks = estimate(model, cfg, list(sizes_of.values()), world, number)
    most, kind = max(peaks.values()), "bf16" if number == 2 else "fp32"
    auto = "; packs and kept activations fill what is free" * ("auto" in (cfg.pack_tokens, cfg.gradient_checkpointing))
    each = ", ".join(f"{what} {size / GIB:.1f}" for what, size in peaks.items())
    yield f"  memory     on a GPU in {kind} {'at least' if auto else 'about'} {most / GIB:.1f} GiB ({each}){auto}"
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if most > 0.92 * whole:
            tight = "this GPU has" if most > whole else "tight: this GPU has"
            yield f"             {tight} {whole / GIB:.1f} GiB; {less_memory(model, cfg)}"


def less_memory(model, cfg):
    """What to try where a run hardly fits. 8 bits cost a 3B less than 4 do, larger models bear 4 (docs/gpus.md)."""
    low_bit = "--base_dtype nf4" if Counts.of(model).base > 6e9 else "--base_dtype int8"
    first = f"{low_bit}, " if cfg.base_dtype == "bf16" and cfg.lora_enable and cfg.freeze_llm else ""
    return f"try {first}--offload_activations True, a lower --video_max_pixels"


def out_of_memory(device, doing, packs, lower):
    """The UserError for an OutOfMemoryError. lower: the options that help."""
    room = ""
    if device.type == "cuda":
        used, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        room = f" ({used / GIB:.1f} of {whole / GIB:.1f} GiB were in use at most)"
    tokens = [len(packed.input_ids) for packed in packs]
    batch = f"{sum(tokens):,} tokens in {len(packs)} packs, the largest {max(tokens, default=0):,}"
    return UserError(f"out of GPU memory{room} while {doing}; {batch}; {lower} lowers it; checkpoints are intact")

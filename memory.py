"""GPU memory of a run by a formula of a dozen terms, what --dry_run prints, and what to say when memory runs out.

The estimate is within some percent of measured peaks (dev/LOG.md). It knows the largest micro-batch by its tokens and
patches, which parts are trained, and recomputation; the allocator's fragments it does not know.
"""

import math
import statistics
from dataclasses import dataclass

import torch

from lora import FLAT, part_of, sizes
from model import UserError
from model.quantized import quantized_weights
from model.qwen import LONG

GIB = 2**30
# Outside torch's allocator: the CUDA context and loaded kernels (1.2 to 1.3 GiB measured on an H100, torch 2.11); in it
# the workspaces of cuBLAS and the float32 logits of one chunk of rows
CONTEXT = int(1.55 * GIB)
LEAST_PIXELS = 4 * 28 * 28  # qwen-vl-utils' bound
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


def update_bytes(config, counts, cfg, tokens, patches, world=1, number=2):
    """Peak of a training step. tokens, patches: of the largest micro-batch; number: bytes of a weight."""
    c, v = config, config.vision
    C, inner, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    heads = c.num_attention_heads * c.head_dim
    keys = 2 * c.num_key_value_heads * c.head_dim
    rank = cfg.lora_rank if counts.adapters else 0
    static = static_bytes(counts, cfg, world, number)
    state_on_card = not cfg.offload_optimizer
    gradients = 4 * counts.trained / world * state_on_card + number * min(counts.trained, 25e6 if world > 1 else 100e6)
    head = (4 + 2 * number) * c.vocab_size * C if counts.head else 0
    recompute = cfg.gradient_checkpointing
    in_parts = recompute and patches > LONG  # a long video goes through the tower a part at a time
    at_once = LONG // 16 if in_parts else patches
    tower = v.depth * at_once * v.hidden_size if counts.tower else 0
    if recompute:
        kept = L * tokens * C + (patches // 4 * C if in_parts and counts.tower else tower)
        vision_block = at_once * (3 * v.intermediate_size + 8 * v.hidden_size) * bool(tower)
        redone = 1.5 * max(tokens * (3 * inner + 8 * C), vision_block)
        redone += tower * in_parts
    else:
        kept = L * tokens * (4 * C + 2 * heads + keys + 3 * inner + 7 * rank)
        if counts.tower:
            kept += v.depth * patches * (9 * v.hidden_size + 3 * v.intermediate_size + 5 * rank)
        redone = tokens * (C + 3 * inner)
    return static + gradients + head + number * (kept + redone)


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


def estimate(model, cfg, lengths, world=1, number=2):
    """{what: bytes}: the peak of an update, and of sampling in GRPO. lengths: [(tokens, patches)] of samples."""
    counts, (longest, patches) = Counts.of(model), max(lengths)
    mean = statistics.fmean(tokens for tokens, _ in lengths)
    group = getattr(cfg, "num_generations", 0)
    if group:
        completions = cfg.per_device_train_batch_size
        tokens = completions * cfg.max_completion_length + -(-completions // group) * longest
        each = longest + group * cfg.max_completion_length  # a group with its prompt
    else:
        tokens, each = cfg.per_device_train_batch_size * longest, longest
    if cfg.pack_tokens:
        tokens = max(each if not group else longest + cfg.max_completion_length, min(tokens, cfg.pack_tokens))
    share = patches * tokens / (each if group else max(mean, 1))
    patches = int(max(patches, share))
    peaks = {"update": update_bytes(model.config, counts, cfg, tokens, patches, world, number) + CONTEXT}
    if group:
        prompts = max(1, cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // group)
        limit = cfg.max_completion_length
        peaks["sampling"] = sampling_bytes(model.config, counts, cfg, prompts, longest, group, limit, number) + CONTEXT
    return peaks


# -- What a run will take, before it is started


def sample_sizes(records, processor, answer):
    """([(tokens, patches)] of up to LOOKED_AT samples spread over the dataset, {name: why} of those left out)."""
    count = len(records)
    sizes_found, left_out = [], {}
    for i in sorted({k * count // min(LOOKED_AT, count) for k in range(min(LOOKED_AT, count))}):
        try:
            ids, _, plans = processor.layout(records[i], answer)
            sizes_found.append((len(ids), sum(math.prod(plan.grid_thw) for plan in plans)))
        except UserError as error:
            left_out[f"sample {i}"] = str(error)
    if count and not sizes_found:
        raise UserError(f"all samples are left out; the first: {next(iter(left_out.values()))}")
    return sizes_found, left_out


def summary(model, cfg, records, processor, loader, steps, world, number):
    """The lines that a run begins with, and that --dry_run prints: data, steps, parameters, memory."""
    is_grpo = hasattr(cfg, "num_generations")
    lengths, left_out = sample_sizes(records, processor, answer=not is_grpo)
    tokens = sorted(size for size, _ in lengths)
    what = "prompt tokens" if is_grpo else "tokens"
    looked = f"{len(lengths) + len(left_out):,} of {len(records):,} looked at"
    yield f"  data       {len(records):,} samples ({looked}): {tokens[0]:,} to {tokens[-1]:,} {what}, median " \
          f"{statistics.median(tokens):,.0f}"  # fmt: skip
    if left_out:
        name, why = next(iter(left_out.items()))
        yield f"             {len(left_out)} of them would be left out; the first: {name}: {why}"
    yield f"  steps      {loader.steps_per_epoch:,} an epoch, {steps:,} in all"
    peaks = estimate(model, cfg, lengths, world, number)
    name, most = max(peaks.items(), key=lambda item: item[1])
    kind = "bf16" if number == 2 else "fp32"
    parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in peaks.items())
    yield f"  memory     about {most / GIB:.1f} GiB of a GPU in {kind} ({parts})"
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if most > 0.92 * whole:
            tight = "this GPU has" if most > whole else "tight: this GPU has"
            options = "--gradient_checkpointing, --pack_tokens, --video_max_pixels"
            yield f"             {tight} {whole / GIB:.1f} GiB; see {options}"


# -- When it runs out


def smaller_view(cfg):
    """Settings that give a clip fewer tokens."""
    pixels = cfg.video_max_pixels or 768 * 28 * 28  # qwen-vl-utils' bound
    name = "max_frames" if cfg.nframes is None else "nframes"
    fewer_frames, fewer_pixels = max(2, getattr(cfg, name) // 4 * 2), max(LEAST_PIXELS, pixels // 2)
    settings = [f"--video_max_pixels {fewer_pixels}"] if fewer_pixels < pixels else []
    return [*settings, f"--{name} {fewer_frames}", "a smaller --model_id"]


def smaller_update(cfg):
    """Settings that lower an update's memory: first those that change nothing else."""
    recompute = [] if cfg.gradient_checkpointing else ["--gradient_checkpointing True"]
    packs = [f"--pack_tokens {cfg.pack_tokens // 2}" if cfg.pack_tokens else "--pack_tokens"]
    return recompute + packs + smaller_view(cfg)


def smaller_sampling(cfg, max_new_tokens):
    """Settings that lower what one prompt's completions take."""
    is_group = getattr(cfg, "max_completion_length", None) == max_new_tokens
    name = "max_completion_length" if is_group else "max_new_tokens"  # the latter in an evaluation
    return [f"--{name} {max(1, max_new_tokens // 2)}", *smaller_view(cfg)]


def out_of_memory(device, doing, packs, settings):
    """The UserError for an OutOfMemoryError. settings: a list, of which the first two are named."""
    room = ""
    if device.type == "cuda":
        used, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        room = f" ({used / GIB:.1f} of {whole / GIB:.1f} GiB were in use at most)"
    tokens = [len(packed.input_ids) for packed in packs]
    batch = f"{sum(tokens):,} tokens in {len(packs)} packs, the largest {max(tokens, default=0):,}"
    lower = f"{settings[0]} or {settings[1]} lowers it; checkpoints are intact"
    return UserError(f"out of GPU memory{room} while {doing}; {batch}; {lower}")

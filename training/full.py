"""When the GPU's memory runs out: what was being done, with how much, and which two settings lower it. Sampling goes on
in halves instead, with the completions that the whole batch would have had.
"""

from contextlib import contextmanager

import torch

from data import pack
from dataset.video import MERGE
from model import UserError
from model.decode import generate
from training.runlog import say

LEAST_PIXELS = 4 * 28 * 28  # qwen-vl-utils' bound


def token_plan(packs):
    """"16 samples in 3 packs: 900 text and 2,400 vision tokens, the largest pack 1,350" of a list of Packed."""
    tokens = [len(packed.input_ids) for packed in packs]
    vision = sum(vision_tokens(packed) for packed in packs)
    samples = sum(len(packed.names) for packed in packs)
    counts = f"{sum(tokens) - vision:,} text and {vision:,} vision tokens"
    return f"{samples} samples in {len(packs)} packs: {counts}, the largest pack {max(tokens, default=0):,}"


def vision_tokens(packed):
    """Those among the tokens of this rank."""
    return 0 if packed.patches is None else len(packed.patches) // MERGE**2


def smaller_view(cfg):
    """Settings that give a clip fewer tokens."""
    pixels = cfg.video_max_pixels or 768 * 28 * 28  # qwen-vl-utils' bound
    if pixels > LEAST_PIXELS:
        yield f"--video_max_pixels {max(LEAST_PIXELS, pixels // 2)}"
    name = "max_frames" if cfg.nframes is None else "nframes"
    if getattr(cfg, name) > 2:
        yield f"--{name} {max(2, getattr(cfg, name) // 4 * 2)}"
    yield f"--max_seq_length {cfg.max_seq_length // 2}"
    yield "a smaller --model_id"


def settings_for_update(cfg, packs, cuda):
    """Settings that lower an update's memory: first those that change nothing else."""
    if not cfg.gradient_checkpointing:
        yield "--gradient_checkpointing True"
    largest = max(packs, key=lambda packed: len(packed.input_ids), default=None)
    if largest is None:  # a rank that only computes along
        yield "--pack_tokens, lowered,"
    elif len(largest.names) > 1 or len(largest.segments.q_lengths) > 2:  # several samples, or completions of a prompt
        yield f"--pack_tokens {max(1, largest.segments.num_tokens // 2)}"
    if cuda and not cfg.offload_optimizer:
        yield "--offload_optimizer True"
    yield from smaller_view(cfg)


def settings_for_sampling(cfg, count):
    """Settings that lower what one prompt's completions take."""
    if count > 1:
        yield f"--max_completion_length {max(1, cfg.max_completion_length // 2)}"
    else:
        yield f"--max_new_tokens {max(1, cfg.max_new_tokens // 2)}"
    yield from smaller_view(cfg)


def out_of_memory(device, doing, packs, settings, then):
    """The UserError. settings: an iterable of which the first two are told; then: what is left to do."""
    room = ""
    if device.type == "cuda":
        used, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        room = f" ({used / 2**30:.1f} of {whole / 2**30:.1f} GiB were in use at most)"
    first, second, *_ = settings
    told = f"out of GPU memory{room} while {doing}; {token_plan(packs)}"
    return UserError(f"{told}; {first} or {second} lowers it; {then}")


@contextmanager
def told_when_full(run, doing, packs):
    """Around an update: a torch.OutOfMemoryError becomes the one line that a user needs. packs: list of Packed.

    Nothing is saved: the update may be half done. The last checkpoint is as it was.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        where = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        settings = settings_for_update(run.cfg, packs, run.device.type == "cuda")
        then = "the last checkpoint is intact, --resume goes on from it"
        raise out_of_memory(run.device, doing + where, packs, settings, then) from None


def sample(run, model, batch, sampling, count, doing, seeds):
    """generate() for a list of Examples: a list of `count` Completions for each. Where memory runs out it is done in
    two halves, each prompt sampled once, and so is whatever is as large from then on.

    seeds: what each prompt draws from, so in exact arithmetic halves give the same completions. (Products over fewer
    rows may be rounded otherwise; where that moves a logit past another draw, the completion differs.)
    UserError where a single prompt is too much.
    """
    packed, tokens = pack(batch), sampled_tokens(batch, count, sampling.max_new_tokens)
    if tokens < run.sample_limit or len(batch) == 1:
        training, own = model.training, [torch.Generator(run.device).manual_seed(seed) for seed in seeds]
        try:
            return generate(model, packed.to(run.device), sampling, count, own)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                settings, then = settings_for_sampling(run.cfg, count), "the last checkpoint is intact, see --resume"
                raise out_of_memory(run.device, f"{doing} {count} x 1 prompt", [packed], settings, then) from None
        run.halved += 1
        run.sample_limit = tokens
        model.ops.graphs = None  # the memory of the graphs of small passes, if there are any, is worth more now
        model.train(training)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # the halves need other sizes
        told = f"out of GPU memory while {doing} {count} x {len(batch)} prompts (at most {tokens:,} tokens)"
        say(f"{told}: done in halves from now on")
    half = (len(batch) + 1) // 2
    cut = slice(None, half), slice(half, None)
    return [group for s in cut for group in sample(run, model, batch[s], sampling, count, doing, seeds[s])]


def sampled_tokens(batch, count, limit):
    """Tokens whose keys and values are held: all prompts count as long as the longest, all completions as they may."""
    return len(batch) * (max(map(len, batch)) + count * limit)

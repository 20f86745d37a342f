"""How large a dataset's samples are, and how the trainers' batches hold them: no clip is decoded.

    survey(records, processor, …)       a Size for each sample
    sft_loads(loader, survey, steps)    a Load (training/blocks.py) for each micro-batch of train_sft.py
    group_loads(prompts, …)             … of train_grpo.py's update

Clips' sizes come from file headers. Of a large dataset some samples are looked at, spread evenly, and each of the
others counts as the one looked at before it.
"""

import math
from array import array
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from data import text_length
from dataset.records import Media
from model import UserError
from training.blocks import Load, part_of_clip


class Size(NamedTuple):
    """One sample."""

    tokens: int
    answers: int  # tokens that are trained
    vision: int  # tokens
    patches: int
    clips: int
    part: int = 0  # patches of the largest part of a clip (memory.part_of_clip)
    grids: tuple = ()  # of its clips

    def __len__(self):  # as an Example's, for prompt_batches
        return self.tokens


@dataclass
class Survey:
    """The sizes of a dataset's samples."""

    sizes: list  # Size of each sample, None where it will be left out
    looked: int
    left_out: dict = field(default_factory=dict)  # {name: reason} of those looked at
    kinds: set = field(default_factory=set)  # video, image

    @property
    def there(self):
        return [size for size in self.sizes if size is not None]


def survey(records, processor, answer, look, workers=1):
    """Sizes of the samples of records; answer: as in Processor.encode."""
    count = len(records)
    chosen = sorted({i * count // min(look, count) for i in range(min(look, count))})

    def measure(i):
        try:
            pieces, plans = processor.layout(records[i], answer, f"sample {i}")
        except UserError as error:
            return str(error)
        vision = sum(plan.num_tokens for plan in plans)
        answers = sum(len(piece) for piece, trained in pieces if trained and not isinstance(piece, Media))
        grids = tuple(plan.grid_thw for plan in plans)
        patches, part = sum(map(math.prod, grids)), max((part_of_clip(*grid) for grid in grids), default=0)
        size = Size(text_length(pieces) + vision, answers, vision, patches, len(plans), part, grids)
        return size, {plan.kind for plan in plans}

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(pool.map(measure, chosen))
    result = Survey([], len(chosen))
    for i, each in zip(chosen, found, strict=True):
        if isinstance(each, str):
            result.left_out[f"sample {i}"] = each
        else:
            result.kinds |= each[1]
    known = [None if isinstance(each, str) else each[0] for each in found]
    result.sizes = [known[bisect_right(chosen, i) - 1] for i in range(count)]
    if count and not result.there:
        raise UserError(f"all samples are left out; the first: {next(iter(result.left_out.values()))}")
    return result


def sft_loads(loader, found, steps):
    """(a Load for each micro-batch of the first `steps` steps and all ranks, the most micro-batches of a step). Where
    ranks share it, the Load of the one with most: it may have all answers, and its patches are whole grid steps."""
    loads, most = [], 0
    loader.lengths = array("q", [size.tokens if size else 0 for size in found.sizes])
    if loader.cost:
        cost = {size: loader.cost(size.grids, size.tokens, size.answers) for size in {*found.there}}
        loader.costs = array("d", [cost.get(size, 0.0) for size in found.sizes])
    for step in range(steps):
        for rank in range(loader.world_size):
            loader.rank = rank
            bins, _ = loader.plan(step, map)
            most = max(most, len(bins))
            for members in bins:
                sizes = [found.sizes[i] for i in members if found.sizes[i]]
                tokens, answers, _, patches, clips = map(sum, zip(*(size[:5] for size in sizes), (0,) * 5))
                part = max((size.part for size in sizes), default=0)
                if loader.readers > 1:
                    each = max((h * w for size in sizes for _, h, w in size.grids), default=1)  # grid step
                    tokens, patches = -(-tokens // loader.readers), -(-patches // (each * loader.readers)) * each
                    answers, part = min(answers, tokens), min(part, patches)
                loads.append(Load(max(1, tokens), answers, patches, clips, max(1, len(sizes)), part=part))
    return loads, most


def group_loads(prompts, completions, cfg):
    """The update's micro-batches of a rank, as train_grpo.micro_batches cuts them: a Load each.

    prompts: (tokens, patches, those of its largest part) of each; completions: their completions' lengths, a list a
    prompt.
    """
    bins, tokens = [], 0  # of (prompt number, length)
    for number, lengths in enumerate(completions):
        for length in lengths:
            prompt = prompts[number][0]
            cost = length + (0 if bins and bins[-1][-1][0] == number else prompt)
            full = bins and len(bins[-1]) == cfg.per_device_train_batch_size
            if not bins or full or (cfg.pack_tokens and tokens + cost > cfg.pack_tokens):
                bins.append([])
                tokens, cost = 0, length + prompt
            bins[-1].append((number, length))
            tokens += cost
    return [_load(prompts, members) for members in bins]


def _load(prompts, members):
    """A prompt stands once, but for its last token, which begins every completion (dataset.batch.pack_groups)."""
    own = dict.fromkeys(number for number, _ in members)
    shared = sum(prompts[number][0] - 1 for number in own)
    answers = sum(length for _, length in members)
    keys = shared + sum(prompts[number][0] - 1 + length for number, length in members)
    patches = sum(prompts[number][1] for number in own)
    part = max(prompts[number][2] for number in own)
    return Load(shared + answers, answers, patches, len(own), len(own) + len(members), keys, part)

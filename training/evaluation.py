"""Answer accuracy by free generation, during training: which held-out samples can be judged, and how many are right."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dataset.batch import Vanished
from dataset.records import read_records, record_name
from model import UserError
from model.decode import Sampling
from rewards import is_correct, sample_from_record
from training.memory import sample

EVAL_TOKENS, EVAL_CLIPS = 16384, 64  # prompt tokens decoded together, and clips read ahead of them


def held_out_records(cfg):
    """The records that answer accuracy is measured on: [] if there are none, or not wanted."""
    path = cfg.eval_data_path
    if path == "":
        beside = Path(cfg.data_path).with_name("val.json")
        path = beside if beside.exists() else None
    return [] if path is None else read_records(path)[: cfg.eval_samples]


def answerable(cfg, what, records, most=None):
    """The records whose right answer can be read, and a note that counts and names the others.

    UserError if they are more than `most` of all, max_skip_share unless given.
    """
    good, faults = [], {}
    for number, record in enumerate(records):
        try:
            is_correct("", sample_from_record(record))
            good.append(record)
        except UserError as error:
            faults[f"sample {number} ({record_name(record)})"] = str(error)
    if faults:
        found = f"the answers of {len(faults)} of {len(records)} {what} samples cannot be read"
        first = next(f"{name}: {error}" for name, error in faults.items())
        if len(faults) > (cfg.max_skip_share if most is None else most) * len(records):
            raise UserError(f"{found}, max_skip_share is {cfg.max_skip_share}; the first: {first}")
        names = ", ".join([*faults][:8]) + (", …" if len(faults) > 8 else "")
        return good, [f"{found}, so they are left out: {names}; {first}"]
    return good, []


def prompt_batches(examples, budget):
    """Examples in lists of at most `budget` prompt tokens (one at least)."""
    batch, tokens = [], 0
    for example in examples:
        if batch and tokens + len(example) > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(example)
        tokens += len(example)
    if batch:
        yield batch


def prompts(run, processor, records):
    """Records -> Examples that end where the answer begins, read ahead by threads; what cannot be read is told."""

    def encode(record):
        try:
            return processor.encode(record, answer=False)
        except Vanished:
            raise
        except UserError as error:
            return error

    with ThreadPoolExecutor(max(1, run.cfg.dataloader_num_workers), thread_name_prefix="eval") as pool:
        for i in range(0, len(records), EVAL_CLIPS):
            for found in pool.map(encode, records[i : i + EVAL_CLIPS]):
                if isinstance(found, UserError):
                    run.say(f"evaluation: skipped: {found}")
                else:
                    yield found


def evaluate(run, model, processor, records, temperature=0.0, seed=0):
    """Answer accuracy on records by free generation: what the model says, read by rewards.py. Shared over the ranks.

    Returns {"accuracy": share of those that could be read (None if there was none), "count": how many these were}.
    """
    stop = (processor.im_end, processor.token_id("<|endoftext|>"))
    sampling = Sampling(run.cfg.max_new_tokens, temperature, stop_ids=stop)
    generator = torch.Generator(run.device).manual_seed(seed + run.rank)
    model.eval()
    right = count = lost = 0
    for batch in prompt_batches(prompts(run, processor, records[run.rank :: run.world]), EVAL_TOKENS):
        answers = sample(run, model, batch, sampling, 1, "evaluating", generator)
        for example, (completion,) in zip(batch, answers, strict=True):
            text = processor.backend.decode(completion.ids, skip_special_tokens=True)
            sound = all(map(math.isfinite, completion.logprobs))
            right += sound and is_correct(text, sample_from_record(example.record))
            lost += not sound
            count += 1
    model.train()
    right, count, lost = run.sum(right, count, lost)
    if lost:
        told = f"evaluation: {int(lost)} of {int(count)} answers come from logits that are not finite"
        run.say(f"{told}: counted as wrong")
    return {"accuracy": right / count if count else None, "count": int(count)}

"""Answer accuracy by free generation, during training: which held-out samples can be judged, and how many are right."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data import pack
from dataset.index import Selection, read_records
from dataset.records import read_turns, record_name
from model import UserError
from model.decode import Sampling, generate
from rewards import is_correct, sample_from_record

EVAL_TOKENS, EVAL_CLIPS = 16384, 64  # prompt tokens decoded together, and clips read ahead of them
# Looked at before the first step: 0.3 s. What a larger dataset holds beyond them is looked at when it is used
CHECKED_RECORDS = 10_000


def held_out_records(cfg):
    """The records that answer accuracy is measured on: [] if there are none, or not wanted."""
    path = cfg.eval_data_path
    if path == "":
        beside = Path(cfg.data_path).with_name("val.json")
        path = beside if beside.exists() else None
    return [] if path is None else read_records(path)[: cfg.eval_samples]


def answerable(cfg, what, records, most=None):
    """The records whose right answer can be read, and a note that counts and names the others.

    Looks at the first CHECKED_RECORDS only; a later one raises its UserError when it is taken, and is counted then.
    UserError if more than `most` of those looked at are faulty, max_skip_share unless given.
    """
    looked_at, faults = min(len(records), CHECKED_RECORDS), {}
    for number in range(looked_at):
        try:
            check_answer(number, records[number])
        except UserError as error:
            faults[number] = str(error)
    good = (number for number in range(len(records)) if number not in faults)
    good = Selection(records, good, check_answer if looked_at < len(records) else None)
    if faults:
        found = f"the answers of {len(faults)} of {looked_at} {what} samples cannot be read"
        first = next(iter(faults.values()))
        if len(faults) > (cfg.max_skip_share if most is None else most) * looked_at:
            raise UserError(f"{found}, max_skip_share is {cfg.max_skip_share}; the first: {first}")
        names = ", ".join(f"sample {number}" for number in [*faults][:8]) + (", …" if len(faults) > 8 else "")
        return good, [f"{found}, so they are left out: {names}; {first}"]
    return good, []


def check_answer(number, record):
    """UserError, naming the sample, if its right answer cannot be read."""
    try:
        read_turns(record, "record")  # raises for what is no conversation at all
        is_correct("", sample_from_record(record))
    except UserError as error:
        raise UserError(f"sample {number} ({record_name(record)}): {error}") from None


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

    def encode(i):
        try:
            return processor.encode(records[i], answer=False)
        except UserError as error:
            return error

    with ThreadPoolExecutor(max(1, run.cfg.dataloader_num_workers), thread_name_prefix="eval") as pool:
        for i in range(0, len(records), EVAL_CLIPS):
            for found in pool.map(encode, range(i, min(i + EVAL_CLIPS, len(records)))):
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
    right = count = 0
    for batch in prompt_batches(prompts(run, processor, records[run.rank :: run.world]), EVAL_TOKENS):
        answers = generate(model, pack(batch).to(run.device), sampling, generator=generator)
        for example, (completion,) in zip(batch, answers, strict=True):
            text = processor.backend.decode(completion.ids, skip_special_tokens=True)
            right += is_correct(text, sample_from_record(example.record))
            count += 1
    model.train()
    right, count = run.sum(right, count)
    return {"accuracy": right / count if count else None, "count": int(count)}

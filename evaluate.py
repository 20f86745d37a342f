"""Answer accuracy by free generation, during training: which held-out samples can be judged, how many are right, what
is said instead, and how much of it is left when the frames are changed."""

import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from answers import extract_answer
from data import CONTROLS
from dataset.batch import Vanished
from dataset.index import Selection, read_records, spread
from dataset.records import read_turns, record_name
from model import UserError
from model.decode import Sampling
from rewards import Sample, accuracy, check_solution, is_correct, reference_answer, sample_from_record
from rollouts import Rollout, row, sample
from runlog import progress

EVAL_TOKENS, EVAL_CLIPS = 16384, 64  # prompt tokens decoded together, and clips read ahead of them
EVAL_SHOWN = 16  # held-out samples whose answers are kept to be read
# Looked at before the first step: 0.3 s. What a larger dataset holds beyond them is looked at when it is used
CHECKED_RECORDS = 10_000
Z = 1.959964  # standard normal quantile of a 95 % interval
# What a clip shows when it is played backwards, besides "X to Y" and "Y to X"
OPPOSITES = {"falling down": "ascending", "ascending": "falling down", "down": "up", "up": "down"}
NO_ANSWER = "(no answer)"


def held_out_records(cfg):
    """The records that answer accuracy is measured on: [] if there are none, or not wanted."""
    path = cfg.eval_data_path
    if path == "":
        beside = Path(cfg.data_path).with_name("val.json")
        path = beside if beside.exists() else None
    return [] if path is None else spread(read_records(path), cfg.eval_samples, cfg.seed)


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
        check_solution(record)
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


def prompts(run, processor, records, control):
    """This rank's records -> Examples that end where the answer begins, with their numbers, read ahead by threads; what
    cannot be read is told."""
    mine = range(run.rank, len(records), run.world)

    def encode(number):
        try:
            example = processor.encode(records[number], answer=False, control=control)
            example.number = number
            return example
        except Vanished:
            raise
        except UserError as error:
            return error

    with ThreadPoolExecutor(max(1, run.cfg.dataloader_num_workers), thread_name_prefix="eval") as pool:
        for i in range(0, len(mine), EVAL_CLIPS):
            for found in pool.map(encode, mine[i : i + EVAL_CLIPS]):
                if isinstance(found, UserError):
                    run.say(f"evaluation: skipped: {found}")
                else:
                    yield found


@dataclass
class Evaluation:
    """What an evaluation gave; on every rank that of all of them, but the rows."""

    accuracy: float | None  # share that is right of those that could be read; None if there was none
    count: int  # how many could be read
    answers: dict[int, tuple]  # number of the record -> (true words, words said, count of options)
    rows: list[dict]  # of rollouts.jsonl: some answers as they were given (rank 0)


def evaluate(run, model, processor, records, temperature=0.0, seed=0, control="none"):
    """Free generation on records, read by rewards.py, shared over the ranks -> Evaluation.

    control: the frames as they are ("none"), "reversed", "shuffled" or "blank".
    """
    stop = (processor.im_end, processor.token_id("<|endoftext|>"))
    sampling = Sampling(run.cfg.max_new_tokens, temperature, stop_ids=stop)
    decode_token = cache(lambda token: processor.backend.decode([token], skip_special_tokens=False))
    answers, rows, right, lost = {}, [], 0, 0
    model.eval()
    with progress(len(records) // run.world, rank=run.rank, unit="clip", desc="evaluation") as bar:
        for batch in prompt_batches(prompts(run, processor, records, control), EVAL_TOKENS):
            seeds = [seed + 7_919 * example.number for example in batch]
            said = sample(run, model, batch, sampling, 1, "evaluating", seeds)
            for example, (completion,) in zip(batch, said, strict=True):
                number, asked = example.number, sample_from_record(example.record)
                text = processor.backend.decode(completion.ids, skip_special_tokens=True)
                finite = all(map(math.isfinite, completion.logprobs))
                answers[number] = in_words(asked, text)
                right += (is_right := accuracy(text, asked) if finite else 0.0)
                lost += not finite
                if number < EVAL_SHOWN:
                    rows.append(shown(run.step, number, example, completion, text, is_right, decode_token))
            bar.update(len(batch))
    model.train()
    right, lost = run.sum(right, lost)
    everyone = run.gather((answers, rows))
    answers = {number: answer for found, _ in everyone for number, answer in found.items()}
    if lost:
        told = f"evaluation: {int(lost)} of {len(answers)} answers come from logits that are not finite"
        run.say(f"{told}: counted as wrong")
    rows = sorted((row for _, found in everyone for row in found), key=lambda row: row["prompt"])
    return Evaluation(right / len(answers) if answers else None, len(answers), answers, rows)


def shown(step, number, example, completion, text, is_right, decode_token):
    """One answer in the words of rollouts.jsonl: a group of one."""
    reward = float(is_right)
    rollout = Rollout(number, completion.ids, completion.logprobs, completion.finished, text)
    rollout.components, rollout.reward = {"accuracy": reward}, reward
    line = row(step, example.record, rollout, decode_token)
    return {name: value for name, value in line.items() if name not in ("advantage", "trained")}


def evaluation_facts(run, model, processor, records, found, total):
    """What metrics.jsonl keeps of an Evaluation, as report.py reads it; controls after step `total`."""
    right = round((found.accuracy or 0) * found.count)
    facts = {"accuracy": found.accuracy, "interval": wilson(right, found.count) if found.count else None}
    facts |= {"count": found.count, "chance": chance(found.answers), "confusion": confusion_of(found.answers)}
    if run.step == total and run.cfg.eval_controls:
        facts["controls"] = evaluate_controls(run, model, processor, records, found)
    return facts


def evaluate_controls(run, model, processor, records, plain):
    """{"reversed", "shuffled", "blank": accuracy, interval, share changed and flipped} of eval_controls of the records,
    spread over them by the seed. plain: the Evaluation of the frames as they are. It costs as much as 3 x eval_controls
    samples of an evaluation; the clips are in the cache if it holds them."""
    numbers, found, began = spread(range(len(records)), run.cfg.eval_controls, run.cfg.seed), {}, time.perf_counter()
    records = Selection(records, numbers)
    for control in CONTROLS[1:]:
        answers = evaluate(run, model, processor, records, control=control).answers
        found[control] = measure({numbers[k]: answer for k, answer in answers.items()}, plain.answers)
    told = [f"{name} {facts['accuracy']:.1%}" for name, facts in found.items() if facts["count"]]
    seconds = f"({time.perf_counter() - began:.1f} s)"
    run.say(f"step {run.step:>6}  with changed frames: {', '.join(told)} of {len(records)} held-out samples  {seconds}")
    return found


# -- What answers show. A run of answers is {number of the sample: (true answer's words, the model's, count of options)}


def in_words(sample: Sample, text: str) -> tuple[str, str, int]:
    """A completion's text -> (true answer's words, the model's, count of options)."""
    letters = reference_answer(sample), extract_answer(text, sample.options)
    true, said = (sample.options.get(letter) or letter or NO_ANSWER for letter in letters)
    options = sum(map(bool, sample.options.values()))  # those with words: of an unread list nobody knows how many
    return true, true if is_correct(text, sample) else said, options


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson, 1927) of count > 0, as [low, high]."""
    p, z2 = right / count, Z * Z / count
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / count + z2 / count / 4)
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def opposite(words: str) -> str | None:
    """What the same clip shows backwards: "Left to Right" -> "right to left"; None where that is not known."""
    start, to, end = words.casefold().partition(" to ")
    return f"{end} to {start}" if to else OPPOSITES.get(start)


def chance(run: dict) -> float | None:
    """Accuracy of blind guessing among the options; None where no question has any."""
    return mean([1 / n for _, _, n in run.values() if n])


def confusion_of(run: dict) -> dict[str, Counter]:
    """{true answer: {answer: count}}, in alphabetical order."""
    found = {}
    for true, said, _ in sorted(run.values()):
        found.setdefault(true, Counter())[said] += 1
    return found


def measure(run: dict, plain: dict) -> dict:
    """Accuracy of one run, and how its answers stand to those of the plain run: the share that `changed`, and the share
    that `flipped` to the opposite, of those that have one."""
    right = [true == said for true, said, _ in run.values()]
    pairs = [(plain[i][1], said) for i, (_, said, _) in run.items() if i in plain]
    flipped = [opposite(before) == after.casefold() for before, after in pairs if opposite(before)]
    changed = [before != after for before, after in pairs]
    found = {"accuracy": mean(right), "interval": wilson(sum(right), len(right)) if right else None}
    return found | {"right": sum(right), "count": len(right), "changed": mean(changed), "flipped": mean(flipped)}

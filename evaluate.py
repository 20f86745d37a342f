"""Answer accuracy by free generation, for both training loops and infer.py: which samples can be judged, how many are
right, what is answered instead, and how much of it is left when the frames are changed."""

import hashlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import ranks
from answers import extract_answer
from checkpoint import MANIFEST, ROLLOUTS, append_lines, sha256
from config import VideoArgs, as_dict
from data import CONTROLS
from loader import examples
from model import UserError
from model.decode import Sampling
from records import Selection, data_files, read_records, read_turns, record_name, spread
from rewards import Sample, accuracy, check_solution, format, reference_answer, sample_from_record
from rollouts import Group, facts_of, prompt_batches, row

EVAL_TOKENS = 16384  # prompt tokens decoded together
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
        beside = Path(data_files(cfg.data_path)[0][0]).with_name("val.json")
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
        if most is None and len(faults) == len(records):
            raise UserError(f"{found}: none is left; the first: {first}")
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


class Judged(NamedTuple):
    """An answer beside the right one."""

    true: str  # the right answer's words
    said: str  # the model's
    options: int  # how many the question has; 0 for an open one, and where they could not be read
    right: float  # the accuracy reward
    task: str = ""  # the record's problem_type, or "multiple choice", or "open"


@dataclass
class Evaluation:
    """What an evaluation gave, of all ranks. Accuracies are None where nothing was answered."""

    answers: dict[int, Judged]  # by the number of the record
    skipped: dict[int, str]  # number of the record that could not be read -> why
    rows: list[dict] = field(default_factory=list)  # of rollouts.jsonl: the first answers as they were given
    controls: dict[str, "Evaluation"] = field(default_factory=dict)  # with the frames reversed, shuffled, blank
    known: int = 0  # answers that were there before

    count = property(lambda self: len(self.answers))
    right = property(lambda self: count_right(answer.right for answer in self.answers.values()))
    accuracy = property(lambda self: self.right / self.count if self.count else None)
    interval = property(lambda self: wilson(self.right, self.count) if self.count else None)

    @property
    def by_task(self) -> dict[str, "Evaluation"]:
        """Each task's own answers, in alphabetical order."""
        tasks = {}
        for number, answer in self.answers.items():
            tasks.setdefault(answer.task, {})[number] = answer
        return {task: Evaluation(answers, {}) for task, answers in sorted(tasks.items())}

    @property
    def chance(self) -> float | None:
        """Accuracy of blind guessing among the options; None where no question has any."""
        return mean([1 / answer.options for answer in self.answers.values() if answer.options])

    @property
    def confusion(self) -> dict[str, Counter]:
        """{right answer: {answer: count}}, in alphabetical order."""
        table = {}
        for answer in sorted(self.answers.values()):
            table.setdefault(answer.true, Counter())[answer.said] += 1
        return table

    def facts(self, plain: "Evaluation") -> dict:
        """Accuracy for a log, and the share of answers that `changed` against those to the frames as they are, and that
        `flipped` to the opposite, of those that have one."""
        pairs = [(plain.answers[i].said, answer.said) for i, answer in self.answers.items() if i in plain.answers]
        flipped = [opposite(before) == after.casefold() for before, after in pairs if opposite(before)]
        facts = {"accuracy": self.accuracy, "interval": self.interval, "right": self.right, "count": self.count}
        return facts | {"changed": mean([before != after for before, after in pairs]), "flipped": mean(flipped)}


def evaluate(sampler, records, sampling, seed=0, control="none", step=0, known=(), on_answer=None) -> Evaluation:
    """Free generation on records, read by rewards.py, shared over the ranks.

    sampler: rollouts.Sampler. sampling: model.decode.Sampling. control: the frames as they are ("none"), "reversed",
    "shuffled" or "blank". step: of the rows. known: {number: Judged} that need not be asked. on_answer(number, sample,
    text, judged): called for each answer as it comes.
    """
    decode_token = cache(lambda token: sampler.processor.backend.decode([token], skip_special_tokens=False))
    answers, skipped, rows = dict(known), {}, []
    mode = sampler.model.training
    sampler.model.eval()
    with progress(len(records) // ranks.world_size(), ranks.rank(), unit="clip", desc=f"evaluation, {control}") as bar:
        readable = prompts(sampler, records, control, set(answers), skipped, bar)
        for batch in prompt_batches(readable, EVAL_TOKENS):
            seeds = [seed + 7_919 * example.number for example in batch]
            for example, (completion,) in zip(batch, sampler(batch, sampling, 1, seeds), strict=True):
                number, sample = example.number, sample_from_record(example.record)
                rollout = sampler.rollout(number, completion)
                rollout.text = example.record.get("answer_prefix", "") + rollout.text
                rollout.right = accuracy(rollout.text, sample) if rollout.finite else 0.0
                answers[number] = judged(sample, rollout)
                if on_answer:
                    on_answer(number, replace(sample, truncated=not rollout.finished), rollout.text, answers[number])
                if number < EVAL_SHOWN:
                    rows.append(shown(step, example, rollout, decode_token))
    sampler.model.train(mode)
    every = ranks.gather((answers, skipped, rows))
    answers, skipped = (dict(sorted(pair for each in every for pair in each[i].items())) for i in (0, 1))
    rows = sorted((line for each in every for line in each[2]), key=lambda line: line["prompt"])
    return Evaluation(answers, skipped, rows, known=len(known))


def prompts(sampler, records, control, known, skipped, bar):
    """This rank's records -> Examples that end where the answer begins, with their numbers, but those in `known`. What
    cannot be read or judged goes into `skipped`."""
    numbers = []
    for number in range(ranks.rank(), len(records), ranks.world_size()):
        if number in known:
            bar.update()
            continue
        try:
            check_solution(records[number])
            numbers.append(number)
        except UserError as error:
            skipped[number] = str(error)
            bar.update()
    for result in examples(sampler.processor, records, numbers, control, sampler.cfg.dataloader_num_workers):
        bar.update()
        if isinstance(result, tuple):
            skipped[result[0]] = str(result[1])
        else:
            yield result


def shown(step, example, rollout, decode_token):
    """One answer in the words of rollouts.jsonl: a group of one."""
    rollout.reward = float(rollout.right)
    rollout.components = {"accuracy": rollout.reward}
    group = Group(example.number, len(example), [rollout])
    line = row(step, facts_of(example.record, sample_from_record(example.record)), group, rollout, decode_token)
    return {name: value for name, value in line.items() if name not in ("advantage", "trained")}


def progress(total, rank=0, **more):
    """A bar with the time left, on rank 0's terminal; nothing where output goes to a file."""
    hidden = rank > 0 or not sys.stdout.isatty()
    return tqdm(total=total, disable=hidden or None, leave=False, dynamic_ncols=True, **more)  # None: by stderr


# -- In the training loops


def evaluate_and_log(run, log, held_out, sampled=False):
    """Log answer accuracy after this step; True if it is the best so far (of equals the latest).

    sampled: also at the temperature that the policy is trained at; otherwise some answers go into rollouts.jsonl.
    """
    cfg, began = run.cfg, time.perf_counter()
    again = partial(evaluate, run.sampler, step=run.step)
    greedy = Sampling(cfg.max_new_tokens, temperature=0.0, stop_ids=run.sampler.stop_ids)
    result = again(held_out, greedy)
    for error in result.skipped.values():
        run.warn(f"evaluation: skipped: {error}")
    facts, words = {"eval_accuracy": result.accuracy, "eval_count": result.count}, ""
    if sampled:
        sampling = Sampling(cfg.max_new_tokens, cfg.temperature, stop_ids=run.sampler.stop_ids)
        drawn = again(held_out, sampling, cfg.seed)
        facts["eval_sampled_accuracy"] = drawn.accuracy
        words = f" greedy, {drawn.accuracy:.1%} sampled," if result.count else ""
    elif run.rank == 0:
        append_lines(run.folder / ROLLOUTS, result.rows)
    facts["eval_seconds"] = seconds = time.perf_counter() - began
    is_best, verdict = run.compare(result.accuracy)
    if result.count:
        text = f"answers right: {result.accuracy:.1%}{words} of {result.count} held-out samples{verdict}"
        run.say(f"step {run.step:>6}  {text}  ({seconds:.1f} s)")
    facts["evaluation"] = {name: getattr(result, name) for name in ("accuracy", "interval", "count")}
    facts["evaluation"] |= {"chance": result.chance, "confusion": result.confusion}
    if run.step == run.total and cfg.eval_controls:
        numbers = spread(range(len(held_out)), cfg.eval_controls, cfg.seed)
        some = Selection(held_out, numbers)
        plain = Evaluation({k: result.answers[n] for k, n in enumerate(numbers) if n in result.answers}, {})
        controls = {name: again(some, greedy, control=name).facts(plain) for name in CONTROLS[1:]}
        facts["evaluation"]["controls"] = controls
        # counts differ where a clip of one frame cannot be shuffled
        rows = [(name, each["accuracy"], each["count"]) for name, each in controls.items() if each["count"]]
        words = ", ".join(f"{name} {accuracy:.1%} of {count}" for name, accuracy, count in rows)
        run.say(f"step {run.step:>6}  with changed frames: {words} held-out samples")
    log.write(run.step, facts)
    return is_best


# -- What answers show


def judged(sample: Sample, rollout) -> Judged:
    """A rollout's answer and the right one, in words."""
    letters = reference_answer(sample), extract_answer(rollout.text, sample.options)
    true, said = (sample.options.get(letter) or letter or NO_ANSWER for letter in letters)
    task = sample.problem_type or ("multiple choice" if sample.options else "open")
    return Judged(true, said, sum(map(bool, sample.options.values())), rollout.right, task)


def count_right(rewards) -> int | float:
    """The sum of accuracy rewards: how many are right, with fractions where a typed answer is partly right."""
    total = sum(rewards)
    return int(total) if total == int(total) else total


def wilson(right: float, count: int) -> list[float]:
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


# -- Answers in a file, for infer.py --output


def made_by(cfg, adapter) -> dict:
    """What an answer depends on besides its record: model, adapter and a hash of the settings. cfg: config.Infer."""
    names = "bf16 base_dtype max_new_tokens temperature top_p top_k seed repetition_penalty max_samples benchmark"
    names = as_dict(VideoArgs()).keys() - {"cache_mb"} | {*names.split(), "prompt"}
    settings = hashlib.sha256(repr(sorted((name, getattr(cfg, name)) for name in names)).encode()).hexdigest()[:16]
    merged = Path(cfg.model_id) / MANIFEST  # of lora.py merge: the same folder may hold another model later
    file = adapter / "adapter_model.safetensors" if adapter else merged if merged.exists() else None
    return {"model_id": cfg.model_id, "weights": file and sha256(file)[:16], "settings": settings}


def record_hash(record: dict) -> str:
    """Of all of a record: a corrected answer or question is another record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


class Predictions:
    """The answers of an evaluation in a .jsonl, a line for each as it comes; what is there already need not be asked.

    path None: no file. made_by: what the answers depend on besides their records. A last line cut short is removed.
    UserError where the lines are of other records, or made by another model or other settings.
    """

    def __init__(self, path, records, made_by: dict):
        self.path, self.records, self.made_by = path, records, made_by
        self.known: dict[int, Judged] = {}
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines():
                self.read(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"--output: {path} holds other lines than predictions of these records by this model ({error})"
            raise UserError(f"{problem}; choose another file") from None
        if whole != data:
            path.write_bytes(whole)

    def read(self, row):
        record = self.records[row["number"]]
        if row["record_hash"] != record_hash(record) or row["made_by"] != self.made_by:
            raise ValueError(f"line {len(self.known) + 1} is of {row['id']}, by {row['made_by']}")
        self.known[row["number"]] = Judged(row["true"], row["said"], row["options"], row["right"], row["task"])

    def write(self, number, sample: Sample, text: str, judged: Judged):
        """on_answer of evaluate()."""
        if self.path is None:
            return
        record = self.records[number]
        row = {"number": number, "id": record.get("id", record_name(record)), "record_hash": record_hash(record)}
        row["task"] = judged.task
        row |= {"prompt": sample.question, "text": text, "answer": sample.answer, "true": judged.true}
        row |= {"said": judged.said, "options": judged.options, "right": judged.right}
        row |= {"rewards": {"accuracy": judged.right, "format": format(text, sample)}, "made_by": self.made_by}
        append_lines(self.path, [row])

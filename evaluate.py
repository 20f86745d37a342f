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

from tqdm import tqdm

import ranks
from checkpoint import MANIFEST, ROLLOUTS, append_lines, sha256
from config import as_dict
from data import CONTROLS
from loader import Samples
from model import UserError
from model.decode import Sampling
from records import Selection, data_files, read_records, record_name, sample_name, spread
from rewards import accuracy, check_solution, extract_answer, format, read_answer, reference_answer, sample_from_record
from rollouts import Group, facts_of, prompt_batches, row

EVAL_TOKENS = 16384  # prompt tokens decoded together
EVAL_SHOWN = 16  # held-out samples whose answers are kept to be read
CHECKED_RECORDS = 10_000  # before the first step: some seconds. Later ones are looked at when they are used
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


def answerable(cfg, what, records, strict=True):
    """The records whose right answer can be read, and a note that counts the others and names the first. UserError if
    strict and more than max_skip_share of those looked at are faulty."""
    looked_at, faults = min(len(records), CHECKED_RECORDS), {}
    for number in range(looked_at):
        try:
            check_solution(records[number])
        except UserError as error:
            faults[number] = error
    good = Selection(records, (i for i in range(len(records)) if i not in faults), check_solution)
    if not faults:
        return good, []
    number, error = next(iter(faults.items()))
    first = f"{sample_name(records, number)}: {error}"
    note = f"the answers of {len(faults)} of {looked_at} {what} samples cannot be read, the first: {first}"
    if strict and (len(faults) > cfg.max_skip_share * looked_at or not len(good)):
        raise UserError(f"{note}; max_skip_share is {cfg.max_skip_share}")
    return good, [f"{note}; they are left out"]


@dataclass(repr=False)
class Evaluation:
    """What an evaluation gave, of all ranks. Accuracies are None where nothing was answered."""

    answers: dict[int, dict]  # by the number of the record, as in --output: see answer_line
    skipped: dict[int, str] = field(default_factory=dict)  # number of a record that could not be read -> why
    rows: list[dict] = field(default_factory=list)  # of rollouts.jsonl: the first answers as they were given
    controls: dict[str, "Evaluation"] = field(default_factory=dict)  # with the frames reversed, shuffled, blank
    known: int = 0  # answers that were there before

    def __repr__(self):
        low, high = self.interval or (0, 1)
        return f"{self.right:g} of {self.count} right ({low:.1%} to {high:.1%})"

    count = property(lambda self: len(self.answers))
    right = property(lambda self: sum(answer["right"] for answer in self.answers.values()))
    accuracy = property(lambda self: self.right / self.count if self.count else None)
    interval = property(lambda self: wilson(self.right, self.count) if self.count else None)

    @property
    def chance(self) -> float | None:
        """Accuracy of blind guessing among the options; None where no question has any."""
        return mean([1 / answer["options"] for answer in self.answers.values() if answer["options"]])

    @property
    def by_task(self) -> dict[str, "Evaluation"]:
        """Each task's own answers, in alphabetical order."""
        of = lambda task: {number: answer for number, answer in self.answers.items() if answer["task"] == task}
        return {task: Evaluation(of(task)) for task in sorted({answer["task"] for answer in self.answers.values()})}

    @property
    def confusion(self) -> dict[str, Counter]:
        """{right answer: {answer: count}}, in alphabetical order."""
        table = {}
        for true, said in sorted((answer["true"], answer["said"]) for answer in self.answers.values()):
            table.setdefault(true, Counter())[said] += 1
        return table

    def facts(self, plain: "Evaluation") -> dict:
        """Accuracy for a log, and the share of answers that `changed` against those to the frames as they are, and that
        `flipped` to the opposite, of those that have one."""
        both = self.answers.keys() & plain.answers.keys()
        pairs = [(plain.answers[number]["said"], self.answers[number]["said"]) for number in both]
        flipped = [opposite(before) == after.casefold() for before, after in pairs if opposite(before)]
        facts = {name: getattr(self, name) for name in ("accuracy", "interval", "right", "count")}
        return facts | {"changed": mean([before != after for before, after in pairs]), "flipped": mean(flipped)}


def wilson(right: float, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson, 1927) of count > 0, as [low, high]."""
    z = 1.959964  # the normal distribution's 97.5 % quantile
    p, z2 = right / count, z * z / count
    middle, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / count + z2 / count / 4)
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def opposite(words: str) -> str | None:
    """What the same clip shows backwards: "Left to Right" -> "right to left"; None where that is not known."""
    start, to, end = words.casefold().partition(" to ")
    return f"{end} to {start}" if to else OPPOSITES.get(start)


def evaluate(sampler, records, sampling, seed=0, control="none", step=0, predictions=None) -> Evaluation:
    """Free generation on records, read by rewards.py, shared over the ranks.

    sampler: rollouts.Sampler. sampling: model.decode.Sampling. control: the frames as they are ("none"), "reversed",
    "shuffled" or "blank". step: of the rows. predictions: Predictions, whose answers need not be asked again.
    """
    decode_token = cache(lambda token: sampler.processor.backend.decode([token], skip_special_tokens=False))
    known = predictions.known if predictions else {}
    answers, skipped, rows = dict(known), {}, []
    numbers = [i for i in range(ranks.rank(), len(records), ranks.world_size()) if i not in known]
    checked = Selection(records, range(len(records)), check_solution)
    samples = Samples(checked, sampler.processor, answer=False, control=control)
    prompts = samples.read(numbers, sampler.cfg.dataloader_num_workers)
    mode = sampler.model.training
    sampler.model.eval()
    with progress(len(numbers), ranks.rank(), unit="clip", desc=f"evaluation, {control}") as bar:
        for batch in prompt_batches(readable(prompts, skipped, bar), EVAL_TOKENS):
            seeds = [seed + 7_919 * example.number for example in batch]
            for example, (completion,) in zip(batch, sampler(batch, sampling, 1, seeds), strict=True):
                number, record = example.number, example.record
                rollout, sample = sampler.rollout(number, completion), sample_from_record(record)
                rollout.text = record.get("answer_prefix", "") + rollout.text
                rollout.reward = float(accuracy(rollout.text, sample)) if rollout.finite else 0.0
                rollout.components = {"accuracy": rollout.reward}
                answers[number] = answer_line(sample, rollout)
                if predictions:
                    predictions.write(number, answers[number])
                if number < EVAL_SHOWN:
                    group = Group(number, len(example), [rollout])
                    line = row(step, facts_of(record, sample), group, rollout, decode_token)
                    rows.append({name: line[name] for name in line if name not in ("advantage", "trained")})
    sampler.model.train(mode)
    every = ranks.gather((answers, skipped, rows))
    answers, skipped = (dict(sorted(pair for each in every for pair in each[i].items())) for i in (0, 1))
    rows = sorted((line for each in every for line in each[2]), key=lambda line: line["prompt"])
    return Evaluation(answers, skipped, rows, known=len(known))


def readable(prompts, skipped, bar):
    """The Examples among loader.Samples; what cannot be read or judged goes into `skipped`."""
    for prompt in prompts:
        bar.update()
        if isinstance(prompt, tuple):
            skipped[prompt[0]] = str(prompt[1])
        else:
            yield prompt


def answer_line(sample, rollout) -> dict:
    """A line of --output. true, said: words of the right answer and of the model's; right: the accuracy reward;
    options: how many the question has, 0 for an open one."""
    text, record = rollout.text, sample.record
    labels = reference_answer(sample), extract_answer(text, sample.options)
    true, said = (sample.options.get(label) or label or NO_ANSWER for label in labels)
    shape = format(text, replace(sample, truncated=not rollout.finished))
    line = {"id": record.get("id", record_name(record)), "prompt": sample.question, "text": text}
    line |= {"answer": sample.answer, "true": true, "said": said, "unreadable": read_answer(text, sample) is None}
    line |= {"right": rollout.reward, "rewards": rollout.components | {"format": shape}}
    line |= {"options": sum(map(bool, sample.options.values()))}
    return line | {"task": sample.problem_type or ("multiple choice" if sample.options else "open")}


def progress(total, rank=0, **more):
    """A bar with the time left, on rank 0's terminal; nothing where output goes to a file."""
    hidden = rank > 0 or not sys.stdout.isatty()
    return tqdm(total=total, disable=hidden or None, leave=False, dynamic_ncols=True, **more)  # None: by stderr


def evaluate_and_log(run, log, held_out, sampled=False):
    """In the training loops: log answer accuracy after this step; True if it is the best so far (of equals the latest).

    sampled: also at the temperature that the policy is trained at; otherwise some answers go into rollouts.jsonl.
    """
    cfg, began, words = run.cfg, time.perf_counter(), ""
    again = partial(evaluate, run.sampler, step=run.step)
    greedy = Sampling(cfg.max_new_tokens, temperature=0.0, stop_ids=run.sampler.stop_ids)
    result = again(held_out, greedy)
    for error in result.skipped.values():
        run.warn(f"evaluation: skipped: {error}")
    facts = {"eval_accuracy": result.accuracy, "eval_count": result.count}
    if sampled:
        drawn = again(held_out, replace(greedy, temperature=cfg.temperature), cfg.seed)
        facts["eval_sampled_accuracy"] = drawn.accuracy
        words = f" greedy, {drawn.accuracy:.1%} sampled," if result.count else ""
    elif run.rank == 0:
        append_lines(run.folder / ROLLOUTS, result.rows)
    facts["eval_seconds"] = seconds = time.perf_counter() - began
    is_best, verdict = run.compare(result.accuracy)
    if result.count:
        text = f"accuracy: {result.accuracy:.1%}{words} of {result.count} held-out samples{verdict}"
        run.say(f"step {run.step:>6}  {text}  ({seconds:.1f} s)")
    names = ("accuracy", "interval", "count", "chance", "confusion")
    facts["evaluation"] = {name: getattr(result, name) for name in names}
    if run.step == run.total and cfg.eval_controls:
        some = spread(range(len(held_out)), cfg.eval_controls, cfg.seed)
        plain = Evaluation({i: result.answers[number] for i, number in enumerate(some) if number in result.answers})
        controls = {name: again(Selection(held_out, some), greedy, control=name).facts(plain) for name in CONTROLS[1:]}
        facts["evaluation"]["controls"] = controls
        for name, control in controls.items():
            if control["count"]:  # of clips of one frame none can be shuffled
                run.say(f"step {run.step:>6}  frames {name}: {control['accuracy']:.1%} of {control['count']} samples")
    log.write(run.step, facts)
    return is_best


class Predictions:
    """The answers of an evaluation in the .jsonl of --output, a line for each as it comes: what is there already need
    not be asked. A last line cut short is removed. UserError for lines of other records, another model or settings.

    cfg: config.Infer. adapter: its folder, or None.
    """

    def __init__(self, cfg, adapter, records):
        self.path, self.records, self.known = Path(cfg.output), records, {}
        merged = Path(cfg.model_id) / MANIFEST  # of lora.py merge: the same folder may hold another model later
        weights = adapter / "adapter_model.safetensors" if adapter else merged if merged.exists() else None
        # they change no answer, or only where the weights and records, which are hashed too, come from
        other = ("output", "json", "controls", "cache_mb", "dataloader_num_workers", "offload_embedding")
        other += ("model_ckpt", "local_files_only", "data_path", "video")
        settings = {name: value for name, value in as_dict(cfg).items() if name not in other}
        self.source = [settings, weights and sha256(weights)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(f"--output: {self.path}: {error.strerror}; choose another file") from None
        whole = data[: data.rfind(b"\n") + 1]
        try:
            for line in map(json.loads, whole.splitlines()):
                if line["made_by"] != self.made_by(line["number"]):
                    raise ValueError
                self.known[line["number"]] = line
            if not b'{"number": '.startswith(data[len(whole) :][:11]):  # another file without a line break
                raise ValueError
        except (ValueError, KeyError, TypeError, IndexError):
            problem = f"line {len(self.known) + 1} is no prediction of these records by this model and these settings"
            raise UserError(f"--output: {self.path}: {problem}; choose another file") from None
        if whole != data:
            self.path.write_bytes(whole)

    def made_by(self, number: int) -> str:
        """A hash of what an answer depends on: the record, the model and the settings."""
        return hashlib.sha256(json.dumps([self.records[number], *self.source]).encode()).hexdigest()[:16]

    def write(self, number: int, line: dict):
        append_lines(self.path, [{"number": number, **line, "made_by": self.made_by(number)}])

"""What a run's records ask, and facts about them for data.json and the run's page."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress

from answers import LETTERS
from model import UserError
from records import TAG, read_form, record_name
from rewards import plain_text, reference_answer, sample_from_record

MAX_READ = 1000  # records whose text is read, evenly spread over the dataset
MAX_MEASURED = 32  # records whose clips are opened and whose tokens are counted
MAX_CLASSES, MAX_EXAMPLES = 40, 6  # listed; more different answers than that are no classes
OPTION = re.compile(r"\([A-Z]\) .+")  # a line of a question, as generate.py writes it


def evenly_spread(records: Sequence[dict], most: int) -> range:
    """Numbers of at most so many of the records."""
    return range(0, len(records), max(1, -(-len(records) // most)))


def dataset_summary(splits: dict[str, Sequence[dict]], processor) -> dict:
    """{split: records} -> {split: facts}; an empty split is left out. No clip is decoded whole; what is
    wrong with a record the loader reports."""
    facts = lambda records: {"samples": len(records), **class_facts(records), **clip_facts(records, processor)}
    return {name: facts(records) for name, records in splits.items() if len(records)}


def class_facts(records: Sequence[dict]) -> dict:
    """How often each right answer comes, and an example of each."""
    classes, examples = Counter(), {}
    for i in evenly_spread(records, MAX_READ):
        with suppress(UserError):
            record = records[i]
            sample = sample_from_record(record)
            answer = reference_answer(sample)
            name = sample.options.get(answer, answer) or sample.answer.strip()[:80]
            classes[name] += 1
            if record.get("video"):
                examples.setdefault(name, {"id": record_name(record), "video": record["video"], "class": name})
    few = dict(sorted(classes.items())) if len(classes) <= MAX_CLASSES else {}
    return {"classes": few, "examples": list(examples.values())[:MAX_EXAMPLES]}


def clip_facts(records: Sequence[dict], processor) -> dict:
    """[least, median, most] of tokens, frames and seconds."""
    values = defaultdict(list)
    for i in evenly_spread(records, MAX_MEASURED):
        with suppress(UserError):
            ids, trained, plans = processor.layout(records[i], True, f"record {i}")
            values["tokens"].append(len(ids))
            values["vision_tokens"].append(sum(plan.num_tokens for plan in plans))
            values["answer_tokens"].append(int(trained.sum()))
            for plan in plans:
                values["frames"].append(len(plan.indices))
                values["seconds"].append(round(plan.total_frames / plan.source_fps, 3) if plan.source_fps else 0)
    return {key: [min(v), statistics.median(v), max(v)] for key, v in values.items()}


def data_question(records: Sequence[dict]) -> dict | None:
    """{"text", "system"}: the question that a run on these records learns to answer, the system turn before it ("" =
    none). None where no record has a question.

    It is the most frequent one. Where the questions differ in their options alone, as generate.py writes them for
    folders of classes, it has all the options that occur.
    """
    questions = Counter()
    for i in evenly_spread(records, MAX_READ):
        with suppress(UserError):
            first, question = read_form(records[i], "").messages[0], sample_from_record(records[i]).question
            system = plain_text(first.content) if first.role == "system" else ""
            questions[TAG.sub("", question).strip(), system] += 1
    if not questions:
        return None
    (text, system), _ = questions.most_common(1)[0]
    lines = [text.split("\n") for text, _ in questions]
    options = sorted({line[4:] for each in lines for line in each if OPTION.fullmatch(line)})
    stems = {tuple(line for line in each if not OPTION.fullmatch(line)) for each in lines}
    if len(questions) > 1 and len(stems) == 1 and 0 < len(options) <= len(LETTERS):
        text = "\n".join([*stems.pop(), *(f"({letter}) {words}" for letter, words in zip(LETTERS, options))])
    return {"text": text, "system": system}

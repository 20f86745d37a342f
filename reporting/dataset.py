"""What a run's records ask, and facts about them for data.json and the run's page."""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from answers import LETTERS
from model import UserError
from records import TAG, read_form, record_name
from rewards import plain_text, reference_answer, sample_from_record

MAX_READ = 1000  # records whose text is read, evenly spread over the dataset
MAX_CLASSES, MAX_EXAMPLES = 40, 6  # listed; more different answers than that are no classes
OPTION = re.compile(r"\([A-Z]\) .+")  # a line of a question, as generate.py writes it


def evenly_spread(records: Sequence[dict]) -> range:
    """Numbers of at most MAX_READ records. What is wrong with one the loader reports, when it comes to it."""
    return range(0, len(records), max(1, -(-len(records) // MAX_READ)))


def dataset_summary(splits: dict[str, Sequence[dict]]) -> dict:
    """{split: records} -> {split: samples, how often each right answer comes, an example of each}; an empty split is
    left out."""
    result = {}
    for split, records in splits.items():
        classes, examples = Counter(), {}
        for i in evenly_spread(records):
            with suppress(UserError):
                record, sample = records[i], sample_from_record(records[i])
                answer = reference_answer(sample)
                name = sample.options.get(answer, answer) or sample.answer.strip()[:80]
                classes[name] += 1
                if record.get("video"):
                    examples.setdefault(name, {"id": record_name(record), "video": record["video"], "class": name})
        classes = dict(sorted(classes.items())) if len(classes) <= MAX_CLASSES else {}
        if len(records):
            examples = list(examples.values())[:MAX_EXAMPLES]
            result[split] = {"samples": len(records), "classes": classes, "examples": examples}
    return result


def data_question(records: Sequence[dict]) -> dict | None:
    """{"text", "system"}: the question that a run on these records learns to answer, the system turn before it ("" =
    none). None where no record has a question.

    It is the most frequent one. Where the questions differ in their options alone, as generate.py writes them for
    folders of classes, it has all the options that occur.
    """
    questions = Counter()
    for i in evenly_spread(records):
        with suppress(UserError):
            first, question = read_form(records[i]).messages[0], sample_from_record(records[i]).question
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

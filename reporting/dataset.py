"""Facts about a dataset for data.json, {split: facts}, which a run's page shows; ranges are [least, median, most]."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

from answers import LETTERS, parse_options
from model import UserError
from records import TAG, read_form, record_name
from rewards import plain_text, reference_answer, sample_from_record

MAX_READ = 1000  # records whose text is read, evenly spread over the dataset
MAX_MEASURED = 32  # records whose clips are opened and whose tokens are counted
MAX_CLASSES, MAX_QUESTIONS, MAX_EXAMPLES = 40, 8, 6  # listed; more different answers than that are no classes
OPTION = re.compile(r"\([A-Z]\) .+")  # a line of a question, as generate.py writes it


def dataset_summary(splits: dict[str, Sequence[dict]], processor) -> dict:
    """{split: records} -> {split: facts} for data.json; an empty split is left out. No clip is decoded whole."""
    facts = lambda records: {"samples": len(records)} | text_facts(records) | clip_facts(records, processor)
    return {name: facts(records) for name, records in splits.items() if len(records)}


def evenly_spread(records: Sequence[dict], most: int) -> Iterator[dict]:
    """At most so many of the records. Here and below the loader reports a UserError, when it comes to the record."""
    count = min(most, len(records))
    for i in range(count):
        with suppress(UserError):
            yield records[i * len(records) // count]


def text_facts(records: Sequence[dict]) -> dict:
    """Classes (the words of the right answers), question templates, and an example of each class."""
    classes, questions, examples = Counter(), Counter(), {}
    for record in evenly_spread(records, MAX_READ):
        with suppress(UserError):
            sample = sample_from_record(record)
            answer = reference_answer(sample)
            name = sample.options.get(answer, answer) or sample.answer.strip()[:80]
            classes[name] += 1
            questions[question_template(sample.question)] += 1
            if record.get("video"):
                examples.setdefault(name, {"id": record_name(record), "video": record["video"], "class": name})
    few = dict(sorted(classes.items())) if len(classes) <= MAX_CLASSES else {}
    examples = list(examples.values())[:MAX_EXAMPLES]
    return {"classes": few, "questions": questions.most_common(MAX_QUESTIONS), "examples": examples}


def data_question(records: Sequence[dict]) -> dict | None:
    """{"text", "system", "origin"}: the question that a run on these records learns to answer, the system turn before
    it ("" = none), and in words where it comes from. None where no record has a question.

    It is the most frequent one. Where the questions differ in their options alone, as generate.py writes them for
    folders of classes, it has all the options that occur.
    """
    asked = Counter()
    for record in evenly_spread(records, MAX_READ):
        with suppress(UserError):
            first, question = read_form(record, "record").messages[0], sample_from_record(record).question
            asked[TAG.sub("", question).strip(), plain_text(first.content) if first.role == "system" else ""] += 1
    if not asked:
        return None
    (text, system), _ = asked.most_common(1)[0]
    lines = [line for text, _ in asked for line in text.split("\n")]
    options = sorted({line[4:] for line in lines if OPTION.fullmatch(line)})
    stems = {tuple(line for line in text.split("\n") if not OPTION.fullmatch(line)) for text, _ in asked}
    origin = "that of the training data"
    if len(asked) > 1 and len(stems) == 1 and 0 < len(options) <= len(LETTERS):
        text = "\n".join([*stems.pop(), *(f"({letter}) {words}" for letter, words in zip(LETTERS, options))])
        origin += f", with all {len(options)} options"
    elif len(asked) > 1:
        origin = f"the most frequent of {len(asked)} in the training data"
    return {"text": text, "system": system, "origin": origin}


def question_template(text: str) -> str:
    """A question without its clips, its list of options and its numbers: what many questions share."""
    text = re.sub(r"<(video|image)>", "", text)
    options = parse_options(text)
    for label, words in options.items():  # label, mark and words
        text = re.sub(rf"\W{{0,2}}\b{label}\W{{1,3}}{re.escape(words)}", "", text, count=1, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", text)).strip()
    return (text[:160] + f" [{len(options)} options]" * bool(options)).strip()


def clip_facts(records: Sequence[dict], processor) -> dict:
    """[least, median, most] of tokens, frames and seconds; how often each size comes; records that cannot be read."""
    values, sizes, unreadable = defaultdict(list), defaultdict(Counter), {}
    records = list(evenly_spread(records, MAX_MEASURED))
    for record in records:
        try:
            ids, trained, plans = processor.layout(record, True, record_name(record))
        except UserError as error:
            unreadable[record_name(record)] = str(error)
            continue
        values["vision_tokens"].append(sum(plan.num_tokens for plan in plans))
        values["tokens"].append(len(ids))
        values["answer_tokens"].append(int(trained.sum()))
        for plan in plans:
            values["frames"].append(len(plan.indices))
            for name, (height, width) in (("sizes", plan.size), ("source_sizes", plan.source_size)):
                sizes[name][f"{width} x {height}"] += 1
            if plan.kind == "video":
                values["seconds"].append(round(plan.total_frames / plan.source_fps, 3))
                values["source_fps"].append(round(plan.source_fps, 3))
    ranges = {key: [min(v), statistics.median(v), max(v)] for key, v in values.items()}
    common = {name: dict(counts.most_common(6)) for name, counts in sizes.items()}
    return {"measured": len(records), "unreadable": unreadable, **ranges, **common}

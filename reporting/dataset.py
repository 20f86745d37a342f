"""Facts about a dataset: counted by `dataset_summary` for data.json, shown by `dataset`.

data.json is {split: facts}. Counts of classes and questions are {text: count} or [[text, count]]; tokens, frames and
seconds are [least, median, most].
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence

from reporting.frames import clip_folders
from reporting.numbers import dict_of, flatten
from reporting.run import Run, read_object

MAX_READ = 1000  # records whose text is read, evenly spread over the dataset
MAX_MEASURED = 32  # records whose clips are opened and whose tokens are counted
MAX_CLASSES, MAX_QUESTIONS, MAX_EXAMPLES = 40, 8, 6  # listed; more different answers than that are no classes

# Key in data.json: line of the table
RANGES = {
    "tokens": "tokens per sample",
    "vision_tokens": "vision tokens",
    "answer_tokens": "answer tokens",
    "frames": "sampled frames per clip",
    "seconds": "clip length, seconds",
    "source_fps": "frame rate of the file",
}
SIZES = {"sizes": "width x height, resized", "source_sizes": "width x height, of the file"}


# -- Counting. These functions import the data modules when called: a page needs no torch.


def dataset_summary(splits: dict[str, Sequence[dict]], processor) -> dict:
    """{split: records} -> {split: facts} for data.json; an empty split is left out. No clip is decoded whole."""
    return {
        name: text_facts(records) | clip_facts(evenly_spread(records, MAX_MEASURED), processor)
        for name, records in splits.items()
        if len(records)
    }


def evenly_spread(records: Sequence[dict], count: int) -> list[dict]:
    total = len(records)
    return [records[i * total // count] for i in range(count)] if total > count else list(records)


def text_facts(records: Sequence[dict]) -> dict:
    """Classes (the words of the right answers), question templates, and an example of each class."""
    from model import UserError
    from records import record_name
    from rewards import reference_answer, sample_from_record

    read, classes, questions, examples = evenly_spread(records, MAX_READ), Counter(), Counter(), {}
    for record in read:
        try:
            sample = sample_from_record(record)
        except UserError:  # reported by the loader when it comes to this record
            continue
        answer = reference_answer(sample)
        name = sample.options.get(answer, answer) or sample.answer.strip()[:80]
        classes[name] += 1
        questions[question_template(sample.question)] += 1
        if record.get("video"):
            examples.setdefault(name, {"id": record_name(record), "video": record["video"], "class": name})
    return {
        "samples": len(records),
        "looked_at": len(read),
        "classes": dict(sorted(classes.items())) if len(classes) <= MAX_CLASSES else {},
        "different_answers": len(classes),
        "different_questions": len(questions),
        "questions": questions.most_common(MAX_QUESTIONS),
        "examples": list(examples.values())[:MAX_EXAMPLES],
    }


def question_template(text: str) -> str:
    """A question without its clips, its list of options and its numbers: what many questions share."""
    from answers import parse_options

    text = re.sub(r"<(video|image)>", "", text)
    options = parse_options(text)
    for label, words in options.items():  # label, mark and words
        text = re.sub(rf"\W{{0,2}}\b{label}\W{{1,3}}{re.escape(words)}", "", text, count=1, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", text)).strip()
    return (text[:160] + f" [{len(options)} options]" * bool(options)).strip()


def clip_facts(records: list[dict], processor) -> dict:
    """[least, median, most] of tokens, frames and seconds; how often each size comes; records that cannot be read."""
    from model import UserError
    from records import record_name

    values = {key: [] for key in RANGES}
    sizes, source_sizes, unreadable = Counter(), Counter(), {}
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
            sizes[f"{plan.size[1]} x {plan.size[0]}"] += 1
            source_sizes[f"{plan.source_size[1]} x {plan.source_size[0]}"] += 1
            values["frames"].append(len(plan.indices))
            if plan.kind == "video":
                values["seconds"].append(round(plan.total_frames / plan.source_fps, 3))
                values["source_fps"].append(round(plan.source_fps, 3))
    ranges = {key: [min(v), statistics.median(v), max(v)] for key, v in values.items() if v}
    common = {"sizes": dict(sizes.most_common(6)), "source_sizes": dict(source_sizes.most_common(6))}
    return {"measured": len(records), "unreadable": unreadable, **ranges, **common}


# -- Showing


def dataset(run: Run) -> dict | None:
    """What the section shows; None where nothing is known of the data."""
    splits = {name: facts for name, facts in run.data.items() if isinstance(facts, dict)}
    metadata = read_object(run.data_path.parent / "metadata.json", run.notes) if run.data_path else {}
    options = flatten({key: value for key, value in metadata.items() if key != "counts"})
    if not splits and not metadata:
        return None
    counts = [dict_of(facts.get("classes")) for facts in splits.values()]
    names = sorted({name for each in counts for name in each})
    return {
        "path": str(run.data_path or ""),
        "splits": splits,
        "ranges": RANGES,
        "sizes": SIZES,
        "classes": {name: [each.get(name, 0) for each in counts] for name in names},
        "most_frequent": max((n for each in counts[:1] for n in each.values()), default=1),
        "options": [(key.removeprefix("options/").replace("/", " "), value) for key, value in options],
        "examples": next((facts["examples"] for facts in splits.values() if facts.get("examples")), []),
        "folders": clip_folders(run.config),
    }

"""A dataset's sheet for the report: counts, classes and question forms of its records; of some of them frames, seconds,
sizes and tokens, as the model gets them. No more is decoded than a clip's first frame."""

import re
import statistics
from collections import Counter
from collections.abc import Sequence

from dataset.records import Media, record_name
from model import UserError
from rewards import Sample, parse_options, reference_answer, sample_from_record

LOOKED = 1000  # records whose text is read, evenly spread over the dataset
MEASURED = 32  # records whose clips are planned and whose tokens are counted
CLASSES, FORMS, EXAMPLES = 40, 8, 6  # most that are told: more different answers than that are no classes


def sheet(splits: dict[str, Sequence[dict]], processor) -> dict:
    """{name of a split: its records} -> {name: facts}, as JSON can hold them; an empty split is left out."""
    return {name: split_facts(records, processor) for name, records in splits.items() if len(records)}


def spread(records: Sequence[dict], most: int) -> list[dict]:
    """At most so many records, evenly spread."""
    count = len(records)
    return [records[i * count // most] for i in range(most)] if count > most else list(records)


def split_facts(records: Sequence[dict], processor) -> dict:
    looked, classes, forms, examples = spread(records, LOOKED), Counter(), Counter(), {}
    for record in looked:
        try:
            sample = sample_from_record(record)
        except UserError:  # told by the loader when it comes to it
            continue
        label = answer_class(sample)
        classes[label] += 1
        forms[question_form(sample.question)] += 1
        if record.get("video"):
            examples.setdefault(label, {"id": record_name(record), "video": record["video"], "class": label})
    facts = {"samples": len(records), "looked_at": len(looked)}
    facts["classes"] = dict(sorted(classes.items())) if len(classes) <= CLASSES else {}
    facts["different_answers"], facts["different_questions"] = len(classes), len(forms)
    facts["questions"] = forms.most_common(FORMS)
    facts["examples"] = list(examples.values())[:EXAMPLES]
    return facts | measured(spread(records, MEASURED), processor)


def answer_class(sample: Sample) -> str:
    """The right answer's words."""
    answer = reference_answer(sample)
    return sample.options.get(answer, answer) or sample.answer.strip()[:80]


def question_form(text: str) -> str:
    """A question without its clips, its list of options and its numbers: what many questions share."""
    text = re.sub(r"<(video|image)>", "", text)
    options = parse_options(text)
    for label, words in options.items():  # label, mark and words
        text = re.sub(rf"\W{{0,2}}\b{label}\W{{1,3}}{re.escape(words)}", "", text, count=1, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", text)).strip()
    return (text[:160] + f" [{len(options)} options]" * bool(options)).strip()


def measured(records: list[dict], processor) -> dict:
    """Three numbers (least, median, most) of each measure of a record or clip, and how often each size comes."""
    found = {name: [] for name in ("tokens", "vision_tokens", "answer_tokens", "frames", "seconds", "source_fps")}
    sizes, sources, unreadable = Counter(), Counter(), {}
    for record in records:
        try:
            pieces, plans = processor.layout(record, True, record_name(record))
        except UserError as error:
            unreadable[record_name(record)] = str(error)
            continue
        texts = [(len(piece), is_answer) for piece, is_answer in pieces if not isinstance(piece, Media)]
        vision = sum(plan.num_tokens for plan in plans)
        found["vision_tokens"].append(vision)
        found["tokens"].append(vision + sum(length for length, _ in texts))
        found["answer_tokens"].append(sum(length for length, is_answer in texts if is_answer))
        for plan in plans:
            sizes[f"{plan.size[1]} x {plan.size[0]}"] += 1
            sources[f"{plan.source_size[1]} x {plan.source_size[0]}"] += 1
            found["frames"].append(len(plan.indices))
            if plan.kind == "video":
                found["seconds"].append(round(plan.total_frames / plan.source_fps, 3))
                found["source_fps"].append(round(plan.source_fps, 3))
    spans = {name: [min(values), statistics.median(values), max(values)] for name, values in found.items() if values}
    told = {"sizes": dict(sizes.most_common(6)), "source_sizes": dict(sources.most_common(6))}
    return {"measured": len(records), "unreadable": unreadable, **spans, **told}

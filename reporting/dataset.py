"""The dataset sheet: how many samples of which kind, what they look like, what the model gets of them (data.json, which
dataset/sheet.py made; metadata.json, which generate.py wrote beside the data)."""

from html import escape

from reporting.charts import number, short
from reporting.frames import Strips, clip_folders
from reporting.pieces import bar, flat_text, plain, table
from reporting.reading import Run, read_object

# Line of the table, key in data.json: [least, median, most]
SPANS = (
    ("tokens a sample", "tokens"),
    ("of them vision", "vision_tokens"),
    ("of them answer", "answer_tokens"),
    ("frames a clip, for the model", "frames"),
    ("seconds a clip", "seconds"),
    ("frames a second, in the file", "source_fps"),
)
SIZES = (("width x height, for the model", "sizes"), ("width x height, in the file", "source_sizes"))


def dataset(run: Run) -> str:
    """The section's inside; "" where nothing is known of the data."""
    splits = {name: facts for name, facts in run.data.items() if isinstance(facts, dict)}
    parts = [sheet(splits), classes(splits), questions(splits), made(run)]
    html = "".join(f"<div>{part}</div>" for part in parts if part)
    if not html:
        return ""
    lead = f'<p class="soft">{escape(str(run.data_path or ""))}</p>'
    return f'{lead}<div class="side">{html}</div>{examples(run, splits)}'


def span(values) -> str:
    """[least, median, most] as "147 (145 to 150)", or one number where they are equal."""
    if not isinstance(values, list) or len(values) != 3 or not all(map(number, values)):
        return "–"
    least, median, most = (escape(short(value)) for value in values)
    return median if least == most else f"{median} <small>({least} to {most})</small>"


def counts(facts: dict, name: str) -> dict:
    """{label: count} of a split; what is no count is left out."""
    found = facts.get(name)
    return {label: n for label, n in found.items() if number(n)} if isinstance(found, dict) else {}


def sheet(splits: dict) -> str:
    if not splits:
        return ""
    each = splits.values()
    rows = [("samples", *(escape(plain(facts.get("samples", "–"))) for facts in each))]
    rows += [(line, *(span(facts.get(key)) for facts in each)) for line, key in SPANS]
    rows += [(line, *(escape(", ".join(counts(facts, key))) or "–" for facts in each)) for line, key in SIZES]
    broken = [facts["unreadable"] for facts in each if isinstance(facts.get("unreadable"), dict)]
    told = [f"{escape(name)}: {escape(plain(why))}" for found in broken for name, why in found.items()]
    some = ", ".join(escape(plain(facts.get("measured", 0))) for facts in each)
    lead = f'<p class="soft">Median, and least to most, over {some} samples, evenly spread.</p>'
    faults = f'<p class="bad">Cannot be read: {"; ".join(told[:8])}</p>' if told else ""
    return f"<h3>Splits</h3>{lead}{table(rows, ['', *map(escape, splits)])}{faults}"


def classes(splits: dict) -> str:
    """How often each right answer comes, with bars for the first split."""
    found = [counts(facts, "classes") for facts in splits.values()]
    labels = sorted({label for each in found for label in each})
    if not labels:
        return ""
    most = max(found[0].values(), default=0) or 1
    rows = []
    for label in labels:
        numbers = (f"{each.get(label, 0):,}" for each in found)
        rows.append((escape(label), *numbers, bar(found[0].get(label, 0) / most)))
    return f"<h3>Classes</h3>{table(rows, ['right answer', *map(escape, splits), ''])}"


def questions(splits: dict) -> str:
    """The forms that questions have, the commonest first."""
    rows = []
    for name, facts in splits.items():
        forms = facts.get("questions") if isinstance(facts.get("questions"), list) else []
        forms = [form for form in forms if isinstance(form, list) and len(form) == 2]
        rows += [(escape(name), escape(plain(text)), escape(plain(n))) for text, n in forms]
        more = facts.get("different_questions")
        if number(more) and more > len(forms):
            rows.append((escape(name), f"<small>and {more - len(forms):,} more forms</small>", ""))
    return f"<h3>Question forms</h3>{table(rows, ['', 'numbers as #', 'samples'])}" if rows else ""


def made(run: Run) -> str:
    """metadata.json beside the data: with which options it was drawn."""
    found = read_object(run.data_path.parent / "metadata.json", run.notes) if run.data_path else {}
    rest = {key: value for key, value in found.items() if key != "counts"}
    facts = (f"{key.replace('options/', '').replace('/', ' ')} = {plain(value)}" for key, value in flat_text(rest))
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<h3>How it was made</h3><ul class="chips">{chips}</ul>' if chips else ""


def examples(run: Run, splits: dict) -> str:
    """A strip of frames for a sample of each class."""
    found = [facts["examples"] for facts in splits.values() if isinstance(facts.get("examples"), list)]
    strips, rows = Strips(clip_folders(run.config)), []
    for example in found[0] if found else ():
        if isinstance(example, dict) and (html := strips.html(example.get("video"))):
            name = f"{escape(plain(example.get('class', '')))} <small>{escape(plain(example.get('id', '')))}</small>"
            rows.append(f'<div class="example"><h4>{name}</h4>{html}</div>')
    return f'<h3>One of each class</h3><div class="examples">{"".join(rows)}</div>' if rows else ""

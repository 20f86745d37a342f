"""The dataset sheet: how many samples of which kind, what they look like, what the model gets of them."""

import base64
from html import escape

from reporting.charts import number
from reporting.pieces import flat_text, plain, table
from reporting.reading import Run, read_object

MAX_PREVIEW = 400_000  # bytes of a dataset's preview.png that is put into the page


def dataset(run: Run) -> str:
    """metadata.json and preview.png beside the data: how many clips of each kind, how they were made."""
    if run.data_path is None:
        return ""
    found = read_object(run.data_path.parent / "metadata.json", run.notes)
    counts = found.get("counts") if isinstance(found.get("counts"), dict) else {}
    counts = {part: n for part, n in counts.items() if isinstance(n, dict)}
    labels = sorted({label for n in counts.values() for label in n})
    rows = [(escape(label), *(escape(plain(n.get(label, 0))) for n in counts.values())) for label in labels]
    rows += [("all", *(str(sum(filter(number, n.values()))) for n in counts.values()))] if rows else []
    parts = [f"<div><h3>Clips</h3>{table(rows, ['', *map(escape, counts)])}</div>"] if rows else []
    rest = {key: value for key, value in found.items() if key != "counts"}
    facts = (f"{key.replace('options/', '').replace('/', ' ')} = {plain(value)}" for key, value in flat_text(rest))
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    parts += [f'<div><h3>How they were made</h3><ul class="chips">{chips}</ul></div>'] if chips else []
    preview, picture = run.data_path.parent / "preview.png", ""
    if preview.is_file() and preview.stat().st_size <= MAX_PREVIEW:
        url = "data:image/png;base64," + base64.b64encode(preview.read_bytes()).decode()
        picture = f'<h3>Samples</h3><img class="preview" src="{url}" alt="frames of some clips of the dataset">'
    lead = f'<p class="soft">{escape(str(run.data_path))}</p>'
    return f'{lead}<div class="side">{"".join(parts)}</div>{picture}' if parts or picture else ""

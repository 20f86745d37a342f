"""A run's folder -> one HTML page that needs nothing else: set-up, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

This file makes plain values, assets/report.html, a Jinja2 template, the HTML; its script draws the curves. Every text
is escaped, and the page's policy lets nothing run or load but its own style and script.
"""

# ruff: noqa: E402, I001
from config import GRPO, SFT, Report, as_dict, cli, parse  # first: it handles Ctrl-C

import base64
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
from jinja2 import Environment

from answers import LETTERS
from checkpoint import BEST, METRICS, ROLLOUTS, RUN, read_json, write_file
from clips import encode_image
from model import UserError, nearest_path
from records import IMAGE_SUFFIXES, TAG, data_files, read_form, record_name, spread
from rewards import Sample, plain_text, read_answer, reference_answer, sample_from_record

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
MAX_CLASSES = 30  # of a confusion matrix that is shown
MAX_READ = 1000  # records whose text is read, spread over the dataset
MAX_LISTED, MAX_EXAMPLES = 40, 6  # classes of a dataset: more different answers are no classes
OPTION = re.compile(r"\([A-Z]\) .+")  # a line of a question, as generate.py writes it
FRAMES = 8  # shown of a clip
SIDE = 168  # pixels: larger frames are shrunk for the page, their longest side to this
WINDOW = 16 * 2**20  # bytes read at either end of rollouts.jsonl, which may have gigabytes
KINDS = {METRICS: {"step": int | float, "evaluation": dict | None}}  # of what a line must hold, or may
KINDS[ROLLOUTS] = {"step": int, "prompt": int, "id": str | int | float | None, "reward": int | float, "rewards": dict}
TILES = [  # label, key, its finite values (N,) -> (value, remark)
    ("Held-out accuracy", "eval_accuracy", lambda y: (f"{100 * y[-1]:.1f} %", f"from {100 * y[0]:.1f} % at first")),
    ("Reward", "reward", lambda y: (f"{y[-10:].mean():.3g}", f"from {y[:10].mean():.3g}; means of 10 steps")),
    ("Loss", "loss", lambda y: (f"{y[-10:].mean():.3g}", f"from {y[:10].mean():.3g}; means of 10 steps")),
    ("Steps", "ms", lambda y: (f"{len(y):,}", f"{y.sum() / 60_000:.1f} min of training")),
    ("Throughput", "tokens_per_second", lambda y: (f"{np.median(y):,.0f}", "tokens per second, median")),
    ("Memory", "gib", lambda y: (f"{y.max():.2f} GiB", "peak")),
]


def read_run(folder: Path) -> dict:
    """What a run's folder holds, and the page shows. {} or [] for a file that is not there. UserError without a run."""
    if not (folder / RUN).is_file():
        expected = f"expected a run's folder, the --output_dir of a training{nearest_path(folder)}"
        raise UserError(f"{folder}: no {RUN} in it; {expected}")
    read = lambda path: read_json(path) if path.is_file() else {}
    info, metrics = read(folder / RUN), read_lines(folder / METRICS)
    run = {"name": folder.resolve().name, "info": info, "config": info.pop("config", {})}
    run |= {"best": read(folder / BEST), "data": read(folder / "data.json"), "groups": read_groups(folder / ROLLOUTS)}
    run["default"] = as_dict(GRPO() if "num_generations" in run["config"] else SFT())
    data = Path(run["config"].get("data_path") or "").parent
    run["data_options"] = read(data / "metadata.json").get("options", {})
    run["columns"] = table = columns(metrics)
    if {"reward", "loss"} <= table.keys():  # GRPO's loss says little, and is another quantity than SFT's
        table["policy_loss"] = table.pop("loss")
    values = {key: y[np.isfinite(y)] for key, (_, y) in table.items()}
    run["tiles"] = {label: tile(values[key]) for label, key, tile in TILES if len(values.get(key, ()))}
    if run["best"]:
        run["tiles"]["Best checkpoint"] = f"{100 * run['best']['accuracy']:.1f} %", f"step {run['best']['step']}"
    stats = [row["evaluation"] | {"step": row["step"]} for row in reversed(metrics) if row.get("evaluation")]
    run["confusion"] = next((each for each in stats if 0 < len(each.get("confusion", ())) <= MAX_CLASSES), None)
    run["controls"] = next((each for each in stats if each.get("controls")), None)
    return run


def read_lines(path: Path, most: int | None = None) -> list[dict]:
    """Objects of a .jsonl, without a line that a crash cut; most: of the first and the last so many bytes. UserError
    for a line that no trainer wrote."""
    rows, data = [], b""
    if path.is_file():
        with path.open("rb") as file:
            data = file.read(most) + file.readline()
            file.seek(max(file.tell(), path.stat().st_size - (most or 0)))
            data += file.read()
    for number, line in enumerate(data.splitlines(), 1):
        with suppress(json.JSONDecodeError, UnicodeDecodeError):
            rows.append(json.loads(line))
            facts = rows[-1] if isinstance(rows[-1], dict) else {}
            if wrong := [key for key, kind in KINDS[path.name].items() if not isinstance(facts.get(key), kind)]:
                problem = f"line {number} of those read is {line[:60].decode(errors='replace')!r}"
                raise UserError(f"{path}: {problem}, expected an object with {wrong[0]} as the trainers write it")
    return rows


# -- Rollouts


def read_groups(path: Path) -> list[dict]:
    """The completions of each prompt at each step, from the best to the worst."""
    groups = {}
    for row in read_lines(path, WINDOW):
        rows = groups.setdefault((row["step"], row["prompt"], row.get("id")), [])
        rows.append(rows[0] | row if rows else row)  # clip, question and answer stand in the first of a group
    result = []
    for (step, _, sample), rows in groups.items():
        if "question" in rows[0]:
            mean = sum(row["reward"] for row in rows) / len(rows)
            rows.sort(key=lambda row: -row["reward"])
            result.append({"step": step, "sample": sample, "mean": mean, "rows": rows})
    return result


def before_and_after(groups: list[dict]) -> list[list[dict]]:
    """[[a prompt's earliest group, its latest]], from the prompt that gained most to the one that gained least."""
    early, late = ({group["sample"]: group for group in order} for order in (reversed(groups), groups))
    pairs = [[early[name], late[name]] for name in late if late[name]["step"] > early[name]["step"]]
    return sorted(pairs, key=lambda pair: pair[0]["mean"] - pair[1]["mean"])


def choose_cards(groups: list[dict], shown: set[str], most: int) -> dict[str, list[list[dict]]]:
    """{heading: at most so many cards}, a card being groups of one prompt: the same prompt at two steps; of the last
    step and the first the best group and the worst. Prompts in `shown` are left out, and those chosen are added."""
    steps = [group["step"] for group in groups]
    cards = {"The same prompt, before and after": before_and_after(groups)}
    for step, heading in {max(steps, default=0): "Last rollouts", min(steps, default=0): "First rollouts"}.items():
        cards[heading] = sorted(([g] for g in groups if g["step"] == step), key=lambda card: -card[0]["mean"])
    for heading, ranked in cards.items():
        choice = [*ranked[:1], *ranked[1:][::-1]]  # the best, then from the worst on
        cards[heading] = [card for card in choice if card[0]["sample"] not in shown][:most]
        shown.update(card[0]["sample"] for card in cards[heading])
    return cards


# -- Curves

# Title, unit ("%": of shares, drawn times 100), pattern of the keys, section where runs are compared. The first fits.
GROUPS = [
    ("Accuracy", "%", r"^(?!class/|reward).*accuracy", "Results"),
    ("Accuracy by class", "%", r"^class/", "Results"),
    ("Reward", "points", r"^reward(?!.*std)", "Results"),
    ("Loss", "", r"loss$", "Training"),
    ("Reward standard deviation", "", r"^(reward|group).*std", "Training"),
    ("Zero-variance groups", "% of the groups", r"all_(right|wrong)|variance", "Training"),
    ("KL to the reference", "nats a token", r"^kl", "Training"),
    ("Truncated completions", "%", r"truncated", "Training"),
    ("Completion length", "tokens", r"length", "Results"),
    ("Clipped fraction", "% of the tokens", r"^clip|capped", "Training"),
    ("Entropy", "nats a token", r"entropy", "Training"),
    ("Gradient norm", "before clipping", r"grad_norm", "Training"),
    ("Learning rate", "", r"^lr$", "Training"),
    ("Log-prob gap, sampler to trainer", "nats", r"gap", "Training"),
    ("Tokens per step", "", r"tokens$", "Speed and memory"),
    ("Throughput", "tokens per second", r"per_second", "Speed and memory"),
    ("Step time", "ms", r"^ms$", "Speed and memory"),
    ("Time", "seconds", r"seconds", "Speed and memory"),
    ("Waiting for data", "% of the step", r"^wait", "Speed and memory"),
    ("Memory", "GiB, peak", r"gib", "Speed and memory"),
    ("Other", "", "", "Training"),
]
# Of several runs two charts of each section are shown, these before others, and the rest is folded
LEADING = ("eval_accuracy", "reward", "loss", "kl", "tokens_per_second", "gib")
LOGARITHMIC = ("Loss", "Gradient norm", "Log-prob gap, sampler to trainer")
NOT_CHARTED = {"step", "epoch", "eval_count", "evaluation"}
COLOURS = 8  # classes s0 ... s7 of the page
POINTS = 1000  # a longer curve is thinned to so many of its points


def columns(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {key: (steps (N,), values (N,))}, sorted; of a step written twice the later row counts.
    A null is NaN (JSON has none); a key with nothing else is left out. "class/X" is the accuracy on class X."""
    points = {}
    for row in rows:
        table = (row.get("evaluation") or {}).get("confusion", {})
        classes = {f"class/{true}": said.get(true, 0) / sum(said.values()) for true, said in table.items()}
        for key, value in (row | (classes if 1 < len(classes) <= COLOURS else {})).items():
            if (value is None or type(value) in (int, float)) and key not in NOT_CHARTED:
                points.setdefault(key, {})[row["step"]] = np.nan if value is None else value
    result = {key: tuple(np.array(sorted(value_at.items()), float).T) for key, value_at in points.items()}
    return {key: (steps, values) for key, (steps, values) in result.items() if not np.isnan(values).all()}


def charts(runs: dict[str, dict]) -> tuple[list[dict], list[str]]:
    """{name of the run: columns} -> charts in the order of GROUPS, and "key value" of what never changes. One run: a
    chart a group. Several, laid over each other: a chart a key."""
    result, constant, several = {}, [], len(runs) > 1
    groups = {key: next(g for g in GROUPS if re.search(g[2], key)) for run in runs.values() for key in run}
    for key, (title, unit, _, section) in sorted(groups.items(), key=lambda item: GROUPS.index(item[1])):
        values = np.concatenate([run[key][1] for run in runs.values() if key in run])
        if values.min() == values.max():
            constant.append(f"{label(key)} {values[0]:.4g}")
            continue
        facts = {"unit": unit, "section": section, "log": title in LOGARITHMIC, "leading": key in LEADING}
        alone = sum(group[0] == title for group in groups.values()) == 1
        if title == "Other" or several and not alone:
            title = label(key)[0].upper() + label(key)[1:]
        curves = result.setdefault(title, facts | {"title": title, "curves": []})["curves"]
        for number, (name, run) in enumerate(runs.items()):
            if key in run and several:
                curves.append(curve(name, *run[key], number, unit))
            elif key in run:
                curves.append(curve(label(key), *run[key], len(curves), unit))
    return list(result.values()), constant


def curve(name: str, steps: np.ndarray, values: np.ndarray, colour: int, unit: str) -> dict:
    """What the page's script draws: points "step,value"; "step," where the value is not finite."""
    scale = 100 if unit.startswith("%") and np.nanmax(np.abs(values)) <= 1 else 1
    every = -(-len(values) // POINTS)
    points = zip(steps[::every], values[::every] * scale)
    points = " ".join(f"{step:.6g}," + (f"{value:.6g}" if np.isfinite(value) else "") for step, value in points)
    return {"name": name, "colour": colour % COLOURS, "points": points}


def label(key: str) -> str:
    """A key as a legend: 'reward/accuracy' -> 'reward accuracy', 'class/Ascending' -> 'Ascending'."""
    return key.removeprefix("class/").replace("/", " ").replace("_", " ").replace("kl", "KL")


# -- Clips as the model saw them: the frames that video.py samples and resizes, as small JPEGs


def strip(video: str | None, config: dict) -> dict:
    """{"images": [(seconds, data URL)], "note"} or {"error"} of a record's `video`, in image_folder, in videos/ beside
    the data, or beside the data."""
    from video import Options  # not at the top: it imports torch, and --help must not wait for that

    if not isinstance(video, str):
        return {}
    texts = (config.get(key) or "" for key in ("data_path", "eval_data_path"))
    data = [Path(file).parent for text in texts for file, _ in data_files(text)]
    folders = [Path(config.get("image_folder") or ""), *(folder / sub for folder in data for sub in ("videos", ""))]
    path = next((folder / video for folder in folders if (folder / video).is_file()), None)
    if path is None:
        return {"error": f"{video}: no such file"}
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
    try:
        options = Options.from_args(kind, SimpleNamespace(**(as_dict(SFT()) | config)), {})
        return sampled(kind, str(path), options)
    except (UserError, OSError) as error:
        return {"error": str(error)}


@lru_cache(256)  # a run's page is written again and again
def sampled(kind: str, path: str, options) -> dict:
    """The strip of a clip: FRAMES of its sampled frames. UserError naming the file."""
    from video import from_patches, plan_clip, read_clip

    plan = plan_clip(kind, (path,), options)
    count = len(plan.indices)
    shown = np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int).tolist()
    few = replace(plan, indices=[plan.indices[k] for k in shown], seeks=[plan.seeks[k] for k in shown if plan.seeks])
    pictures = [jpeg(picture) for picture in from_patches(read_clip(few).numpy(), few.grid_thw)]
    note = f"{len(shown)} of {count} sampled frames, {plan.size[1]} x {plan.size[0]} pixels"
    return {"images": list(zip((plan.times[k] for k in shown), pictures)), "note": note}


def jpeg(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URL, at most SIDE pixels a side."""
    scale = min(1.0, SIDE / max(picture.shape[:2]))
    height, width = (max(2, int(side * scale)) for side in picture.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").reformat(width, height, "yuvj444p")
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(frame, "mjpeg", qmin="2", qmax="3")).decode()


# -- What a run's records ask, and facts about them, for trainer_state.json and data.json


def some_samples(records: Sequence[dict]) -> Iterator[Sample]:
    """At most MAX_READ, spread over the records. What is wrong with one the loader reports, when it comes to it."""
    for i in spread(range(len(records)), MAX_READ, seed=0):
        with suppress(UserError):
            yield sample_from_record(records[i])


def dataset_summary(splits: dict[str, Sequence[dict]]) -> dict:
    """{split: records} -> {split: samples, how often each right answer comes, an example of each}."""
    result = {}
    for split, records in splits.items():
        classes, examples = Counter(), {}
        for sample in some_samples(records):
            answer, record = reference_answer(sample), sample.record
            name = sample.options.get(answer, answer) or sample.answer.strip()[:80]
            classes[name] += 1
            if record.get("video"):
                examples.setdefault(name, {"id": record_name(record), "video": record["video"], "class": name})
        classes = dict(sorted(classes.items())) if len(classes) <= MAX_LISTED else {}
        if len(records):
            examples = list(examples.values())[:MAX_EXAMPLES]
            result[split] = {"samples": len(records), "classes": classes, "examples": examples}
    return result


def two_answers(records: Sequence[dict]) -> Iterator[str]:
    """A note where records have an `answer` that says other than their `solution`, which counts."""
    both = [each for each in some_samples(records) if None not in map(each.record.get, ("solution", "answer"))]
    said = [(each, read_answer(str(each.record["answer"]), each)) for each in both]
    differ = [each.record for each, answer in said if answer not in (None, read_answer(each.answer, each))]
    if differ:
        count = f"{len(differ)} of {len(both)} samples with both"
        yield f"solution and answer differ in {count}, the first {record_name(differ[0])}; the solution counts"


def data_question(records: Sequence[dict]) -> dict | None:
    """{"text", "system"}: the records' most frequent question, and the system turn before it ("" = none); None without.
    Where the questions differ in their options alone, as for folders of classes, it has all of these."""
    questions = Counter()
    for sample in some_samples(records):
        first = read_form(sample.record).messages[0]
        system = plain_text(first.content) if first.role == "system" else ""
        questions[TAG.sub("", sample.question).strip(), system] += 1
    if not questions:
        return None
    (text, system), _ = questions.most_common(1)[0]
    lines = [text.split("\n") for text, _ in questions]
    options = sorted({line[4:] for each in lines for line in each if OPTION.fullmatch(line)})
    stems = {tuple(line for line in each if not OPTION.fullmatch(line)) for each in lines}
    if len(questions) > 1 and len(stems) == 1 and 0 < len(options) <= len(LETTERS):
        text = "\n".join([*stems.pop(), *(f"({letter}) {words}" for letter, words in zip(LETTERS, options))])
    return {"text": text, "system": system}


# -- The page


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run to `output`, whole or not at all, and return it; or the page of several: curves over
    each other, the prompt that gained most, no prompt twice. UserError if it cannot be written."""
    runs, output = [read_run(Path(folder)) for folder in run_folders], Path(output)
    if len({run["name"] for run in runs}) < len(runs):  # a/sft and b/sft
        for run, folder in zip(runs, run_folders):
            run["name"] = str(folder)
    values, shown, several = {"runs": runs}, set(), len(runs) > 1
    pairs = [(k, pair) for k, run in enumerate(runs) for pair in before_and_after(run["groups"])[:1]]
    if several and pairs:
        values["example"] = max(pairs, key=lambda each: each[1][1]["mean"] - each[1][0]["mean"])
        shown.add(values["example"][1][0]["sample"])
    for run in runs:
        run["rollouts"] = choose_cards(run["groups"], shown, 1 if several else 2)
    values["charts"], values["constant"] = charts({run["name"]: run["columns"] for run in runs})
    environment = Environment(autoescape=True)
    environment.filters["frames"] = strip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(nonce=secrets.token_hex(16), exp=math.exp, shown=shown, **values)
    try:
        write_file(output, text.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    return output


def main(argv=None):
    cfg = parse(Report, argv)
    runs = [Path(run) for run in cfg.runs]
    folder = os.path.commonpath([run.absolute().parent for run in runs])  # the deepest that holds them all
    output = runs[0] / "report.html" if len(runs) == 1 else Path(folder) / "compare.html"
    print(write_report(runs, cfg.output or output))


if __name__ == "__main__":
    cli(main)

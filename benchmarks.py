"""Public video benchmarks from their published annotation files: `python infer.py --benchmark NAME DIR`.

assets/benchmarks.json describes each: its annotation files, the columns of a question, where clips lie, its own prompt.
infer.py asks the records of a Task as those of any dataset; Task.report makes two numbers of the answers: ours, by
judges.py and answers.py, and the official scorer's, its published rule stated anew, defects included.
"""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from answers import LETTERS, extract_answer
from evaluate import mean
from judges import judge_for
from model import UserError, nearest_path
from records import IMAGE_SUFFIXES, spread
from rewards import sample_from_record, without_label
from video import VIDEO_PIXELS

# What an annotation file calls a kind of question -> as judges.py has it; "" is not judged here
KINDS = {"regression": "MRA", "multiple-choice": "multiple choice", "open-ended": "", "yes_no": "yes or no",
         "multi-choice": "multiple choice", "caption_matching": "multiple choice"}  # fmt: skip
FRAME_RATE = 3  # of MVBench's folders of frames, which are TVQA's


@dataclass(frozen=True)
class Question:
    id: str
    task: str  # the row of the table that it counts in
    text: str
    answer: str  # a letter, a number, words, or "2.5 to 7.5"
    clips: list[str]  # where its clip may lie below the benchmark's folder; the first that is there counts
    options: dict[str, str]  # letter -> words, where they are not in the text
    kind: str
    span: tuple[float, float] | None  # seconds of the clip that it is about; None = all
    media: str  # video or image


def load_benchmarks() -> tuple[dict[str, dict], dict[str, str]]:
    """({name: its entry in assets/benchmarks.json, with name and family}, Video-R1's prompt by kind of question)"""
    data, result = json.loads((Path(__file__).parent / "assets/benchmarks.json").read_text(encoding="utf-8")), {}
    for family, entry in data["benchmarks"].items():
        for part in entry.get("parts", [""]):
            name, text = f"{family}-{part}" if part else family, json.dumps(entry).replace("{part}", part)
            result[name] = json.loads(text) | {"name": name, "family": family}
    return result, data["video-r1 prompt"]


# -- Annotation files -> questions


def rows_of(path: Path) -> list[dict]:
    """A row for each question, with the columns of the file."""
    text = path.read_text(encoding="utf-8-sig")
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".txt":  # Charades-STA: 3MSZA 24.3 30.4##person turn a light on.
        pairs = [line.split("##", 1) for line in lines]
        return [dict(zip(("clip", "start", "end"), head.split(), strict=True), sentence=text) for head, text in pairs]
    data, rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text), []
    if isinstance(data, list):  # a question, or Video-MME's clip with its `questions`
        return [entry | each for entry in data for each in entry.get("questions", [{}])]
    for clip, entry in data.items():
        if "timestamps" in entry:  # Charades-STA
            pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
            rows += [{"clip": clip, "start": start, "end": end, "sentence": text} for (start, end), text in pairs]
        else:  # TempCompass: {"direction": [{"question", "answer"}]}
            rows += [each | {"clip": clip, "task": task} for task, group in entry.items() for each in group]
    return rows


def read_question(row: dict, benchmark: dict) -> Question:
    """A row, with its file and number, by the columns that the benchmark names."""
    names, span = benchmark["columns"], None
    words, kind = row[names["options"]] or [] if "options" in names else [], names.get("kind")
    options = words if isinstance(words, dict) else dict(zip(LETTERS, words))
    plain = {letter: without_label(letter, text) for letter, text in options.items()}
    options = plain if all(plain[letter] != options[letter] for letter in options) else options  # else "A.M." is a word
    kind = row.get(kind, kind) or ("multiple choice" if options else "MRA")  # a column's, or the benchmark's
    if row.get("start") is not None:
        span = row["start"], row["end"]
    if kind == "time span":  # it is what is asked for; an end behind the clip's own stays as it is
        row, span = row | {"span": f"{span[0]} to {span[1]}"}, None
    answer = row[names["answer"]]
    if not isinstance(answer, str) or (isinstance(words, list) and answer in words):  # its place, or its words
        answer = LETTERS[answer if isinstance(answer, int) else words.index(answer)]
    folders = benchmark.get("folders", {}).get(row["file"], [""])
    clips = [clip.format(**row, folder=folder) for folder in folders for clip in benchmark["clips"]]
    clips = [clip.rpartition("/resolve/main/")[2] for clip in clips]  # MMVU names them on the hub
    name, task = (names[key].format(**row) for key in ("id", "task"))
    media, kind = row.get("data_type", "video"), KINDS.get(kind, kind)
    return Question(name, task, row[names["text"]], answer, clips, options, kind, span, media)


def read_questions(benchmark: dict, root: Path) -> list[Question]:
    name, files = benchmark["name"], benchmark["files"]
    expected = f"expected {' or '.join(files)} in it, clips in {benchmark['where']}"
    if not root.is_dir():
        raise UserError(f"--benchmark {name}: no such folder {root}; {expected}{nearest_path(root)}")
    paths = next(filter(None, (sorted(root.glob(pattern)) for pattern in files)), [])
    if not paths:
        raise UserError(f"--benchmark {name}: no annotation file in {root}; {expected}")
    questions = []
    for path in paths:
        try:
            rows = enumerate(rows_of(path))
            questions += [read_question(row | {"file": path.stem, "number": i}, benchmark) for i, row in rows]
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            what = f"not as it is published ({type(error).__name__}: {error}); see docs/benchmarks.md"
            raise UserError(f"{path}: {what}") from None
    return questions


# -- What the official scorers say of an answer: 0 to 1, None where they leave it out


def first_answer(text: str) -> str:
    block = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return (block[1] if block else text).strip()


def to_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def official_video_r1(text: str, q: Question) -> float | None:
    said, true = first_answer(text), first_answer(q.answer)
    if q.kind == "multiple choice":
        return float(said == true)
    if q.kind not in ("numerical", "MRA"):
        return None  # text: as ours, but for the stemming of its ROUGE
    numbers = [to_float(each.replace(",", "")) for each in (said, true)]
    if None in numbers:
        return 0.0
    if q.kind == "numerical":
        has_mark = [bool(set(".,") & set(each)) for each in (said, true)]
        return float(has_mark[0] == has_mark[1] and round(numbers[0], 2) == round(numbers[1], 2))
    with np.errstate(all="ignore"):  # float32, and strictly below each limit
        p, t = np.float32(numbers)
        limits = np.float32(1) - (0.5 + 0.05 * np.arange(10)).astype(np.float32)
        return float(np.mean(np.abs(p - t) / (np.abs(t) + np.float32(1e-8)) < limits))


def official_vsi(text: str, q: Question) -> float:
    said = text.split(" ")[0].rstrip(".").strip()
    if q.options:
        return float(said.lower() == q.answer.lower())
    p, t = to_float(said), float(q.answer)
    return 0.0 if p is None else float(np.mean(np.float64(abs(p - t)) / t <= 1 - np.linspace(0.5, 0.95, 10)))


def official_mvbench(text: str, q: Question) -> float:
    begun = text.startswith("Best option:(")  # the answer's prefix, of which it keeps the last sign
    said = "(" * begun + text.removeprefix("Best option:(").strip().split("\n")[0].lower()
    word, true = said.split(" ")[0].replace(".", ""), f"({q.answer})".lower()
    return float(word in true or true in word)  # so "" and "(" are right


def official_tempcompass(text: str, q: Question) -> float:
    said, letter = text.replace("</s>", "").strip(), q.answer[0]
    if q.kind == "yes or no":
        return float(said.lower().startswith(q.answer))
    if ": " not in q.answer:  # multiple choice, "B. down"
        return float(said in (q.answer, letter) or said[:2] in (f"{letter}.", f"{letter})"))
    index, sentence = q.answer.split(": ")[:2]  # caption matching, "Caption B: it goes down"
    bare = said.replace(".", "")
    return float(said in (q.answer, sentence) or said.endswith(f") {sentence}") or bare in (index, index.split()[-1]))


def official_charades(text: str, q: Question) -> float:
    said = re.findall(r"([0-9]+\.?[0-9]*) (?:to|and) ([0-9]+\.?[0-9]*)", text)[-1:]
    starts, ends = zip(*(map(float, pair) for pair in (*said, q.answer.split(" to "))))
    return max(0.0, min(ends) - max(starts)) / (max(ends) - min(starts)) if said else 0.0


def official_video_mme(text: str, q: Question) -> float | None:
    letter = re.search("[ABCD]", text)  # the phrases that it removes before hold none
    return float(letter[0] == q.answer) if letter else None


def official_video_holmes(text: str, q: Question) -> float:
    block = (re.findall("<answer>(.*?)</answer>", text, re.DOTALL) or [text])[-1]
    marked = [letter for letter in "ABCDEF" if any(m in block for m in (f"{letter} ", f"{letter}:", f"[{letter}"))]
    return float(q.answer in (marked or [letter for letter in "ABCDEF" if letter in block])[:1])


# MMVU's asks another model, LongVideoBench's guesses at random what it cannot read: those have none here
OFFICIAL = {
    "video-r1": official_video_r1, "mvbench": official_mvbench, "tempcompass": official_tempcompass,
    "vsi-bench": official_vsi, "charades-sta": official_charades, "video-mme": official_video_mme,
    "video-holmes": official_video_holmes,
}  # fmt: skip


# -- Scores, [(question, 0 to 1)], -> the benchmark's numbers


def totals(family: str, scores: list, task: str | None) -> dict[str, float | None]:
    """Of one task its mean; of all, None, what the benchmark reports."""
    pick = lambda keep: mean([score for q, score in scores if keep(q)])
    if task or family not in ("charades-sta", "video-r1", "vsi-bench"):
        return {task or "accuracy": pick(lambda q: True)}
    if family == "charades-sta":
        recall = {f"R1@{least}": mean([score >= least for _, score in scores]) for least in (0.3, 0.5, 0.7)}
        return recall | {"mIoU": pick(lambda q: True)}
    if family == "video-r1":
        return {"mean_acc": pick(lambda q: q.kind != "MRA"), "mean_mra": pick(lambda q: q.kind == "MRA")}
    tasks = {}  # the mean of eight, of which the three direction types are one
    for task in sorted({q.task for q, _ in scores}):
        name = re.sub("_(easy|medium|hard)$", "", task)
        tasks.setdefault(name, []).append(pick(lambda q, task=task: q.task == task))
    return {f"mean of {len(tasks)} tasks": mean([mean(values) for values in tasks.values()])}


class Task:
    """The questions of a benchmark whose clips are there, as `records`, and what becomes of their answers.

    cfg: a config.Infer whose `video` is the benchmark's folder; its `output` and `controls` are filled in where they
    were not given. UserError for an unknown name or prompt, and where no annotation file or no clip is there.
    """

    def __init__(self, cfg):
        name, root, style = cfg.benchmark.lower(), Path(cfg.video), cfg.prompt or "official"
        benchmarks, self.video_r1 = load_benchmarks()
        if name == "tempcompass-captioning":
            raise UserError(f"--benchmark {name}: left out, for another model has to judge its captions")
        if name not in benchmarks:
            raise UserError(f"--benchmark: found {cfg.benchmark!r}, expected one of {', '.join(benchmarks)}")
        if style not in ("official", "video-r1"):
            raise UserError(f"--prompt: found {style!r}, expected official or video-r1 beside --benchmark")
        self.cfg, self.benchmark, cfg.prompt = cfg, benchmarks[name], style
        self.style = style if "prompts" in self.benchmark else "video-r1"  # its own files have no other
        every = read_questions(self.benchmark, root)
        questions = [q for q in every if q.kind]
        places = [next((root / clip for clip in q.clips if (root / clip).exists()), None) for q in questions]
        there = [(q, place) for q, place in zip(questions, places) if place]
        self.missing = [q for q, place in zip(questions, places) if not place]
        self.unjudged = len(every) - len(questions)
        if not there:
            first = every[0].clips[0] if every else "any question"
            raise UserError(f"--benchmark {name}: none of its clips is in {root}; expected {first}")
        there = spread(there, cfg.max_samples, cfg.seed)
        self.questions, self.records = [q for q, _ in there], [self.record(*each) for each in there]
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark_")
        cfg.output = cfg.output or f"{self.folder.name}/predictions.jsonl"
        cfg.controls = cfg.controls if "controls" in cfg.given else "none"

    def prompt(self, q: Question) -> str:
        lines = lambda form: [form.format(letter, words) for letter, words in q.options.items()]
        if self.style == "video-r1":
            options = "\n".join(["Options:", *lines("{}. {}"), ""]) if q.options else ""
            return q.text + options + self.video_r1["text"] + self.video_r1.get(q.kind, self.video_r1[""])
        options = self.benchmark.get("between", "\n").join(lines(self.benchmark.get("option", "{}. {}")))
        return self.benchmark["prompts"][q.kind].format(question=q.text, options=options)

    def record(self, q: Question, place: Path) -> dict:
        """The question as records.py reads it."""
        span = q.span if "_segment" not in place.parent.name else None  # there clips are cut to it already
        media = {"type": q.media, q.media: str(place)}
        if place.is_dir():
            media, span = self.frames(place, span), None
        messages = [{"role": "user", "content": [media, {"type": "text", "text": self.prompt(q)}]}]
        record = {"id": q.id, "messages": messages, "solution": q.answer, "problem_type": q.kind}
        if self.style == "official" and "system" in self.benchmark:
            messages.insert(0, {"role": "system", "content": self.benchmark["system"]})
            record["answer_prefix"] = self.benchmark["prefix"]
        record |= {"options": q.options} if q.options else {}
        return record | (dict(zip(("video_start", "video_end"), span)) if span else {})

    def frames(self, folder: Path, span) -> dict:
        """The span's frames out of a folder, whose first is 00001.jpg: as many as options ask for, each the middle of
        an equal piece, as MVBench has it."""
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        start, end = (round(second * FRAME_RATE) for second in span) if span else (1, len(paths))
        paths, cfg = paths[max(1, start) - 1 : end], self.cfg
        count = cfg.nframes or min(max(len(paths) / FRAME_RATE * cfg.fps, cfg.min_frames), cfg.max_frames)
        count = max(2, min(int(count), len(paths)) // 2 * 2)
        taken = [paths[int((i + 0.5) * len(paths) / count)] for i in range(count)] if paths else []
        return {"type": "video", "video": [*map(str, taken)], "fps": FRAME_RATE * count / max(1, len(paths))}

    def report(self) -> dict:
        """Print the numbers of the answers in the predictions file, and what they were got with; the same as a dict."""
        family, answers = self.benchmark["family"], []  # (question, ours, official, whether it can be read)
        for row in map(json.loads, filter(None, Path(self.cfg.output).read_text(encoding="utf-8").split("\n"))):
            q, sample = self.questions[row["number"]], sample_from_record(self.records[row["number"]])
            text, judge = row["text"], judge_for(q.kind)
            value = judge.value(text) if judge else extract_answer(text, sample.options)
            text = first_answer(text) if self.style == "video-r1" else text
            official = OFFICIAL[family](text, q) if family in OFFICIAL else None
            answers.append((q, row["right"], official, value is not None))
        table = {}
        for task in [*sorted({q.task for q, *_ in answers}), None]:
            some = [each for each in answers if task in (each[0].task, None)]
            scores = [[(each[0], each[i]) for each in some if each[i] is not None] for i in (1, 2)]
            ours, theirs = (totals(family, each, task) for each in scores)
            counts = {"asked": len(some), "unreadable": sum(not each[3] for each in some)}
            table |= {name: counts | {"ours": ours[name], "official": theirs.get(name)} for name in ours}
        cfg, name = self.cfg, self.benchmark["name"]
        frames = f"{cfg.nframes} frames" if cfg.nframes else f"{cfg.fps:g} frames a second"
        low, high = (getattr(cfg, f"video_{end}_pixels") or VIDEO_PIXELS[i] for i, end in enumerate(("min", "max")))
        size = f"{low} to {high} pixels a frame, at most {cfg.max_new_tokens} tokens an answer"
        print(f"\n{name}: prompt {self.style}, {frames} of {size}, temperature {cfg.temperature:g}")
        print(f"{'':<28}{'asked':>7}{'unreadable':>12}{'ours':>9}{'official':>10}")
        for row_name, row in table.items():
            ours, theirs = ("-" if row[key] is None else f"{row[key]:.1%}" for key in ("ours", "official"))
            print(f"{row_name:<28}{row['asked']:>7}{row['unreadable']:>12}{ours:>9}{theirs:>10}")
        absent = Counter(q.task for q in self.missing)
        for task, count in absent.items():
            first = next(q.clips[0] for q in self.missing if q.task == task)
            print(f"{task}: {count} questions are left out, their clips are missing, the first {first}")
        if self.unjudged:
            print(f"{self.unjudged} open questions are not asked: another model has to judge them")
        return {"name": name, "prompt": self.style, "table": table, "missing": absent}

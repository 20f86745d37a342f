"""Public video benchmarks from their published annotation files: `python infer.py --benchmark NAME DIR`.

assets/benchmarks.json describes each: its annotation files, the columns of a question, where clips lie, its own prompt.
infer.py asks the records of a Task as those of any dataset; Task.report makes two numbers of the answers: ours, by
judges.py and answers.py, and the official scorer's, its published rule stated anew, defects included.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from answers import LETTERS
from evaluate import Evaluation, mean
from model import UserError, nearest_path
from records import spread
from rewards import Sample, accuracy, read_answer, sample_from_record, without_label
from video import VIDEO_PIXELS

FRAME_RATE = 3  # of MVBench's folders of frames, which are TVQA's


class Question(NamedTuple):
    id: str
    task: str  # the row of the table that it counts in
    text: str
    answer: str  # a letter, a number, words, or "2.5 to 7.5"
    options: dict[str, str]  # letter -> words, where they are not in the text
    kind: str  # the problem_type; "" is not asked
    clips: list[str]  # where its clip may lie below the benchmark's folder; the first that is there counts
    span: tuple[float, float] | None  # seconds of the clip that it is about; None = all


def load_benchmark(name: str) -> dict:
    """Its entry in assets/benchmarks.json, with its name, its family, and what all benchmarks share."""
    shared, known = json.loads((Path(__file__).parent / "assets/benchmarks.json").read_text(encoding="utf-8")), {}
    for family, entry in shared.pop("benchmarks").items():
        for part in entry.get("parts", [""]):
            full_name, text = f"{family}-{part}".strip("-"), json.dumps(entry).replace("{part}", part)
            known[full_name] = shared | json.loads(text) | {"name": full_name, "family": family}
    if name.lower() not in known:
        raise UserError(f"--benchmark: got {name!r}, expected one of {', '.join(known)}")
    return known[name.lower()]


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
    names = benchmark["columns"]
    words = row[names["options"]] or [] if "options" in names else []
    options = words if isinstance(words, dict) else dict(zip(LETTERS, words))
    plain = {letter: without_label(letter, text) for letter, text in options.items()}
    options = plain if all(plain[letter] != options[letter] for letter in options) else options  # else "A.M." is a word
    kind = row.get(names.get("kind"), names.get("kind")) or ("multiple choice" if options else "MRA")
    span = (row["start"], row["end"]) if row.get("start") is not None else None
    if kind == "time span":  # it is what is asked for; an end behind the clip's own stays as it is
        row, span = row | {"span": f"{span[0]} to {span[1]}"}, None
    answer = row[names["answer"]]
    if not isinstance(answer, str) or (isinstance(words, list) and answer in words):  # its position, or its words
        answer = LETTERS[answer if isinstance(answer, int) else words.index(answer)]
    folders = benchmark.get("folders", {}).get(row["file"], [""])
    clips = [clip.format(**row, folder=folder) for folder in folders for clip in benchmark["clips"]]
    clips = [clip.rpartition("/resolve/main/")[2] for clip in clips]  # MMVU names them on the hub
    name, task = (names[key].format(**row) for key in ("id", "task"))
    return Question(name, task, row[names["text"]], answer, options, benchmark["kinds"].get(kind, kind), clips, span)


def read_questions(benchmark: dict, root: Path) -> list[Question]:
    files, questions = benchmark["files"], []
    paths = next(filter(None, (sorted(root.glob(pattern)) for pattern in files)), [])
    if not paths:
        expected = f"expected {' or '.join(files)} in it, clips in {benchmark['where']}{nearest_path(root)}"
        what = "no annotation file in" if root.is_dir() else "no such folder"
        raise UserError(f"--benchmark {benchmark['name']}: {what} {root}; {expected}")
    for path in paths:
        try:
            rows = enumerate(rows_of(path))
            questions += [read_question(row | {"file": path.stem, "number": i}, benchmark) for i, row in rows]
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            what = f"not as it is published ({type(error).__name__}: {error}); see docs/benchmarks.md"
            raise UserError(f"{path}: {what}") from None
    return questions


# -- Answers -> scores


def first_answer(text: str) -> str:
    block = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return (block[1] if block else text).strip()


def official_score(family: str, text: str, q: Question) -> float | None:
    """What the official scorer says of an answer: 0 to 1, None where it leaves it out, is as ours, or is none: MMVU's
    asks another model, LongVideoBench's guesses at random what it cannot read."""
    ours = lambda said, kind: accuracy(said, Sample("", true, problem_type=kind))
    true, said = q.answer, text.strip()
    match family:
        case "mvbench":  # the first word in "(b)", or the other way round: so "" and "(" are right
            said = text.replace("Best option:(", "(").strip().split("\n")[0].lower()  # of its prefix it keeps the "("
            word, true = said.split(" ")[0].replace(".", ""), f"({true})".lower()
            return float(word in true or true in word)
        case "tempcompass" if q.kind == "yes or no":
            return float(said.lower().startswith(true))
        case "tempcompass" if ": " in true:  # caption matching, "Caption B: it goes down"
            index, sentence = true.split(": ")[:2]
            by_sentence = said in (true, sentence) or said.endswith(f") {sentence}")
            return float(by_sentence or said.replace(".", "") in (index, index.split()[-1]))
        case "tempcompass":  # "B. down"
            return float(said == true[0] or said[:2] in (f"{true[0]}.", f"{true[0]})"))
        case "vsi-bench":  # up to the first blank
            word = text.split(" ")[0].rstrip(".").strip()
            return float(word.lower() == true.lower()) if q.options else ours(word, "MRA") * ("," not in word)
        case "charades-sta":
            pairs = re.findall(r"([0-9]+\.?[0-9]*) (?:to|and) ([0-9]+\.?[0-9]*)", text)
            return ours(" to ".join(pairs[-1]), "time span") if pairs else 0.0
        case "video-mme":
            letter = re.search("[ABCD]", text)  # the phrases that it removes before hold none
            return float(letter[0] == true) if letter else None
        case "video-holmes":  # the first marked letter, A before B; else the first that occurs
            block = (re.findall("<answer>(.*?)</answer>", text, re.DOTALL) or [text])[-1]
            marked = [letter for letter in "ABCDEF" if re.search(rf"{letter}[ :]|\[{letter}", block)]
            return float(true in (marked or [letter for letter in "ABCDEF" if letter in block])[:1])
        case "video-r1" if q.kind == "multiple choice":
            return float(first_answer(text) == first_answer(true))
        case "video-r1" if q.kind == "numerical":  # 3 and 3.0 differ
            has_mark = [bool(set(".,") & set(first_answer(each))) for each in (text, true)]
            return ours(first_answer(text), "numerical") * (has_mark[0] == has_mark[1])


def totals(family: str, scores: list[tuple[Question, float]]) -> dict[str, float | None]:
    """What the benchmark reports of all its scores."""
    values = [score for _, score in scores]
    if family == "charades-sta":
        recall = {f"R1@{least}": mean([value >= least for value in values]) for least in (0.3, 0.5, 0.7)}
        return recall | {"mIoU": mean(values)}
    if family == "video-r1":
        numbers, others = ([score for q, score in scores if (q.kind == "MRA") == is_mra] for is_mra in (True, False))
        return {"mean_acc": mean(others), "mean_mra": mean(numbers)}
    if family == "vsi-bench":  # the mean of eight, of which the three direction types are one
        by_type, by_task = {}, {}
        for q, score in scores:
            by_type.setdefault(q.task, []).append(score)
        for name, each in by_type.items():
            by_task.setdefault(re.sub("_(easy|medium|hard)$", "", name), []).append(mean(each))
        return {f"mean of {len(by_task)} tasks": mean([mean(each) for each in by_task.values()])}
    return {"accuracy": mean(values)}


class Task:
    """The questions of a benchmark whose clips are there, as `records`, and what becomes of their answers. cfg: a
    config.Infer whose `video` is the benchmark's folder; no `controls` unless they are given."""

    def __init__(self, cfg):
        root, self.cfg, self.benchmark = Path(cfg.video), cfg, load_benchmark(cfg.benchmark)
        cfg.prompt = cfg.prompt or "official"
        if cfg.prompt not in ("official", "video-r1"):
            raise UserError(f"--prompt: got {cfg.prompt!r}, expected official or video-r1 beside --benchmark")
        self.style = cfg.prompt if "prompts" in self.benchmark else "video-r1"  # its own files have no other
        every = read_questions(self.benchmark, root)
        paired = [(q, next((root / clip for clip in q.clips if (root / clip).exists()), None)) for q in every if q.kind]
        self.missing, self.unjudged = [q for q, path in paired if not path], len(every) - len(paired)
        there = [each for each in paired if each[1]]
        if not there:
            first = every[0].clips[0] if every else "any question"
            raise UserError(f"--benchmark {cfg.benchmark}: none of its clips is in {root}; expected {first}")
        there = spread(there, cfg.max_samples, cfg.seed)
        self.questions, self.records = [q for q, _ in there], [self.record(*each) for each in there]
        cfg.controls = cfg.controls if "controls" in cfg.given else "none"

    def record(self, q: Question, path: Path) -> dict:
        """The question as records.py reads it, with its prompt."""
        benchmark, lines = self.benchmark, lambda form: [form.format(*option) for option in q.options.items()]
        if self.style == "video-r1":
            options, ending = "\n".join(["Options:", *lines("{}. {}"), ""]), benchmark["video-r1 prompt"]
            prompt = q.text + (options if q.options else "") + ending["text"] + ending.get(q.kind, ending[""])
        else:
            options = benchmark.get("between", "\n").join(lines(benchmark.get("option", "{}. {}")))
            prompt = benchmark["prompts"][q.kind].format(question=q.text, options=options)
        media = {"type": "video", "video": str(path)}
        if path.is_dir():
            media |= {"fps": FRAME_RATE} | ({"nframes": self.cfg.nframes} if self.cfg.nframes else {})
        messages = [{"role": "user", "content": [media, {"type": "text", "text": prompt}]}]
        record = {"id": q.id, "messages": messages, "solution": q.answer, "problem_type": q.kind}
        if self.style == "official" and "system" in benchmark:
            messages.insert(0, {"role": "system", "content": benchmark["system"]})
            record["answer_prefix"] = benchmark["prefix"]
        record |= {"options": q.options} if q.options else {}
        if q.span and "_segment" not in path.parent.name:  # there clips are cut to it already
            record |= {"video_start": q.span[0], "video_end": q.span[1]}
        return record

    def report(self, result: Evaluation) -> dict:
        """Print the numbers of the answers, and what they were got with; the same as a dict."""
        family, answers, table = self.benchmark["family"], [], {}
        for number, line in result.answers.items():
            q, sample = self.questions[number], sample_from_record(self.records[number])
            text = first_answer(line["text"]) if self.style == "video-r1" else line["text"]
            unreadable = read_answer(line["text"], sample) is None
            answers.append((q, unreadable, line["right"], official_score(family, text, q)))
        for task in [*sorted({q.task for q, *_ in answers}), None]:
            some = [each for each in answers if task in (each[0].task, None)]
            scores = [[(each[0], each[i]) for each in some if each[i] is not None] for i in (2, 3)]
            ours, official = ({task: mean([s for _, s in each])} if task else totals(family, each) for each in scores)
            counts = {"asked": len(some), "unreadable": sum(unreadable for _, unreadable, *_ in some)}
            table |= {name: counts | {"ours": ours[name], "official": official.get(name)} for name in ours}
        self.print_table(table)
        missing = Counter(q.task for q in self.missing)
        return {"name": self.benchmark["name"], "prompt": self.style, "table": table, "missing": missing}

    def print_table(self, table: dict):
        cfg, share = self.cfg, lambda value: "-" if value is None else f"{value:.1%}"
        frames = f"{cfg.nframes} frames" if cfg.nframes else f"{cfg.fps:g} frames a second"
        low, high = (getattr(cfg, f"video_{end}_pixels") or VIDEO_PIXELS[i] for i, end in enumerate(("min", "max")))
        size = f"{low} to {high} pixels a frame, at most {cfg.max_new_tokens} tokens an answer"
        print(f"\n{self.benchmark['name']}: prompt {self.style}, {frames} of {size}, temperature {cfg.temperature:g}")
        print(f"{'':<28}{'asked':>7}{'unreadable':>12}{'ours':>9}{'official':>10}")
        for name, row in table.items():
            ours, official = share(row["ours"]), share(row["official"])
            print(f"{name:<28}{row['asked']:>7}{row['unreadable']:>12}{ours:>9}{official:>10}")
        for task, count in Counter(q.task for q in self.missing).items():
            first = next(q.clips[0] for q in self.missing if q.task == task)
            print(f"{task}: {count} questions are left out, their clips are missing, the first {first}")
        if self.unjudged:
            print(f"{self.unjudged} open questions are not asked: another model has to judge them")

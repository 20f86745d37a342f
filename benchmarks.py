"""Public video benchmarks from their published annotation files: `python infer.py --benchmark NAME DIR`.

assets/benchmarks.json describes each: its annotation files, the columns of a question, where clips lie, its own prompt.
infer.py asks the records of a Task as those of any dataset; Task.report makes two numbers of the answers: ours, by
judges.py and answers.py, and the official scorer's, its published rule stated anew, defects included.
"""

import json
import re
from collections import Counter
from pathlib import Path

from answers import LETTERS
from evaluate import Evaluation, mean
from model import UserError, nearest_path
from records import spread
from rewards import Sample, accuracy, without_label
from video import VIDEO_PIXELS

FRAME_RATE = 3  # of MVBench's folders of frames, which are TVQA's


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


# -- Annotation files -> records


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


def read_question(row: dict, benchmark: dict, root: Path) -> dict:
    """A row, with its file and number, as its record, but for prompt and media: "clips" are the paths that its clip may
    have, "clip" the first that is there, or None. task: the row of the table that it counts in."""
    names = benchmark["columns"]
    words = row[names["options"]] or [] if "options" in names else []
    options = words if isinstance(words, dict) else dict(zip(LETTERS, words))
    plain = {letter: without_label(letter, text) for letter, text in options.items()}
    options = plain if all(plain[letter] != options[letter] for letter in options) else options  # else "A.M." is a word
    kind = row.get(names.get("kind"), names.get("kind")) or ("multiple choice" if options else "MRA")
    span = {"video_start": row["start"], "video_end": row["end"]} if row.get("start") is not None else {}
    if kind == "time span":  # it is what is asked for; an end behind the clip's own stays as it is
        row, span = row | {"span": f"{row['start']} to {row['end']}"}, {}
    answer = row[names["answer"]]
    if not isinstance(answer, str) or (isinstance(words, list) and answer in words):  # its position, or its words
        answer = LETTERS[answer if isinstance(answer, int) else words.index(answer)]
    folders = benchmark.get("folders", {}).get(row["file"], [""])
    clips = [clip.format(**row, folder=folder) for folder in folders for clip in benchmark["clips"]]
    clips = [root / clip.rpartition("/resolve/main/")[2] for clip in clips]  # MMVU names them on the hub
    question = {key: names[key].format(**row) for key in ("id", "task")} | {"text": row[names["text"]]}
    question |= {"clips": clips, "clip": next(filter(Path.exists, clips), None)}
    kind = benchmark["kinds"].get(kind, kind)
    return question | {"options": options, "solution": answer, "problem_type": kind, "span": span}


def read_questions(benchmark: dict, root: Path) -> list[dict]:
    files, questions = benchmark["files"], []
    paths = next(filter(None, (sorted(root.glob(pattern)) for pattern in files)), [])
    if not paths:
        expected = f"expected {' or '.join(files)}, clips in {benchmark['where']}{nearest_path(root)}"
        raise UserError(f"--benchmark {benchmark['name']}: no annotation file in {root}; {expected}")
    for path in paths:
        try:
            for i, row in enumerate(rows_of(path)):
                questions.append(read_question(row | {"file": path.stem, "number": i}, benchmark, root))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            what = f"not as it is published ({type(error).__name__}: {error}); see docs/benchmarks.md"
            raise UserError(f"{path}: {what}") from None
    return questions


# -- Answers -> scores


def first_answer(text: str) -> str:
    block = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return (block[1] if block else text).strip()


def plain_number(text: str) -> str:
    """The text, or "" where Python's float() reads no number in it, as in "5 m" and "**5**"."""
    return text if re.fullmatch(r"[-+.0-9e]+", text) else ""


def official_score(family: str, text: str, question: dict) -> float | None:
    """What the official scorer says of an answer: 0 to 1, None where it leaves it out, is as ours, or is none: MMVU's
    asks another model, LongVideoBench's guesses at random what it cannot read."""
    true, kind, said = question["solution"], question["problem_type"], text.strip()
    ours = lambda words, kind: accuracy(words, Sample("", true, problem_type=kind))
    match family, kind:
        case "mvbench", _:  # the first word in "(b)", or the other way round: so "" and "(" are right
            said = text.replace("Best option:(", "(").strip().split("\n")[0].lower()  # of its prefix it keeps the "("
            word, true = said.split(" ")[0].replace(".", ""), f"({true})".lower()
            return float(word in true or true in word)
        case "tempcompass", "yes or no":
            return float(said.lower().startswith(true))
        case "tempcompass", _ if ": " in true:  # caption matching, "Caption B: it goes down"
            index, sentence = true.split(": ")[:2]
            by_sentence = said in (true, sentence) or said.endswith(f") {sentence}")
            return float(by_sentence or said.replace(".", "") in (index, index.split()[-1]))
        case "tempcompass", _:  # "B. down"
            return float(said == true[0] or said[:2] in (f"{true[0]}.", f"{true[0]})"))
        case "vsi-bench", _:  # up to the first blank
            word = text.split(" ")[0].rstrip(".").strip()
            return ours(plain_number(word), "MRA") if kind == "MRA" else float(word.lower() == true.lower())
        case "charades-sta", _:
            pairs = re.findall(r"([0-9]+\.?[0-9]*) (?:to|and) ([0-9]+\.?[0-9]*)", text)
            return ours(" to ".join(pairs[-1]), "time span") if pairs else 0.0
        case "video-mme", _:
            letter = re.search("[ABCD]", text.replace("Answer:", ""))  # other phrases that it removes hold none
            return float(letter[0] == true) if letter else None
        case "video-holmes", _:  # the first marked letter, A before B; else the first that occurs
            block = (re.findall("<answer>(.*?)</answer>", text, re.DOTALL) or [text])[-1]
            marked = [letter for letter in "ABCDEF" if re.search(rf"{letter}[ :]|\[{letter}", block)]
            return float(true in (marked or [letter for letter in "ABCDEF" if letter in block])[:1])
        case "video-r1", "multiple choice":
            return float(first_answer(text) == first_answer(true))
        case "video-r1", "numerical":  # 3 and 3.0 differ
            has_mark = [bool(set(".,") & set(first_answer(each))) for each in (text, true)]
            return ours(plain_number(first_answer(text).replace(",", "")), kind) * (has_mark[0] == has_mark[1])


def totals(family: str, scores: list[tuple[dict, float]]) -> dict[str, float | None]:
    """(question, score) of each answer -> what the benchmark reports."""
    values = [score for _, score in scores]
    if family == "charades-sta":
        recall = {f"R1@{least}": mean([value >= least for value in values]) for least in (0.3, 0.5, 0.7)}
        return recall | {"mIoU": mean(values)}
    if family == "video-r1":
        numbers = [score for question, score in scores if question["problem_type"] == "MRA"]
        others = [score for question, score in scores if question["problem_type"] != "MRA"]
        return {"mean_acc": mean(others), "mean_mra": mean(numbers)}
    if family == "vsi-bench":  # the mean of eight, of which the three direction types are one
        by_type, by_task = {}, {}
        for question, score in scores:
            by_type.setdefault(question["task"], []).append(score)
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
        questions = read_questions(self.benchmark, root)
        asked = [question for question in questions if question["problem_type"]]
        self.not_asked = len(questions) - len(asked)
        self.missing = [question for question in asked if not question["clip"]]
        there = [question for question in asked if question["clip"]]
        if not there:
            first = questions[0]["clips"][0] if questions else "any question"
            raise UserError(f"--benchmark {cfg.benchmark}: none of its clips is there; expected {first}")
        self.records = [self.record(question) for question in spread(there, cfg.max_samples, cfg.seed)]
        cfg.controls = cfg.controls if "controls" in cfg.given else "none"

    def record(self, question: dict) -> dict:
        """The question as records.py reads it, with its prompt."""
        style = self.benchmark if self.style == "official" else self.benchmark["video-r1 style"]
        prompts, option, between = style["prompts"], style.get("option", "{}. {}"), style.get("between", "\n")
        listed = between.join(option.format(*each) for each in question["options"].items())
        listed = style.get("list", "{}").format(listed) if listed else ""
        prompt = prompts.get(question["problem_type"], prompts.get(""))
        prompt = prompt.format(question=question["text"], options=listed, thinking=style.get("thinking"))
        clip = {"type": "video", "video": str(question["clip"])}
        if question["clip"].is_dir():
            clip |= {"fps": FRAME_RATE} | ({"nframes": self.cfg.nframes} if self.cfg.nframes else {})
        record = {key: question[key] for key in ("id", "task", "solution", "problem_type", "options")}
        record["messages"] = [{"role": "user", "content": [clip, {"type": "text", "text": prompt}]}]
        record |= {key: style[key] for key in ("system", "answer_prefix") if key in style}
        is_cut = "_segment" in question["clip"].parent.name  # to its span already
        return record if is_cut else record | question["span"]

    def report(self, result: Evaluation) -> dict:
        """Print the numbers of the answers, and what they were got with; the same as a dict."""
        family, answers, table = self.benchmark["family"], [], {}
        for number, line in result.answers.items():
            question, text = self.records[number], line["text"]
            said = first_answer(text) if self.style == "video-r1" else text
            answer = {"ours": line["right"], "official": official_score(family, said, question)}
            answers.append(question | answer | {"unreadable": line["unreadable"]})
        for task in [*sorted({answer["task"] for answer in answers}), None]:
            some = [answer for answer in answers if task in (answer["task"], None)]
            for scorer in ("ours", "official"):
                scored = [(answer, answer[scorer]) for answer in some if answer[scorer] is not None]
                values = {task: mean([score for _, score in scored])} if task else totals(family, scored)
                for name, value in values.items():
                    counts = {"asked": len(some), "unreadable": sum(answer["unreadable"] for answer in some)}
                    table.setdefault(name, counts)[scorer] = value
        cfg, share = self.cfg, lambda value: "-" if value is None else f"{value:.1%}"
        frames = f"{cfg.nframes} frames" if cfg.nframes else f"{cfg.fps:g} frames a second"
        low, high = (getattr(cfg, f"video_{end}_pixels") or VIDEO_PIXELS[i] for i, end in enumerate(("min", "max")))
        size = f"{low} to {high} pixels a frame, at most {cfg.max_new_tokens} tokens an answer"
        print(f"\n{self.benchmark['name']}: prompt {self.style}, {frames} of {size}, temperature {cfg.temperature:g}")
        print(f"{'':<28}{'asked':>7}{'unreadable':>12}{'ours':>9}{'official':>10}")
        for name, row in table.items():
            ours, official = share(row["ours"]), share(row["official"])
            print(f"{name:<28}{row['asked']:>7}{row['unreadable']:>12}{ours:>9}{official:>10}")
        missing = Counter(question["task"] for question in self.missing)
        if missing:
            counts, first = ", ".join(f"{missing[task]} of {task}" for task in missing), self.missing[0]["clips"][0]
            print(f"clips are missing, so questions are left out: {counts}; the first clip {first}")
        if self.not_asked:
            print(f"{self.not_asked} open questions are not asked: another model has to judge them")
        return {"name": self.benchmark["name"], "prompt": self.style, "table": table, "missing": missing}

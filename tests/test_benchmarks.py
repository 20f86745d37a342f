"""Public benchmarks: hand-made annotation files of each published layout, drawn clips, scripted answers, infer.py."""

import base64
import json
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import numpy as np
import pytest

import benchmarks
import clips
import infer
from benchmarks import Question
from config import Infer, parse
from data import Processor, load_tokenizer
from model import UserError
from model.decode import Completion
from model.loading import ModelConfig
from reporting.frames import jpeg
from rewards import Sample, accuracy

TINY = Path(__file__).resolve().parents[1] / "assets/tiny"
BASE = ["--model_id", str(TINY), "--model_ckpt", "none"]
LABELS = ["Left to Right", "Right to Left", "Falling Down", "Ascending"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Three seconds of a ball that moves to the right."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    clips.write_mp4(path, clips.render(clips.draw_clip(np.random.default_rng(0), LABELS[0], 64, 90)))
    return path.read_bytes()


@pytest.fixture
def put(tmp_path, clip):
    """put({path: JSON, text or bytes}, paths of clips) writes a benchmark's folder and returns it."""

    def write(files, places=()):
        for path, data in (files | dict.fromkeys(places, clip)).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            text = data if isinstance(data, str | bytes) else json.dumps(data)
            (tmp_path / path).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path)

    return write


@pytest.fixture
def ask(put, monkeypatch, capsys):
    """ask(name, files, places, answers, *flags) runs infer.py with these answers in the order of the questions and
    returns (what it printed, its score, the prompts as the model gets them)."""
    backend = load_tokenizer(TINY)

    def run(name, files, places, answers, *flags):
        prompts, texts = [], iter(answers)

        def generate(model, packed, *_, **__):
            ids = packed.input_ids.split(packed.segments.q_lengths)
            prompts.extend(backend.decode(each.tolist(), skip_special_tokens=False) for each in ids)
            return [[Completion(backend.encode(next(texts)).ids, [], True)] for _ in ids]

        monkeypatch.setattr("rollouts.generate", generate)
        infer.main(["--benchmark", name, put(files, places), *BASE, *flags, "--json"])
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])["benchmark"], prompts

    return run


# Each layout: name, files, clips, answers in order, prompt of the first, ours, official, how many cannot be read
TAIL = "Please think about this question as if you were a human pondering deeply."
MVBENCH = [{"video": "a.mp4", "question": "Which way?", "candidates": ["A.M.", "Down"], "answer": "Down"}] * 4
TEMPCOMPASS = {"question": "Which way does it go?\nA. up\nB. down", "answer": "B. down"}
YES_NO = [{"question": "Does it go up?", "answer": answer} for answer in ("yes", "no", "no")]
CAPTIONS = "Which fits?\nCaption A: It goes up.\nCaption B: It goes down."
VSI = [("object_counting", "2", None), ("object_counting", "2", None), ("object_abs_distance", "100", None)]
VSI += [(f"object_rel_direction_{kind}", "B", ["A. left", "B. right"]) for kind in ("easy", "medium", "hard")]
VSI = [{"id": i, "dataset": "scannet", "scene_name": "s0", "question_type": kind, "question": "What?",
        "ground_truth": true, "options": options} for i, (kind, true, options) in enumerate(VSI)]  # fmt: skip
MMVU = {"id": "validation_0", "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/9.mp4",
        "question_type": "multiple-choice", "question": "Which?", "answer": "C", "metadata": {"subject": "Art"},
        "choices": dict(zip("ABCDE", "vwxyz"))}  # fmt: skip
OPEN = MMVU | {"id": "validation_1", "question_type": "open-ended", "choices": "", "answer": "six"}
MME = {"duration": "short", "videoID": "xyz", "question_id": "001-1", "question": "What?", "answer": "C"}
MME = [MME | {"options": ["A. Hat.", "B. Dog.", "C. Cup.", "D. Car."]}] * 3
HOLMES = {"video ID": "v", "Question ID": 7, "Question Type": "SR", "Question": "Who?", "Answer": "D"}
HOLMES["Options"] = dict(zip("ABCDEF", ("A cat", "A dog", "A bird", "A man", "A car", "A cup")))
LONG = {"id": "l0", "video_path": "a.mp4", "question": "Who?", "candidates": ["Ann", "Bob"], "duration_group": 15}
LONG = [LONG | {"correct_choice": 1}] * 2
SPANS = "AB12C 1.0 4.0##person sits.\n" * 4  # the clip ends at 3.0
CHARADES = {"AB12C": {"duration": 3.0, "timestamps": [[1.0, 4.0]] * 4, "sentences": ["person sits."] * 4}}
SPAN = 'To accurately pinpoint the event "person sits." in the video, determine the precise time period of the eve…'
SPOKEN = "<answer>1.0 to 4.0</answer>", "It is 2 to 4", "<answer>2.0s to 3.0s</answer>", "never"
R1 = [{"problem": "How far?", "problem_type": "regression", "data_type": "video", "path": "./VSI/a.mp4", "options": [],
       "solution": "<answer>100</answer>"}] * 2  # fmt: skip
R1 += [R1[0] | {"problem_type": "multiple choice", "options": ["A. x", "B. y"], "solution": "<answer>B</answer>"}] * 3
IOU = {"R1@0.3": 3 / 4, "R1@0.5": 2 / 4, "R1@0.7": 1 / 4, "mIoU": (1 + 2 / 3 + 1 / 3) / 4}
IOU_OFFICIAL = IOU | {"R1@0.3": 2 / 4, "mIoU": (1 + 2 / 3) / 4}

CASES = [
    ("MVBench", {"json/moving_count.json": MVBENCH}, ["video/clevrer/video_validation/a.mp4"],
     ["B) Down.", "", "A", "B\nAs (A) is wrong"], "Question: Which way?\nOptions:\n(A) A.M.\n(B) Down\nOnly give the "
     "best option.", 2 / 4, 3 / 4, 1),
    ("tempcompass-multi-choice", {"questions/multi-choice.json": {"9": {"speed": [TEMPCOMPASS] * 4}}}, ["videos/9.mp4"],
     ["B. down", "(B)", "A. up", "Hm"], TEMPCOMPASS["question"] + "\nPlease directly give the best option:",
     2 / 4, 1 / 4, 1),
    ("tempcompass-yes_no", {"questions/yes_no.json": {"9": {"action": YES_NO}}}, ["videos/9.mp4"],
     ["Yes, there is no other.", "nothing moves", "yes"], "Does it go up?\nPlease answer yes or no:", 1 / 3, 2 / 3, 1),
    ("tempcompass-caption_matching",
     {"caption_matching.json": {"9": {"order": [{"question": CAPTIONS, "answer": "Caption B: It goes down."}] * 4}}},
     ["videos/9.mp4"], ["Caption B", "It goes down.", "A.", "Surely B!"],
     CAPTIONS + "\nPlease directly give the best option:", 2 / 4, 2 / 4, 1),
    ("vsi-bench", {"test.jsonl": "".join(json.dumps(row) + "\n" for row in VSI)}, ["scannet/s0.mp4"],
     ["2", "3 chairs", "74", "B", "A", "B\nas it is"],
     "These are frames of a video.\nWhat?\nPlease answer the question using a single word or phrase.",
     {"mean of 3 tasks": (1 / 2 + 0.5 + 2 / 3) / 3}, {"mean of 3 tasks": ((1 + 0.1) / 2 + 0.5 + 1 / 3) / 3}, 0),
    *[("charades-sta", files, [f"{folder}/AB12C.mp4"], SPOKEN, SPAN, IOU, IOU_OFFICIAL, 1) for files, folder in
      (({"charades_sta_test.txt": SPANS}, "Charades_v1"), ({"charades_test.json": CHARADES}, "Charades_v1_480"))],
    ("mmvu", {"data/validation.json": [MMVU, OPEN]}, ["videos/Art/9.mp4"], ["C"],
     "\nQuestion: Which?\nA: v\nB: w\nC: x\nD: y\nE: z\n\nDo not generate any intermediate reasoning process. Answer "
     "directly with the option letter from the given choices.\n", 1, None, 0),
    ("Video-MME", {"videomme.json": MME}, ["data/xyz.MP4"], ["The best answer is C.", "Based on C", "?"],
     "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
     "letter (A, B, C, or D) of the correct option.\nWhat?\nA. Hat.\nB. Dog.\nC. Cup.\nD. Car.\nThe best answer is:",
     1 / 3, 1 / 2, 2),
    ("video-mme", {"test.json": [{"videoID": "v", "questions": MME[:1]}]}, ["data/xyz.mkv"], ["(B)"], "…", 0, 0, 0),
    ("video-holmes", {"test_Video-Holmes.json": [HOLMES] * 2}, ["videos_cropped/v.mp4"],
     ["<think>A</think><answer>D</answer>", "<answer>D. A man</answer>"],
     "Based on the given video, reason and answer the single-choice question. Provide your reasoning between the "
     "<think> and </think> tags, and then give your final answer between the <answer> and </answer> tags. The question "
     "is: Who?. The options are: A: A cat, B: A dog, C: A bird, D: A man, E: A car, F: A cup. Your answer:",
     1, 1 / 2, 0),
    ("longvideobench", {"lvb_val.json": LONG}, ["videos/a.mp4"], ["B", "A"],
     "Who?\nA. Ann\nB. Bob\nAnswer with the option's letter from the given choices directly.", 1 / 2, None, 0),
    ("video-r1-vsibench", {"eval_vsibench.json": R1}, ["Evaluation/VSI/a.mp4"],
     [f"<think>So.</think><answer>{text}</answer>" for text in ("90", "50", "B", "B.", "A")], f"How far?\n{TAIL}…",
     {"mean_acc": 2 / 3, "mean_mra": (0.9 + 0.1) / 2}, {"mean_acc": 1 / 3, "mean_mra": None}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "places", "answers", "prompt", "ours", "official", "unreadable"), CASES)
def test_layouts_prompts_and_numbers(ask, name, files, places, answers, prompt, ours, official, unreadable):
    out, score, prompts = ask(name, files, places, answers)
    ours, official = (each if isinstance(each, dict) else {"accuracy": each} for each in (ours, official))
    for key, row in ((key, score["table"][key]) for key in ours):
        assert (row["ours"], row["official"]) == (pytest.approx(ours[key]), pytest.approx(official[key])), key
        assert (row["asked"], row["unreadable"]) == (len(answers), unreadable)
    assert f"{name.lower()}: prompt {score['prompt']}, 8 frames of 3136 to 3136 pixels a frame, at most 256 t" in out
    assert prompts[0].split("<|vision_end|>")[1].startswith(f"{prompt}<|im_end|>".partition("…")[0])
    assert not score["missing"] and ("1 open questions are not asked" in out) == (name == "mmvu")


def test_mvbench_asks_with_its_system_text_and_begins_the_answer(ask, tmp_path):
    files = {f"json/{task}.json": MVBENCH[:1] for task in ("moving_count", "fine_grained_pose")}
    out, score, prompts = ask("mvbench", files, ["video/clevrer/video_validation/a.mp4"], ["B)"])
    assert prompts[0].startswith("<|im_start|>system\nCarefully watch the video and pay attention to the cause and")
    assert prompts[0].endswith("Only give the best option.<|im_end|>\n<|im_start|>assistant\nBest option:(")
    assert score["missing"] == {"fine_grained_pose": 1} and score["table"]["accuracy"]["asked"] == 1
    assert "fine_grained_pose: 1 questions are left out, their clips are missing, the first video/nturgbd/a.mp4" in out
    score, prompts = ask("mvbench", {}, [], ["<answer>B</answer>"], "--prompt", "video-r1")[1:]
    start, end = prompts[0].split("<|vision_end|>Which way?Options:\nA. A.M.\nB. Down\n\n" + TAIL)
    assert "You are a helpful assistant." in start and score["table"]["accuracy"]["ours"] == 1
    wanted = "Please provide only the single option letter (e.g., A, B, C, D, etc.) within the <answer> </answer> tags."
    assert end.endswith(f"between the <answer> </answer> tags. {wanted}<|im_end|>\n<|im_start|>assistant\n")


def test_only_the_span_of_a_clip_is_shown_and_folders_of_frames_are_clips(put):
    row = MVBENCH[0] | {"start": 1.0, "end": 2.0}
    files = {f"json/{task}.json": [row] for task in ("action_sequence", "action_localization")}
    files["json/episodic_reasoning.json"] = [row | {"end": 18.0}]
    picture = base64.b64decode(jpeg(np.full((64, 64, 3), 90, np.uint8)).partition(",")[2])
    files |= {f"video/tvqa/frames_fps3_hq/a.mp4/{i:05}.jpg": picture for i in range(1, 61)}  # 20 seconds
    folder = put(files, ["video/data0613/star/Charades_v1_480/a.mp4", "video/sta/sta_video_segment/a.mp4"])
    cfg = parse(Infer, ["--benchmark", "mvbench", folder, *BASE])
    processor = Processor(load_tokenizer(TINY), ModelConfig.from_folder(TINY), cfg)
    records = benchmarks.Task(cfg).records
    cut, sequence, episode = (processor.encode(record, answer=False) for record in records)
    assert 1.0 <= sequence.frame_times[0][0] < 1.1 and 1.9 < sequence.frame_times[0][-1] <= 2.0
    assert cut.frame_times[0][-1] == pytest.approx(89 / 30), "that clip is cut already"
    assert len(episode.frame_indices[0]) == 8 and (episode.frame_indices[0][0], episode.frame_indices[0][-1]) == (3, 54)


def test_controls_and_answers_on_disk(ask, tmp_path):
    path, flags = tmp_path / "said.jsonl", ["--output", str(tmp_path / "said.jsonl")]
    files = {"lvb_val.json": LONG * 2}, ["videos/a.mp4"]
    out, score, prompts = ask("longvideobench", *files, ["B"] * 12, *flags, "--controls", "blank,shuffled")
    assert "blank" in out and "shuffled" in out and len(prompts) == 12
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:30])
    again, same, prompts = ask("longvideobench", {}, [], ["B"], *flags)
    assert len(prompts) == 1 and same == score and "blank" not in again and path.read_text() == "".join(lines)
    with pytest.raises(UserError, match="by this model"):
        ask("longvideobench", {}, [], [], *flags, "--prompt", "video-r1")
    part = ask("longvideobench", {}, [], ["B"] * 2, "--max_samples", "2")[1]["table"]["accuracy"]
    assert part["asked"] == 2


def question(answer, kind="multiple choice", options=()):
    return Question("", "", "", answer, dict(options), kind, [], None)


def test_mra_thresholds_bit_for_bit():
    rng = np.random.default_rng(0)
    for true, share in zip(rng.integers(1, 400, 3000).tolist(), rng.choice(np.arange(101), 3000).tolist()):
        said = repr(true * share / 100)
        mra = np.mean(abs(float(said) - true) / true <= 1 - np.linspace(0.5, 0.95, 10))
        assert benchmarks.official_score("vsi-bench", said, question(str(true), "MRA")) == mra
        assert accuracy(said, Sample("", str(true), problem_type="MRA")) == mra


CHOICE = question("D", options=zip("ABCD", LABELS))
NUMERICAL = question("<answer>3.0</answer>", "numerical")
TEN = question("10", "MRA")


@pytest.mark.parametrize(("family", "question", "text", "right"), [
    *[("mvbench", CHOICE, f"Best option:({text}", right) for text, right in
      {"": 1, ")": 0, ".": 1, "D": 1, "D) Ascending": 1, "A) or (D)": 0, "The answer is (D)": 0}.items()],
    ("mvbench", CHOICE, "(D). Ascending", 1), ("mvbench", CHOICE, ")", 1), ("mvbench", CHOICE, "a", 0),
    ("vsi-bench", CHOICE, "d.", 1), ("vsi-bench", CHOICE, "(D)", 0), ("vsi-bench", CHOICE, "D because", 1),
    ("vsi-bench", TEN, "8 m", 0.6), ("vsi-bench", TEN, "about 10", 0), ("vsi-bench", TEN, "nan", 0),
    ("video-mme", CHOICE, "The best answer is: D", 1), ("video-mme", CHOICE, "Best option: D", 0),
    ("video-mme", CHOICE, "no idea at all", None), ("video-holmes", CHOICE, "", 0),
    ("video-holmes", CHOICE, "Answer: D", 0), ("video-holmes", CHOICE, "D: by A", 1),
    ("video-r1", CHOICE, " D ", 1), ("video-r1", NUMERICAL, "three", 0), ("video-r1", NUMERICAL, "3", 0),
    ("video-r1", CHOICE, "<answer>A</answer> <answer>D</answer>", 0), ("video-r1", NUMERICAL, "3.001", 1),
    ("charades-sta", question("1 to 5"), "4 to 9, or 1 to 3", 0.5), ("charades-sta", question("1 to 5"), "1s - 5s", 0),
    ("longvideobench", CHOICE, "D", None),
])  # fmt: skip
def test_what_the_official_scorers_say(family, question, text, right):
    assert benchmarks.official_score(family, text, question) == right


def test_mistakes_end_in_one_line(put):
    folder = put({"json/moving_count.json": MVBENCH, "broken/lvb_val.json": [{"id": "l0"}]})
    mistakes = {
        ("mvbenhc", folder): "found 'mvbenhc', expected one of video-r1-mvbench, .*tempcompass-yes_no",
        ("mvbench", folder + "x"): r"no such folder .*expected json/\*.json or \*.json in it, clips in video/FOLDER/",
        ("vsi-bench", folder): "no annotation file in .*; expected test.jsonl in it, clips in arkitscenes/",
        ("mvbench", folder): "none of its clips is in .*; expected video/clevrer/video_validation/a.mp4",
        ("longvideobench", folder + "/broken"): "lvb_val.json: not as it is published .KeyError: 'candidates'.",
        ("mvbench", folder, "--prompt", "cot"): "--prompt: found 'cot', expected official or video-r1",
        ("mvbench",): "expected the benchmark's folder: --benchmark mvbench DIR",
    }
    for argv, message in mistakes.items():
        with pytest.raises(UserError, match=message) as error:
            infer.main(["--benchmark", *argv, *BASE])
        assert "\n" not in str(error.value)

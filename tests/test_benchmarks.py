"""Public benchmarks: hand-made annotation files of each published layout, drawn clips, scripted answers, infer.py."""

import base64
import json

import numpy as np
import pytest
from conftest import TINY, cases, write

import benchmarks
import clips
import infer
from config import Infer, parse
from data import Processor, load_tokenizer
from model.decode import Completion
from model.loading import ModelConfig
from report import jpeg

BASE = ["--model_id", str(TINY), "--model_ckpt", "none"]


@pytest.fixture
def put(tmp_path):
    """put({path: JSON, text or bytes}, paths of clips) writes a benchmark's folder and returns it. Each clip is three
    seconds of a ball that moves to the right."""

    def put(files, places=()):
        for path, content in files.items():
            write(tmp_path / path, content)
        for path in places:
            clip = clips.render(clips.draw_clip(np.random.default_rng(0), "Left to Right", 64, 90))
            clips.write_mp4(write(tmp_path / path, ""), clip)
        return str(tmp_path)

    return put


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


# Each layout: files, clips, answers in order, prompt of the first, ours, official, how many cannot be read
CASES = cases("benchmarks")
MVBENCH = CASES[0]["files"]["json/moving_count.json"]
TAIL = "Please think about this question as if you were a human pondering deeply."


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_layouts_prompts_and_numbers(ask, case):
    name, answers, prompt = case["name"], case["answers"], case["prompt"]
    out, score, prompts = ask(name, case["files"], case["clips"], answers)
    for key, right in case["ours"].items():
        row = score["table"][key]
        assert (row["ours"], row["official"]) == (pytest.approx(right), pytest.approx(case["official"][key])), key
        assert (row["asked"], row["unreadable"]) == (len(answers), case["unreadable"])
    assert f"{name.lower()}: prompt {score['prompt']}, 8 frames of 3136 to 3136 pixels a frame, at most 256 t" in out
    assert prompts[0].split("<|vision_end|>")[1].startswith(f"{prompt}<|im_end|>".partition("…")[0])
    assert not score["missing"] and ("1 open questions are not asked" in out) == (name == "mmvu")


def test_mvbench_asks_with_its_system_text_and_begins_the_answer(ask, tmp_path):
    files = {f"json/{task}.json": MVBENCH[:1] for task in ("moving_count", "fine_grained_pose")}
    out, score, prompts = ask("mvbench", files, ["video/clevrer/video_validation/a.mp4"], ["B)"])
    assert prompts[0].startswith("<|im_start|>system\nCarefully watch the video and pay attention to the cause and")
    assert prompts[0].endswith("Only give the best option.<|im_end|>\n<|im_start|>assistant\nBest option:(")
    assert score["missing"] == {"fine_grained_pose": 1} and score["table"]["accuracy"]["asked"] == 1
    assert f"left out: 1 of fine_grained_pose; the first clip {tmp_path}/video/nturgbd/a.mp4" in out
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


@pytest.mark.parametrize("family, kind, true, text, right", cases("official"))
def test_what_the_official_scorers_say(family, kind, true, text, right):
    assert benchmarks.official_score(family, text, {"solution": true, "problem_type": kind}) == right

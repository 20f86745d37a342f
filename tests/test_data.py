"""Records -> chat -> ids and targets; and what a wrong record says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, cases, python, refused
from test_video import ramp, write_clip
from transformers import AutoTokenizer

import data
from config import VideoArgs
from data import Processor, TooLong, load_tokenizer
from model.loading import ModelConfig
from model.packed import IGNORE
from reader import read_image
from video import frame_indices


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with ten clips (30 frames at 10 a second), a picture and a broken clip."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(10):
        write_clip(folder / f"{i}.mp4", ramp(30))
    write_clip(folder / "p.png", ramp(1, 56, 84), codec="png", pix_fmt="rgb24", container={"update": "1"})
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def processor(clips):
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"]["tokens_per_second"] = 2  # as in the released 3B
    bounds = {"video_min_pixels": None, "video_max_pixels": 3136, "image_min_pixels": 784}
    args = VideoArgs(image_folder=str(clips), nframes=4, **bounds)
    return Processor(load_tokenizer(TINY), ModelConfig.from_dict(raw), args)


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def record(i=0, question="<video>\nWhere?", answer="Left"):
    return {"video": f"{i}.mp4", "conversations": turns(question, answer)}


def text_of(processor, ids):
    """Decoded, runs of pads shortened to one."""
    pads = (processor.config.video_token_id, processor.config.image_token_id)
    kept = [int(t) for i, t in enumerate(ids) if i == 0 or t != ids[i - 1] or t not in pads]
    return processor.backend.decode(kept, skip_special_tokens=False)


def length(processor, record):
    return len(processor.layout(record, True)[0])


def trained_text(processor, example):
    return processor.backend.decode([int(t) for t in example.targets if t != IGNORE], skip_special_tokens=False)


# -- Chat and targets


def test_one_turn(processor):
    """Its ids: below; what of them is trained: test_records.py."""
    example = processor.encode(record())
    trained = example.targets != IGNORE
    assert np.array_equal(example.targets[trained], example.ids[1:][trained[:-1]])  # already shifted
    assert example.targets.dtype == example.ids.dtype == example.position_ids.dtype == np.int64
    assert example.grid_thw == [(2, 4, 4)] and example.second_per_grid == [2 / (4 / 30 * 10)]
    assert example.patches.shape == (32, 1176) and example.patches.dtype == torch.uint8
    assert example.frame_indices == [[0, 10, 19, 29]] and np.allclose(example.frame_times, [[0, 1, 1.9, 2.9]])
    assert length(processor, record()) == len(example) and example.record["video"] == "0.mp4"


def as_transformers(messages, generation):
    """The ids by transformers' chat template, with one pad a clip."""
    theirs = AutoTokenizer.from_pretrained(TINY)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return theirs(text, add_special_tokens=False)["input_ids"]


VIDEO = {"type": "video", "video": "0.mp4"}
CHATS = {
    "video": [[VIDEO, "In which direction?\n(A) Left\n(B) Right"], "Answer: (A) Left to Right"],
    "two": [["Look: ", {"type": "image", "image": "p.png"}, VIDEO], "It’s 12 px,\n\nnaïve 你好"],
    "turns": ["  Hello\n", "Hi!", "\tAnd\r\n\r\nso?\n", "<think>x</think><answer>(A)</answer>"],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_equals_the_chat_template(processor, chat):
    roles = [("user", "assistant")[i % 2] for i in range(len(chat))]
    ours = [{"role": role, "content": content} for role, content in zip(roles, chat)]  # text may stand bare in a list
    messages = [m | {"content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in m["content"]]}
                if isinstance(m["content"], list) else m for m in ours]  # fmt: skip
    pads = {processor.config.video_token_id: 8, processor.config.image_token_id: 6}
    for answer in (True, False):
        expected = as_transformers(messages if answer else messages[:-1], not answer)
        expected = [t for t in expected for _ in range(pads.get(t, 1))]
        assert processor.encode({"messages": ours}, answer=answer).ids.tolist() == expected


# -- Clips: cache, controls, length


def test_a_clip_is_decoded_once_until_its_file_changes(processor, clips, monkeypatch):
    decoded = []
    read_clip = data.read_clip
    monkeypatch.setattr(data, "read_clip", lambda plan: decoded.append(plan.paths[0]) or read_clip(plan))
    first, again = processor.encode(record(3)), processor.encode(record(3, answer="Right"))
    assert len(decoded) == 1 and first.patches.data_ptr() == again.patches.data_ptr()
    before = first.patches.clone()
    for control in ("reversed", "shuffled", "blank"):  # not by writing over what is kept
        other = processor.encode(record(3), control=control)
        assert np.array_equal(other.ids, first.ids) and not torch.equal(other.patches, before)
    assert "nothing changes" in refused(processor.encode, {"problem": "Which?", "solution": "A"}, control="shuffled")
    assert len(decoded) == 1 and torch.equal(first.patches, before)
    write_clip(clips / "3.mp4", ramp(30)[::-1])
    changed = processor.encode(record(3))
    assert len(decoded) == 2 and not torch.equal(changed.patches, first.patches)
    full = Processor(processor.backend, processor.config, replace(processor.args, cache_mb=0))
    assert torch.equal(full.encode(record(3)).patches, changed.patches) and not full.cache
    full.cache_room = 2 * 32 * 1176  # the patches of two clips: the first ones stay
    for i in (0, 1, 2, 0, 3):
        full.encode(record(i))
    assert [plan.paths[0][-5:] for plan in full.cache] == ["0.mp4", "1.mp4"]


def test_too_long_a_sample_gets_fewer_frames_or_is_dropped(processor, caplog):
    args = processor.args
    args.nframes = 12
    full = processor.encode(record())
    args.max_seq_length = len(full) - 1
    shorter = processor.encode(record())
    assert full.grid_thw == [(6, 4, 4)] and shorter.grid_thw == [(5, 4, 4)] and len(shorter) == len(full) - 4
    assert shorter.frame_indices == [[0, 3, 6, 10, 13, 16, 19, 23, 26, 29]]
    assert shorter.second_per_grid == [2 / (10 / 30 * 10)]
    assert "0.mp4: 12 -> 10 frames for max_seq_length" in caplog.text
    assert length(processor, record()) == len(shorter)
    args.max_seq_length = len(full) - 20
    assert processor.encode(record()).grid_thw == [(1, 4, 4)]
    args.max_seq_length = len(full) - 21
    with pytest.raises(TooLong, match="[0-9]+ tokens, [0-9]+ of them text"):
        processor.encode(record())
    args.overlong, args.max_seq_length = "drop", len(full) - 1
    for too_long in (record(), {"id": "text alone", "question": "?" * 999, "answer": "!"}):
        with pytest.raises(TooLong):
            processor.encode(too_long)


# -- python data.py FILE...


def lines_of(processor, file, as_json=False):
    lines = list(data.look_at_file(str(file), processor, as_json, "Where?"))
    return [json.loads(line) for line in lines] if as_json else "\n".join(lines)


def test_the_plan_of_a_clip(processor, clips):
    processor.args.nframes, processor.args.fps = None, 8.0  # of three seconds
    text = lines_of(processor, clips / "0.mp4")
    facts = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    assert facts["samples"].startswith("1, ")
    assert (facts["frames"], facts["size"], facts["grid_thw"], facts["tokens"]) == ("30", "56 56", "12 4 4", "48")
    (result,) = lines_of(processor, clips / "0.mp4", as_json=True)
    (clip,) = result["clips"]
    facts = {key: clip[key] for key in ("frames", "width", "height", "fps", "seconds")}
    assert facts == dict(frames=30, width=64, height=64, fps=10.0, seconds=3.0) and result["learned"] == []
    assert len(clip["indices"]) == 24 and np.allclose(clip["times"], np.array(clip["indices"]) / 10)
    (broken,) = lines_of(processor, clips / "broken.mp4", as_json=True)
    assert "no readable video" in broken["refused"] and broken["clips"] == broken["warnings"] == []


def test_the_plan_of_a_dataset(processor, clips):
    records = [record(i, answer="x" * i) for i in range(1, 4)]
    records.append({"video": "broken.mp4", "conversations": turns("<video>", "L")})
    (clips / "d.json").write_text(json.dumps(records))
    lines = lines_of(processor, clips / "d.json").splitlines()
    lengths = [length(processor, r) for r in records[:3]]
    assert f"3, {sum(lengths)} tokens: {lengths[0]} to {lengths[2]} a sample, median {lengths[1]}" in lines[1]
    assert lines[2].count("sample 3 (broken.mp4): ") == 1 and "no readable video" in lines[2]
    results = lines_of(processor, clips / "d.json", as_json=True)
    assert [result.get("learned") for result in results] == [["x"], ["xx"], ["xxx"], None]
    broken = [{"question": str(i)} for i in range(30)]
    (clips / "more.json").write_text(json.dumps([*records, *broken]))
    text = lines_of(processor, clips / "more.json")
    assert text.count("skipped:") == 9 and "23 more" in text


def test_records_that_went_wrong(clips, tmp_path):
    """Records that were learned wrongly once, by `python data.py FILE --json`."""
    known = cases("records")
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case["record"]) + "\n" for case in known))
    for name, file in (("a.mp4", "0.mp4"), ("a.png", "p.png")):
        (tmp_path / name).write_bytes((clips / file).read_bytes())
    result = python("data.py", tmp_path / "cases.jsonl", "--json")
    assert result.returncode == 0, result.stderr
    for case, line in zip(known, result.stdout.splitlines(), strict=True):
        facts, expected = json.loads(line), case["expect"]
        if isinstance(expected, dict):
            assert facts["learned"] == expected["learned"], case["why"]
        elif expected.startswith("refused"):
            assert facts["refused"] and "\n" not in facts["refused"] and len(facts["refused"]) < 300, case["why"]
            assert "names" not in expected or expected.split()[-1] in facts["refused"]
        else:
            assert expected.startswith("only frames between 1.0 s and 2.0 s")
            (clip,) = facts["clips"]
            assert clip["indices"] == frame_indices(11, 8, 10) and clip["times"][0] == 1.0 and clip["times"][-1] == 2.0


def test_a_preview_shows_the_frames_as_the_model_sees_them(tmp_path):
    """The PNG holds every sampled frame, in its resized pixels, in order."""
    frames = [np.full((56, 84, 3), 60 * k + 20, np.uint8) for k in range(4)]
    path = write_clip(tmp_path / "clip.mkv", frames, fps=2, codec="libx264rgb", pix_fmt="bgr0", qp="0")
    data.main([path, "--nframes", "4", "--preview", str(tmp_path / "out.png")])
    page = read_image(str(tmp_path / "out.png"))
    row = page[0, page.shape[1] // 2].int().tolist()
    assert [value for value, before in zip(row[1:], row[:-1]) if value != before and value < 250] == [20, 80, 140, 200]

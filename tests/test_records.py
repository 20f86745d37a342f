"""Files of records, and records as other projects have them: read unchanged, for SFT and for the rewards; others are
refused in one line."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import test_data
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import SYSTEM, as_transformers, text_of, trained_text, turns

from loader import Loader
from model import UserError
from records import Media, Selection, clip_name, data_files, read_records, read_turns, record_name, shares, spread
from rewards import accuracy, reference_answer, sample_from_record

clips, processor = test_data.clips, test_data.processor  # fixtures
QUESTION = "Where does it go?\n(A) left\n(B) right"
USER, ASSISTANT = {"role": "user"}, {"role": "assistant"}
VIDEO, IMAGE = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))


def chat(question, answer):
    return [{**USER, "content": question}, {**ASSISTANT, "content": answer}]


def typed(*parts):
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


# Written here after the documents that records.py names. All of them ask QUESTION about 0.mp4 and say (B) right.
THINK = "<think>It goes right.</think>"
SAME = {
    "llava": {"id": "7", "video": "0.mp4", "conversations": turns(f"<video>\n{QUESTION}", "(B) right")},
    "2U1 for GRPO": {"id": "7", "video": "0.mp4", "conversations": turns(QUESTION, "(B) right")},
    "llama-factory sharegpt": {"conversations": turns(f"<video>{QUESTION}", "(B) right"), "videos": ["0.mp4"]},
    "llama-factory nulls": {
        "conversations": turns(f"<video>{QUESTION}", "(B) right"),
        **{"videos": ["0.mp4"], "images": [], "system": "", "tools": "[]"},
    },
    "ms-swift": {"messages": chat(f"<video>{QUESTION}", "(B) right"), "videos": ["0.mp4"], "solution": "B"},
    "ms-swift for GRPO": {"messages": chat(f"<video>{QUESTION}", "")[:1], "videos": ["0.mp4"], "solution": "(B) right"},
    "ms-swift sharegpt": {"conversation": [{"human": f"<video>{QUESTION}", "assistant": "(B) right"}],
                          "videos": ["0.mp4"]},
    "ms-swift query": {"query": f"<video>{QUESTION}", "response": "(B) right", "videos": ["0.mp4"]},
    "alpaca": {"instruction": "<video>Where does it go?", "input": "(A) left\n(B) right", "output": "(B) right",
               "videos": ["0.mp4"]},
    "trl prompt and completion": {
        "prompt": [{**USER, "content": typed({"type": "video"}, QUESTION)}],
        "completion": [{**ASSISTANT, "content": typed("(B) right")}],
        "videos": ["0.mp4"],
    },
    "trl for GRPO": {"prompt": [{**USER, "content": QUESTION}], "solution": "(B) right", "videos": ["0.mp4"]},
    "trl, as datasets writes it": {
        "messages": [
            {**USER, "content": [{"type": "video", "text": None}, {"type": "text", "text": QUESTION, "video": None}]},
            {**ASSISTANT, "content": [{"type": "text", "text": "(B) right", "video": None}]},
        ],
        "videos": [{"bytes": None, "path": "0.mp4"}],
        "images": None,
    },
    "openai": {"messages": chat(typed({"type": "video_url", "video_url": {"url": "0.mp4"}}, QUESTION), "(B) right")},
    "qwen": {"messages": chat(typed({"type": "video", "video": "0.mp4"}, QUESTION), "(B) right")},
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_each_form_says_the_same(processor, form):
    """One clip, question and answer in every form: the same ids, targets and reward, and what transformers' own chat
    template makes of them."""
    record = SAME[form]
    example = processor.encode(record)
    messages = [{**USER, "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    messages.append({**ASSISTANT, "content": "(B) right"})
    pad = processor.config.video_token_id
    ids = [t for t in as_transformers(processor.backend, messages, False) for _ in range(8 if t == pad else 1)]
    assert example.ids.tolist() == ids and trained_text(processor, example) == "(B) right<|im_end|>"
    prompt = processor.encode(record, answer=False)
    assert prompt.ids.tolist() == ids[: len(prompt)] and torch.equal(prompt.patches, example.patches)
    sample = sample_from_record(record)
    assert sample.options == {"A": "left", "B": "right"} and reference_answer(sample) == "B"
    said = [accuracy(f"{THINK}<answer>{answer}</answer>", sample) for answer in ("(B) right", "B", "(A) left", "")]
    assert said == [1, 1, 0, 0]
    assert clip_name(record) == "0.mp4" and record_name(record) in ("7", "0.mp4")


VIDEO_R1 = {
    "problem_id": 2,
    "problem": "Where does it go?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. left", "B. right", "C. up"],
    "process": THINK,
    "solution": "<answer>B</answer>",
    "path": "./0.mp4",
    "data_source": "drawn",
}


def test_video_r1(processor):
    example = processor.encode(VIDEO_R1)
    asked = f"{SYSTEM}<|im_start|>user\n{VIDEO}Where does it go?\nOptions:\nA. left\nB. right\nC. up<|im_end|>\n"
    assert text_of(processor, example.ids).startswith(asked)
    assert trained_text(processor, example) == f"{THINK}\n<answer>B</answer><|im_end|>"
    sample = sample_from_record(VIDEO_R1)
    assert sample.answer == "<answer>B</answer>" and sample.options == {"A": "left", "B": "right", "C": "up"}
    assert [accuracy(f"{THINK}<answer>{a}</answer>", sample) for a in ("B", "B. right", "right", "A")] == [1, 1, 1, 0]
    assert record_name(VIDEO_R1) == "2" and clip_name(VIDEO_R1) == "./0.mp4"
    bare = {**VIDEO_R1, "process": None, "options": ["left", "right"], "problem": "A. Smith asks: where?"}
    assert sample_from_record(bare).options == {"A": "left", "B": "right"}
    number = {"problem": "How many?", "problem_type": "numerical", "options": [], "solution": 3, "path": "p.png"}
    number |= {"data_type": "image"}
    assert accuracy(f"{THINK}<answer>3</answer>", sample_from_record(number)) == 1
    span = number | {"problem_type": "time span", "solution": [2.0, 6]}  # 2 of 6 seconds are in both
    assert accuracy(f"{THINK}<answer>4 to 8</answer>", sample_from_record(span)) == 2 / 6
    assert text_of(processor, processor.encode(number).ids).startswith(f"{SYSTEM}<|im_start|>user\n{IMAGE}How many?<")
    lettered = {"problem": "?", "solution": "A", "options": {"A": 3, "B": "four", "C": None}}
    assert read_turns(lettered, "r")[0].text == "?\nOptions:\nA. 3\nB. four"


def kinds(record):
    parts = [part for turn in read_turns(record, "r") for part in turn.parts]
    return [(part.kind, *part.paths) if isinstance(part, Media) else part for part in parts]


CLIPS = [  # record, where its clips stand
    ({"messages": chat("<image>What, <video>and what?", "So"), "images": ["p.png"], "videos": ["0.mp4"]},
     [("image", "p.png"), "What, ", ("video", "0.mp4"), "and what?", "So"]),
    ({"messages": [*chat("<image>Who?", "A"), *chat("And here?<image>", "B")], "images": ["p.png", "q.png"]},
     [("image", "p.png"), "Who?", "A", "And here?", ("image", "q.png"), "B"]),
    ({"messages": chat("<video>?", "!"), "videos": [["a.png", "b.png"]]},  # ms-swift's form for frames
     [("video", "a.png", "b.png"), "?", "!"]),
    ({"conversations": turns("?", "!"), "image": ["a.png", "b.png"], "video": "c.mp4"},
     [("image", "a.png"), ("image", "b.png"), ("video", "c.mp4"), "?", "!"]),
    ({"prompt": [{**USER, "content": typed({"type": "image"}, "or", {"type": "image"}, "?")}], "completion": "!",
      "images": ["a.png", "b.png"]}, [("image", "a.png"), "or", ("image", "b.png"), "?", "!"]),
    ({"messages": chat(typed("<video>\nWhere?"), "!"), "videos": ["c.mp4"]}, [("video", "c.mp4"), "Where?", "!"]),
    ({"video": [["a.png", "b.png"], "file:///c.mp4"], "conversations": turns("<video> <video>", "!")},
     [("video", "a.png", "b.png"), " ", ("video", "/c.mp4"), "!"]),
    ({"video": ["a.mp4", "b.mp4"], "conversations": turns("<video>\n<video>\n?", "!")},
     [("video", "a.mp4"), ("video", "b.mp4"), "?", "!"]),
]  # fmt: skip
DATA = "data:image/png;base64,AA"
for _names in (["1.png", "2.png"], [{"path": "1.png"}, {"url": "2.jpg"}], [DATA, DATA], [{"url": DATA}, "2.png"]):
    _paths = [name if isinstance(name, str) else next(iter(name.values())) for name in _names]
    CLIPS.append(({"question": "?", "answer": "!", "video": _names}, [("video", *_paths), "?", "!"]))


@pytest.mark.parametrize("record, expected", CLIPS)
def test_clips_stand_where_the_record_says(record, expected):
    assert kinds(record) == expected


def test_what_is_not_learned(processor):
    """The marks of ms-swift, OpenAI, LLaMA-Factory v1, and the prompt of TRL's prompt and completion."""
    for mark in ({"loss": False}, {"loss": 0}, {"weight": 0}, {"loss_weight": 0.0}):
        messages = [*chat("Hi", "Ho"), *chat("And?", "So")]
        messages[1] |= mark
        assert trained_text(processor, processor.encode({"messages": messages})) == "So<|im_end|>"
        with pytest.raises(UserError, match="every answer is marked as not learned"):
            processor.encode({"messages": messages[:2]})
    trl = {"prompt": [*chat("Hi", "Ho"), {**USER, "content": "And?"}], "completion": chat("", "So")[1:]}
    assert trained_text(processor, processor.encode(trl)) == "So<|im_end|>"
    history = {"query": "And?", "response": "So", "history": [["Hi", "Ho"]], "system": "Be short."}
    assert text_of(processor, processor.encode(history).ids).startswith("<|im_start|>system\nBe short.<|im_end|>")


def test_clips_inside_a_record(processor, clips):
    """data: addresses, as OpenAI and ms-swift have them: the same ids and patches as from the file."""

    def address(name, kind):
        return f"data:{kind};base64," + base64.b64encode((clips / name).read_bytes()).decode()

    plain = processor.encode({"messages": chat("<video><image>?", "!"), "videos": ["0.mp4"], "images": ["p.png"]})
    movie, still = address("0.mp4", "video/mp4"), address("p.png", "image/png")
    swift = {"messages": chat("<video><image>?", "!"), "videos": [movie], "images": [still]}
    urls = {"type": "video_url", "video_url": {"url": movie}}, {"type": "image_url", "image_url": still}
    for record in (swift, {"messages": chat(typed(*urls, "?"), "!")}):
        example = processor.encode(record)
        assert np.array_equal(example.ids, plain.ids) and torch.equal(example.patches, plain.patches)
        assert clip_name(record) is None and len(record_name(record)) <= 80
    held = [Path(path) for plan in processor.layout(swift, True, "r")[2] for path in plan.paths]
    assert sorted(path.suffix for path in held) == [".mp4", ".png"] and all(path.is_file() for path in held)
    file = {"type": "video_url", "video_url": {"url": f"file://{clips / '0.mp4'}"}}
    assert processor.encode({"messages": chat(typed(file, "?"), "!")}).grid_thw == [(2, 4, 4)]


def test_text_and_clips_mix_in_one_file(processor, tmp_path):
    """Every form in one .jsonl, records of text alone among them: all can be batched together."""
    text_alone = [{"messages": chat("Capital of France?", "Paris")}, {"prompt": "1+1=", "answer": 2}]
    records = [*SAME.values(), VIDEO_R1, *text_alone]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = processor.args
    args.seed, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_skip_share = 0, 32, 1, 0.0
    args.dataloader_num_workers, args.pack_tokens = 1, None
    loader = Loader(read_records(path), processor, args)
    ((batch,),) = loader.iterate(0, 1)
    assert not loader.skipped and len(batch.grid_thw) == len(records) - len(text_alone)


# One record of each layout, cut short: what is learned, or why it is refused. docs/data.md lists the same
LAYOUTS = {
    "Video-R1-COT": (VIDEO_R1, [f"{THINK}\n<answer>B</answer>"]),
    "Video-R1-260k": ({**VIDEO_R1, "process": ""}, ["<answer>B</answer>"]),
    "LLaMA-Factory alpaca_en_demo": ({"instruction": "Sum.", "input": "1 2", "output": "3"}, ["3"]),
    "LLaMA-Factory alpaca with history": (
        {"instruction": "?", "input": "", "output": "c", "system": "s", "history": [["a", "b"]]}, ["b", "c"],
    ),
    "LLaMA-Factory mllm_demo": ({"messages": chat("<image>Who?", "He"), "images": ["p.png"]}, ["He"]),
    "LLaMA-Factory mllm_video_demo": ({"messages": chat("<video>Why?", "So"), "videos": ["0.mp4"]}, ["So"]),
    "LLaMA-Factory mllm_audio_demo": ({"messages": chat("<audio>?", "!"), "audios": ["1.mp3"]}, "holds audios"),
    "LLaMA-Factory glaive_toolcall": ({"conversations": turns("?", "!"), "tools": '[{"name": "f"}]'}, "holds tools"),
    "LLaMA-Factory dpo_en_demo": ({"conversations": turns("?"), "chosen": {"value": "!"}}, "holds chosen"),
    "LLaMA-Factory kto_en_demo": ({"messages": chat("?", "!"), "label": False}, "label false"),
    "LLaMA-Factory kto_tag": ({"instruction": "?", "output": "!", "kto_tag": False}, "label false"),
    "LLaMA-Factory c4_demo": ({"text": "A whole text."}, "no known form"),
    "LLaMA-Factory v1_multimodal": (
        {"messages": [
            {**USER, "content": [{"type": "video_url", "value": "0.mp4"}, {"type": "text", "value": "?"}]},
            {**ASSISTANT, "content": [{"type": "text", "value": "So"}], "loss_weight": 1.0},
        ]},
        ["So"],
    ),
    "LLaMA-Factory v1_dpo_demo": ({"chosen_messages": chat("?", "!"), "rejected_messages": []}, "no known form"),
    "ms-swift pre-training": ({"messages": [{**ASSISTANT, "content": "I love"}]}, "no user's turn"),
    "ms-swift fine-tuning": ({"messages": [*chat("a", "b"), *chat("<image>c", "d")], "images": ["p.png"]}, ["b", "d"]),
    "ms-swift loss": (
        {"messages": [*chat("a", "b"), {**USER, "content": "c"}, {**ASSISTANT, "content": "d", "loss": False}]}, ["b"],
    ),
    "ms-swift DPO": ({"messages": chat("?", "!"), "rejected_response": "."}, "holds rejected_response"),
    "ms-swift KTO": ({"messages": chat("?", "!"), "label": True}, ["!"]),
    "ms-swift GRPO": ({"messages": chat("?", "")[:1], "solution": "<answer>3</answer>"}, ["<answer>3</answer>"]),
    "ms-swift classification": ({"messages": chat("?", "")[:1], "label": 1}, "ends with a turn of the user"),
    "ms-swift grounding": (
        {"messages": chat("<image>Find it", "<bbox>"), "images": ["p.png"], "objects": {"bbox": [[1, 2, 3, 4]]}},
        "holds objects",
    ),
    "TRL language modeling": ({"messages": chat("?", "!")}, ["!"]),
    "TRL prompt-only": ({"prompt": chat("?", "")[:1]}, "ends with a turn of the user"),
    "TRL prompt-completion": ({"prompt": "The sky is", "completion": " blue."}, [" blue."]),
    "TRL preference": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "holds chosen"),
    "TRL unpaired preference": ({"prompt": "The sky is", "completion": " green.", "label": False}, "label false"),
    "TRL stepwise": ({"prompt": "?", "completions": ["a"], "labels": [True]}, "ends with a turn of the user"),
    "TRL thinking": (
        {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "thinking": "Hm", "content": "!"}]}, "holds thinking",
    ),
    "Qwen single_images": ({"image": "p.png", "conversations": turns("Is it 38?\n<image>", "Yes")}, ["Yes"]),
    "Qwen several images": ({"image": ["p.png", "p.png"], "conversations": turns("<image>\n<image>\n?", "!")}, ["!"]),
    "Qwen video": ({"video": "0.mp4", "conversations": turns("<video>\nWhat?", "Cars")}, ["Cars"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_whole_or_refused(processor, layout):
    record, expected = LAYOUTS[layout]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            processor.encode(record)
        return
    learned = trained_text(processor, processor.encode(record))
    assert learned == "".join(f"{text}<|im_end|>" for text in expected)
    named = json.dumps(record).count("0.mp4") + json.dumps(record).count("p.png")
    assert len(processor.encode(record).grid_thw) == named


COLUMNS = {
    "image_path": "a.png", "video_path": "clips/a.mp4", "img": "a", "file_name": "a.mp4", "frames": ["1.jpg", "2.jpg"],
    "clip": "a.webm", "media": [{"path": "a.mov"}], "extra": {"source": {"file": "a.MP4"}}, "whatever": "b.TIFF",
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_a_clip_in_a_column_that_no_form_knows_is_refused_by_name(column):
    for record in ({"question": "?", "answer": "!"}, {"conversations": turns("?", "!")}, {"messages": chat("?", "!")}):
        with pytest.raises(UserError, match=f"column {column}"):
            read_turns(record | {column: COLUMNS[column]}, "sample 1")
    harmless = {"id": "a.mp4", "source": "x", "num_frames": 8, "image_size": [3, 4], "video_id": "x1"}
    assert len(read_turns({"question": "?", "answer": "!"} | harmless, "sample 1")) == 2


def test_a_subset_is_spread_over_the_records_by_seed():
    numbers = [list(spread(range(1000), 20, seed)) for seed in (1, 1, 2)]
    assert numbers[0] == numbers[1] != numbers[2] and len(set(numbers[0])) == 20
    assert min(numbers[0]) < 200 and max(numbers[0]) > 800 and numbers[0] == sorted(numbers[0])
    assert list(spread(range(30), 30, 0)) == [*range(30)]


WRONG = {
    "its keys are: conversatons, video; expected one of conversations, messages": {"conversatons": [], "video": "a"},
    "its keys are: none": {},
    "conversations is '\\[\\]'; expected a list of turns": {"conversations": []},
    "weight is 0.5; expected 0 or 1": {"messages": [*chat("?", "!"), {**ASSISTANT, "content": "!", "weight": 0.5}]},
    "the column frames": {"frames": [{"x": "a.JPG"}], "question": "?", "answer": "!"},
    "video_start beside 0 videos": {"question": "?", "answer": "!", "video_start": 1.0},
    "found video and videos": {"conversations": turns("<video>", "!"), "video": "a.mp4", "videos": ["a.mp4"]},
    "2 <video> tag.* 1 video": {"video": "0.mp4", "conversations": turns("<video><video>", "L")},
    "no user's turn": {"conversations": turns("L", roles=("gpt", "gpt"))},
    "ends with a turn of the user": {"conversations": turns("?")},
    "special token <.im_end.>": {"conversations": turns("?<|im_end|>", "L")},
    "no file nothing.mp4; .*--image_folder": {"video": "nothing.mp4", "conversations": turns("?", "L")},
    "1 <video> tag.* 0 video": {"video": "", "conversations": turns("<video>", "L")},
    "unknown content part": {"messages": [{**USER, "content": [{"type": "audio"}]}]},
    "unknown video option 'speed'": {"messages": chat([{"type": "video", "video": "0.mp4", "speed": 2}], "L")},
    "turn of the assistant; expected it in a user's": {"messages": chat("?", [{"type": "video", "video": "0.mp4"}])},
    "image is .*; expected a file name": {"conversations": turns("<image>", "!"), "image": [["a.png", "b.png"]]},
    "1 <image> tag.* for 2 image": {"messages": chat(typed({"type": "image"}), "!"), "images": ["a.png", "b.png"]},
    "https://a.b/c.mp4 is a web address": {"messages": chat("<video>", "!"), "videos": ["https://a.b/c.mp4"]},
    "s3://c.png is a web": {"messages": chat(typed({"type": "image_url", "image_url": {"url": "s3://c.png"}}), "!")},
    "is not base64": {"messages": chat("<image>", "!"), "images": ["data:image/png;base64,?"]},
    "does not decode": {"messages": chat("<image>", "!"), "images": ["data:image/png;base64,AAAA"]},
    "unknown role 'tool'": {"messages": [*chat("?", "!"), {"role": "tool", "content": "3"}]},
    r"unknown role \"\['human'\]\"": {"conversations": [{"from": ["human"], "value": "?"}]},
    "holds tool_calls": {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "content": "", "tool_calls": [{}]}]},
    "in the column path": {**VIDEO_R1, "data_type": "audio"},
    "options are left": {**VIDEO_R1, "options": "left"},
    "solution is \\['B'\\]": {**VIDEO_R1, "solution": ["B"]},
    "an empty turn of the user": {"messages": chat(" \n", "!")},
    "an empty answer": {"messages": chat("?", typed(""))},
    "an empty answer; ": {"problem": "?", "process": THINK, "solution": "<answer> </answer>"},
    "loss_scale is 0.3": {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "content": "!", "loss_scale": 0.3}]},
    "loss_weight is 0.5": {"question": "?", "answer": "!", "loss_weight": 0.5},
    "a part of a turn": {"messages": chat("?", [{"type": "text", "value": "!", "loss_weight": 0.0}])},
    "label false": {"question": "?", "answer": "!", "label": "false"},
    "holds rejected_images": {"query": "<image>?", "response": "!", "images": ["p.png"], "rejected_images": ["q.png"]},
    "system column beside another": {"system": "s", "messages": [{"role": "system", "content": "t"}, *chat("?", "!")]},
    "stand in the column path": {"question": "?", "answer": "!", "path": "0.mp4"},
    "the column image_path": {"video": "0.mp4", "question": "?", "answer": "!", "image_path": "p.png"},
    "expected one file name": {"messages": chat([{"type": "video", "video": "0.mp4", "path": "1.mp4"}], "!")},
    "unknown image option 'fps'": {"messages": chat([{"type": "image", "image": "p.png", "fps": 1}], "!")},
    "video_start beside 1 videos": {
        "messages": chat([{"type": "video", "video": "0.mp4", "video_start": 0.1}], "!"), "video_start": 0.2,
    },
    "expected an answer": {"prompt": "?", "solution": " "},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_record_is_refused_in_one_line(processor, message):
    record = WRONG[message]
    with pytest.raises(UserError, match=message) as caught:
        processor.encode(record, name="sample 3")
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and ("sample 3" in text or "inline_clips" in text)
    try:  # the rewards refuse it too, or do not care; they never fall over
        sample_from_record(record)
    except UserError:
        pass


WORDS = st.sampled_from(["", "<video>", "a.mp4", "human", "user", "assistant", "text", "video", "image_url", "B"])
INNER = st.sampled_from(["role", "from", "value", "content", "type", "video", "text", "image_url", "url", "path"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER, inner, max_size=3),
    max_leaves=12,
)
KEYS = ["conversations", "messages", "conversation", "prompt", "completion", "problem", "options", "solution", "path"]
KEYS += ["video", "videos", "image", "images", "data_type", "query", "history", "system", "answer", "id"]


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6))
def test_no_record_does_anything_but_load_or_be_refused(record):
    for read in (lambda: read_turns(record, "sample 3"), lambda: sample_from_record(record)):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)
    record_name(record), clip_name(record)


def test_options_beside_a_name_count_wherever_it_stands(processor):
    part = {"type": "video", "nframes": 4}
    for record in (
        {"messages": chat([{**part, "video": "0.mp4"}, *typed("?")], "!")},
        {"messages": chat([part, *typed("?")], "!"), "videos": ["0.mp4"]},  # TRL: the record names the file
        {"messages": chat([{"type": "video_url", "video_url": {"url": "0.mp4", "nframes": 4}}, *typed("?")], "!")},
        {"messages": chat("<video>?", "!"), "videos": [{"path": "0.mp4", "nframes": 4}]},
        {"messages": chat([{"type": "video", "video": "0.mp4", "max_frames": 4}, *typed("?")], "!")},
    ):
        assert len(processor.encode(record).frame_indices[0]) == 4


def test_the_reader_leaves_the_record_alone():
    for record in [*SAME.values(), VIDEO_R1]:
        before = json.dumps(record)
        read_turns(record, "r"), sample_from_record(record)
        assert json.dumps(record) == before


# -- Files


def test_several_files_and_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.json", "b.jsonl", "c:3.json", "d,e.json", "f.json:2")):
        Path(name).write_text(json.dumps({"i": i}) if name == "b.jsonl" else json.dumps([{"i": i}, {"i": i}]))
    for text, files in (
        ("a.json", [("a.json", 1)]),
        ("a.json:2,b.jsonl:0.5", [("a.json", 2), ("b.jsonl", 0.5)]),
        ("a.json,b.jsonl:3", [("a.json", 1), ("b.jsonl", 3)]),
        ("c:3.json", [("c:3.json", 1)]),  # names that exist are taken as they are
        ("c:3.json:2,a.json", [("c:3.json", 2), ("a.json", 1)]),
        ("d,e.json", [("d,e.json", 1)]),
        ("f.json:2", [("f.json:2", 1)]),
    ):
        assert data_files(text) == files
    records = read_records("b.jsonl:2,a.json")
    assert [record["i"] for record in records] == [1, 0, 0] and records[1].folder == "."
    assert shares(records) == [(2, [0]), (1, [1, 2])] and shares(Selection(records, [0, 2])) == [(2, [0]), (1, [1])]
    for weight in ("0", "-1", "nan", "inf", "x", "", "1e5000"):
        with pytest.raises(UserError, match="the weight is .*; expected a number above 0"):
            read_records(f"a.json:{weight},b.jsonl")


@pytest.mark.parametrize("name, separator", [("a.json", " ,\n"), ("a.jsonl", "\n"), ("a.jsonl", "\r\n\n")])
def test_a_file_is_read_as_json_loads_reads_it(tmp_path, name, separator):
    whole = [{"i": i, "text": 'ä \u00e9\u2028 [{"},\\', "empty": {}, "list": [1, [2.5, None]]} for i in range(30)]
    text = separator.join(json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(whole))
    for mark in (b"", b"\xef\xbb\xbf"):  # the second as Windows saves UTF-8
        (tmp_path / name).write_bytes(mark + (f" [{text} ]\n" if name == "a.json" else text).encode())
        records = read_records(tmp_path / name)
        assert list(records) == whole and records[-1]["i"] == 29 and len(records) == 30
        assert [r["i"] for r in Selection(records, [3, 7, 11])] == [3, 7, 11]


NOT_JSON = {
    "a.json": {
        "line 1 column 1 is not JSON": ["hello", ""],
        "line 2 column 1 is not JSON (Extra data); one object a line is .jsonl": ['{"a": 1}\n{"a": 2}'],
        "is not JSON": ["[\n{}\n {}]", "[{},]", "[{}", "[", "[,", "[{}}", '[{"a": 1},\n{"a": }]', "[{}]]"],
        "expected records": ["12", "{}", "[]", "[{}, 1]"],
        "cannot be read": ['[{"a": ' + "[" * 100_000, '[{"a": ' + "1" * 5000 + "}]", b'[\n{"a": "\xc3"}]'],
        "record 1 holds half a character": ['[{}, {"a": "\\ud83d"}]'],
    },
    "a.jsonl": {
        "line 4 column 7 is not JSON": ['{"a": 1}\n\n{"a": 2}\n{"a": \n'],
        "line 1 column 4 is not JSON (Extra data)": ["{} {}"],
        "expected records": ["{}\n[]\n", "\n\n"],
        "cannot be read, after line 1": ['{}\n{"a":' + "[" * 100_000],
    },
    "a.csv": {"a.csv: a table, which is not read": ["question,answer"]},
}


@pytest.mark.parametrize("name, message", [(name, message) for name in NOT_JSON for message in NOT_JSON[name]])
def test_what_is_no_dataset(tmp_path, name, message):
    for content in NOT_JSON[name][message]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as caught:
            read_records(tmp_path / name)
        assert message in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.json").touch()
    for name, message in (
        ("none.json", "no such file"),
        ("zero\0.json", "no such file"),
        ("x" * 300, "no such file"),
        ("fifo.jsonl", "not a file; .*makes one$"),  # at once: nothing opens the fifo
        ("folder", "not a file; .*did you mean .*folder/train.json"),
    ):
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / name)
    with pytest.raises(UserError, match="https://a.b/c.json is a web address; download it first"):
        read_records("https://a.b/c.json")

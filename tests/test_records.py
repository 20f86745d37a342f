"""Records as other projects have them load unchanged, for SFT and for the rewards; others are refused in one line."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import SYSTEM, as_transformers, clips, processor, text_of, trained_text, turns  # noqa: F401 fixtures

from loader import Loader
from model import UserError
from records import Media, clip_name, read_records, read_turns, record_name, spread
from rewards import accuracy, reference_answer, sample_from_record

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
def test_each_form_says_the_same(processor, form):  # noqa: F811
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


def test_video_r1(processor):  # noqa: F811
    example = processor.encode(VIDEO_R1)
    asked = f"{SYSTEM}<|im_start|>user\n{VIDEO}Where does it go?\nOptions:\nA. left\nB. right\nC. up<|im_end|>\n"
    assert text_of(processor, example.ids).startswith(asked)
    assert trained_text(processor, example) == f"{THINK}\n<answer>B</answer><|im_end|>"
    sample = sample_from_record(VIDEO_R1)
    assert sample.answer == "<answer>B</answer>" and sample.options == {"A": "left", "B": "right", "C": "up"}
    assert [accuracy(f"{THINK}<answer>{a}</answer>", sample) for a in ("B", "B. right", "right", "A")] == [1, 1, 1, 0]
    rl = {**VIDEO_R1, "process": None}  # Video-R1-260k has no reasoning: the solution alone is learned
    assert trained_text(processor, processor.encode(rl)) == "<answer>B</answer><|im_end|>"
    assert record_name(rl) == "2" and clip_name(rl) == "./0.mp4"
    bare = {**rl, "options": ["left", "right"], "problem": "A. Smith asks: where?"}
    assert sample_from_record(bare).options == {"A": "left", "B": "right"}
    assert accuracy("<answer>B</answer>", sample_from_record(bare)) == 1
    number = {"problem": "How many?", "problem_type": "numerical", "options": [], "solution": 3, "path": "p.png"}
    number |= {"data_type": "image"}
    assert accuracy(f"{THINK}<answer>3</answer>", sample_from_record(number)) == 1
    assert text_of(processor, processor.encode(number).ids).startswith(f"{SYSTEM}<|im_start|>user\n{IMAGE}How many?<")


def kinds(record):
    turns_ = read_turns(record, "r")
    return [(p.kind, *p.paths) if isinstance(p, Media) else p for turn in turns_ for p in turn.parts]


def test_several_clips_in_one_record(processor):  # noqa: F811
    mixed = {"messages": chat("<image>What, <video>and what?", "So"), "images": ["p.png"], "videos": ["0.mp4"]}
    assert kinds(mixed) == [("image", "p.png"), "What, ", ("video", "0.mp4"), "and what?", "So"]
    assert processor.encode(mixed).grid_thw == [(1, 4, 6), (2, 4, 4)]
    later = [*chat("<image>Who?", "A"), *chat("And here?<image>", "B")]
    assert kinds({"messages": later, "images": ["p.png", "q.png"]})[3:5] == ["And here?", ("image", "q.png")]
    frames = {"messages": chat("<video>?", "!"), "videos": [["a.png", "b.png"]]}  # ms-swift's form for frames
    assert kinds(frames)[0] == ("video", "a.png", "b.png")
    ahead = {"conversations": turns("?", "!"), "image": ["a.png", "b.png"], "video": "c.mp4"}
    assert kinds(ahead) == [("image", "a.png"), ("image", "b.png"), ("video", "c.mp4"), "?", "!"]
    parts = typed({"type": "image"}, "or", {"type": "image"}, "?")
    assert kinds({"prompt": [{**USER, "content": parts}], "completion": "!", "images": ["a.png", "b.png"]}) == [
        *(("image", "a.png"), "or", ("image", "b.png"), "?", "!")
    ]
    tags = {"messages": chat(typed("<video>\nWhere?"), "!"), "videos": ["c.mp4"]}
    assert kinds(tags) == [("video", "c.mp4"), "Where?", "!"]
    both = {"video": [["a.png", "b.png"], "file:///c.mp4"], "conversations": turns("<video> <video>", "!")}
    assert kinds(both) == [("video", "a.png", "b.png"), " ", ("video", "/c.mp4"), "!"]
    two = {"video": ["a.mp4", "b.mp4"], "conversations": turns("<video>\n<video>\n?", "!")}
    assert kinds(two) == [("video", "a.mp4"), ("video", "b.mp4"), "?", "!"] and record_name(two) == "a.mp4"


def test_what_is_not_learned(processor):  # noqa: F811
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


def test_clips_inside_a_record(processor, clips):  # noqa: F811
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


def test_text_and_clips_mix_in_one_file(processor, tmp_path):  # noqa: F811
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
    "LLaMA-Factory dpo_en_demo": ({"conversations": turns("?"), "chosen": {}, "rejected": {}}, "a preference"),
    "LLaMA-Factory kto_en_demo": ({"messages": chat("?", "!"), "label": False}, "label is False"),
    "LLaMA-Factory kto_tag": ({"instruction": "?", "output": "!", "kto_tag": False}, "kto_tag is False"),
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
    "TRL preference": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "a preference"),
    "TRL unpaired preference": ({"prompt": "The sky is", "completion": " green.", "label": False}, "label is False"),
    "TRL stepwise": ({"prompt": "?", "completions": ["a"], "labels": [True]}, "ends with a turn of the user"),
    "TRL thinking": (
        {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "thinking": "Hm", "content": "!"}]}, "holds thinking",
    ),
    "Qwen single_images": ({"image": "p.png", "conversations": turns("Is it 38?\n<image>", "Yes")}, ["Yes"]),
    "Qwen several images": ({"image": ["p.png", "p.png"], "conversations": turns("<image>\n<image>\n?", "!")}, ["!"]),
    "Qwen video": ({"video": "0.mp4", "conversations": turns("<video>\nWhat?", "Cars")}, ["Cars"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_whole_or_refused(processor, layout):  # noqa: F811
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
    "stand in the column frames": {"frames": [{"x": "a.JPG"}], "question": "?", "answer": "!"},
    "video_start beside 0 videos": {"question": "?", "answer": "!", "video_start": 1.0},
    "found conversations and messages": {"conversations": turns("?", "!"), "messages": chat("?", "!")},
    "found video and videos": {"conversations": turns("<video>", "!"), "video": "a.mp4", "videos": ["a.mp4"]},
    "2 <video> tag.* 1 video": {"video": "0.mp4", "conversations": turns("<video><video>", "L")},
    "no user's turn": {"conversations": turns("L", roles=("gpt", "gpt"))},
    "ends with a turn of the user": {"conversations": turns("?")},
    "special token <.im_end.>": {"conversations": turns("?<|im_end|>", "L")},
    "no file nothing.mp4; .*--image_folder": {"video": "nothing.mp4", "conversations": turns("?", "L")},
    "video is ''": {"video": "", "conversations": turns("<video>", "L")},
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
    "holds tool_calls": {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "content": None, "tool_calls": [{}]}]},
    "data_type is 'audio'": {**VIDEO_R1, "data_type": "audio"},
    "options are left": {**VIDEO_R1, "options": "left"},
    "solution is \\['B'\\]": {**VIDEO_R1, "solution": ["B"]},
    "an empty turn of the user": {"messages": chat(" \n", "!")},
    "an empty answer": {"messages": chat("?", typed(""))},
    "an empty answer; ": {"problem": "?", "process": THINK, "solution": "<answer> </answer>"},
    "loss_scale is 0.3": {"messages": [{**USER, "content": "?"}, {**ASSISTANT, "content": "!", "loss_scale": 0.3}]},
    "loss_weight is 0.5": {"question": "?", "answer": "!", "loss_weight": 0.5},
    "a part of a turn": {"messages": chat("?", [{"type": "text", "value": "!", "loss_weight": 0.0}])},
    "label is false": {"question": "?", "answer": "!", "label": "false"},
    "holds rejected_images": {"query": "<image>?", "response": "!", "images": ["p.png"], "rejected_images": ["q.png"]},
    "system column beside another": {"system": "s", "messages": [{"role": "system", "content": "t"}, *chat("?", "!")]},
    "stand in the column path": {"question": "?", "answer": "!", "path": "0.mp4"},
    "the column image_path": {"video": "0.mp4", "question": "?", "answer": "!", "image_path": "p.png"},
    "expected one file name": {"messages": chat([{"type": "video", "video": "0.mp4", "path": "1.mp4"}], "!")},
    "fps and sample_fps": {"messages": chat([{"type": "video", "video": "0.mp4", "fps": 1, "sample_fps": 2}], "!")},
    "unknown image option 'fps'": {"messages": chat([{"type": "image", "image": "p.png", "fps": 1}], "!")},
    "video_start of the record and of": {
        "messages": chat([{"type": "video", "video": "0.mp4", "video_start": 0.1}], "!"), "video_start": 0.2,
    },
    "expected the assistant's answer": {"prompt": "?", "solution": " "},
}  # fmt: skip


@pytest.mark.parametrize("told", WRONG)
def test_a_wrong_record_is_told_in_one_line(processor, told):  # noqa: F811
    record = WRONG[told]
    with pytest.raises(UserError, match=told) as caught:
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


def test_options_beside_a_name_count_wherever_it_stands(processor):  # noqa: F811
    part = {"type": "video", "nframes": 4}
    for record in (
        {"messages": chat([{**part, "video": "0.mp4"}, *typed("?")], "!")},
        {"messages": chat([part, *typed("?")], "!"), "videos": ["0.mp4"]},  # TRL: the record names the file
        {"messages": chat([{"type": "video_url", "video_url": {"url": "0.mp4", "nframes": 4}}, *typed("?")], "!")},
        {"messages": chat("<video>?", "!"), "videos": [{"path": "0.mp4", "nframes": 4}]},
        {"messages": chat([{"type": "video", "video": "0.mp4", "max_frames": 4}, *typed("?")], "!")},
    ):
        assert len(processor.encode(record).frame_indices[0]) == 4


def test_frames_of_a_clip_by_any_name():
    data = "data:image/png;base64,AA"
    for names in (["1.png", "2.png"], [{"path": "1.png"}, {"url": "2.jpg"}], [data, data], [{"url": data}, "2.png"]):
        for record in ({"question": "?", "answer": "!", "video": names}, {"query": "<video>?", "videos": names}):
            (clip, _) = read_turns(record, "r")[0].parts
            assert len(clip.paths) == 2


def test_absent_options_and_numbers(processor):  # noqa: F811
    record = {"problem": "?", "solution": "A", "options": {"A": 3, "B": "four", "C": None}}
    assert read_turns(record, "r")[0].text == "?\nOptions:\nA. 3\nB. four"


def test_the_reader_leaves_the_record_alone():
    for record in [*SAME.values(), VIDEO_R1]:
        before = json.dumps(record)
        read_turns(record, "r"), sample_from_record(record)
        assert json.dumps(record) == before

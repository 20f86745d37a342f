"""Files of records, and records as other projects have them: read unchanged, for SFT and for the rewards; others are
refused in one line. cases/forms.jsonl holds the records, written here after the documents that docs/data.md names."""

import base64
import json
import os
import re
import struct
from pathlib import Path

import conftest
import numpy as np
import pytest
import test_data
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from test_data import as_transformers, text_of, trained_text

from data import records_of
from model import UserError
from records import Media, Selection, clip_name, data_files, read_records, read_turns, record_name
from rewards import accuracy, reference_answer, sample_from_record

clips, processor = test_data.clips, test_data.processor  # fixtures
CASES = conftest.cases("forms")
SAME = {case["name"]: case["record"] for case in CASES if "same" in case}
QUESTION = "Where does it go?\n(A) left\n(B) right"  # of all SAME, about 0.mp4; its answer is (B) right
VIDEO_R1 = next(case["record"] for case in CASES if case["name"] == "Video-R1-COT")
THINK = "<think>It goes right.</think>"


def cases(key):
    marked = [pytest.param(case, id=f"{case['name']} {i}") for i, case in enumerate(CASES) if key in case]
    return pytest.mark.parametrize("case", marked)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("form", SAME)
def test_each_form_says_the_same(processor, form):
    """One clip, question and answer in every form: the same ids, targets and reward, and what transformers' own chat
    template makes of them."""
    record = SAME[form]
    example = processor.encode(record)
    messages = chat([{"type": "video"}, {"type": "text", "text": QUESTION}], "(B) right")
    pad = processor.config.video_token_id
    ids = [t for t in as_transformers(messages, False) for _ in range(8 if t == pad else 1)]
    assert example.ids.tolist() == ids and trained_text(processor, example) == "(B) right<|im_end|>"
    prompt = processor.encode(record, answer=False)
    assert prompt.ids.tolist() == ids[: len(prompt)] and torch.equal(prompt.patches, example.patches)
    sample = sample_from_record(record)
    assert sample.options == {"A": "left", "B": "right"} and reference_answer(sample) == "B"
    said = [accuracy(f"{THINK}<answer>{answer}</answer>", sample) for answer in ("(B) right", "B", "(A) left", "")]
    assert said == [1, 1, 0, 0]
    assert clip_name(record) == "0.mp4" and record_name(record) in ("7", "0.mp4")


@cases("parts")
def test_clips_stand_where_the_record_says(case):
    parts = [part for turn in read_turns(case["record"]) for part in turn.parts]
    assert [[part.kind, *part.paths] if isinstance(part, Media) else part for part in parts] == case["parts"]


@cases("learned")
def test_each_layout_is_read_whole(processor, case):
    before = json.dumps(case["record"])
    example = processor.encode(case["record"])
    assert trained_text(processor, example) == "".join(f"{text}<|im_end|>" for text in case["learned"])
    assert len(example.grid_thw) == before.count("0.mp4") + before.count("p.png")
    assert "frames" not in case or len(example.frame_indices[0]) == case["frames"]
    sample_from_record(case["record"])
    assert json.dumps(case["record"]) == before


@cases("refused")
def test_a_wrong_record_is_refused_in_one_line(processor, case):
    message = refused(processor.encode, case["record"])
    assert re.search(case["refused"], message) and len(message) < 500
    try:  # the rewards refuse it too, or do not care; they never fall over
        sample_from_record(case["record"])
    except UserError:
        pass


def test_options_in_a_column_are_asked_and_read(processor):
    asked = "<|vision_end|>Where does it go?\nOptions:\nA. left\nB. right\nC. up<|im_end|>\n<|im_start|>assistant\n"
    assert asked in text_of(processor, processor.encode(VIDEO_R1).ids)
    sample = sample_from_record(VIDEO_R1)
    assert [accuracy(f"{THINK}<answer>{a}</answer>", sample) for a in ("B", "B. right", "right", "A")] == [1, 1, 1, 0]
    picture = VIDEO_R1 | {"path": {"path": "p.png", "fps": 4}}
    assert read_turns(picture)[0].parts[0] == Media("video", ("p.png",), {"fps": 4})
    lettered = {"problem": "?", "solution": "A", "options": {"A": 3, "B": "four", "C": None}}
    assert read_turns(lettered)[0].text == "?\nOptions:\nA. 3\nB. four"


def test_clips_inside_a_record(processor, clips):
    """data: addresses, as OpenAI and ms-swift have them: the same ids and patches as from the file."""
    plain = processor.encode({"messages": chat("<video><image>?", "!"), "videos": ["0.mp4"], "images": ["p.png"]})
    (clips / "p.tga").write_bytes(struct.pack("<2xB9x2H2B", 2, 84, 56, 24, 0) + bytes(84 * 56 * 3))
    names = {"0.mp4": "video/mp4", "p.png": "image/png", "p.tga": "image/x-tga"}
    movie, still, tga = (f"data:{kind};base64," + base64.b64encode((clips / name).read_bytes()).decode()
                         for name, kind in names.items())  # fmt: skip
    swift = {"messages": chat("<video><image>?", "!"), "videos": [movie], "images": [still]}
    urls = {"type": "video_url", "video_url": {"url": movie}}, {"type": "image_url", "image_url": still}
    for record in (swift, {"messages": chat([*urls, "?"], "!")}):
        example = processor.encode(record)
        assert np.array_equal(example.ids, plain.ids) and torch.equal(example.patches, plain.patches)
        assert clip_name(record) is None and len(record_name(record)) <= 80
    dark = processor.encode({"messages": chat("<image>?", "!"), "images": [tga]})  # a kind known by its suffix alone
    assert dark.grid_thw == [(1, 4, 6)] and not dark.patches.any()
    file = {"type": "video_url", "video_url": {"url": f"file://{clips / '0.mp4'}"}}
    assert processor.encode({"messages": chat([file, "?"], "!")}).grid_thw == [(2, 4, 4)]


WORDS = st.sampled_from(["", "<video>", "a.mp4", "human", "user", "assistant", "text", "video", "image_url", "B"])
INNER = st.sampled_from(["role", "from", "value", "content", "type", "video", "text", "image_url", "url", "path"])
KEYS = ["conversations", "messages", "conversation", "prompt", "completion", "problem", "options", "solution", "path"]
KEYS += ["video", "videos", "image", "images", "data_type", "query", "history", "system", "answer", "id"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6))
def test_no_record_does_anything_but_load_or_be_refused(record):
    for read in (lambda: read_turns(record), lambda: sample_from_record(record)):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)
    record_name(record), clip_name(record)


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
    assert records.weights == [2, 1] and list(Selection(records, [0, 2]).file) == [0, 1]
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


@pytest.mark.parametrize("name, message, text", conftest.cases("not_json"))
def test_what_is_no_dataset(tmp_path, name, message, text):
    """As python data.py reads it. DEEP, LONG and BYTE stand for what would make long lines or no text."""
    content = text.replace("DEEP", "[" * 100_000).replace("LONG", "1" * 5000).encode().replace(b"BYTE", b"\xc3")
    (tmp_path / name).write_bytes(content)
    assert message in refused(records_of, str(tmp_path / name), "")


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name, message in (
        (tmp_path / "zero\0.json", "no such file"),
        (tmp_path / "fifo.jsonl", "not a file; .*makes one$"),  # at once: nothing opens the fifo
        (tmp_path, "not a file; expected a .json or .jsonl dataset"),
        ("https://a.b/c.json", "https://a.b/c.json is a web address; download it first"),
    ):
        with pytest.raises(UserError, match=message):
            read_records(name)

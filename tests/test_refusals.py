"""What would be trained as something else in silence is refused by name: unknown columns of clips, other models."""

import json

import pytest

from model import UserError
from model.loading import ModelConfig
from records import read_turns

ASKED = {"question": "What is it?", "answer": "a cube"}
COLUMNS = {
    "image_path": "a.png", "video_path": "clips/a.mp4", "img": "a", "file_name": "a.mp4", "frames": ["1.jpg", "2.jpg"],
    "clip": "a.webm", "media": [{"path": "a.mov"}], "extra": {"source": {"file": "a.MP4"}}, "whatever": "b.TIFF",
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    "record",
    [
        ASKED,
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cube"}]},
        {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cube"}]},
    ],
    ids=["question", "conversations", "messages"],
)
def test_clip_in_an_unknown_column(record, column):
    with pytest.raises(UserError, match=f"column {column},.*rename"):
        read_turns(record | {column: COLUMNS[column]}, "sample 1")


@pytest.mark.parametrize(
    "more", [{"id": "a.mp4"}, {"source": "x", "num_frames": 8, "image_size": [3, 4], "video_id": "x1"}, {"img": ""}]
)
def test_harmless_columns(more):
    assert len(read_turns(ASKED | more, "sample 1")) == 2
    assert len(read_turns(ASKED | {"video": "a.mp4", "thumbnail": "a.png"}, "sample 1")) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [4, 6, 6]}}, "rope_scaling type is yarn"),
        ({"rope_scaling": {"rope_type": "linear", "mrope_section": [4, 6, 6]}}, "rope_scaling rope_type is linear"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act is relu"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config's hidden_act is quick_gelu"),
    ],
)
def test_other_models(change, message):
    with open("assets/tiny/config.json") as file:
        raw = json.load(file)
    assert ModelConfig.from_dict(raw)
    for key, value in change.items():
        raw[key] = raw[key] | value if key == "vision_config" else value
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(raw, "config.json")


def test_both_ways_to_write_the_rope_that_is_supported():
    with open("assets/tiny/config.json") as file:
        raw = json.load(file)
    raw["rope_scaling"] |= {"rope_type": "default", "type": "mrope"}
    assert ModelConfig.from_dict(raw).mrope_section == raw["rope_scaling"]["mrope_section"]

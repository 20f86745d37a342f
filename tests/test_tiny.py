"""The tiny base checkpoint: what it is, that transformers loads it, and that it does not know direction yet."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clips import DIRECTIONS, OPTIONS, draw_clip, render, write_mp4
from config import QUESTION, Infer
from data import Processor, load_tokenizer, pack
from generate import record
from model.decode import Sampling, generate
from model.loading import load_model
from model.qwen import normalise_patches
from rewards import accuracy, sample_from_record

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    model = load_model(TINY).eval()
    return model, Processor(load_tokenizer(TINY), model.config, Infer())


def drawn(folder, i):
    """The record of one drawn clip."""
    label = list(DIRECTIONS)[i % 4]
    write_mp4(folder / f"{i}.mp4", render(draw_clip(np.random.default_rng(1000 + i), label, 64, 30)))
    return record(str(i), str(folder / f"{i}.mp4"), [(QUESTION, f"Answer: {OPTIONS[label]}")], {})


def test_transformers_loads_it_and_agrees(tiny, tmp_path):
    """Model, tokenizer and chat template by transformers alone; logits and greedy tokens of a clip's prompt."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model, processor = tiny
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    example = processor.encode(drawn(tmp_path, 0), answer=False)
    times = example.position_ids[0, example.ids == model.config.video_token_id]
    assert (times - times[0]).tolist() == np.repeat([0, 2, 4, 6], 4).tolist()  # neighbouring grid steps differ
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|video_pad|>", "<|video_pad|>" * example.num_vision_tokens)
    assert tokenizer(text)["input_ids"] == example.ids.tolist()
    ids = torch.from_numpy(example.ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = 2 * (ids == model.config.video_token_id).int()
    inputs["pixel_values_videos"] = normalise_patches(example.patches, torch.float32)
    inputs["video_grid_thw"] = torch.tensor(example.grid_thw)
    with torch.no_grad():
        reference = theirs(**inputs, position_ids=torch.from_numpy(example.position_ids)[:, None]).logits[0]
        ours = model.logits(pack([example]))
    assert (ours - reference).abs().max() < 1e-4


def test_it_is_small_and_was_never_taught_direction(tiny, tmp_path):
    model, processor = tiny
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 5e6
    assert json.loads((TINY / "config.json").read_text())["vision_config"]["tokens_per_second"] == 8
    samples = [drawn(tmp_path, i) for i in range(32)]
    prompts = pack([processor.encode(r, answer=False) for r in samples])
    rows = generate(model, prompts, Sampling(12, 0.0, stop_ids=(processor.im_end,)))
    texts = [processor.backend.decode(row.ids, skip_special_tokens=True) for (row,) in rows]
    assert sum(accuracy(t, sample_from_record(r)) for t, r in zip(texts, samples)) <= 13, texts  # 40 %

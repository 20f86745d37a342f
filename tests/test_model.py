"""The model against transformers, packed against separate, and what a video must do to the logits."""

import json

import numpy as np
import pytest
import torch
from conftest import SHAPES, Sequence, config_dict, pack_sequences, random_model
from safetensors.torch import save_file

import lora
from config import LoraArgs
from model import qwen
from model.loading import ModelConfig, load_model
from model.packed import VisionPlan
from model.qwen import Qwen2_5_VL
from model.rope import mrope_position_ids

# grids in patches: 8x8 is one whole window of 112 pixels, 4x12 and 10x6 are cut by its border, 16x8 is two windows
CASES = {
    "text": [17],
    "image": [5, ("image", 8, 8), 7],
    "images": [3, ("image", 10, 6), 2, ("image", 4, 12), ("image", 16, 8), 6],
    "video": [4, ("video", 2, 8, 8, 0.5), 9],
    "videos": [4, ("video", 3, 4, 12, 0.5), ("video", 2, 10, 6, 1.0), 8],
    "mixed": [2, ("video", 2, 16, 8, 1.0), 5, ("image", 10, 6), 3, ("video", 4, 6, 10, 0.25), 5, ("image", 8, 8), 4],
}


def with_plain_ops(model):
    """The same weights under the plain operations of qwen.py."""
    plain = Qwen2_5_VL(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    assert model.ops.bound and not plain.ops.bound and plain.ops.attention is qwen.attention
    return plain.requires_grad_(True).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(oracle, shape, case):
    """Our positions are given to transformers where there are videos: its own rule for these differs by release."""
    ours, theirs, _ = oracle(shape)
    sequence = Sequence(ours.config, CASES[case])
    with torch.no_grad():
        reference = theirs(**sequence.for_transformers(positions="video" in case or case == "mixed")).logits[0]
        for model in (ours, with_plain_ops(ours)):
            mine = model.logits(pack_sequences([sequence]))
            assert (mine - reference).abs().max() < 1e-4, (mine - reference).abs().max()
    assert reference.std() > 0.05  # not an equality of near-zeros


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_transformers(oracle, shape):
    """Recomputation on: every parameter of tower, merger and language model gets transformers' gradient, by the fast
    operations and by the plain ones."""
    ours, theirs, _ = oracle(shape)
    plain = with_plain_ops(ours)
    sequence = Sequence(ours.config, CASES["mixed"])
    weight = torch.randn(len(sequence.ids), 260, generator=torch.Generator().manual_seed(0))
    ours.gradient_checkpointing = plain.gradient_checkpointing = True
    for model, logits in (
        (ours, ours.logits(pack_sequences([sequence]))),
        (plain, plain.logits(pack_sequences([sequence]))),
        (theirs, theirs(**sequence.for_transformers()).logits[0]),
    ):
        model.zero_grad()
        (logits * weight).sum().backward()
    ours.gradient_checkpointing = False
    reference = dict(theirs.named_parameters())
    for name, p in [*ours.named_parameters(), *plain.named_parameters()]:
        new = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
        other = reference["model." + name if name.startswith("visual") else new].grad
        assert p.grad is not None and (p.grad - other).norm() <= 1e-4 * other.norm() + 1e-5, name


def test_checkpoints_of_either_key_style_whole_or_in_shards(tmp_path, oracle):
    """Ours, transformers', and the names of transformers 4.52 and later in two shards: the same weights."""
    ours, theirs, folder = oracle("untied")
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "new").mkdir()
    tensors = {
        ("model." + k if k.startswith("visual") else k.replace("model.", "model.language_model.", 1)): v.clone()
        for k, v in ours.state_dict().items()
    }
    names = [*tensors]
    for i in (0, 1):
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / f"new/part{i}.safetensors")
    index = {"weight_map": {name: f"part{k % 2}.safetensors" for k, name in enumerate(names)}}
    (tmp_path / "new/model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["text_config"] |= {"image_token_id": None, "video_token_id": None}  # as 4.52 to 4.56 write them
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    text = config["text_config"] | {"tie_word_embeddings": True}  # counts beside the False outside, as in transformers
    assert ModelConfig.from_dict(config | {"text_config": text}).tie_word_embeddings
    for where in (folder, tmp_path / "hf", tmp_path / "new"):
        again = load_model(where)
        assert all(again.state_dict()[name].equal(tensor) for name, tensor in ours.state_dict().items()), where


def adapted(shape="grouped"):
    """A model with adapters that do something on every linear layer, and nothing else trained."""
    model, args = random_model(shape), LoraArgs(lora_rank=8)
    lora.inject(model, args)
    for _, layer in lora.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, 0, 0.05)
    lora.set_trainable(model, args)
    return model.train()


def gradients(forward, packed, model=None):
    """Hidden states, and the gradient of every adapter. model: forward itself unless given."""
    model = model or forward
    model.zero_grad()
    hidden = forward(packed)
    (hidden * hidden.detach().cos()).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_kept_blocks_offloading_and_pieces_change_no_gradient(monkeypatch, kept):
    """Of four blocks of the tower and two layers the first are recomputed, the others keep all."""
    model, moved = adapted(), []
    packed = pack_sequences([Sequence(model.config, CASES["mixed"])])
    whole = gradients(model, packed)
    model.gradient_checkpointing, model.kept_blocks, model.ops.offload = True, kept, True
    monkeypatch.setattr(qwen, "from_host", lambda saved: moved.append(saved[0].shape) or saved[0])
    assert all(map(torch.equal, gradients(model, packed), whole))
    moved = [shape for shape in moved if shape.numel()]  # torch 2.11 saves an empty tensor too
    assert moved == ([(182, 128)] * 2 + [(620, 32)] * 4)[kept:]  # (T, C) and (P, width) of the blocks' inputs
    monkeypatch.setattr(qwen, "PIECE", 50)  # an MLP in pieces adds up the adapters' gradients in another order
    for mine, theirs in zip(gradients(model, packed), whole, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_long_video_in_parts_is_the_same(monkeypatch):
    model, cut, build = adapted(), [], VisionPlan.build
    packed = pack_sequences([Sequence(model.config, [3, ("video", 3, 8, 12, 1.0), ("video", 5, 4, 4, 0.5), 4])])
    model.gradient_checkpointing = True
    whole = gradients(model, packed)
    monkeypatch.setattr(VisionPlan, "build", lambda grids, *rest: cut.append(grids) or build(grids, *rest))
    monkeypatch.setattr(qwen, "LONG", 64)
    monkeypatch.setattr(qwen, "PART", 200)  # two grid steps of the first, all of the second
    for mine, theirs in zip(gradients(model, packed), whole, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    parts = [[(2, 8, 12)], [(1, 8, 12)], [(5, 4, 4)]]
    assert cut == [packed.grid_thw, *parts]


# -- Positions

RULE = ModelConfig.from_dict(config_dict("tied"))  # tokens_per_second 2, as in the released 3B


@pytest.mark.parametrize("grid, seconds, times, text_start", [
    # written out by hand from the rule; the tables that transformers 4.51.1 gives
    ((2, 24, 24), 0.5, [0, 1], 12),
    ((8, 12, 12), 1 / 3, [0, 0, 1, 2, 2, 3, 4, 4], 6),
    ((8, 12, 12), 1.0, [0, 2, 4, 6, 8, 10, 12, 14], 15),
    ((32, 18, 32), 1.0, list(range(0, 64, 2)), 63),
    ((4, 4, 4), 1.15, [0, 2, 4, 6], 7),
    ((2, 4, 4), 1.4999999999999998, [0, 3], 4),  # 75 frames at 25 fps, --fps 1: float64 would give 0, 2
])  # fmt: skip
def test_video_positions(grid, seconds, times, text_start):
    t, h, w = grid
    ids = [9, 9, 250] + [254] * (t * h * w // 4) + [251, 9]
    positions = mrope_position_ids(ids, [grid], [seconds], RULE)
    cells = h * w // 4
    assert positions[:, :3].tolist() == [[0, 1, 2]] * 3
    body = positions[:, 3 : 3 + t * cells] - 3
    assert body[0].tolist() == np.repeat(times, cells).tolist()
    assert body[1, :cells].tolist() == np.repeat(range(h // 2), w // 2).tolist()
    assert body[2, :cells].tolist() == list(range(w // 2)) * (h // 2)
    assert positions[:, -2:].tolist() == [[3 + text_start, 4 + text_start]] * 3


def test_image_positions_and_neighbours():
    ids = [250, 253, 253, 251] + [254] * 4 + [254] * 2 + [9]  # an image, then two videos without a token between
    positions = mrope_position_ids(ids, [(1, 2, 4), (2, 4, 2), (1, 2, 4)], [0.0, 1.0, 1.0], RULE)
    assert positions[0].tolist() == [0, 1, 1, 3, 4, 4, 6, 6, 7, 7, 9]
    assert positions[1].tolist() == [0, 1, 1, 3, 4, 5, 4, 5, 7, 7, 9]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 7, 8, 9]

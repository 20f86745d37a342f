"""The model against transformers, packed against separate, and what a video must do to the logits."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SHAPES, Sequence, config_dict, pack_sequences, random_model
from safetensors.torch import load_file, save_file

from model import UserError, vision
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL
from model.rope import mrope_position_ids, mrope_tables
from model.vision import MEAN, STD, VisionPlan, normalise_patches

# grids in patches: 8x8 is one whole window of 112 pixels, 4x12 and 10x6 are cut by its border, 16x8 is two windows
CASES = {
    "text": [17],
    "image": [5, ("image", 8, 8), 7],
    "images": [3, ("image", 10, 6), 2, ("image", 4, 12), ("image", 16, 8), 6],
    "video": [4, ("video", 2, 8, 8, 0.5), 9],
    "videos": [4, ("video", 3, 4, 12, 0.5), ("video", 2, 10, 6, 1.0), 8],
    "mixed": [2, ("video", 2, 16, 8, 1.0), 5, ("image", 10, 6), 3, ("video", 4, 6, 10, 0.25), 5, ("image", 8, 8), 4],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(oracle, shape, case):
    """Our positions are given to transformers, whose own rule for videos differs by release (test_rope.py)."""
    ours, theirs, _ = oracle(shape)
    sequence = Sequence(ours.config, CASES[case])
    with torch.no_grad():
        mine = ours.logits(pack_sequences([sequence]))
        reference = theirs(**sequence.for_transformers()).logits[0]
    assert (mine - reference).abs().max() < 1e-4, (mine - reference).abs().max()
    assert reference.std() > 0.05  # not an equality of near-zeros


@pytest.mark.parametrize("case", ["text", "image", "images"])
def test_logits_equal_transformers_with_its_own_positions(oracle, case):
    ours, theirs, _ = oracle("untied")
    sequence = Sequence(ours.config, CASES[case])
    with torch.no_grad():
        reference = theirs(**sequence.for_transformers(positions=False)).logits[0]
        assert (ours.logits(pack_sequences([sequence])) - reference).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_transformers(oracle, shape):
    """Recomputation on: every parameter of tower, merger and language model gets transformers' gradient."""
    ours, theirs, _ = oracle(shape)
    sequence = Sequence(ours.config, CASES["mixed"])
    weight = torch.randn(len(sequence.ids), 260, generator=torch.Generator().manual_seed(0))
    ours.gradient_checkpointing = True
    for model, logits in (
        (ours, ours.logits(pack_sequences([sequence]))),
        (theirs, theirs(**sequence.for_transformers()).logits[0]),
    ):
        model.zero_grad()
        (logits * weight).sum().backward()
    ours.gradient_checkpointing = False
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        new = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
        other = reference["model." + name if name.startswith("visual") else new].grad
        assert p.grad is not None and (p.grad - other).norm() <= 1e-4 * other.norm() + 1e-5, name


def test_a_long_video_in_parts_is_the_same(monkeypatch):
    model, grids = random_model("grouped"), [(3, 8, 12), (5, 4, 4), (1, 8, 8)]
    seed = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), 1176), generator=seed, dtype=torch.uint8)

    def run():
        model.zero_grad()
        out = model.visual(patches, grids, recompute=True)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.visual.parameters())]

    whole = run()
    monkeypatch.setattr(vision, "LONG", 64)
    monkeypatch.setattr(vision, "PART", 200)  # two grid steps of the first, all of the second
    cut = []
    monkeypatch.setattr(vision.VisionPlan, "build", partial(record, vision.VisionPlan.build, cut))
    for a, b in zip(run(), whole, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert [(2, 8, 12)] in cut and [(1, 8, 12)] in cut and [(5, 4, 4)] in cut and grids not in cut


def record(function, seen, grids, *args):
    seen.append(grids)
    return function(grids, *args)


def test_packed_equals_separate():
    model = random_model("grouped")
    sequences = [Sequence(model.config, parts, seed=i) for i, parts in enumerate(CASES.values())]
    with torch.no_grad():
        together = model.logits(pack_sequences(sequences)).split([len(s.ids) for s in sequences])
        for sequence, packed in zip(sequences, together):
            assert (packed - model.logits(pack_sequences([sequence]))).abs().max() < 1e-4


def test_blanked_and_reversed_video_change_the_logits():
    model = random_model()
    sequence = Sequence(model.config, CASES["video"])
    base = model.logits(pack_sequences([sequence]))[-1]
    original = sequence.patches.clone()
    for other in (torch.zeros_like(original), original.view(2, 64, 1176).flip(0).reshape(-1, 1176)):
        sequence.patches = other
        assert (model.logits(pack_sequences([sequence]))[-1] - base).abs().max() > 1e-3


def test_bf16_stays_within_its_own_rounding(oracle):
    ours, theirs, _ = oracle("grouped")
    sequence = Sequence(ours.config, CASES["mixed"])
    with torch.no_grad():
        exact = theirs(**sequence.for_transformers()).logits[0]
        low = Qwen2_5_VL(ours.config).bfloat16()
        low.load_state_dict(ours.state_dict())
        error = (low.logits(pack_sequences([sequence])).float() - exact).norm() / exact.norm()
        inputs = {
            k: v.bfloat16() if v.is_floating_point() and "pixel" in k else v
            for k, v in sequence.for_transformers().items()
        }
        theirs_error = (copy.deepcopy(theirs).bfloat16()(**inputs).logits[0].float() - exact).norm() / exact.norm()
    assert error < 1.5 * theirs_error, (error, theirs_error)


def test_window_plan_covers_every_patch_once():
    config = ModelConfig.from_dict(config_dict("tied")).vision
    plan = VisionPlan.build([(2, 10, 6), (1, 8, 8), (3, 18, 30)], config, "cpu")
    assert plan.order.sort().values.equal(torch.arange(len(plan.order)))
    assert plan.order[plan.back].equal(torch.arange(len(plan.order)))
    assert sum(plan.windows.q_lengths) == sum(plan.steps.q_lengths) == 4 * len(plan.order)
    assert plan.windows.q_lengths[:4] == [48, 12, 48, 12] and max(plan.windows.q_lengths) == 64  # 10x6 -> 8x6 and 2x6


def test_normalise_is_the_processor_rule():
    pixels = torch.randint(0, 256, (5, 1176), dtype=torch.uint8)
    mean = torch.tensor(MEAN).repeat_interleave(392)
    std = torch.tensor(STD).repeat_interleave(392)
    assert torch.allclose(normalise_patches(pixels, torch.float32), (pixels / 255 - mean) / std, atol=1e-6)


def test_rotary_tables_lie_row_by_row():
    """The GPU kernel reads them so. A transposed table once put every position wrong there, and right on the CPU."""
    positions = torch.arange(21).view(3, 7)
    for table in mrope_tables(positions, RULE, torch.float32):
        assert table.shape == (7, 1, RULE.head_dim // 2) and table.is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype):
    """Logits and gradients of a mixed batch through the GPU's own paths: Triton, flash attention, aligned widths. In
    bf16 they may be off by what the CPU's plain bf16 is off."""
    exact, sequence = random_model("grouped"), Sequence(RULE, CASES["mixed"])
    packed = pack_sequences([sequence, Sequence(RULE, CASES["videos"], seed=1)])
    weight = torch.randn(len(packed.input_ids), 260, generator=torch.Generator().manual_seed(0))
    results = []
    for model, device in ((exact, "cpu"), (copy.deepcopy(exact), "cuda"), (copy.deepcopy(exact), "cpu")):
        model.to(device, torch.float32 if model is exact else dtype)
        logits = model.logits(packed.to(device))
        (logits.float().cpu() * weight).sum().backward()
        results.append([logits.detach().float().cpu(), *(p.grad.float().cpu() for p in model.parameters())])
    for right, found, plain in zip(*results):
        assert (found - right).norm() <= 1.5 * (plain - right).norm() + 1e-4 * right.norm() + 1e-6


# ---------------------------------------------------------------- positions

RULE = ModelConfig.from_dict(config_dict("tied"))  # tokens_per_second 2, as in the released 3B


@pytest.mark.parametrize(
    "grid, seconds, times, text_start",
    [  # written out by hand from the rule; the tables that transformers 4.51.1 gives
        ((2, 24, 24), 0.5, [0, 1], 12),
        ((8, 12, 12), 1 / 3, [0, 0, 1, 2, 2, 3, 4, 4], 6),
        ((8, 12, 12), 1.0, [0, 2, 4, 6, 8, 10, 12, 14], 15),
        ((32, 18, 32), 1.0, list(range(0, 64, 2)), 63),
        ((4, 4, 4), 1.15, [0, 2, 4, 6], 7),
        ((2, 4, 4), 1.4999999999999998, [0, 3], 4),  # 75 frames at 25 fps, --fps 1: float64 would give 0, 2
    ],
)
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


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip_and_key_styles(tmp_path, oracle):
    ours, theirs, folder = oracle("untied")
    theirs.save_pretrained(tmp_path / "hf")
    new = tmp_path / "new"  # the key names of transformers 4.52 and later, nested text_config, two shards
    new.mkdir()
    tensors = {
        ("model." + k if k.startswith("visual") else k.replace("model.", "model.language_model.", 1)): v.clone()
        for k, v in ours.state_dict().items()
    }
    half = len(tensors) // 2
    shards = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    for i, shard in enumerate(shards):
        save_file(shard, new / f"part{i}.safetensors")
    index = {"weight_map": {k: f"part{i}.safetensors" for i, shard in enumerate(shards) for k in shard}}
    (new / "model.safetensors.index.json").write_text(json.dumps(index))
    (new / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    for where in (folder, tmp_path / "hf", new):
        again = Qwen2_5_VL.from_pretrained(where)
        for name, tensor in ours.state_dict().items():
            assert again.state_dict()[name].equal(tensor), (where, name)
    assert Qwen2_5_VL.from_pretrained(folder, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_wrong_tensors_are_named(tmp_path):
    random_model("tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.bogus"] = torch.zeros(1)
    tensors["visual.merger.ln_q.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"missing model\.norm\.weight.*surplus model\.layers\.9\.bogus.*ln_q\.weight is \(7,\), expected \(48,\)",
    ):
        Qwen2_5_VL.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Qwen2_5_VL.from_pretrained(tmp_path)


def test_a_path_that_climbs_out_of_the_checkpoint_is_refused(tmp_path):
    random_model("tied").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(UserError, match="not a plain file name"):
        Qwen2_5_VL.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "Qwen/not-downloaded"])
def test_unknown_model_is_one_clear_line(name):
    with pytest.raises(UserError) as error:
        Qwen2_5_VL.from_pretrained(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_sharded_save(tmp_path, monkeypatch):
    monkeypatch.setattr("model.qwen2_5_vl.SHARD_BYTES", 40_000)
    model = random_model("tied")
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = Qwen2_5_VL.from_pretrained(tmp_path)
    assert all(again.state_dict()[k].equal(v) for k, v in model.state_dict().items())

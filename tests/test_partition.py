"""Weights in parts: ranks against one model with whole weights (tests/parted.py), and what is refused."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Sequence, config_dict, pack_sequences, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from config import SFT, ignored_options, parse
from interop.saved import load_adapter, save_adapter
from model import UserError
from model.linear import padded
from model.partition import Share, counts, layout
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL, not_finite
from trainer import parted_not_finite
from training.engine import deepspeed_config
from training.memory import GIB, Memory

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from workloads import model_config

KINDS = ["passes on 2 ranks", "passes on 4 ranks", "loading"]
KINDS += [f"{script} on {n}" for script in ("train_sft", "train_grpo") for n in ("2 ranks", "4 ranks", "1 ranks, off")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    command = [sys.executable, "tests/parted.py", str(tmp_path_factory.mktemp("parted"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_parted_equals_whole_bit_for_bit(found, kind):
    """Hidden states, gradients, and all that a run of the real scripts leaves, evaluations and checkpoints included."""
    lines, stderr = found
    (line,) = (line for line in lines if line["what"].startswith(kind))
    assert not line["wrong"], f"{line}\n{stderr[-3000:]}"


def parted(shape="untied", **flags):
    model = Qwen2_5_VL.random(ModelConfig.from_dict(config_dict(shape)), share=Share())
    lora.inject(model, SFT(**flags))
    model.gradient_checkpointing = True
    return model


def test_two_buffers_serve_a_pass_forwards_and_backwards():
    """Every block is brought once each way but the two that are there when the pass turns round; what is not there is
    NaN, and never the weights of another block."""
    model = parted()
    partition, brought = model.partition, []
    copy = partition.copy
    partition.copy = lambda block, flat: (brought.append(partition.blocks.index(block)), copy(block, flat))
    clip = pack_sequences([Sequence(model.config, [5, ("video", 2, 4, 4, 1.0), 20])])
    model.train()(clip).sum().backward()
    assert brought == [0, 1, 2, 3, 4, 5, *(3, 2, 1, 0)]
    there = [bool(p.isfinite().all()) for block in partition.blocks for p in block.parameters[:1]]
    assert there == [True, True, False, False, False, False]
    assert partition.onwards(3, 4) == 5 and partition.onwards(4, 3) == 2 and partition.onwards(4, 5) is None


class Race(AssertionError):
    pass


class Order(TorchDispatchMode):
    """Which work is certain to come after which, as CUDA's streams and events order it (vector clocks): two streams
    stand for the card, every operation on a buffer is checked. It runs at once, so what is sent for ahead is written as
    early as it could be."""

    def __init__(self, partition, monkeypatch):
        super().__init__()
        self.partition, self.now = partition, "compute"
        self.clocks = {name: {"compute": 0, "copy": 0} for name in ("compute", "copy")}
        self.written, self.read, self.operations = {}, {}, 0
        partition.cuda, partition.stream = True, SimpleNamespace(wait_event=lambda event: event.wait("copy"))
        for buffer in partition.buffers:
            buffer.ready, buffer.free = Event(self), Event(self)
        monkeypatch.setattr(torch.cuda, "stream", self.other)

    @contextmanager
    def other(self, _stream):
        self.now = "copy"
        yield
        self.now = "compute"

    def knows(self, clock):
        """Whether what was done at clock (stream, time) is over before what the current stream does next."""
        return clock is None or self.clocks[self.now][clock[0]] >= clock[1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        starts = {buffer.flat.untyped_storage().data_ptr(): i for i, buffer in enumerate(self.partition.buffers)}
        touched = {starts[p] for x in tensors if (p := x.untyped_storage().data_ptr()) in starts}
        views = function.is_view or function in (torch.ops.aten.detach.default,)
        for i in () if views else touched:
            clock = self.clocks[self.now]
            clock[self.now] += 1
            self.operations += 1
            if self.now == "copy":
                if not self.knows(self.read.get(i)):
                    raise Race(f"buffer {i} is written while it may still be read")
                self.written[i] = self.now, clock[self.now]
            else:
                if not self.knows(self.written.get(i)):
                    raise Race(f"buffer {i} is read by {function} while it may still be written")
                self.read[i] = self.now, clock[self.now]
        return function(*args, **(kwargs or {}))


class Event:
    def __init__(self, order):
        self.order, self.clock = order, None

    def record(self, stream=None):
        self.clock = dict(self.order.clocks["compute" if stream is None else "copy"])

    def wait(self, stream=None):
        mine = self.order.clocks[stream or "compute"]
        for name, time in (self.clock or {}).items():
            mine[name] = max(mine[name], time)


def two_steps(model):
    """Two training passes and one without gradients: hidden states and gradients."""
    clip = pack_sequences([Sequence(model.config, [5, ("video", 2, 4, 4, 1.0), 20])])
    trained, found = [p for _, p in lora.trainable_parameters(model)], []
    for _ in range(2):
        hidden = model.train()(clip)
        found += [hidden.detach(), *torch.autograd.grad((hidden**2).sum(), trained)]
        with torch.no_grad():
            found.append(model(clip))
    return found


@pytest.mark.parametrize("parts", [False, True], ids=["whole clips", "clips in parts"])
def test_streams_are_ordered_by_events(monkeypatch, parts):
    """Every read of a buffer comes after its writing, every writing after the last read, with layers sent for ahead;
    and the numbers are those of whole weights."""
    monkeypatch.setattr("model.cpu.handles", lambda x: False)  # the GPU's products, which keep weights for later
    if parts:
        monkeypatch.setattr("model.vision.LONG", 8)
        monkeypatch.setattr("model.vision.PART", 16)
    torch.manual_seed(1)
    whole = Qwen2_5_VL.random(ModelConfig.from_dict(config_dict("untied")))
    lora.inject(whole, SFT())
    whole.gradient_checkpointing = True
    torch.manual_seed(1)
    model = parted()
    expected = two_steps(whole)
    with Order(model.partition, monkeypatch) as order:
        found = two_steps(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert order.operations > 400


@pytest.mark.parametrize("broken, told", [("leave", "written while"), ("wait", "read by")])
def test_without_its_events_there_is_a_race(monkeypatch, broken, told):
    monkeypatch.setattr("model.cpu.handles", lambda x: False)
    model = parted()
    setattr(model.partition, broken, lambda *_: None)
    with pytest.raises(Race, match=told), Order(model.partition, monkeypatch):
        two_steps(model)


def test_what_came_next_is_remembered():
    """On a GPU it is sent for ahead: a pass through the tower's blocks alone, and one through the layers alone."""
    partition = parted().partition
    for number in (0, 1, 2, 0, 1, 2, 0):
        partition.fetch(partition.blocks[number].module)
    assert partition.followed[1, 2] == 0 and partition.followed[2, 0] == 1


def test_the_room_that_a_gpu_wants_lies_behind_the_weights(monkeypatch):
    """Vision's MLP is 3,420 wide and goes as 3,424: in the buffer there are zeros, so widening copies nothing."""
    block = random_model("tied").visual.blocks[0]
    inner = block.mlp.gate_proj.out_features
    assert inner % 8, "this shape needs no room"
    spots, numbers = layout(block, pad=True)
    wide = -(-inner // 8) * 8
    assert spots["mlp.gate_proj.weight"].room == (wide, 48) and spots["mlp.down_proj.weight"].room == (48, wide)
    assert spots["mlp.up_proj.bias"].room == (wide,) and spots["attn.qkv.weight"].room == (144, 48)
    ends = [spot.start + torch.Size(spot.room).numel() for spot in spots.values()]
    assert all(end <= spot.start for end, spot in zip(ends, [*spots.values()][1:])) and ends[-1] <= numbers
    monkeypatch.setattr("model.partition.layout", lambda block, pad: layout(block, True))
    clip = pack_sequences([Sequence(ModelConfig.from_dict(config_dict("tied")), [5, ("video", 2, 4, 4, 1.0), 20])])
    model, whole = parted("tied"), Qwen2_5_VL.random(ModelConfig.from_dict(config_dict("tied")))
    lora.inject(whole, SFT())
    with torch.no_grad():
        assert torch.allclose(model(clip), whole(clip), atol=1e-5)
    mlp, twin = (m.visual.blocks[0].mlp for m in (model, whole))
    model.partition.fetch(model.visual.blocks[0])
    for name, width in (("gate_proj", 48), ("up_proj", 48), ("down_proj", wide)):
        mine, theirs = getattr(mlp, name), getattr(twin, name)
        where = mine.weight.data_ptr(), mine.bias.data_ptr()
        got, expected = padded(mine.weight, mine.bias, width, True), padded(theirs.weight, theirs.bias, width, True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
        assert where == tuple(x.data_ptr() for x in got)  # nothing was moved


def test_a_rank_keeps_its_share_of_every_block():
    with torch.device("meta"):
        model = Qwen2_5_VL(ModelConfig.from_dict(config_dict("grouped")))
    whole, one, _ = counts(model, 1, pad=False)
    assert whole <= one < 1.01 * whole
    for ranks in (2, 3, 4, 7):
        _, part, buffers = counts(model, ranks, pad=False)
        assert one <= ranks * part <= one + 64 * ranks * 6 and buffers >= 2 * layout(model.model.layers[0], False)[1]


def test_memory_of_the_72b_by_hand():
    """On four cards; a layer of 8,192 wide, 29,568 inside, 1,024 of keys and of values; a vision block of 1,280."""
    flags = {"partition_weights": True, "gradient_checkpointing": True, "lora_rank": 16}
    with torch.device("meta"):
        model = Qwen2_5_VL(model_config("72B")).bfloat16()
    lora.inject(model, SFT(**flags))
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 29568 + 8192 + 2 * 1024 + 2 * 8192
    block = 4 * 1280**2 + 3 * 1280 * 3456 + 4 * 1280 + 2 * 3456 + 1280 + 2 * 1280
    whole = 2 * 152_064 * 8192 + 8192 + 1176 * 1280 + 5120**2 + 5120 + 5120 * 8192 + 8192 + 1280
    assert 80 * layer + 32 * block + whole == 73_410_777_344
    static = Memory(model, SFT(**flags), world=4).static()
    assert static["weights"] == pytest.approx(2 * (whole + 20 * layer + 8 * block), rel=1e-4)
    assert static["layers on their way"] == pytest.approx(2 * 2 * layer, rel=1e-4)
    assert static["weights"] + static["layers on their way"] < 42 * GIB
    away = Memory(model, SFT(**flags, offload_weights=True), world=4).static()
    assert away["weights"] == 2 * whole and away["layers on their way"] == static["layers on their way"]


def test_what_cannot_be_parted_is_refused(tmp_path):
    with pytest.raises(UserError, match="gradient_checkpointing True"):
        parse(SFT, ["--partition_weights", "True"])
    both = ["--partition_weights", "True", "--gradient_checkpointing", "True"]
    for more in (["--lora_bias", "all"], ["--lora_enable", "False", "--freeze_llm", "False"]):
        with pytest.raises(UserError, match="only frozen ones, with adapters"):
            parse(SFT, [*both, *more])
    with pytest.raises(UserError, match="--partition_weights True beside it"):
        parse(SFT, ["--offload_weights", "True"])
    stage3 = tmp_path / "zero3.json"
    stage3.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    with pytest.raises(UserError, match="stage is not 1 or 2 but 3; .*--partition_weights True"):
        deepspeed_config(SFT(deepspeed=str(stage3)), torch.device("cpu"), torch.float32, 1, 1000)
    (line,) = (x for x in ignored_options(parse(SFT, [*both, "--cuda_graphs", "True"])) if "cuda_graphs" in x)
    assert "no effect" in line
    base = random_model("untied")
    lora.inject(base, SFT(lora_bias="all"))
    save_adapter(base, tmp_path, "base")
    model = Qwen2_5_VL.random(base.config, share=Share())
    with pytest.raises(UserError, match="brings .*bias of the base too"):
        load_adapter(model, tmp_path)


def test_numbers_that_are_not_finite_are_found_in_a_part(monkeypatch):
    model = parted()
    assert not_finite(model) == [] and model.partition.not_finite() == []
    number, spot = model.partition.names["model.layers.1.mlp.up_proj.weight"]
    model.partition.part[model.partition.blocks[number].first + spot.start] = torch.nan
    monkeypatch.setattr("trainer.gather", lambda found: [[], found, found])
    assert parted_not_finite(model) == ["model.layers.1"]


def test_a_whole_model_is_never_written_from_parts(tmp_path):
    with pytest.raises(AssertionError, match="no rank has the whole"):
        parted().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        lora.merge(parted())

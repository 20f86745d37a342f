"""SFT over bad numbers and a full memory: each has a defined, told outcome, and the parameters stay finite."""

import gc
import json
import shutil
import signal
import subprocess
import sys

import conftest  # noqa: F401 (sets the environment before torch is imported)
import deepspeed
import pytest
import test_train_sft
import torch
from safetensors.torch import load_file, save_file
from test_train_sft import metrics, steps_kept, weights

import infer
import rollouts
import train_sft
import trainer
from checkpoint import newest_checkpoint, read_json
from config import SFT, cli
from data import Loader
from model import UserError

base, sft = test_train_sft.base, test_train_sft.sft  # fixtures


def damaged(folder, name, value, to):
    """A copy of a checkpoint's or an adapter's folder with one number of one tensor replaced."""
    shutil.copytree(folder, to)
    (file,) = [path for path in to.glob("*model.safetensors")]
    tensors = load_file(file)
    (found,) = [key for key in tensors if name in key][:1]
    tensors[found].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    (to / "manifest.json").unlink(missing_ok=True)
    return to


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_a_number_that_is_none_is_not_trained(sft, base, tmp_path, value):
    bad = damaged(base / "tiny", "layers.1.mlp.up_proj", value, tmp_path / "bad")
    with pytest.raises(UserError, match="bad: 1 tensors hold NaN or Inf, the first: model.layers.1.mlp.up_proj.weight"):
        sft("run", model_id=bad)


def test_nor_is_an_adapter_and_neither_answers(sft, base, tmp_path, capsys):
    good = newest_checkpoint(sft("good", max_steps=1))
    bad = damaged(good, "lora_A", float("nan"), tmp_path / "bad")
    with pytest.raises(UserError, match="bad: 1 tensors hold NaN or Inf"):
        sft("run", model_ckpt=bad)
    clip = str(next((base / "data/videos").iterdir()))
    with pytest.raises(UserError, match="bad: 1 tensors hold NaN or Inf"):
        infer.main([clip, "--model_id", str(base / "tiny"), "--model_ckpt", str(bad)])


def at_step(monkeypatch, number, act):
    """Call act(engine) before the update of step `number` and after it."""
    update, seen = train_sft.update, []

    def acting(engine, *rest):
        seen.append(engine)
        if len(seen) >= number:
            act(engine)
        return update(engine, *rest)

    monkeypatch.setattr(train_sft, "update", acting)


def spoil(where):
    def act(engine):
        parameter = engine.module.model.layers[0].adapters
        if where == "weights":
            parameter.data[5] = float("nan")
        else:
            engine.optimizer.single_partition_of_fp32_groups[-1].data[5] = float("inf")

    return act


@pytest.mark.parametrize("where", ["weights", "master weights"])
def test_spoilt_weights_are_never_saved_over_good_ones(sft, tmp_path, monkeypatch, where):
    at_step(monkeypatch, 3, spoil(where))
    with pytest.raises(UserError, match="checkpoint-3: is not written: .* holds NaN or Inf; earlier ones are intact"):
        sft("run", save_steps=1, save_total_limit=1, max_steps=9)
    folder = tmp_path / "run"
    assert steps_kept(folder) == [2] and not list(folder.glob(".checkpoint*"))
    assert all(tensor.isfinite().all() for tensor in weights(folder / "checkpoint-2").values())
    monkeypatch.undo()


def test_spoilt_weights_end_a_run_that_saves_seldom(sft, tmp_path, monkeypatch, capfd):
    at_step(monkeypatch, 7, spoil("weights"))
    with pytest.raises(UserError, match="5 steps in a row without an update .*checkpoint-6"):
        sft("run", save_steps=6, max_steps=30, save_total_limit=1)
    assert steps_kept(tmp_path / "run") == [6]
    assert "step 7: loss nan, gradient norm inf: no update (1 in a row)" in capfd.readouterr().out


# Gradients


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("value", ["nan", "inf", "1e25"])
def test_one_bad_number_in_one_gradient_changes_nothing(sft, base, tmp_path, monkeypatch, bf16, clip, value):
    """Also with a DeepSpeed file that turns its check off. 1e25 is finite, its square is not."""
    (tmp_path / "zero.json").write_text('{"bf16": {"check_grad_overflow": false}}')
    hooks = []

    def poison(engine):
        if not hooks:
            spoilt = lambda grad: torch.where(torch.arange(len(grad)) == 7, float(value), grad)
            hooks.append(engine.module.model.layers[1].adapters.register_hook(spoilt))
        else:
            hooks[0].remove()

    at_step(monkeypatch, 2, poison)
    options = {"bf16": bf16, "max_grad_norm": clip, "deepspeed": tmp_path / "zero.json", "save_total_limit": "none"}
    folder = sft("run", **options, max_steps=3, save_steps=1)
    one, two, three = (load_file(folder / f"checkpoint-{i}/optimizer-00000.safetensors") for i in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)  # moments too
    assert all(tensor.isfinite().all() for tensor in three.values())
    assert metrics(folder, "updated") == [(True,), (False,), (True,)]


def test_a_spike_is_told_clipped_and_survived(sft, monkeypatch, capfd):
    real, calls = train_sft.micro_loss, []

    def micro_loss(*args):
        calls.append(args)
        return real(*args) * (1e6 if len(calls) == trainer.SPIKE_STEPS + 2 else 1.0)

    monkeypatch.setattr(train_sft, "micro_loss", micro_loss)
    n = trainer.SPIKE_STEPS
    folder = sft("run", max_steps=n + 3, save_steps=n + 1, save_total_limit="none")
    shown = [line for line in capfd.readouterr().out.splitlines() if "SPIKE" in line]
    assert len(shown) == 1 and shown[0].startswith(f"step {trainer.SPIKE_STEPS + 2}: SPIKE gradient norm")
    assert "times the usual: clipped to 1" in shown[0]
    norms = [norm for (norm,) in metrics(folder, "grad_norm")]
    kept = read_json(folder / f"checkpoint-{trainer.SPIKE_STEPS + 1}" / "trainer_state.json")["norms"]
    assert kept == norms[1 : trainer.SPIKE_STEPS + 1]  # what a resumed run judges by
    before, after = (weights(folder / f"checkpoint-{trainer.SPIKE_STEPS + i}") for i in (1, 3))
    assert max((before[name] - after[name]).abs().max() for name in before) < 20 * 1e-3  # AdamW's steps, no leap


def test_no_answer_token_at_all_ends_the_run_after_five_steps(sft, base, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "count", lambda micro_batches: (0, 10))
    with pytest.raises(UserError, match="5 steps in a row without an update .no answer tokens in the batch.*none"):
        sft("run", max_steps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_without_answers_changes_nothing(sft, tmp_path, monkeypatch, capfd, dtype):
    """No weight, no moment, no loss scale. (fp16 is made to run on a CPU for it.)"""
    monkeypatch.setattr(trainer, "precision", lambda cfg, device: (dtype, "a test"))
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    (tmp_path / "scale.json").write_text('{"fp16": {"initial_scale_power": 8}}')
    real, calls = train_sft.count, []

    def count(packs):
        calls.append(packs)
        return (0, 9) if len(calls) == 3 else real(packs)

    monkeypatch.setattr(train_sft, "count", count)
    folder = sft("run", max_steps=4, save_steps=1, save_total_limit="none", deepspeed=tmp_path / "scale.json")
    two, three, four = (load_file(folder / f"checkpoint-{i}/optimizer-00000.safetensors") for i in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert all(tensor.isfinite().all() for tensor in four.values())
    scales = [read_json(folder / f"checkpoint-{i}/trainer_state.json")["loss_scale"] for i in (2, 3)]
    assert scales[0] == scales[1]
    assert any(not torch.equal(three[name], four[name]) for name in three)
    told = metrics(folder, "answer_tokens", "loss", "grad_norm", "updated")
    assert told[2] == (0, None, None, False) and [updated for *_, updated in told] == [True, True, False, True]
    assert "step 3: no answer tokens in the batch: no update (1 in a row)" in capfd.readouterr().out


def test_an_empty_answer_is_a_broken_sample(sft, tmp_path):
    talks = [[{"from": "human", "value": "Say."}, {"from": "gpt", "value": "yes" if i else ""}] for i in range(8)]
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i), "conversations": t} for i, t in enumerate(talks)]))
    folder = sft("run", data_path=tmp_path / "train.json", max_steps=2, max_skip_share=0.2)
    assert metrics(folder, "skipped", "updated") == [(1, True)] * 2
    with pytest.raises(UserError, match="1 of 8 samples are broken.*sample 0: 0: an empty answer"):
        sft("strict", data_path=tmp_path / "train.json", max_steps=2)


# Memory


def let_go():
    """A run that ended by an error in this process, which goes on: its signal handlers hold it, and it the lock."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    gc.collect()


def full(real, when):
    calls = []

    def acting(*args, **kwargs):
        calls.append(args)
        if len(calls) == when:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **kwargs)

    return acting


@pytest.mark.parametrize("where", ["forward", "backward", "AdamW"])
def test_out_of_memory_is_one_line_with_the_plan_and_resume_goes_on(sft, base, tmp_path, monkeypatch, capsys, where):
    options = {"save_steps": 2, "pack_tokens": 400}
    whole, places = sft("whole", **options), []

    def hurt(engine):
        places.append(engine)
        if len(places) == 1:
            owner, name = {"forward": (engine.module, "forward"), "backward": (engine, "backward")}.get(
                where, (engine.optimizer, "step")
            )
            monkeypatch.setattr(owner, name, full(getattr(owner, name), 1))

    with monkeypatch.context() as patch:
        at_step(patch, 4, hurt)
        with pytest.raises(SystemExit) as ended:
            cli(lambda: sft("run", **options))
    assert ended.value.code == 2 and steps_kept(tmp_path / "run") == [2]
    del ended, hurt, places[:]
    let_go()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    for words in ("out of GPU memory while training step 4", " tokens in ", "the largest ",
                  "--gradient_checkpointing True or --pack_tokens ", "the last checkpoint is intact"):  # fmt: skip
        assert words in line, line
    again = sft("run", **options | {"pack_tokens": 200}, resume=True, gradient_checkpointing=True)
    for mine, theirs in zip(metrics(again, "loss", "grad_norm"), metrics(whole, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)  # what it proposes changes no result


def test_an_evaluation_goes_on_in_halves(sft, base, monkeypatch, capfd):
    options = {"eval_data_path": base / "data/val.json", "max_new_tokens": 12, "max_steps": 2}
    whole = sft("whole", **options)
    real, asked = rollouts.generate, []

    def small(model, packed, *rest, **kwargs):
        asked.append(len(packed.names))
        if len(packed.names) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, packed, *rest, **kwargs)

    monkeypatch.setattr(rollouts, "generate", small)
    folder = sft("run", **options)
    assert asked[:6] == [4, 2, 1, 1, 1, 1] and metrics(folder, "eval_count") == [(4,)]
    assert metrics(folder, "eval_accuracy") == metrics(whole, "eval_accuracy")
    assert "out of GPU memory while evaluating 1 x 4 prompts" in capfd.readouterr().out


def test_logits_that_are_not_finite_are_wrong_answers(sft, base, monkeypatch, capfd):
    from model import decode

    real = decode.sample
    monkeypatch.setattr(decode, "sample", lambda logits, *rest: real(logits * float("nan"), *rest))
    folder = sft("run", eval_data_path=base / "data/val.json", max_new_tokens=4, max_steps=1)
    assert metrics(folder, "eval_accuracy", "eval_count") == [(0.0, 4)]
    assert "4 of 4 answers come from logits that are not finite: counted as wrong" in capfd.readouterr().out
    clip = str(next((base / "data/videos").iterdir()))
    with pytest.raises(UserError, match="logits are not finite, so there is no answer"):
        infer.main([clip, "--model_id", str(base / "tiny"), "--model_ckpt", "none"])


def test_infer_out_of_memory(base, monkeypatch):
    from model import decode

    monkeypatch.setattr(decode, "generate", full(None, 1))
    clip = str(next((base / "data/videos").iterdir()))
    with pytest.raises(UserError, match="memory while answering; .* tokens in 1 packs.*--max_new_tokens 128 or"):
        infer.main([clip, "--model_id", str(base / "tiny"), "--model_ckpt", "none"])


# Samples that are left out


@pytest.fixture
def half_broken(base, tmp_path):
    """Options of runs on 16 clips of which two are damaged: one cannot be opened, one is cut off in its frames."""
    shutil.copytree(base / "data", tmp_path / "data")
    records = json.loads((tmp_path / "data/train.json").read_text())
    (tmp_path / "data/videos" / records[3]["video"]).write_bytes(b"no video")
    whole = tmp_path / "data/videos" / records[9]["video"]
    whole.write_bytes(whole.read_bytes()[:-600])
    options = {"data_path": tmp_path / "data/train.json", "max_skip_share": 0.2, "per_device_train_batch_size": 4}
    return options | {"max_steps": 12, "save_steps": 2, "save_total_limit": "none"}


@pytest.mark.parametrize("pack_tokens", ["none", 400])
def test_what_is_left_out_is_counted_on_after_a_resume(sft, half_broken, caplog, pack_tokens):
    options = half_broken | {"pack_tokens": pack_tokens}
    whole, broken = sft("whole", **options), sft("broken", **options)
    counts = [count for (count,) in metrics(whole, "skipped")]
    assert counts == sorted(counts) and counts[-1] == 2
    for step in (8, 10, 12):
        shutil.rmtree(broken / f"checkpoint-{step}")
    caplog.clear()
    sft("broken", **options, resume=True)
    assert metrics(broken, "skipped", "loss") == metrics(whole, "skipped", "loss")
    assert not caplog.records  # told before, not told again
    strict = options | {"max_skip_share": 0.1}
    let_go()
    with pytest.raises(UserError, match="2 of 16 samples are broken, max_skip_share is 0.1"):
        for step in (8, 10, 12):
            shutil.rmtree(broken / f"checkpoint-{step}")
        sft("broken", **strict, resume=True)


def test_broken_samples_are_summed_over_the_ranks(base, half_broken, tmp_path):
    """Each of two ranks comes across one broken clip of sixteen: no rank alone knows of more than the share."""
    options = half_broken | {"pack_tokens": "none", "max_skip_share": 0.1, "per_device_train_batch_size": 2}
    port = str(test_train_sft.free_port())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    flags = test_train_sft.flags_for(base, tmp_path / "two", **options)
    command = [*launcher, "train_sft.py", *flags]
    done = subprocess.run(command, cwd=test_train_sft.ROOT, capture_output=True, text=True, timeout=120)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode and len(errors) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "error: 2 of 16 samples are broken, max_skip_share is 0.1" in errors[0]


def test_counts_go_from_any_number_of_ranks_to_any_other(base):
    """Two ranks knew of three samples, one of them both: three are known and counted on one rank, and on four."""
    known = {"sample 1": "cut", "sample 5": "gone"}, {"sample 1": "cut", "sample 2": "long"}
    states = [{"skipped": names, "left_out": 1.5, "broken": broken} for names, broken in zip(known, (1.5, 0.5))]
    make = lambda rank, world: Loader([{}] * 40, None, SFT(), rank=rank, world_size=world)
    for world in (1, 2, 4):
        loaders = [make(rank, world) for rank in range(world)]
        for loader in loaders:
            loader.restore(json.loads(json.dumps(states)))
            before = loader.left_out
            loader.skip(1, UserError("cut"), everywhere=True)  # known already
            assert loader.left_out == before
        assert sum(loader.left_out for loader in loaders) == 3 and sum(loader.broken for loader in loaders) == 2
        assert {name for loader in loaders for name in loader.skipped} == {"sample 1", "sample 2", "sample 5"}

"""Both loops over bad numbers, bad rewards, broken clips, full memory and full disks: each has a defined, reported
outcome, the parameters stay finite, and the last good checkpoint is intact."""

import json
import math
import resource
import shutil
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import refused
from runs import apart, base, column, cut, finite, grpo, lines, release_run, same_files, sft, state, steps_saved, whole  # noqa: F401
from safetensors.torch import load_file, save_file

import checkpoint
import infer
import rollouts
import startup
import train_grpo
import train_sft
import trainer
from checkpoint import read_json, what_is_broken
from config import SFT, cli
from loader import Loader
from model import UserError, decode
from trainer import Run

# ruff: noqa: F811 (fixtures are imported by name)


# -- Bad numbers


def damaged(folder, name, value, to):
    """A copy of a checkpoint's or an adapter's folder with one number of one tensor replaced."""
    shutil.copytree(folder, to)
    (file,) = to.glob("*model.safetensors")
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if name in key).view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    (to / "manifest.json").unlink(missing_ok=True)
    return to


def test_a_base_or_adapter_with_a_number_that_is_none_neither_trains_nor_answers(sft, base, whole, tmp_path):
    model = damaged(base / "tiny", "layers.1.mlp.up_proj", math.inf, tmp_path / "model")
    first = "model: 1 tensors hold NaN or Inf, the first: model.layers.1.mlp.up_proj.wei"
    assert first in refused(sft, "run", model_id=model)
    adapter = damaged(whole / "checkpoint-1", "lora_A", math.nan, tmp_path / "adapter")
    clip = str(next((base / "data/videos").iterdir()))
    asked = [clip, "--model_id", str(base / "tiny"), "--model_ckpt", str(adapter)]
    for message in (refused(sft, "run", model_ckpt=adapter), refused(infer.main, asked)):
        assert "adapter: 1 tensors hold NaN or Inf" in message


def before_update(monkeypatch, act):
    """Call act(number of the update: 1, 2, …; engine) before each."""
    update, numbers = trainer.update, count(1)
    monkeypatch.setattr(trainer, "update", lambda engine, *rest: (act(next(numbers), engine), update(engine, *rest))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_numbers_change_nothing_and_are_never_saved(sft, tmp_path, monkeypatch, capfd, dtype):
    """Step 2: one bad number in one gradient (1e25 is finite, its square is not), with a DeepSpeed file that turns its
    check off; step 3: no answers; step 5: a bad number in the weights or in their fp32 copy."""
    monkeypatch.setattr(startup, "precision", lambda cfg, device: (dtype, "a test"))
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    (tmp_path / "zero.json").write_text('{"bf16": {"check_grad_overflow": false}, "fp16": {"initial_scale_power": 8}}')
    real, counts, hooks = train_sft.count_tokens, iter([None, None, (0, 9)]), []
    monkeypatch.setattr(train_sft, "count_tokens", lambda packs: next(counts, None) or real(packs))
    bad = 1e25 if dtype == torch.bfloat16 else math.nan

    def act(number, engine):
        adapters = engine.module.model.layers[1].adapters
        if number == 2:
            spoilt = lambda grad: torch.where(torch.arange(len(grad)) == 7, bad, grad)
            hooks.append(adapters.register_hook(spoilt))
        elif number == 3:
            hooks[0].remove()
        elif number == 4:
            before = dict(vars(engine.optimizer.loss_scaler))
            trainer.clear_gradients(engine)
            assert vars(engine.optimizer.loss_scaler) == before  # when it overflowed last, too
            here = engine.optimizer.single_partition_of_fp32_groups[-1] if dtype == torch.bfloat16 else adapters
            here.data[5] = math.nan

    before_update(monkeypatch, act)
    with pytest.raises(UserError, match="checkpoint-5: cannot be written .* holds NaN or Inf.; earlier ones are"):
        options = {"save_steps": 1, "save_total_limit": "none", "max_steps": 9, "max_grad_norm": 0}
        sft("run", deepspeed=tmp_path / "zero.json", **options)
    folder = tmp_path / "run"
    assert steps_saved(folder) == [1, 2, 3, 4] and not list(folder.glob(".checkpoint*")) and finite(folder)
    one, two, three, four = (state(folder / f"checkpoint-{i}") for i in (1, 2, 3, 4))
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)  # moments too
    assert any(not torch.equal(three[name], four[name]) for name in three)
    scales = [read_json(folder / f"checkpoint-{i}/trainer_state.json")["loss_scale"] for i in (2, 3)]
    assert scales[0] == scales[1]
    rows = column(folder, "answer_tokens", "loss", "grad_norm", "updated")
    assert rows[2] == (0, None, None, False) and [updated for *_, updated in rows[:4]] == [True, False, False, True]
    assert "step 3: no answer tokens in the batch: no update (2 in a row)" in capfd.readouterr().out


def test_a_step_with_nan_is_reported_and_skipped_and_many_stop_the_run(grpo, tmp_path, monkeypatch, capfd):
    real, calls = train_grpo.micro_loss, count(1)
    bad = {2, *range(5, 99)}
    monkeypatch.setattr(train_grpo, "micro_loss", lambda *args: real(*args) * (math.nan if next(calls) in bad else 1))
    with pytest.raises(UserError, match="5 steps in a row.*checkpoint-8"):
        grpo("run", max_steps=20, save_steps=1, save_total_limit="none")
    one, two, three = (tmp_path / f"run/checkpoint-{i}" for i in (1, 2, 3))
    assert apart(one, two) == 0 < apart(two, three)
    assert "step 2: loss" in capfd.readouterr().out


def spoil_logits(monkeypatch, value, rows):
    """These rows of the sampler's logits become `value`."""

    def sample(logits, *rest, real=decode.sample):
        logits = logits.clone()
        logits[rows] = value
        return real(logits, *rest)

    monkeypatch.setattr(decode, "sample", sample)


def test_logits_that_are_not_finite_are_wrong_answers(sft, base, monkeypatch):
    spoil_logits(monkeypatch, math.nan, slice(None))
    folder = sft("run", eval_data_path=base / "data/val.json", max_new_tokens=4, max_steps=1)
    assert column(folder, "eval_accuracy", "eval_count") == [(0.0, 4)]
    clip = str(next((base / "data/videos").iterdir()))
    with pytest.raises(UserError, match="logits are not finite, so there is no answer"):
        infer.main([clip, "--model_id", str(base / "tiny"), "--model_ckpt", "none"])


def test_groups_with_log_probs_that_are_not_finite_are_not_trained(grpo, monkeypatch, capfd):
    spoil_logits(monkeypatch, -math.inf, slice(2, 3))
    folder = grpo("run", save_steps=1, max_steps=2)
    assert column(folder, "not_finite") == [1, 1] and column(folder, "updated") == [True, True] and finite(folder)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / "rollouts.jsonl")]  # no bare NaN
    assert {row["prompt"] for row in rows if None in row.get("logprobs", [])} <= {0}
    assert not any(row["trained"] for row in rows if row["prompt"] == 0) and any(row["trained"] for row in rows)
    assert "1 of 16 completions have log-probs that are not finite" in capfd.readouterr().out
    assert (folder / "report.html").exists() and all(isinstance(value, float) for value in column(folder, "kl"))


# -- Broken clips


def test_what_is_left_out_is_counted_on_after_a_resume(sft, base, tmp_path, caplog):
    """Of 16 clips one cannot be opened, one is cut off in its frames."""
    shutil.copytree(base / "data", tmp_path / "data")
    records = json.loads((tmp_path / "data/train.json").read_text())
    (tmp_path / "data/videos" / records[3]["video"]).write_bytes(b"no video")
    short = tmp_path / "data/videos" / records[9]["video"]
    short.write_bytes(short.read_bytes()[:-600])
    options = {"data_path": tmp_path / "data/train.json", "max_skip_share": 0.2, "per_device_train_batch_size": 4}
    options |= {"max_steps": 12, "save_steps": 2, "save_total_limit": "none", "pack_tokens": 400}
    options |= {"dataloader_num_workers": 2}
    whole = sft("whole", **options)
    counts = column(whole, "skipped")
    assert counts == sorted(counts) and counts[-1] == 2
    broken = cut(whole, "broken", 8, 10, 12)
    caplog.clear()
    sft("broken", **options, resume=True)
    assert column(broken, "skipped", "loss") == column(whole, "skipped", "loss")
    assert not caplog.records  # logged before, not logged again


def test_broken_samples_are_summed_over_the_ranks(monkeypatch):
    """Each of two ranks comes across one broken clip of sixteen: no rank alone knows of more than the share."""
    args = SFT(max_skip_share=0.1)
    mine, theirs = (Loader([{}] * 16, None, args, rank=rank, world_size=2) for rank in (0, 1))
    mine.skip(3, UserError("no video"))
    theirs.skip(9, UserError("cut short"))
    run = Run(args, "train_sft", Path(), None, None, loader=mine)
    monkeypatch.setattr(trainer.ranks, "gather", lambda own: [own, (set(theirs.skipped), theirs.too_long)])
    with pytest.raises(UserError, match="2 of 16 samples are broken, max_skip_share is 0.1"):
        trainer.count_skipped(run, 2)
    args.max_skip_share = 0.2
    assert trainer.count_skipped(run, 2) == 2


# -- Full memory


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def full_once(where):
    """-> act: memory runs out in the second pass of the fourth update, in its forward or backward."""
    calls = []

    def hook(_layer, _args, out):
        calls.append(where)
        if len(calls) == 2 and where == "backward":
            out.register_hook(no_memory)
        elif len(calls) == 2:
            no_memory()

    return lambda number, engine: number == 4 and engine.module.model.layers[0].register_forward_hook(hook)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_repeats_the_step_with_smaller_packs(sft, monkeypatch, capfd, where):
    """The update is the same, and so is that of the run that goes on from it."""
    options = {"save_steps": 2, "pack_tokens": 400, "max_steps": 6}
    whole = sft("whole", **options)
    with monkeypatch.context() as patch:
        before_update(patch, full_once(where))
        run = sft("run", **options)
    assert capfd.readouterr().out.count("step 4: out of GPU memory; it is repeated, from now on packs of at most ") == 1
    plans = [read_json(run / f"checkpoint-{step}/trainer_state.json")["plan"] for step in (4, 6)]
    assert plans[0] == plans[1] and 100 < plans[0]["pack_tokens"] < 200
    cut(run, "again", 6)
    again = sft("again", **options, resume=True)
    assert column(again, "loss") == column(run, "loss")  # bit for bit: what was learned of the memory is kept
    for mine, theirs in zip(column(again, "loss", "grad_norm"), column(whole, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert apart(again / "checkpoint-6", whole / "checkpoint-6") < 1e-5


@pytest.mark.parametrize("where, words", [
    ("one sample", ("while training step 4", "--offload_activations, --video_max_pixels or --nframes")),
    ("AdamW", ("while updating the weights", "--offload_optimizer or --lora_rank")),
])  # fmt: skip
def test_what_no_smaller_pack_helps_is_one_line_and_resume_goes_on(sft, tmp_path, monkeypatch, capsys, where, words):
    options = {"save_steps": 2, "pack_tokens": 400}
    whole = sft("whole", **options)

    def act(number, engine):
        if number == 4:
            setattr(*((engine.module, "forward") if where == "one sample" else (engine.optimizer, "step")), no_memory)

    with monkeypatch.context() as patch:
        before_update(patch, act)
        with pytest.raises(SystemExit) as ended:
            cli(lambda: sft("run", **options))
    assert ended.value.code == 2 and steps_saved(tmp_path / "run") == [2]
    del ended
    release_run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert all(part in line for part in (*words, "out of GPU memory")), line
    again = sft("run", **options, resume=True)
    assert column(again, "loss", "grad_norm") == column(whole, "loss", "grad_norm")


def small_memory(monkeypatch, most):
    """A memory that holds `most` completions: more than that cannot be sampled together. -> sizes that were tried"""
    real, sizes = decode.generate, []

    def generate(model, packed, sampling, count, *rest, **kwargs):
        sizes.append(len(packed.names) * count)
        if sizes[-1] > most:
            model.eval()  # as a call that breaks off leaves it
            no_memory()
        return real(model, packed, sampling, count, *rest, **kwargs)

    monkeypatch.setattr(rollouts, "generate", generate)
    return sizes


def same_rollouts(one, other):
    """Every token and reward; log-probs up to rounding, which depends on how many rows are multiplied at once."""
    mine, theirs = lines(one, "rollouts.jsonl"), lines(other, "rollouts.jsonl")
    drawn = [row.pop("logprobs", []) for row in mine], [row.pop("logprobs", []) for row in theirs]
    assert mine == theirs
    assert sum(drawn[0], []) == pytest.approx(sum(drawn[1], []), abs=2e-4)


def test_sampling_in_halves_gives_what_the_whole_batch_gives(grpo, base, monkeypatch, capfd):
    """Every prompt once, the same completions and steps; also with a second draw in the step (shuffled frames)."""
    options = {"per_device_train_batch_size": 24, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}
    options |= {"rewards": f"{base}/rewards.py:vowels,temporal", "learning_rate": 1e-2}
    whole = grpo("whole", **options)
    assert column(whole, "oom_retries") == [0] * 4
    sizes = small_memory(monkeypatch, 10)
    halves = grpo("halves", **options)
    assert sizes[:6] == [24, 12, 8, 4, 8, 4]  # 24 do not fit, 12 do not; from now on neither is tried again
    assert max(sizes[2:]) == 8 and column(halves, "oom_retries") == [2] * 4
    same_rollouts(halves, whole)
    assert same_files(whole, halves, 4)
    shown = capfd.readouterr().out
    assert shown.count("out of GPU memory while sampling 4 x 6 prompts") == 1 and "in halves from now on" in shown
    cut(halves, "again", 4)
    del sizes[:]
    again = grpo("again", **options, resume=True)
    assert max(sizes) == 8 and column(again, "oom_retries") == [2] * 4  # the resumed run knows
    same_rollouts(again, whole)
    small_memory(monkeypatch, 0)
    lower = "--max_completion_length, --max_new_tokens or --nframes lowers"
    with pytest.raises(UserError, match=f"while sampling 4 x 1 prompt; {lower}"):
        grpo("none")


# -- Full disks


@contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: what is left of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_a_checkpoint(sft, whole, tmp_path, monkeypatch):
    def save_state(state, folder, real=checkpoint.save_state):
        with full_disk(100_000 if "checkpoint-4" in folder.name else -1):
            real(state, folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", save_state)
        with pytest.raises(UserError, match="checkpoint-4: cannot be written .*earlier ones are in"):
            sft("run", save_steps=2, save_total_limit="none")
    folder = tmp_path / "run"
    assert steps_saved(folder) == [2] and not list(folder.glob(".*"))
    assert what_is_broken(folder / "checkpoint-2") is None
    release_run()
    sft("run", save_steps=2, save_total_limit="none", resume=True)
    assert steps_saved(folder) == [2, 4, 5] and column(folder, "loss") == column(whole, "loss")


@pytest.mark.parametrize("written", [0, 1, 20])
def test_a_line_is_written_whole_or_not_at_all_and_later_ones_are_dropped(tmp_path, written):
    path = tmp_path / "metrics.jsonl"
    checkpoint.append_lines(path, [{"step": step, "text": "a\u2028b\u0085c"} for step in (1, 2, 3, 4)])
    before = path.read_bytes()
    with full_disk(len(before) + written), pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        checkpoint.append_lines(path, [{"step": 5, "loss": 0.123456789}, {"step": 5}])
    assert path.read_bytes() == before
    path.write_bytes(before + '{"step": 5, "text": "ü'.encode()[:-1])  # killed within a character
    checkpoint.cut_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("where", ["reference_pass", "grpo_loss"])
def test_out_of_memory_in_the_update_repeats_it_with_smaller_packs(grpo, monkeypatch, capfd, where):
    options = {"max_steps": 3, "beta": 0.1, "pack_tokens": 300}
    whole, real, calls = grpo("whole", **options), getattr(train_grpo, where), []

    def full(*args, **kwargs):
        calls.append(where)
        return no_memory() if len(calls) == 2 else real(*args, **kwargs)

    monkeypatch.setattr(train_grpo, where, full)
    run = grpo("run", **options)
    assert capfd.readouterr().out.count("out of GPU memory; it is repeated") == 1
    names = ("loss", "kl", "grad_norm", "entropy", "sampler_gap")
    for mine, theirs in zip(column(run, *names), column(whole, *names), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)

"""Both loops over bad numbers, bad rewards, broken clips, full memory and full disks: each has a defined, reported
outcome, the parameters stay finite, and the last good checkpoint is intact."""

import errno
import json
import math
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import pytest
import torch
from runs import base, column, finite, grpo, lines, release_run, sft, steps_saved, times, weights, whole  # noqa: F401 (fixtures)
from safetensors.torch import load_file, save_file

import checkpoint
import infer
import rollouts
import startup
import train_grpo
import train_sft
import trainer
from checkpoint import newest_checkpoint, read_json, what_is_broken
from config import SFT, cli
from loader import Loader
from model import UserError, decode
from trainer import Run

# ruff: noqa: F811 (fixtures are imported by name)


def damaged(folder, name, value, to):
    """A copy of a checkpoint's or an adapter's folder with one number of one tensor replaced."""
    shutil.copytree(folder, to)
    (file,) = [path for path in to.glob("*model.safetensors")]
    tensors = load_file(file)
    (key,) = [key for key in tensors if name in key][:1]
    tensors[key].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    (to / "manifest.json").unlink(missing_ok=True)
    return to


def test_a_base_with_a_number_that_is_none_is_not_trained(sft, base, tmp_path):
    bad = damaged(base / "tiny", "layers.1.mlp.up_proj", math.inf, tmp_path / "bad")
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
    update, seen = trainer.update, []

    def acting(engine, *rest):
        seen.append(engine)
        if len(seen) >= number:
            act(engine)
        return update(engine, *rest)

    monkeypatch.setattr(trainer, "update", acting)


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
    assert steps_saved(folder) == [2] and not list(folder.glob(".checkpoint*"))
    assert all(tensor.isfinite().all() for tensor in weights(folder / "checkpoint-2").values())
    monkeypatch.undo()


@pytest.mark.parametrize("bf16, clip, value", [(False, 1.0, "nan"), (True, 1.0, "nan"), (True, 0.0, "1e25")])
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
    assert column(folder, "updated") == [True, False, True]


def test_a_batch_without_answers_changes_nothing(sft, tmp_path, monkeypatch, capfd):
    """No weight, no moment, no loss scale. (fp16 is made to run on a CPU for it.)"""
    monkeypatch.setattr(startup, "precision", lambda cfg, device: (torch.float16, "a test"))
    monkeypatch.setattr(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    (tmp_path / "scale.json").write_text('{"fp16": {"initial_scale_power": 8}}')
    real, calls = train_sft.count_tokens, []

    def count_tokens(packs):
        calls.append(packs)
        return (0, 9) if len(calls) == 3 else real(packs)

    monkeypatch.setattr(train_sft, "count_tokens", count_tokens)
    folder = sft("run", max_steps=4, save_steps=1, save_total_limit="none", deepspeed=tmp_path / "scale.json")
    two, three, four = (load_file(folder / f"checkpoint-{i}/optimizer-00000.safetensors") for i in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert all(tensor.isfinite().all() for tensor in four.values())
    scales = [read_json(folder / f"checkpoint-{i}/trainer_state.json")["loss_scale"] for i in (2, 3)]
    assert scales[0] == scales[1]
    assert any(not torch.equal(three[name], four[name]) for name in three)
    rows = column(folder, "answer_tokens", "loss", "grad_norm", "updated")
    assert rows[2] == (0, None, None, False) and [updated for *_, updated in rows] == [True, True, False, True]
    assert "step 3: no answer tokens in the batch: no update (1 in a row)" in capfd.readouterr().out


def test_a_step_whose_samples_are_all_broken_is_defined_and_logged(sft, base, tmp_path, capfd):
    records = json.loads((base / "data/train.json").read_text())[:3]
    (tmp_path / "videos").mkdir()
    for record in records:
        shutil.copyfile(base / "data/videos" / record["video"], tmp_path / "videos" / record["video"])
    (tmp_path / "videos" / records[1]["video"]).write_bytes(b"")
    (tmp_path / "train.json").write_text(json.dumps(records))
    options = {"data_path": tmp_path / "train.json", "max_skip_share": 0.5, "per_device_train_batch_size": 1}
    folder = sft("run", **options, max_steps=3)
    (empty,) = [line for line in column(folder, "answer_tokens", "loss", "updated") if line[0] == 0]
    assert empty == (0, None, False) and "no answer tokens" in capfd.readouterr().out
    # one empty micro-batch among three
    together = sft("together", **options, max_steps=1, gradient_accumulation_steps=3)
    assert column(together, "updated", "skipped") == [(True, 1)]
    with pytest.raises(UserError, match="max_skip_share"):
        sft("strict", **(options | {"max_skip_share": 0.05}), max_steps=3)


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def full_once(where, calls):
    """-> act(engine): memory runs out in the second pass of the update that follows, in the middle of the forward or
    backward pass, or in the update itself."""

    def hook(_layer, _args, out):
        calls.append(where)
        if len(calls) == 2 and where == "backward":
            out.register_hook(no_memory)
        elif len(calls) == 2:
            no_memory()

    def act(engine):
        if where == "AdamW":
            engine.optimizer.step = no_memory
        elif not calls:
            engine.module.model.layers[0].register_forward_hook(hook)

    return act


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_repeats_the_step_with_smaller_packs(sft, monkeypatch, capfd, where):
    """The update is the same, and so is that of the run that goes on from it."""
    options = {"save_steps": 2, "pack_tokens": 400, "max_steps": 6}
    whole = sft("whole", **options)
    with monkeypatch.context() as patch:
        at_step(patch, 4, full_once(where, []))
        run = sft("run", **options)
    assert capfd.readouterr().out.count("step 4: out of GPU memory; it is repeated, from now on packs of at most ") == 1
    plans = [json.loads((run / f"checkpoint-{step}/trainer_state.json").read_text())["plan"] for step in (4, 6)]
    assert plans[0] == plans[1] and 100 < plans[0]["pack_tokens"] < 200
    losses = column(run, "loss")
    shutil.rmtree(run / "checkpoint-6")
    again = sft("run", **options, resume=True)
    assert column(again, "loss") == losses  # bit for bit: what was learned of the memory is kept
    for mine, theirs in zip(column(again, "loss", "grad_norm"), column(whole, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    mine, theirs = weights(again / "checkpoint-6"), weights(whole / "checkpoint-6")
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize("where", ["one sample", "AdamW"])
def test_out_of_memory_that_nothing_helps_is_one_line_and_resume_goes_on(sft, tmp_path, monkeypatch, capsys, where):
    options = {"save_steps": 2, "pack_tokens": 400}
    whole = sft("whole", **options)

    def act(engine):
        if where == "one sample":
            monkeypatch.setattr(engine.module, "forward", no_memory)
        else:
            full_once(where, [])(engine)

    with monkeypatch.context() as patch:
        at_step(patch, 4, act)
        with pytest.raises(SystemExit) as ended:
            cli(lambda: sft("run", **options))
    assert ended.value.code == 2 and steps_saved(tmp_path / "run") == [2]
    del ended, act
    release_run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    doing, lower = {"one sample": ("training step 4", "--offload_activations, --video_max_pixels or --nframes"),
                    "AdamW": ("updating the weights", "--offload_optimizer or --lora_rank")}[where]  # fmt: skip
    assert all(words in line for words in (f"out of GPU memory while {doing}", " packs, the largest ", lower)), line
    again = sft("run", **options, resume=True)
    assert column(again, "loss", "grad_norm") == column(whole, "loss", "grad_norm")


def test_logits_that_are_not_finite_are_wrong_answers(sft, base, monkeypatch):
    real = decode.sample
    monkeypatch.setattr(decode, "sample", lambda logits, *rest: real(logits * float("nan"), *rest))
    folder = sft("run", eval_data_path=base / "data/val.json", max_new_tokens=4, max_steps=1)
    assert column(folder, "eval_accuracy", "eval_count") == [(0.0, 4)]
    clip = str(next((base / "data/videos").iterdir()))
    with pytest.raises(UserError, match="logits are not finite, so there is no answer"):
        infer.main([clip, "--model_id", str(base / "tiny"), "--model_ckpt", "none"])


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


def test_what_is_left_out_is_counted_on_after_a_resume(sft, half_broken, tmp_path, caplog):
    whole = sft("whole", **half_broken, pack_tokens=400)
    counts = column(whole, "skipped")
    assert counts == sorted(counts) and counts[-1] == 2
    broken = shutil.copytree(whole, tmp_path / "broken")
    for step in (8, 10, 12):
        shutil.rmtree(broken / f"checkpoint-{step}")
    caplog.clear()
    sft("broken", **half_broken, pack_tokens=400, resume=True)
    assert column(broken, "skipped", "loss") == column(whole, "skipped", "loss")
    assert not caplog.records  # logged before, not logged again


def test_broken_samples_are_summed_over_the_ranks(monkeypatch):
    """Each of two ranks comes across one broken clip of sixteen: no rank alone knows of more than the share."""
    args = SFT(max_skip_share=0.1)
    mine, theirs = (Loader([{}] * 16, None, args, rank=rank, world_size=2) for rank in (0, 1))
    mine.skip(3, UserError("no video"))
    theirs.skip(9, UserError("cut short"))
    run = Run(args, "train_sft", Path(), None, None, "", loader=mine)
    each = [(set(loader.skipped), loader.too_long) for loader in (mine, theirs)]
    monkeypatch.setattr(trainer.ranks, "gather", lambda own: each if own == each[0] else pytest.fail(str(own)))
    with pytest.raises(UserError, match="2 of 16 samples are broken, max_skip_share is 0.1"):
        trainer.count_skipped(run, 2)
    args.max_skip_share = 0.2
    assert trainer.count_skipped(run, 2) == 2
    run.rank, args.max_skip_share, run.skipped_seen = 1, 0.1, 0
    with pytest.raises(SystemExit):  # one line is enough
        trainer.count_skipped(run, 2)


def test_a_step_with_nan_is_reported_and_skipped_and_many_stop_the_run(grpo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train_grpo, "micro_loss", times({2, *range(5, 99)}, train_grpo.micro_loss))
    with pytest.raises(UserError, match="5 steps in a row.*checkpoint-8"):
        grpo("run", max_steps=20, save_steps=1, save_total_limit="none")
    kept = [weights(tmp_path / f"run/checkpoint-{i}") for i in (1, 2, 3)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert any(not torch.equal(kept[1][name], kept[2][name]) for name in kept[0])
    assert "step 2: loss" in capfd.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    [
        ("nothing", "reward nothing returned None, expected a finite number"),
        ("raises", "reward raises raised KeyError: 'no such thing'; completion"),
    ],
)
def test_a_reward_that_is_no_number_ends_the_run_in_one_line(grpo, base, name, words):
    with pytest.raises(UserError, match=words) as error:
        grpo("run", rewards=f"{base}/rewards.py:{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_largest_reward_there_may_be(grpo, base, scale, capfd):
    """Scaled, it is a reward like any other; unscaled, its gradient overflows and the step is reported and skipped."""
    folder = grpo("run", rewards=f"{base}/rewards.py:large", scale_rewards=scale, save_steps=1, max_steps=3)
    rows = lines(folder, "rollouts.jsonl")
    assert {row["reward"] for row in rows} == {0.0, 1e30} and all(math.isfinite(row["advantage"]) for row in rows)
    assert finite(folder) and any(column(folder, "updated")) == (scale != "none")
    assert ("no update" in capfd.readouterr().out) == (scale == "none")


def spoil_logits(monkeypatch, value, rows, calls=None):
    """Rows of the sampler's logits become `value` in the calls named (all: None)."""
    real, seen = decode.sample, []

    def sample(logits, *rest):
        seen.append(1)
        if calls is None or len(seen) in calls:
            logits = logits.clone()
            logits[rows] = value
        return real(logits, *rest)

    monkeypatch.setattr(decode, "sample", sample)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_groups_with_log_probs_that_are_not_finite_are_not_trained(grpo, monkeypatch, capfd, value):
    spoil_logits(monkeypatch, value, slice(2, 3))
    folder = grpo("run", save_steps=1, max_steps=2)
    assert column(folder, "not_finite") == [1, 1] and column(folder, "updated") == [True, True] and finite(folder)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / "rollouts.jsonl")]  # no bare NaN
    spoilt = [row for row in rows if None in row.get("logprobs", [])]
    assert {row["prompt"] for row in spoilt} <= {0}
    assert not any(row["trained"] for row in rows if row["prompt"] == 0) and any(row["trained"] for row in rows)
    assert "1 of 16 completions have log-probs that are not finite" in capfd.readouterr().out
    assert (folder / "report.html").exists()
    assert all(isinstance(value, float) for value in column(folder, "kl"))


def small_memory(monkeypatch, most, sizes):
    """A memory that holds `most` completions: more than that cannot be sampled together."""
    real = decode.generate

    def generate(model, packed, sampling, count, *rest, **kwargs):
        sizes.append(len(packed.names) * count)
        if sizes[-1] > most:
            model.eval()  # as a call that breaks off leaves it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return real(model, packed, sampling, count, *rest, **kwargs)

    monkeypatch.setattr(rollouts, "generate", generate)


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
    whole, sizes = grpo("whole", **options), []
    assert column(whole, "oom_retries") == [0] * 4
    small_memory(monkeypatch, 10, sizes)
    halves = grpo("halves", **options)
    assert sizes[:6] == [24, 12, 8, 4, 8, 4]  # 24 do not fit, 12 do not; from now on neither is tried again
    assert max(sizes[2:]) == 8 and column(halves, "oom_retries") == [2] * 4
    same_rollouts(halves, whole)
    for name in ("optimizer-00000.safetensors", "adapter_model.safetensors"):
        assert (whole / "checkpoint-4" / name).read_bytes() == (halves / "checkpoint-4" / name).read_bytes()
    shown = capfd.readouterr().out
    assert shown.count("out of GPU memory while sampling 4 x 6 prompts") == 1 and "in halves from now on" in shown

    shutil.rmtree(halves / "checkpoint-4")
    del sizes[:]
    again = grpo("halves", **options, resume=True)
    assert max(sizes) == 8 and column(again, "oom_retries") == [2] * 4  # the resumed run knows
    same_rollouts(again, whole)


def test_a_prompt_too_large_for_the_memory_is_one_line(grpo, monkeypatch):
    small_memory(monkeypatch, 0, [])
    lower = "--max_completion_length, --max_new_tokens or --nframes lowers"
    with pytest.raises(UserError, match=f"while sampling 4 x 1 prompt; .* tokens in 1 packs.*{lower}"):
        grpo("run")


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

    monkeypatch.setattr(checkpoint, "save_state", save_state)
    with pytest.raises(UserError, match="checkpoint-4: cannot be written .*earlier ones are in") as error:
        sft("run", save_steps=2, save_total_limit="none")
    folder = tmp_path / "run"
    assert "\n" not in str(error.value) and steps_saved(folder) == [2] and not list(folder.glob(".*"))
    assert what_is_broken(folder / "checkpoint-2") is None
    del error
    release_run()
    monkeypatch.undo()
    sft("run", save_steps=2, save_total_limit="none", resume=True)
    assert steps_saved(folder) == [2, 4, 5] and column(folder, "loss") == column(whole, "loss")


@pytest.mark.parametrize("written", [0, 1, 20])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, written):
    path = tmp_path / "metrics.jsonl"
    checkpoint.append_lines(path, [{"step": 1}])
    with full_disk(path.stat().st_size + written), pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        checkpoint.append_lines(path, [{"step": 2, "loss": 0.123456789}, {"step": 2}])
    assert path.read_text() == '{"step": 1}\n'


def test_cli_reports_what_a_disk_did_and_nothing_else(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli(lambda: fail(PermissionError(errno.EACCES, "Permission denied", "a/file")))
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: a/file: Permission denied; ")
    for other in (FileExistsError(errno.EEXIST, "File exists"), ConnectionResetError(), OSError("ours")):
        with pytest.raises(type(other)):  # a fault of ours keeps its traceback
            cli(lambda other=other: fail(other))


def test_lines_that_are_written_again_are_dropped_and_no_others(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    checkpoint.append_lines(path, [{"step": step, "text": "a\u2028b\u0085c"} for step in (1, 2, 3, 4)])
    path.write_bytes(path.read_bytes() + '{"step": 5, "text": "ü'.encode()[:-1])  # killed within a character
    checkpoint.cut_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3]

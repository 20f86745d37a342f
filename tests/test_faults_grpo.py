"""GRPO over bad numbers, rewards and a full memory: each has a defined, told outcome, the parameters stay finite."""

import json
import math
import shutil

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import test_train_grpo
import torch
from safetensors.torch import load_file
from test_faults_disk import disk, fill  # noqa: F401 (a fixture)
from test_faults_sft import let_go
from test_train_grpo import column, lines

import rollouts
import train_grpo
from checkpoint import checkpoints
from model import UserError, decode
from model.decode import Completion
from rewards import LARGEST

base, grpo = test_train_grpo.base, test_train_grpo.grpo  # fixtures

BAD_REWARDS = """
import math

def none(text, sample): return None
def words(text, sample): return "0.5"
def inf(text, sample): return math.inf
def too_large(text, sample): return 1e31
def raises(text, sample): raise KeyError("no such thing")
def recursion(text, sample): return recursion(text, sample)

def large(text, sample): return 1e30 if sum(map(ord, text)) % 2 else 0.0
def opposite(text, sample): return -large(text, sample)
def length(text, sample): return float(len(text))
def yes(text, sample): return sum(map(ord, text)) % 2 == 0
"""


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "bad.py").write_text(BAD_REWARDS)
    return lambda *names: ",".join(f"{tmp_path}/bad.py:{name}" for name in names)


def finite(folder):
    """Every checkpoint of a run, to the last moment of AdamW."""
    kept = [load_file(path / "optimizer-00000.safetensors") for path in checkpoints(folder)]
    return bool(kept) and all(tensor.isfinite().all() for state in kept for tensor in state.values())


# Rewards


@pytest.mark.parametrize(
    "name, words",
    [
        ("none", "reward none returned None, expected a finite number"),
        ("words", "reward words returned '0.5', expected a finite number"),
        ("inf", "reward inf returned inf, expected a finite number"),
        ("too_large", "reward too_large returned 1e.31, expected a finite number of at most 1e.30"),
        ("raises", "reward raises raised KeyError: 'no such thing'; completion"),
        ("recursion", "reward recursion raised RecursionError"),
    ],
)
def test_a_reward_that_is_no_number_ends_the_run_in_one_line(grpo, rewards, name, words):
    with pytest.raises(UserError, match=words) as told:
        grpo("run", rewards=rewards(name))
    assert "\n" not in str(told.value)


def test_rewards_that_add_up_to_too_much_end_the_run(grpo, rewards):
    with pytest.raises(UserError, match="the rewards add up to .*1e.10 x large.*see --reward_weights"):
        grpo("run", rewards=rewards("large"), reward_weights="1e10", num_generations=8)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_largest_reward_there_may_be(grpo, rewards, scale, capfd):
    """Scaled, it is a reward like any other; unscaled, its gradient overflows and the step is told and skipped."""
    folder = grpo("run", rewards=rewards("large"), scale_rewards=scale, save_steps=1, max_steps=3)
    rows = lines(folder, "rollouts.jsonl")
    assert {row["reward"] for row in rows} == {0.0, LARGEST} and all(math.isfinite(row["advantage"]) for row in rows)
    assert finite(folder) and any(column(folder, "updated")) == (scale != "none")
    assert ("no update" in capfd.readouterr().out) == (scale == "none")


def test_truth_is_a_number(grpo, rewards):
    folder = grpo("run", rewards=rewards("yes"), max_steps=1)
    assert {row["reward"] for row in lines(folder, "rollouts.jsonl")} == {0.0, 1.0}


def test_empty_completions(grpo, rewards, monkeypatch, capfd):
    """Every completion ends at once: no text, equal rewards, nothing trained, ten steps on an alarm."""

    def silent(model, packed, sampling, count, generator=None):
        return [[Completion([sampling.stop_ids[0]], [-0.1], True) for _ in range(count)] for _ in packed.names]

    monkeypatch.setattr(rollouts, "generate", silent)
    folder = grpo("run", rewards=rewards("length") + ",accuracy,format,length,repetition".replace(",length,", ","),
                  max_steps=10, log_completions=1)  # fmt: skip
    assert {row["completion"] for row in lines(folder, "rollouts.jsonl")} == {""}
    assert column(folder, "length") == [1.0] * 10 and column(folder, "updated") == [False] * 10
    shown = capfd.readouterr().out
    assert "ALARM for 10 steps nothing is learned" in shown and finite(folder)


def test_a_step_without_a_readable_clip(grpo, base, tmp_path):
    records = json.loads((base / "data/train.json").read_text())
    (tmp_path / "videos").mkdir()
    for k, record in enumerate(records):
        shutil.copyfile(base / "data/videos" / record["video"], tmp_path / "videos" / record["video"])
        if k == 2:
            (tmp_path / "videos" / record["video"]).write_bytes(b"")
    (tmp_path / "train.json").write_text(json.dumps(records))
    options = {"per_device_train_batch_size": 4, "max_skip_share": 0.5, "data_path": tmp_path / "train.json"}
    folder = grpo("run", **options, max_steps=6)  # one prompt a step, one of six broken
    empty = [line for line in lines(folder) if line["prompt_tokens"] == 0]
    assert len(empty) == 1 and empty[0]["completion_tokens"] == 0 and empty[0]["updated"] is False
    assert column(folder, "skipped")[-1] == 1 and finite(folder)


# Log-probs and logits


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_groups_with_log_probs_that_are_not_finite_are_not_trained(grpo, monkeypatch, capfd, value):
    spoil_logits(monkeypatch, value, slice(2, 3))
    folder = grpo("run", save_steps=1, max_steps=2)
    assert column(folder, "not_finite") == [1, 1] and column(folder, "updated") == [True, True] and finite(folder)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / "rollouts.jsonl")]  # no bare NaN
    spoilt = [row for row in rows if None in row["logprobs"]]
    assert [row["prompt"] for row in spoilt] == [0, 0]
    assert not any(row["trained"] for row in rows if row["prompt"] == 0) and any(row["trained"] for row in rows)
    assert "1 of 16 completions have log-probs that are not finite" in capfd.readouterr().out
    assert (folder / "report.html").exists()
    assert all(isinstance(value, float) for value in column(folder, "kl"))


def test_logits_that_stay_nan_end_the_run(grpo, monkeypatch, tmp_path):
    spoil_logits(monkeypatch, math.nan, slice(None), range(17, 999))  # from the third step on: 8 tokens a step
    with pytest.raises(UserError, match="5 steps in a row without an update .loss nan.*checkpoint-6"):
        grpo("run", save_steps=1, save_total_limit="none", max_steps=30)
    assert finite(tmp_path / "run") and len(checkpoints(tmp_path / "run")) == 6


def test_a_log_prob_of_minus_infinity_in_the_update_skips_the_step(grpo, monkeypatch, capfd):
    real, calls = train_grpo.token_logprobs, []

    def spoilt(forward, model, batch, cfg):
        logprobs, entropy = real(forward, model, batch, cfg)
        if forward is not model:  # the policy's pass in the update, not the reference's
            calls.append(1)
            if len(calls) == 2:
                logprobs = torch.where(torch.arange(len(logprobs)) == 3, -math.inf, logprobs)
        return logprobs, entropy

    monkeypatch.setattr(train_grpo, "token_logprobs", spoilt)
    folder = grpo("run", save_steps=1, save_total_limit="none", max_steps=3)
    assert column(folder, "updated") == [True, False, True] and finite(folder)
    assert "step 2: loss nan" in capfd.readouterr().out


def test_a_reference_that_is_not_finite_skips_the_step(grpo, monkeypatch):
    real, steps = train_grpo.reference_pass, []

    def spoilt(run, model, frozen, batches, *rest):
        real(run, model, frozen, batches, *rest)
        steps.append(run.step)
        for batch in batches if len(steps) == 2 else ():
            batch.ref *= math.nan

    monkeypatch.setattr(train_grpo, "reference_pass", spoilt)
    folder = grpo("run", save_steps=1, max_steps=3, beta=0.1)
    assert column(folder, "updated") == [True, False, True] and finite(folder)


# Memory


def small_memory(monkeypatch, most, asked):
    """A memory that holds `most` completions: more than that cannot be sampled together."""
    real = decode.generate

    def generate(model, packed, sampling, count, *rest, **kwargs):
        asked.append(len(packed.names) * count)
        if asked[-1] > most:
            model.eval()  # as a call that breaks off leaves it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return real(model, packed, sampling, count, *rest, **kwargs)

    monkeypatch.setattr(rollouts, "generate", generate)


def same_rollouts(one, other):
    """Every token and reward; log-probs up to rounding, which depends on how many rows are multiplied at once."""
    mine, theirs = lines(one, "rollouts.jsonl"), lines(other, "rollouts.jsonl")
    drawn = [pair.pop("logprobs") for pair in mine], [pair.pop("logprobs") for pair in theirs]
    assert mine == theirs
    assert sum(drawn[0], []) == pytest.approx(sum(drawn[1], []), abs=2e-4)


def test_sampling_in_halves_gives_what_the_whole_batch_gives(grpo, base, monkeypatch, capfd):
    """Every prompt once, the same completions and steps; also with a second draw in the step (shuffled frames)."""
    options = {"per_device_train_batch_size": 24, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}
    options |= {"rewards": f"{base}/rewards.py:vowels,temporal", "learning_rate": 1e-2}
    whole, asked = grpo("whole", **options), []
    assert column(whole, "oom_retries") == [0] * 4
    small_memory(monkeypatch, 10, asked)
    halves = grpo("halves", **options)
    assert asked[:6] == [24, 12, 8, 4, 8, 4]  # 24 do not fit, 12 do not; from now on neither is tried again
    assert max(asked[2:]) == 8 and column(halves, "oom_retries") == [2] * 4
    same_rollouts(halves, whole)
    for name in ("optimizer-00000.safetensors", "adapter_model.safetensors"):
        assert (whole / "checkpoint-4" / name).read_bytes() == (halves / "checkpoint-4" / name).read_bytes()
    shown = capfd.readouterr().out
    assert shown.count("out of GPU memory while sampling 4 x 6 prompts") == 1 and "done in halves from now on" in shown

    shutil.rmtree(halves / "checkpoint-4")
    del asked[:]
    again = grpo("halves", **options, resume=True)
    assert max(asked) == 8 and column(again, "oom_retries") == [2] * 4  # the resumed run knows
    same_rollouts(again, whole)


@pytest.mark.parametrize("seed", range(20))
def test_any_way_of_halving_draws_the_same(seed):
    """Rows of a batch that ends at different lengths, cut anywhere: with the same seeds the same completions."""
    from conftest import Sequence, pack_sequences, random_model

    model, some = random_model("tied"), torch.Generator().manual_seed(seed)
    count, N = int(torch.randint(1, 4, (1,), generator=some)), 5
    sequences = [Sequence(model.config, [4 + k], seed=k) for k in range(N)]
    sampling = decode.Sampling(12, 1.3, stop_ids=tuple(range(3, 60)))
    own = lambda numbers: [torch.Generator().manual_seed(100 * seed + k) for k in numbers]
    expected = decode.generate(model, pack_sequences(sequences), sampling, count, own(range(N)))
    cut, found = int(torch.randint(1, N, (1,), generator=some)), []
    for numbers in (range(cut), range(cut, N)):
        some_of = pack_sequences([sequences[k] for k in numbers])
        found += decode.generate(model, some_of, sampling, count, own(numbers))
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in expected]
    assert len({tuple(c.ids) for group in found for c in group}) >= N - 1  # and not one for all


def test_a_prompt_too_large_for_the_memory_is_one_line(grpo, monkeypatch):
    small_memory(monkeypatch, 0, [])
    words = "while sampling 4 x 1 prompt; .* tokens in 1 packs.*--max_completion_length 4 or --nframes 2"
    with pytest.raises(UserError, match=words):
        grpo("run")


@pytest.mark.parametrize("where", ["reference_pass", "grpo_loss"])
def test_out_of_memory_in_the_update_is_one_line_and_resume_goes_on(grpo, tmp_path, monkeypatch, where):
    options = {"max_steps": 4, "save_steps": 1, "beta": 0.1, "pack_tokens": 300}
    whole, real, calls = grpo("whole", **options), getattr(train_grpo, where), []

    def full(*args, **kwargs):
        if (tmp_path / "run/metrics.jsonl").exists() and len(lines(tmp_path / "run")) == 2:
            calls.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, where, full)
        words = "out of GPU memory while training step 3; .* tokens in . packs.*gradient_checkpointing True or --pack_"
        with pytest.raises(UserError, match=words):
            grpo("run", **options)
    del patch, full
    let_go()
    again = grpo("run", **options, resume=True)
    assert len(calls) == 1 and lines(again, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


# Disk, and a dataset that goes


def failing_at(monkeypatch, step, act):
    real = train_grpo.write_rollouts

    def write(run, now, *rest):
        if now == step:
            act()
        return real(run, now, *rest)

    monkeypatch.setattr(train_grpo, "write_rollouts", write)


def test_a_full_disk_ends_the_run_and_no_line_is_half(grpo, disk, monkeypatch):  # noqa: F811 (a fixture)
    place = disk(8192)
    failing_at(monkeypatch, 4, lambda: fill(place))
    with pytest.raises(UserError, match="rollouts.jsonl: cannot be written .No space left.*checkpoint is intact"):
        grpo("run", save_steps=2, max_steps=6)
    folder = place / "run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] and finite(folder)
    assert {row["step"] for row in lines(folder, "rollouts.jsonl")} == {1, 2, 3} and len(lines(folder)) == 3
    assert (folder / "rollouts.jsonl").read_text().endswith("\n")
    (place / "filler").unlink()
    monkeypatch.undo()
    let_go()
    grpo("run", save_steps=2, max_steps=6, resume=True)
    assert column(folder, "step") == [1, 2, 3, 4, 5, 6]


def test_clips_that_are_gone_end_the_run(grpo, base, tmp_path, monkeypatch):
    shutil.copytree(base / "data", tmp_path / "data")
    failing_at(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "data/videos"))
    with pytest.raises(UserError, match="data/videos: this folder of clips was there at the start and is gone"):
        grpo("run", data_path=tmp_path / "data/train.json", cache_mb=0, max_steps=40, save_steps=1)
    assert finite(tmp_path / "run")

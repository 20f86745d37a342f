"""GRPO end to end on a tiny random checkpoint: what is sampled is what is trained, the reference, resuming, ranks, and
the loss by itself. Sampling: test_decode.py."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import move_adapters
from runs import apart, base, column, cut, execute, grpo, lines, same_files, seeds_options, two_ranks  # noqa: F401 (fixtures)

import train_grpo
from checkpoint import write_whole
from config import GRPO
from data import Processor, load_tokenizer, pack, read_records
from grpo import group_advantages, grpo_loss, loss_normalizer
from lora import inject, lora_layers, trainable_parameters
from model import UserError
from model.decode import Sampling
from model.loading import load_model
from model.packed import IGNORE
from rollouts import Group, Rollout, Sampler, differ, score_group

# ruff: noqa: F811 (fixtures are imported by name)


@pytest.fixture(scope="session")
def bench(base):
    """(model with a random adapter, processor, prompts of two clips, cfg)"""
    cfg = GRPO(num_generations=4, per_device_train_batch_size=8, max_completion_length=8, nframes=4)
    model, records = load_model(base / "tiny"), read_records(base / "data/few.json")
    torch.manual_seed(0)
    inject(model, cfg)
    move_adapters(model, 0.05)
    processor = Processor(load_tokenizer(base / "tiny"), model.config, cfg)
    return model, processor, [processor.encode(records[k], answer=False) for k in (0, 1)], cfg


def sampled(bench, prompts=None, length=8):
    """Groups of the bench's prompts with made-up advantages."""
    model, processor, own, cfg = bench
    sampler, groups = Sampler(model, processor, cfg), []
    sampling = Sampling(length, cfg.temperature, stop_ids=sampler.stop_ids)
    for k, each in enumerate(sampler(prompts or own, sampling, cfg.num_generations, [0, 1])):
        groups.append(Group(k, len(own[k]), [sampler.rollout(k, completion) for completion in each], k))
    for k, rollout in enumerate(r for group in groups for r in group.rollouts):
        rollout.advantage = (-1) ** k * (1 + 0.1 * k)
    return groups


def micro_batches(prompts, groups, cfg):
    splits = train_grpo.split_micro_batches(groups, cfg, None)
    return [train_grpo.micro_batch(dict(enumerate(prompts)), rollouts, "cpu") for rollouts in splits]


def test_the_training_forward_gives_the_samplers_logprobs(bench):
    """Vision tokens are neither drawn nor in the softmax."""
    model, _, prompts, cfg = bench
    groups = sampled(bench)
    (batch,) = micro_batches(prompts, groups, cfg)
    rollouts, banned = [rollout for group in groups for rollout in group.rollouts], set(model.config.vision_token_ids)
    assert len({rollout.text for rollout in rollouts}) > 4 and not any(banned & set(r.ids) for r in rollouts)
    assert (train_grpo.token_logprobs(model, model, batch, cfg)[0] - batch.sampler).abs().max() < 1e-4
    batch.packed.targets[batch.rows] = model.config.video_token_id
    assert (train_grpo.token_logprobs(model, model, batch, cfg)[0] == -torch.inf).all()


def repeated_form(prompt, rollouts):
    """The reference form of a packed group: every completion behind its own copy of prompt and clip."""
    for rollout in rollouts:
        ids = np.array([*prompt.ids, *rollout.ids])
        after = prompt.position_ids.max() + 1 + np.arange(len(rollout.ids))
        targets = np.full(len(ids), IGNORE)
        targets[len(prompt) - 1 : -1] = rollout.ids
        positions = np.concatenate([prompt.position_ids, np.tile(after, (3, 1))], axis=1)
        yield replace(prompt, ids=ids, targets=targets, position_ids=positions)


@pytest.mark.parametrize("split", [8, 3], ids=["whole groups", "split groups"])
def test_the_shared_prompt_has_loss_and_gradients_of_the_repeated_form(bench, split):
    model, _, prompts, cfg = bench
    groups = sampled(bench)
    everyone = [rollout for group in groups for rollout in group.rollouts]
    for k, rollout in enumerate(everyone):  # completions of different lengths
        rollout.ids, rollout.logprobs = rollout.ids[: 1 + k], rollout.logprobs[: 1 + k]
    tokens = sum(len(rollout.ids) for rollout in everyone)
    normalizer, knobs = loss_normalizer("sequence", tokens, len(everyone), 8), GRPO(beta=0.1, aggregation="sequence")
    shared = micro_batches(prompts, groups, replace(cfg, per_device_train_batch_size=split))
    (repeated,) = micro_batches(prompts, groups, cfg)
    repeated.packed = pack([e for p, group in zip(prompts, groups) for e in repeated_form(p, group.rollouts)])
    repeated.rows = (repeated.packed.targets != IGNORE).nonzero()[:, 0]
    results = []
    for batches in (shared, [repeated]):
        model.zero_grad()
        total, offset = 0.0, 0
        for batch in batches:
            logprobs, entropy = train_grpo.token_logprobs(model, model, batch, cfg)
            noise = torch.linspace(-0.3, 0.3, tokens)[offset : offset + len(logprobs)]  # ratios not 1, KL not 0
            known = {"old": batch.sampler + noise, "ref": batch.sampler - noise, "entropy": entropy}
            loss = grpo_loss(logprobs, batch.advantages, batch.completion, normalizer, knobs, **known)[0]
            loss.backward()
            total, offset = total + loss.item(), offset + len(batch.rows)
        results.append((total, {name: p.grad.clone() for name, p in trainable_parameters(model)}))
    (loss, gradients), (expected, reference) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert any(name.startswith("visual.blocks") for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).abs().max() <= 1e-5 * reference[name].abs().max(), name


def test_another_video_gives_other_rollouts_and_rewards(bench, base):
    _, processor, prompts, _ = bench
    rewards, seen = train_grpo.load_rewards(f"{base}/rewards.py:vowels"), []
    for control in ("none", "none", "blank", "reversed"):
        examples = [processor.encode(prompt.record, answer=False, control=control) for prompt in prompts]
        groups = sampled(bench, examples, length=40)  # long enough for a weak effect of random weights to show
        for group, example in zip(groups, examples):
            score_group(rewards, group, example.record, [], 8)
        seen.append([(r.text, r.reward) for group in groups for r in group.rollouts])
    assert seen[0] == seen[1] and seen[0] != seen[2] and seen[0] != seen[3]
    assert all([reward for _, reward in seen[0]] != [reward for _, reward in other] for other in seen[2:])


# -- Advantages


SAME = [[1.0, 1.0], [0.0, 0.0], [0.1, 0.1]]
LENGTHS, RIGHT = [[0.3, 0.0], [0.2, 0.2], [1.1, 0.0], [1.0, 0.0]], [[0, 0], [0, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize("rewards, accuracy, wanted, beta, normalizer, trained", [
    ([[1.0, 0.0], [9.0, 8.0], [3.0, 3.0], [0.0, 5.0]], None, 2, 0.0, 4, [0, 1]),  # of those that differ the first
    (LENGTHS, RIGHT, 3, 0.0, 6, [0, 2, 3]),  # those that differ in accuracy before those that differ in length
    (LENGTHS, RIGHT, 2, 0.0, 4, [2, 3]),
    (SAME, None, 3, 0.0, 6, []), (SAME, None, 3, 0.1, 6, [0, 1, 2]),  # for their KL alone; they count in the mean
])  # fmt: skip
def test_which_groups_a_step_trains_on(rewards, accuracy, wanted, beta, normalizer, trained):
    """Groups of completions that have these rewards. accuracy: likewise, that component."""
    groups, run = [], SimpleNamespace(cfg=GRPO(num_generations=2, beta=beta))
    for g, (values, right) in enumerate(zip(rewards, accuracy or rewards)):
        rollouts = [Rollout(g, [5], [-1.0], True, "same", {"accuracy": a}, r, r > 0.5) for a, r in zip(right, values)]
        groups.append(Group(g, 3, rollouts, g, differs=differ(rollouts)))
    _, divisor = train_grpo.compare_within_groups(run, groups, wanted)
    assert [group.number for group in groups if group.trained] == trained and divisor == normalizer


# -- Runs


def test_it_learns_and_logs(grpo, base, capfd):
    options = {"max_steps": 24, "learning_rate": 2e-2, "data_path": base / "data/train.json", "logging_steps": 8}
    folder = grpo("run", **options, num_generations=8, per_device_train_batch_size=32, eval_steps=12, max_new_tokens=8,
                  eval_data_path=base / "data/val.json")  # fmt: skip
    reward = column(folder, "reward")
    assert np.mean(reward[-4:]) > np.mean(reward[:4]) + 0.025, reward  # over the same 16 prompts
    names = "reward reward_std reward/vowels reward/vowels_std all_right all_wrong no_variance length truncated kl " \
            "clipped entropy grad_norm sampler_gap rollout_seconds tokens_per_second loss lr"  # fmt: skip
    assert all(isinstance(lines(folder)[1][name], float) for name in names.split())
    assert column(folder, "kl")[0] == pytest.approx(0, abs=1e-6) and column(folder, "kl")[-1] > 1e-3
    assert max(column(folder, "sampler_gap")) < 1e-5
    assert [line["step"] for line in lines(folder) if "eval_sampled_accuracy" in line] == [0, 12, 24]

    rollouts = lines(folder, "rollouts.jsonl")
    assert len(rollouts) == 24 * 4 * 8 and sum("question" in row for row in rollouts) == 24 * 4  # once a group
    first, detailed = rollouts[0], [row for row in rollouts if "tokens" in row]
    assert first["question"].startswith("<video>") and first["video"].endswith(".mp4") and first["answer"]
    assert first["reward"] == pytest.approx(first["rewards"]["vowels"])
    assert all(row["n_tokens"] == len(row["tokens"]) == len(row["logprobs"]) for row in detailed)
    shown = {(row["step"], row["prompt"]) for row in detailed}  # one to three groups a step
    assert {step for step, _ in shown} == set(range(1, 25)) and len(shown) <= 24 * 3
    printed = capfd.readouterr().out
    assert "greedy" in printed and "step  8/24" in printed and "step  7/24" not in printed
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("lost", [(4, 5), (2, 4, 5)], ids=["some checkpoints", "all"])
def test_resume_goes_on_bit_for_bit(grpo, lost):
    """Same rollouts, same update, and the reference is still the policy as the run began: the run has its own copy."""
    start = grpo("start", max_steps=2, learning_rate=1e-2)
    options = {"max_steps": 5, "save_steps": 2, "save_total_limit": "none", "learning_rate": 1e-2, "num_iterations": 2}
    options |= {"model_ckpt": start, "beta": 0.5}
    whole = grpo("whole", **options)
    broken = cut(whole, "broken", *lost)
    shutil.rmtree(start)
    grpo("broken", **options, resume=True)
    assert lines(whole, "rollouts.jsonl") == lines(broken, "rollouts.jsonl")
    names = "kl", "loss", "grad_norm", "reward", "entropy", "clipped"
    assert column(whole, *names) == column(broken, *names) and min(column(whole, "kl")) > 1e-3
    assert same_files(whole, broken, 5)


def test_more_is_sampled_until_enough_groups_differ(grpo, base, capsys):
    """Only some prompts differ in accuracy: rounds go on until enough do; a resumed run goes on in the data."""
    own = 'def accuracy(text, sample):\n    return len(text) * ("3" in sample.record["id"])\n'
    (base / "some.py").write_text(own)
    records = [json.loads(json.dumps(record)) for record in read_records(base / "data/train.json")][:12]
    for k, record in enumerate(records):
        record["id"] = f"{k}-{'3' if k % 3 else '0'}"
    (base / "data/twelve.json").write_text(json.dumps(records))
    options = {"data_path": base / "data/twelve.json", "rewards": f"{base}/some.py:accuracy", "max_resample": 2}
    options |= {"per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}
    whole = grpo("whole", **options)
    broken = cut(whole, "broken", 4)
    assert set(column(whole, "rounds")) <= {1, 2, 3} and max(column(whole, "rounds")) > 1
    for rounds, differing in column(whole, "rounds", "groups_differing"):
        assert differing >= 2 or rounds == 3
    assert column(whole, "epoch")[-1] == sum(column(whole, "rounds")) / 6
    saved = json.loads((broken / "checkpoint-2/trainer_state.json").read_text())
    older = json.dumps(saved | {"loop": {"rounds": saved.pop("rounds")}})  # as it was until 2026-11-30

    def fill(folder):
        shutil.copytree(whole / "checkpoint-2", folder, ignore=lambda *_: ["manifest.json"], dirs_exist_ok=True)
        (folder / "trainer_state.json").write_text(older)

    write_whole(broken / "checkpoint-2", fill)
    grpo("broken", **options, resume=True)
    assert "going on from" in capsys.readouterr().out
    assert lines(whole, "rollouts.jsonl") == lines(broken, "rollouts.jsonl")


# -- However the batch is cut


TWO = {"max_steps": 2, "max_resample": 1, "save_steps": 2}


@pytest.fixture(scope="session")
def two_steps(base):
    """Two steps of four prompts, or two: 16 completions a round."""
    return execute(train_grpo, base, base / "two_steps", **TWO)


def assert_same_run(one, other):
    """The same completions; weights after step 2 and what was logged within 1e-5."""
    rows = [lines(folder, "rollouts.jsonl") for folder in (one, other)]
    names = "step", "prompt", "id", "completion", "n_tokens", "trained"
    assert [[row[name] for name in names] for row in rows[0]] == [[row[name] for name in names] for row in rows[1]]
    assert apart(one / "checkpoint-2", other / "checkpoint-2") < 1e-5
    for name in ("reward", "kl", "loss", "entropy", "grad_norm"):
        assert column(one, name) == pytest.approx(column(other, name), abs=1e-5)


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "pack_tokens": "none"},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "pack_tokens": "none"},  # groups are cut
    {"pack_tokens": 150},
])  # fmt: skip
def test_how_the_batch_is_split_changes_nothing(grpo, two_steps, options):
    assert_same_run(grpo("run", **TWO, **options), two_steps)


def test_two_ranks_equal_one(base, two_steps, tmp_path):
    """One group dropped or chosen as all ranks see it, counts over all ranks."""
    assert_same_run(two_ranks(train_grpo, base, tmp_path / "two", **TWO, per_device_train_batch_size=8), two_steps)


# -- Rewards, answers, flags


def test_the_temporal_reward_samples_shuffled_frames_too(grpo, monkeypatch):
    seen, real = [], Sampler.__call__

    def watched(sampler, prompts, sampling, count, seeds):
        seen.append((count, [prompt.frame_indices[0] for prompt in prompts]))
        return real(sampler, prompts, sampling, count, seeds)

    monkeypatch.setattr(Sampler, "__call__", watched)
    folder = grpo("run", rewards="temporal,accuracy", max_steps=1)
    (every, ordered), (half, shuffled) = seen
    assert (every, half) == (4, 2) and ordered != shuffled and [sorted(f) for f in shuffled] == ordered
    assert lines(folder)[0]["reward/temporal"] == 0.0


def test_answers_that_cannot_be_read_are_named_and_counted(grpo, base, tmp_path, capfd):
    records = json.loads((base / "data/few.json").read_text())
    records[3]["conversations"][1]["value"] = "Answer: (E) Sideways"
    (tmp_path / "train.json").write_text(json.dumps(records))
    options = {"data_path": tmp_path / "train.json", "image_folder": base / "data/videos", "max_steps": 1}
    with pytest.raises(UserError, match="1 of 6 training samples cannot be read.*sample 3.*Sideways.*max_skip_share"):
        grpo("strict", **options)
    grpo("run", **options, max_skip_share=0.2)
    assert "sample 3" in capfd.readouterr().out


def test_the_flags_of_the_seeds_command(grpo, base, capfd):
    """Its GRPO command with our paths."""
    options = {"num_generations": 8, "max_steps": -1, "image_folder": base / "data/videos"}
    folder = grpo("grpo_video_lora", **seeds_options("GRPO"), **options)
    assert len(column(folder, "reward")) == 6 and max(column(folder, "sampler_gap")) < 0.1  # bf16
    config = json.loads((folder / "checkpoint-6/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 64)
    assert "bfloat16" in capfd.readouterr().out


# -- The loss: against TRL's numbers, and where numbers get extreme


# Made with TRL 1.16.0 by tests/make_grpo_trl_numbers.py, which has the settings.
TRL = json.loads(Path(__file__).with_name("grpo_trl_numbers.json").read_text())
AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}
INDEX = torch.repeat_interleave(torch.arange(len(TRL["lengths"])), torch.tensor(TRL["lengths"]))


@pytest.mark.parametrize("name", TRL["cases"])
def test_trl_advantages_loss_and_gradient(name):
    case, knobs = TRL["cases"][name], TRL["cases"][name]["knobs"]
    rewards = torch.tensor(TRL["rewards"]).view(-1, TRL["num_generations"])
    advantages = group_advantages(rewards, knobs.get("scale_rewards", "group"))[0].flatten()
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), atol=1e-5, rtol=1e-5)

    own = {name: knobs[name] for name in ("use_bias_correction_kl", "importance_sampling_level") if name in knobs}
    own |= {name: case[name] for name in ("epsilon", "epsilon_high", "beta", "sampler_is_cap")}
    cfg = GRPO(aggregation=AGGREGATION[knobs["loss_type"]], **own)
    tensors = {key: torch.tensor(value) for key, value in TRL["tensors"].items()}
    for key, used in (("old", case["has_old"]), ("ref", cfg.beta), ("sampler", cfg.sampler_is_cap)):
        tensors[key] = tensors[key] if used else None
    keep = ~torch.tensor(TRL["truncated"]) if knobs.get("mask_truncated_completions") else None
    n_tokens = len(INDEX) if keep is None else int(keep[INDEX].sum())
    normalizer = loss_normalizer(cfg.aggregation, n_tokens, len(TRL["lengths"]), TRL["max_completion_length"])
    logprobs = tensors.pop("logprobs").requires_grad_()
    loss, metrics = grpo_loss(logprobs, torch.tensor(case["advantages"]), INDEX, normalizer, cfg, keep=keep, **tensors)
    loss.backward()
    assert abs(loss.item() - case["loss"]) < 1e-5
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-5)
    shares = dict(case["shares"])
    if cfg.use_bias_correction_kl and case["has_old"]:
        shares.pop("kl", None)  # TRL logs the KL times the ratio; ours is the plain one
    if cfg.importance_sampling_level == "sequence":
        shares = {key: shares[key] for key in shares.keys() & {"entropy", "kl"}}  # TRL: clip shares of sequences
    for key, share in shares.items():
        assert (metrics[key] / metrics["tokens"]).item() == pytest.approx(share, abs=1e-6), key


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("gap", [-200.0, -15.0, 15.0, 200.0])
def test_no_overflow_and_the_kl_pulls_back(gap, unbiased, level):
    """A policy far from its reference, in either direction, is pulled towards it by a finite gradient."""
    logprobs = torch.full((4,), -1.0 - max(gap, 0.0), requires_grad=True)
    cfg = GRPO(beta=0.1, use_bias_correction_kl=unbiased, importance_sampling_level=level, sampler_is_cap=2.0)
    index, ref = torch.tensor([0, 0, 1, 1]), logprobs.detach() + gap
    loss, metrics = grpo_loss(logprobs, torch.zeros(2), index, 1, cfg, ref=ref, sampler=ref)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    if not (unbiased and level == "sequence" and gap < 0):  # a broadcast ratio is no unbiased KL (TRL says so too)
        assert (logprobs.grad.sign() == -math.copysign(1, gap)).all(), logprobs.grad
    logprobs.grad = None
    cfg = GRPO(beta=0.0, importance_sampling_level=level)
    loss, metrics = grpo_loss(logprobs, -torch.ones(2), index, 1, cfg, old=ref)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("keep", [[True, False, True], [False, False, False]])
def test_masked_completions_give_nothing_even_when_they_are_nan(keep, level):
    """Nothing kept is a zero with a gradient: every rank must run backward, also one whose completions are masked."""
    logprobs = torch.tensor([-1.0, -2.0, math.nan, -1.0], requires_grad=True)
    known = {"keep": torch.tensor(keep), "sampler": logprobs.detach(), "ref": logprobs.detach()}
    cfg = GRPO(beta=1.0, sampler_is_cap=2.0, importance_sampling_level=level, aggregation="sequence")
    index, advantages = torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 5.0, -1.0])
    loss, metrics = grpo_loss(logprobs, advantages, index, 3, cfg, **known)
    loss.backward()
    assert loss.isfinite() and logprobs.grad[2] == 0 and metrics["tokens"] == 3 * keep[0]
    assert bool(logprobs.grad.any()) == keep[0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.2, 0.1, 1 / 3, 1e6])
def test_equal_rewards_teach_exactly_nothing(scale, reward):
    rewards = torch.full((3, 7), reward)
    rewards[2] = torch.arange(7)
    advantages, std = group_advantages(rewards, scale)
    assert not advantages[:2].any() and not std[:2].any() and advantages[2].any()


@pytest.mark.parametrize("tokens, expected", [
    (60, [[0] * 3 + [1] * 3, [2] * 3 + [3] * 3]),  # there would be room for two prompts and eight completions
    (49, [[0] * 3, [1] * 3, [2] * 3, [3] * 3]),
    (24, [[g] * n for g in range(4) for n in (2, 1)]),
])  # fmt: skip
def test_a_pack_cuts_no_group_that_fits(tokens, expected):
    """Prompts of 10 tokens with three completions of 5: a group takes 25."""
    groups = [Group(g, 10, [Rollout(g, [1] * 5, [0.0] * 5, True, "") for _ in range(3)], g) for g in range(4)]
    batches = train_grpo.split_micro_batches(groups, GRPO(), tokens)
    assert [[rollout.group for rollout in each] for each in batches] == expected


def test_beta_0_makes_no_reference_pass_and_a_large_one_holds_the_policy(grpo):
    free, held = (column(grpo(f"{beta}", max_steps=5, learning_rate=1e-2, beta=beta), "kl") for beta in (1e-9, 10.0))
    assert held[-1] < free[-1] / 3, (free, held)
    assert column(grpo("off", max_steps=2, beta=0), "kl") == []


def test_the_reference_may_be_the_base(bench):
    """The start as reference: test_adapter_files.py, and the resumed runs above."""
    model, _, _, cfg = bench
    with train_grpo.freeze_reference(model, replace(cfg, beta=0.1, reference="base"))():
        assert not any(layer.enabled for _, layer in lora_layers(model))

"""The GRPO loss: against numbers out of TRL, against a reference implementation, and where numbers get extreme."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import LOG_RATIO_LIMIT, group_advantages, grpo_loss, k3, loss_normalizer

# Made with TRL 1.16.0 by tests/make_grpo_trl_numbers.py, which has the settings.
TRL = json.loads(Path(__file__).with_name("grpo_trl_numbers.json").read_text())
AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}
INDEX = torch.repeat_interleave(torch.arange(len(TRL["lengths"])), torch.tensor(TRL["lengths"]))


def as_ours(case):
    """A TRL case -> (normalizer, keyword arguments of grpo_loss)."""
    knobs, tensors = case["knobs"], {key: torch.tensor(value) for key, value in TRL["tensors"].items()}
    keep = ~torch.tensor(TRL["truncated"]) if knobs.get("mask_truncated_completions") else None
    n_tokens = int(keep[INDEX].sum()) if keep is not None else len(INDEX)
    aggregation = AGGREGATION[knobs["loss_type"]]
    return loss_normalizer(aggregation, n_tokens, len(TRL["lengths"]), TRL["max_completion_length"]), {
        "old_logprobs": tensors["old"] if case["has_old"] else None,
        "ref_logprobs": tensors["ref"] if case["beta"] else None,
        "sampler_logprobs": tensors["sampler"] if case["sampler_is_cap"] else None,
        "entropy": tensors["entropy"],
        "keep": keep,
        "epsilon": case["epsilon"],
        "epsilon_high": case["epsilon_high"],
        "beta": case["beta"],
        "use_bias_correction_kl": knobs["use_bias_correction_kl"],
        "aggregation": aggregation,
        "importance_sampling_level": knobs.get("importance_sampling_level", "token"),
        "sampler_is_cap": case["sampler_is_cap"],
    }


@pytest.mark.parametrize("name", TRL["cases"])
def test_trl_advantages_loss_and_gradient(name):
    case = TRL["cases"][name]
    index = torch.arange(len(TRL["rewards"])) // TRL["num_generations"]
    advantages, _ = group_advantages(torch.tensor(TRL["rewards"]), index, case["knobs"].get("scale_rewards", "group"))
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), atol=1e-5, rtol=1e-5)
    normalizer, knobs = as_ours(case)
    logprobs = torch.tensor(TRL["tensors"]["logprobs"], requires_grad=True)
    loss, metrics = grpo_loss(logprobs, torch.tensor(case["advantages"]), INDEX, normalizer, **knobs)
    loss.backward()
    assert abs(loss.item() - case["loss"]) < 1e-5
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-5)
    shares = dict(case["shares"])
    if knobs["use_bias_correction_kl"] and case["has_old"]:
        shares.pop("kl", None)  # TRL logs the KL times the ratio; ours is the plain one
    if knobs["importance_sampling_level"] == "sequence":
        shares = {key: shares[key] for key in shares.keys() & {"entropy", "kl"}}  # TRL: clip shares of sequences
    for key, share in shares.items():
        assert (metrics[key] / metrics["tokens"]).item() == pytest.approx(share, abs=1e-6), key


# --- the reference: one Python loop, one token at a time, double precision ------------------------------------------


def reference_loss(logprobs, advantages, index, normalizer, old, ref, sampler, keep, epsilon, high, beta, unbiased,
              aggregation, level, cap):  # fmt: skip
    loss = 0.0
    for i, advantage in enumerate(advantages):
        tokens = [t for t in range(len(index)) if index[t] == i]
        if not keep[i] or not tokens:
            continue
        mean_log_ratio = sum(logprobs[t] - old[t] for t in tokens) / len(tokens)
        for t in tokens:
            ratio = math.exp(mean_log_ratio if level == "sequence" else logprobs[t] - old[t])
            term = -min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + high) * advantage)
            term *= min(math.exp(old[t] - sampler[t]), cap)
            kl = math.exp(ref[t] - logprobs[t]) - (ref[t] - logprobs[t]) - 1
            term += beta * kl * (ratio if unbiased else 1)
            loss += term / (len(tokens) if aggregation == "sequence" else 1)
    return loss / normalizer


values = st.floats(-3, 0, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reference_implementation(data):
    n, g = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    draw_n = lambda strategy: data.draw(st.lists(strategy, min_size=n, max_size=n))
    logprobs, old, ref, sampler = (draw_n(values) for _ in range(4))
    index = draw_n(st.integers(0, g - 1))  # in any order: tokens of a completion need not be neighbours
    advantages = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=g, max_size=g))
    keep = data.draw(st.lists(st.booleans(), min_size=g, max_size=g))
    epsilon, high = data.draw(st.sampled_from([(0.2, 0.2), (0.1, 0.28), (0.5, 3.0)]))
    beta, unbiased = data.draw(st.sampled_from([0.0, 0.04, 1.0])), data.draw(st.booleans())
    aggregation = data.draw(st.sampled_from(["token", "sequence", "constant"]))
    level, cap = data.draw(st.sampled_from(["token", "sequence"])), data.draw(st.sampled_from([0.9, 2.0]))
    ours, metrics = grpo_loss(
        torch.tensor(logprobs), torch.tensor(advantages), torch.tensor(index), 7, old_logprobs=torch.tensor(old),
        ref_logprobs=torch.tensor(ref), sampler_logprobs=torch.tensor(sampler), keep=torch.tensor(keep),
        epsilon=epsilon, epsilon_high=high, beta=beta, use_bias_correction_kl=unbiased, aggregation=aggregation,
        importance_sampling_level=level, sampler_is_cap=cap,
    )  # fmt: skip
    expected = reference_loss(logprobs, advantages, index, 7, old, ref, sampler, keep, epsilon, high, beta, unbiased,
                     aggregation, level, cap)  # fmt: skip
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["tokens"] == sum(keep[i] for i in index)


# --- what must hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_add_up(aggregation, level):
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref = (-torch.rand(len(INDEX), generator=generator) for _ in range(3))
    advantages = torch.randn(12, generator=generator)
    knobs = {"beta": 0.1, "aggregation": aggregation, "importance_sampling_level": level}
    normalizer = loss_normalizer(aggregation, len(INDEX), 12, 7)
    whole, sums = grpo_loss(logprobs, advantages, INDEX, normalizer, old_logprobs=old, ref_logprobs=ref, **knobs)
    parts, part_sums = 0, 0
    for rows in (range(5), range(5, 6), range(6, 12)):
        token = torch.isin(INDEX, torch.tensor(list(rows)))
        loss, metrics = grpo_loss(
            logprobs[token], advantages[rows.start : rows.stop], INDEX[token] - rows.start, normalizer,
            old_logprobs=old[token], ref_logprobs=ref[token], **knobs,
        )  # fmt: skip
        parts, part_sums = parts + loss, part_sums + metrics["kl"]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(part_sums, sums["kl"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_the_gradient_flows(level):
    logprobs = -torch.rand(len(INDEX))
    grads = []
    for old in (None, logprobs.clone()):
        leaf = logprobs.clone().requires_grad_(True)
        advantages = torch.linspace(-1, 1, 12)
        loss, metrics = grpo_loss(leaf, advantages, INDEX, 1, old_logprobs=old, importance_sampling_level=level)
        loss.backward()
        grads.append(leaf.grad)
        assert metrics["ratio"] == metrics["tokens"]
    assert torch.equal(*grads)
    # d ratio / d logprob is 1; for a sequence 1 / length, and all its tokens share that ratio: the same sum
    torch.testing.assert_close(grads[0], -torch.linspace(-1, 1, 12)[INDEX])


def test_kl_is_zero_at_the_start_and_its_unbiased_gradient_is_the_log_ratio():
    logprobs = (-3 * torch.rand(50)).requires_grad_(True)
    index, zero = torch.zeros(50, dtype=torch.long), torch.zeros(1)
    loss, metrics = grpo_loss(logprobs, zero, index, 1, ref_logprobs=logprobs.detach(), beta=1.0)
    loss.backward()
    assert metrics["kl"] == 0 and abs(loss.item()) < 1e-5 and not logprobs.grad.any()
    ref = logprobs.detach() + torch.randn(50)
    logprobs.grad = None
    grpo_loss(logprobs, zero, index, 1, ref_logprobs=ref, beta=1.0)[0].backward()
    torch.testing.assert_close(logprobs.grad, (logprobs - ref).detach(), atol=1e-5, rtol=1e-5)


def test_k3_is_never_negative():
    gap = torch.cat([torch.linspace(-1e-3, 1e-3, 1001), torch.linspace(-50, 200, 1001)])
    assert (k3(gap) >= 0).all() and k3(torch.zeros(1)) == 0
    below = gap[gap <= LOG_RATIO_LIMIT].double()
    torch.testing.assert_close(k3(below), below.exp() - below - 1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("gap", [-200.0, -15.0, 15.0, 200.0])
def test_no_overflow_and_the_kl_pulls_back(gap, unbiased, level):
    """A policy far from its reference, in either direction, is pulled towards it by a finite gradient."""
    logprobs = torch.full((4,), -1.0 - max(gap, 0.0), requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs, torch.zeros(2), torch.tensor([0, 0, 1, 1]), 1, ref_logprobs=logprobs.detach() + gap, beta=0.1,
        use_bias_correction_kl=unbiased, importance_sampling_level=level,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and metrics["kl"].isfinite() and logprobs.grad.isfinite().all()
    if unbiased and level == "sequence" and gap < 0:
        return  # a broadcast ratio is no unbiased KL (TRL says so too): its direction is what it is
    assert (logprobs.grad.sign() == -math.copysign(1, gap)).all(), logprobs.grad


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_ratio_does_not_overflow(gap, level):
    logprobs = torch.tensor([-400.0, -1.0], requires_grad=True)
    old, sampler = logprobs.detach() - gap, logprobs.detach() - 2 * gap
    knobs = {"old_logprobs": old, "sampler_logprobs": sampler, "sampler_is_cap": 2.0}
    loss, metrics = grpo_loss(
        logprobs, torch.tensor([-1.0]), torch.zeros(2).long(), 1, importance_sampling_level=level, **knobs
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    assert metrics["sampler_gap_max"] == 300


def test_masked_completions_give_nothing_even_when_they_are_nan():
    logprobs = torch.tensor([-1.0, -2.0, math.nan, -1.0], requires_grad=True)
    index, keep = torch.tensor([0, 0, 1, 2]), torch.tensor([True, False, True])
    loss, metrics = grpo_loss(logprobs, torch.tensor([1.0, 5.0, -1.0]), index, 3, keep=keep)
    loss.backward()
    assert loss.isfinite() and logprobs.grad[2] == 0 and metrics["tokens"] == 3


def test_nothing_kept_is_a_zero_with_a_gradient():
    """Every rank must run backward, also the one whose completions are all masked."""
    logprobs = torch.randn(3, requires_grad=True)
    for level in ("token", "sequence"):
        loss, metrics = grpo_loss(
            logprobs, torch.ones(1), torch.zeros(3).long(), 5, keep=torch.tensor([False]), sampler_is_cap=2.0,
            sampler_logprobs=logprobs.detach(), ref_logprobs=logprobs.detach(), beta=1.0,
            importance_sampling_level=level, aggregation="sequence",
        )  # fmt: skip
        loss.backward()
        assert loss == 0 and metrics["tokens"] == 0 and not logprobs.grad.any()


# --- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.2, 0.1, 1 / 3, 1e6])
def test_equal_rewards_teach_exactly_nothing(scale, reward):
    rewards = torch.full((9,), reward)
    rewards[8] = 7.0  # a group of one: nothing to compare it with
    advantages, std = group_advantages(rewards, torch.tensor([0] * 7 + [1, 2]), scale)
    assert not advantages.any() and not std.any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5, width=32)), min_size=2, max_size=30))
def test_each_group_has_mean_zero(pairs):
    group, rewards = torch.tensor([g for g, _ in pairs]), torch.tensor([r for _, r in pairs])
    for scale in ("group", "batch", "none"):
        advantages, std = group_advantages(rewards, group, scale)
        for g in group.unique():
            assert abs(advantages[group == g].double().mean()) < 1e-5
            if len(rewards[group == g]) > 1:
                assert std[g].item() == pytest.approx(rewards[group == g].double().std().item(), rel=1e-5, abs=1e-30)


def test_normalizers():
    assert [loss_normalizer(how, 30, 4, 16) for how in ("token", "sequence", "constant")] == [30, 4, 64]
    assert loss_normalizer("token", 0, 4, 16) == 1  # everything masked

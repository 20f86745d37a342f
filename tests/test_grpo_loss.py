"""The GRPO loss: against numbers out of TRL, against a reference implementation, and where numbers get extreme."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GRPO
from grpo import LOG_RATIO_LIMIT, group_advantages, grpo_loss, k3, loss_normalizer

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


# --- the reference: one Python loop, one token at a time, double precision


def reference_loss(cfg, normalizer, logprobs, advantages, index, old, ref, sampler, keep):
    loss = 0.0
    for i, advantage in enumerate(advantages):
        tokens = [t for t in range(len(index)) if index[t] == i and keep[i]]
        mean_log_ratio = sum(logprobs[t] - old[t] for t in tokens) / max(1, len(tokens))
        for t in tokens:
            ratio = math.exp(mean_log_ratio if cfg.importance_sampling_level == "sequence" else logprobs[t] - old[t])
            term = -min(ratio * advantage, min(max(ratio, 1 - cfg.epsilon), 1 + cfg.epsilon_high) * advantage)
            term *= min(math.exp(old[t] - sampler[t]), cfg.sampler_is_cap)
            kl = math.exp(ref[t] - logprobs[t]) - (ref[t] - logprobs[t]) - 1
            term += cfg.beta * kl * (ratio if cfg.use_bias_correction_kl else 1)
            loss += term / (len(tokens) if cfg.aggregation == "sequence" else 1)
    return loss / normalizer


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reference_implementation(data):
    n, g = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    draw = lambda strategy, size: data.draw(st.lists(strategy, min_size=size, max_size=size))
    one_of = lambda *options: data.draw(st.sampled_from(options))
    tensors = {name: draw(st.floats(-3, 0, width=32), n) for name in ("logprobs", "old", "ref", "sampler")}
    tensors |= {"index": draw(st.integers(0, g - 1), n)}  # in any order: tokens of a completion need not be neighbours
    tensors |= {"advantages": draw(st.floats(-2, 2, width=32), g), "keep": draw(st.booleans(), g)}
    low, high = one_of((0.2, 0.2), (0.1, 0.28), (0.5, 3.0))
    cfg = GRPO(epsilon=low, epsilon_high=high, beta=one_of(0.0, 0.04, 1.0), use_bias_correction_kl=one_of(True, False),
               aggregation=one_of("token", "sequence", "constant"), sampler_is_cap=one_of(0.9, 2.0),
               importance_sampling_level=one_of("token", "sequence"))  # fmt: skip
    ours, metrics = grpo_loss(cfg=cfg, normalizer=7, **{name: torch.tensor(value) for name, value in tensors.items()})
    expected = pytest.approx(reference_loss(cfg, 7, **tensors), rel=1e-4, abs=1e-5)
    assert ours.item() == expected and metrics["tokens"] == sum(tensors["keep"][i] for i in tensors["index"])
    # micro-batches add up: completion 0, and the others
    index, per_completion = torch.tensor(tensors.pop("index")), ("advantages", "keep")
    total = 0.0
    for mine, own in ((index == 0, slice(0, 1)), (index > 0, slice(1, None))):
        part = {k: torch.tensor(v)[own if k in per_completion else mine] for k, v in tensors.items()}
        total += grpo_loss(cfg=cfg, normalizer=7, index=index[mine] - own.start, **part)[0].item()
    assert total == expected


# --- what must hold


def test_kl_is_zero_at_the_start_and_its_unbiased_gradient_is_the_log_ratio():
    logprobs, cfg = (-3 * torch.rand(50)).requires_grad_(True), GRPO(beta=1.0)
    for ref in (logprobs.detach(), logprobs.detach() + torch.randn(50)):
        logprobs.grad = None
        grpo_loss(logprobs, torch.zeros(1), torch.zeros(50).long(), 1, cfg, ref=ref)[0].backward()
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
    cfg = GRPO(beta=0.1, use_bias_correction_kl=unbiased, importance_sampling_level=level, sampler_is_cap=2.0)
    index, ref = torch.tensor([0, 0, 1, 1]), logprobs.detach() + gap
    loss, metrics = grpo_loss(logprobs, torch.zeros(2), index, 1, cfg, ref=ref, sampler=ref)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    if not (unbiased and level == "sequence" and gap < 0):  # a broadcast ratio is no unbiased KL (TRL says so too)
        assert (logprobs.grad.sign() == -math.copysign(1, gap)).all(), logprobs.grad
    logprobs.grad = None
    loss, metrics = grpo_loss(
        logprobs, -torch.ones(2), index, 1, GRPO(beta=0.0, importance_sampling_level=level), old=ref
    )
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


# --- advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.2, 0.1, 1 / 3, 1e6])
def test_equal_rewards_teach_exactly_nothing(scale, reward):
    rewards = torch.full((3, 7), reward)
    rewards[2] = torch.arange(7)
    advantages, std = group_advantages(rewards, scale)
    assert not advantages[:2].any() and not std[:2].any() and advantages[2].any()


def test_normalizers():
    assert [loss_normalizer(how, 30, 4, 16) for how in ("token", "sequence", "constant")] == [30, 4, 64]
    assert loss_normalizer("token", 0, 4, 16) == 1  # everything masked

"""The mathematics of GRPO: rewards -> advantages -> loss. The loop around it is train_grpo.py.

The loss, over the tokens t of all completions i of the global batch:

    ratio  = exp(logprob - old logprob)               per token, or one a sequence: exp of the mean over its tokens
    policy = -min(ratio * A_i, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A_i)
    kl     = exp(ref - logprob) - (ref - logprob) - 1                     k3, joschu.net/blog/kl-approx.html
    loss   = sum over tokens of (weight * policy + beta * kl) / normalizer     aggregation "sequence": / length_i too

kl is multiplied by the ratio where use_bias_correction_kl says so (see `kl_loss`). weight is 1, or with sampler_is_cap
min(exp(old logprob - sampler's logprob), cap): the sampler's numerics (bf16, caches, graphs) differ from training's.

It is one loss with independent knobs, named as TRL's GRPOConfig where TRL has them; what TRL calls a `loss_type` is
here `aggregation`: "sequence" = grpo, "token" = bnpo and dapo, "constant" = dr_grpo.
"""

import torch

ADVANTAGE_EPS = 1e-4  # added to the std of the rewards, as in TRL
# Log-ratios are kept below this before exp: exp(10) = 22026 is far outside any trust region, and finite in every dtype.
LOG_RATIO_LIMIT = 10.0


def group_advantages(rewards, scale="group"):
    """rewards (groups, G) -> how much better each completion is than the mean of its group, (groups, G) float32, and
    the unbiased std of each group, (groups,) float32: both exactly 0 where all rewards of a group are equal.

    scale: the difference is divided by the std (+ 1e-4, as TRL) of its "group", of the whole "batch", or by nothing.
    """
    rewards = rewards.double()  # in float32 the mean of equal rewards can miss them, and / 1e-4 makes that a signal
    assert rewards.isfinite().all(), f"rewards hold {rewards[~rewards.isfinite()].tolist()}, expected finite numbers"
    centred = rewards - rewards.mean(1, keepdim=True)
    centred[rewards.amin(1) == rewards.amax(1)] = 0.0
    std = (centred.square().sum(1) / max(1, rewards.shape[1] - 1)).sqrt()
    if scale == "group":
        centred = centred / (std[:, None] + ADVANTAGE_EPS)
    elif scale == "batch":
        centred = centred / (rewards.std() + ADVANTAGE_EPS)
    return centred.float(), std.float()


def loss_normalizer(aggregation, n_tokens, n_completions, max_completion_length):
    """The number that the loss is divided by, from counts over the whole global batch. n_tokens: without those of
    masked completions. n_completions: with them, as TRL: they give nothing, but do not make the others weigh more."""
    counts = {"token": n_tokens, "sequence": n_completions, "constant": n_completions * max_completion_length}
    return max(counts[aggregation], 1)


def grpo_loss(
    logprobs, advantages, index, normalizer, cfg, *, old=None, ref=None, sampler=None, entropy=None, keep=None
):
    """Loss of one micro-batch, already divided: the sum over micro-batches and ranks is the loss of the global batch.

    logprobs (N,): of the completions' tokens under the policy, with gradient. advantages (G,): one a completion.
    index (N,) int64: completion of each token; no completion is split over micro-batches. cfg: config.GRPO.
    Each (N,) without gradient, None where it is not needed:
        old      log-probs by the training forward before the first update; None: this very policy, so the ratio is 1
        ref      log-probs under the frozen reference, for the KL
        sampler  log-probs as the sampler gave them
        entropy  of the policy's distribution at each token, for the metrics
    keep (G,) bool: completions to train on; None: all.

    Returns the loss (scalar float32) and metrics: detached sums over the kept tokens, to be added over micro-batches
    and ranks and divided by "tokens".
    """
    tensors = logprobs, index, old, ref, sampler, entropy
    if keep is not None:  # taken out rather than multiplied by 0: NaN * 0 is NaN
        tensors = [None if tensor is None else tensor[keep[index]] for tensor in tensors]
    logprobs, index, old, ref, sampler, entropy = tensors
    logprobs, advantage = logprobs.float(), advantages.float()[index]
    old = logprobs.detach() if old is None else old.float()
    sums = lambda values: values.new_zeros(len(advantages)).index_add(0, index, values)  # (N,) -> (G,)
    lengths = sums(torch.ones_like(old)).clamp(min=1)

    log_ratio, per_token = logprobs - old, cfg.importance_sampling_level == "token"
    if not per_token:  # the geometric mean of a completion's ratios (GSPO)
        log_ratio = (sums(log_ratio) / lengths)[index]
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = 1 - cfg.epsilon, 1 + (cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = {"clip_low": (ratio < low) & (advantage < 0), "clip_high": (ratio > high) & (advantage > 0)}
    metrics = {"tokens": torch.ones_like(ratio), "ratio": ratio, **clipped}
    if entropy is not None:
        metrics["entropy"] = entropy.float()
    if sampler is not None:
        gap = (old - sampler.float()).detach()
        metrics["sampler_gap"] = gap.abs()
        if cfg.sampler_is_cap is not None:
            weight = gap.clamp(max=LOG_RATIO_LIMIT).exp()
            loss = loss * weight.clamp(max=cfg.sampler_is_cap)
            metrics["sampler_capped"] = weight > cfg.sampler_is_cap
    if ref is not None:
        metrics["kl"] = k3(ref.float() - logprobs)
    if cfg.beta:
        loss = loss + cfg.beta * kl_loss(logprobs, ref.float(), old, ratio, per_token, cfg.use_bias_correction_kl)
    if cfg.aggregation == "sequence":
        loss = loss / lengths[index]
    return loss.sum() / normalizer, {name: value.detach().sum().float() for name, value in metrics.items()}


def k3(gap):
    """Estimate of KL(policy || reference) at tokens drawn from the policy: exp(gap) - gap - 1, never below 0.

    gap (N,) = ref logprob - logprob. Above LOG_RATIO_LIMIT the exponential goes on as its tangent, so neither value
    nor gradient overflows, and the gradient still pulls back (a plain clamp would let go of the worst tokens).
    """
    inside = gap.clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(inside) * (1 + gap - inside) - inside


def kl_loss(logprobs, ref, old, ratio, per_token, bias_correction):
    """The KL term that is differentiated, (N,).

    Taken alone, the gradient of k3 is that of another divergence, and grows with exp(gap). Times the ratio (TRL's
    `use_bias_correction_kl`, arXiv 2512.02556) its gradient is an unbiased estimate of the reverse KL's and cannot
    explode.
    """
    gap = ref - logprobs
    if not bias_correction:
        return k3(gap)
    if per_token:  # ratio * exp(gap) is exp(ref - old), a constant: said so, its two huge gradients need not cancel
        return (ref - old).clamp(max=LOG_RATIO_LIMIT).exp() - ratio * (gap + 1)
    # A sequence's ratio cancels nothing; beyond the limit only k3 may pull, or the ratio's part pushes further away.
    return torch.where(gap > LOG_RATIO_LIMIT, ratio.detach(), ratio) * k3(gap)

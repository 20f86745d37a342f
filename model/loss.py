"""Log-probs of target tokens without ever holding (T, V) logits. SFT and GRPO both end here.

At V = 151,936 the logits of 2,048 tokens are 1.2 GB in float32, and autograd would keep them and their softmax. Here a
chunk of rows at a time goes through the head; forward keeps one number a row (the log-sum-exp), backward computes the
chunk again and turns it into the gradient in place:

    d logp(y | h) / dh = (onehot(y) - softmax(h W^T / tau)) W / tau
"""

import torch
from torch import Tensor

from model import cpu
from model.cpu import product
from model.linear import stack

IGNORE = -100  # target of a token that is not trained (torch's cross_entropy uses the same number)
CHUNK_BYTES = 256 << 20  # float32 logits held at a time; 441 rows at the real vocabulary


def target_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float = 1.0, banned: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-prob of each target under softmax(hidden head_weight^T / temperature).

    hidden: (N, C), rows whose target is trained. head_weight: (V, C). targets: (N,) int64, none IGNORE.
    banned: token ids that the policy can never draw; they are left out of the softmax, as in sampling.
    Returns log-probs (N,) float32 with gradient, entropies (N,) float32 in nats without (None: not asked for; they
    cost half as much as all the rest), and (N,) bool: is the target the most likely token.
    """
    assert hidden.shape[0] == targets.shape[0], f"{hidden.shape[0]} rows, {targets.shape[0]} targets"
    once = cpu.handles(hidden) and len(hidden) and not with_entropy and banned is None and temperature == 1.0
    if once and not head_weight.requires_grad:
        logprobs, correct = LogprobsAtOnce.apply(hidden, head_weight, targets)
        return logprobs, None, correct
    return TargetLogprobs.apply(hidden, head_weight, targets, temperature, banned, with_entropy)


def chunk_logits(hidden: Tensor, head_weight: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    logits = product(hidden, head_weight).float()  # (n, V)
    if temperature != 1.0:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


class TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, banned, with_entropy):
        N, V = hidden.shape[0], head_weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * V))
        logprobs, entropy, lse = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
        correct = torch.empty(N, dtype=torch.bool, device=hidden.device)
        for i in range(0, N, rows):
            s = slice(i, i + rows)
            logits = chunk_logits(hidden[s], head_weight, temperature, banned)
            lse[s] = logits.logsumexp(-1)
            chosen = logits.gather(1, targets[s, None])[:, 0]
            logprobs[s] = chosen - lse[s]
            correct[s] = chosen >= logits.amax(-1)
            if with_entropy:
                logp = logits.sub_(lse[s, None]).clamp_(min=-1e30)  # the clamp keeps 0 * -inf out
                entropy[s] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, head_weight, targets, lse)
        ctx.options = temperature, banned, rows
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy if with_entropy else None, correct

    @staticmethod
    def backward(ctx, grad, _entropy, _correct):
        hidden, head_weight, targets, lse = ctx.saved_tensors
        temperature, banned, rows = ctx.options
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if need_head else None
        for i in range(0, hidden.shape[0], rows):
            s = slice(i, i + rows)
            d = chunk_logits(hidden[s], head_weight, temperature, banned).sub_(lse[s, None]).exp_().neg_()
            d.scatter_add_(1, targets[s, None], torch.ones_like(d[:, :1]))  # onehot - softmax
            d = d.mul_(grad[s, None] / temperature).to(hidden.dtype)
            if need_hidden:
                d_hidden[s] = product(d, head_weight.T)
            if need_head:
                d_head += (d.T @ hidden[s]).float()
        return d_hidden, None if d_head is None else d_head.to(head_weight.dtype), None, None, None, None


class LogprobsAtOnce(torch.autograd.Function):
    """SFT's case on a CPU: the head is frozen, so a row's gradient is its `grad` times W[y] - softmax W, which is made
    while the chunk's exponentials are there; nothing is computed again. Its twin is TargetLogprobs."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        logprobs, units, correct = [], [], []
        for rows in cpu.pieces(len(hidden)):
            logits, y = product(hidden[rows], head_weight), targets[rows, None]  # (n, V)
            chosen, most = logits.gather(1, y), logits.amax(-1, keepdim=True)
            total = logits.sub_(most).exp_().sum(-1, keepdim=True)
            logprobs.append((chosen - most - total.log())[:, 0])
            correct.append((chosen >= most)[:, 0])
            mean = product(logits, head_weight.T).div_(total)
            units.append(head_weight.index_select(0, y[:, 0]).sub_(mean))
        ctx.save_for_backward(stack(units))
        correct = stack(correct)
        ctx.mark_non_differentiable(correct)
        return stack(logprobs), correct

    @staticmethod
    def backward(ctx, grad, _correct):
        return ctx.saved_tensors[0] * grad[:, None], None, None


def target_logprobs_reference(hidden, head_weight, targets, temperature=1.0, banned=None):
    """The slow twin of `target_logprobs`: the whole (N, V) log-softmax at once, by autograd."""
    logp = chunk_logits(hidden, head_weight, temperature, banned).log_softmax(-1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1).detach()
    return logp.gather(1, targets[:, None])[:, 0], entropy, logp.argmax(-1) == targets

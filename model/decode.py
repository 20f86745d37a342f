"""Sampling: a clip is encoded once, its prompt prefilled once, and the prompt's keys and values are stored once for all
G completions of its group. Each completion (a row) keeps only its own keys and values, one slot a token.

    prompt cache   (N, K, longest prompt, D) a layer        own cache   (N*G, K, S slots, D) a layer

Row r belongs to prompt r // G. A step computes R = N*G new tokens through the same decoder layers as training; the
attention it passes to them reads both caches and takes one softmax over prompt keys and own keys together.

The hub's generation_config is never read: its near-zero temperature would make every row of a group the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import cpu_decode
from model.attention import Segments, attend
from model.qwen2_5_vl import Packed, Qwen2_5_VL

STOP_CHECK = 16  # steps between looks at "is every row finished?" on a GPU, where a look waits for the device


@dataclass
class Sampling:
    """How to draw. Filters act in transformers' order: repetition penalty, temperature, top-k, top-p."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and completion; 1 = none
    stop_ids: tuple[int, ...] = ()  # any of these ends a row; it is kept as the row's last token
    banned_ids: tuple[int, ...] = ()  # never drawn, besides the model's vision tokens


@dataclass
class Completion:
    """One sampled answer. `logprobs[i]` is the log-prob of ids[i] under the policy that training sees: softmax of
    logits / temperature over every token but the banned ones, before top-k, top-p and repetition penalty."""

    ids: list[int] = field(default_factory=list)  # with the stop token, if it came to one
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # ended by a stop token, not by the length limit


class GroupCache:
    """Keys and values of N prompts and of their N*G completions, for every layer."""

    def __init__(self, model: Qwen2_5_VL, lengths: list[int], G: int, slots: int):
        config, weight = model.config, model.head_weight
        self.N, self.G, self.K, self.D = len(lengths), G, config.num_key_value_heads, config.head_dim
        self.lengths, self.used = lengths, 0  # used: slots filled in every row
        like = {"device": weight.device, "dtype": weight.dtype}
        L = config.num_hidden_layers
        self.prompt_k = torch.zeros(L, self.N, self.K, max(lengths), self.D, **like)
        self.prompt_v = torch.zeros_like(self.prompt_k)
        self.own_k = torch.zeros(L, self.N * G, self.K, slots, self.D, **like)
        self.own_v = torch.zeros_like(self.own_k)
        slot = torch.arange(max(lengths), device=weight.device)
        length = torch.tensor(lengths, device=weight.device)
        hidden = torch.zeros(self.N, max(lengths), **like).masked_fill(slot >= length[:, None], float("-inf"))
        self.hidden = hidden.repeat_interleave(self.K, 0)[:, None]  # (N*K, 1, longest): padding of shorter prompts

    def prefill(self, segments: Segments):
        """Attention of the prompt pass: packed, and each prompt's keys and values are written down once."""

        def attention(layer, q, k, v):
            for n, (keys, values) in enumerate(zip(k.split(self.lengths), v.split(self.lengths))):
                self.prompt_k[layer, n, :, : len(keys)] = keys.transpose(0, 1)
                self.prompt_v[layer, n, :, : len(values)] = values.transpose(0, 1)
            return attend(q, k, v, segments)

        return attention

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token a row. q: (R, H, D); k, v: (R, K, D). Returns (R, H, D)."""
        N, G, K, D, now = self.N, self.G, self.K, self.D, self.used + 1
        R, H, h = N * G, q.shape[1], q.shape[1] // K
        self.own_k[layer, :, :, self.used] = k
        self.own_v[layer, :, :, self.used] = v
        own_k, own_v = (x[layer].flatten(0, 1)[:, :now] for x in (self.own_k, self.own_v))  # (R*K, now, D)
        prompt_k, prompt_v = self.prompt_k[layer].flatten(0, 1), self.prompt_v[layer].flatten(0, 1)  # (N*K, longest, D)
        P = prompt_k.shape[1]
        q = (q * D**-0.5).view(N, G, K, h, D)
        by_prompt = q.transpose(1, 2).reshape(N * K, G * h, D)  # all rows of a group against one stored prompt
        shared = torch.baddbmm(self.hidden, by_prompt, prompt_k.transpose(1, 2))  # (N*K, G*h, longest)
        shared = shared.view(N, K, G, h, P).transpose(1, 2).reshape(R * K, h, P)
        own = torch.bmm(q.reshape(R * K, h, D), own_k.transpose(1, 2))  # (R*K, h, now)
        weights = torch.cat([shared, own], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
        shared = weights[..., :P].view(N, G, K, h, P).transpose(1, 2).reshape(N * K, G * h, P)
        out = torch.bmm(shared, prompt_v).view(N, K, G, h, D).transpose(1, 2).reshape(R * K, h, D)
        return torch.baddbmm(out, weights[..., P:], own_v).view(R, H, D)


class Step:
    """ids (R,), their number t in the rollout -> logits (R, V), by the decoder layers of training: the slow twin of
    cpu_decode.FusedStep."""

    def __init__(self, model: Qwen2_5_VL, cache: GroupCache, position: Tensor, _steps: int):
        self.model, self.cache, self.position = model, cache, position

    def __call__(self, ids: Tensor, t: int) -> Tensor:
        packed = Packed(ids, (self.position + t).expand(3, -1), segments=None)
        return self.model(packed, self.cache.step) @ self.model.head_weight.T


def sample(logits: Tensor, sampling: Sampling, banned: Tensor, seen: Tensor | None, generator) -> tuple[Tensor, Tensor]:
    """Draw one token a row. logits: (R, V). seen: (R, V) bool for the repetition penalty, or None.

    Returns ids (R,) int64 and their log-probs (R,) float32 under the untruncated policy (see Completion). Logits that
    are not finite give some id of the vocabulary and a log-prob that is not finite either.
    """
    logits = logits.float()
    logits.index_fill_(1, banned, float("-inf"))
    greedy = sampling.temperature == 0
    logp = (logits if sampling.temperature in (0, 1) else logits / sampling.temperature).log_softmax(-1)
    scores = logp
    if seen is not None:
        p = sampling.repetition_penalty  # CTRL (Keskar et al., 2019; arXiv 1909.05858), sign-aware as in transformers
        scores = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
        scores = scores if greedy else scores / sampling.temperature
    if greedy:
        ids = scores.argmax(-1)
    else:
        ids = draw(truncate(scores, sampling), generator)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Keep the top-k tokens, then the smallest set whose mass reaches top-p (Holtzman et al., 2020; 1904.09751)."""
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.empty_like(mass_before, dtype=torch.bool).scatter_(1, order, mass_before >= sampling.top_p)
        scores = scores.masked_fill(drop, float("-inf"))
    return scores


class Uniforms:
    """On a CPU, the random numbers of a whole rollout: one a row and step, in [0, 1), from one generator or a list of
    one a prompt. Drawn at once, for calls cost more than numbers."""

    def __init__(self, generator, rows: int, steps: int):
        own = generator if isinstance(generator, list) else [generator]
        self.numbers, self.t = torch.empty(rows, steps, 1, dtype=torch.float64), -1
        for part, source in zip(self.numbers.chunk(len(own)), own):
            part.uniform_(generator=source)

    def column(self) -> Tensor:
        """The next step's, (rows, 1)."""
        self.t += 1
        return self.numbers[:, self.t]


def draw(scores: Tensor, generator) -> Tensor:
    """One index a row from softmax(scores). generator: see generate.

    On a GPU by the exponential race: argmin of -log(u) / p is index i with chance p_i, and needs no host sync, as
    torch.multinomial does. On a CPU by one random number a row, for V of them cost more than a decoding step: the first
    token whose cumulative chance reaches it."""
    if scores.device.type == "cpu":
        chances = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        noise = generator if isinstance(generator, Uniforms) else Uniforms(generator, len(scores), 1)
        # (0, 1] of the sum: never reached by a chance of 0
        ids = torch.searchsorted(chances, (1 - noise.column()) * chances[:, -1:])[:, 0]
        return ids.clamp(max=scores.shape[1] - 1)  # where the chances are no numbers
    race, own = torch.empty_like(scores), generator if isinstance(generator, list) else [generator]
    for rows, source in zip(race.chunk(len(own)), own):
        rows.exponential_(generator=source)
    return (scores.softmax(-1) / race).argmax(-1)


@torch.no_grad()
def generate(
    model: Qwen2_5_VL,
    prompts: Packed,
    sampling: Sampling,
    num_generations: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """Sample `num_generations` completions of each prompt.

    prompts: packed prompts on the model's device, one causal segment each. generator: on that device; or a list of one
    a prompt: then what a prompt draws does not depend on the prompts it is sampled with.
    on_token(row, id) is called for every token as it is drawn. Returns a list of G completions for each prompt.
    bf16 on a GPU goes through fast_decode.py where nothing forbids it.
    """
    assert prompts.segments.kv_index is None, "prompts are plain causal segments"
    if prompts.input_ids.is_cuda:
        from model.fast_decode import generate_fast, why_not  # here, because it imports from this file

        if why_not(model, prompts, sampling, num_generations) is None:
            return generate_fast(model, prompts, sampling, num_generations, generator, on_token)
    step = cpu_decode.FusedStep if cpu_decode.pays(model) else Step
    return generate_plain(model, prompts, sampling, num_generations, generator, on_token, step)


@torch.no_grad()
def generate_plain(model, prompts, sampling, num_generations=1, generator=None, on_token=None, step=Step):
    """`generate` in plain PyTorch: any device, dtype and option, and the slow twin of fast_decode.py."""
    lengths, G = prompts.segments.q_lengths, num_generations
    was_training = model.training
    model.eval()
    device, R = prompts.input_ids.device, len(lengths) * G
    cache = GroupCache(model, lengths, G, max(1, sampling.max_new_tokens - 1))
    hidden = model(prompts, cache.prefill(prompts.segments))
    last = prompts.segments.cu_q[1:].long() - 1
    logits = (hidden[last] @ model.head_weight.T).repeat_interleave(G, 0)  # each row draws its own first token
    ends = [int(p.max()) + 1 for p in prompts.position_ids.split(lengths, dim=1)]
    position = torch.tensor(ends, device=device).repeat_interleave(G)  # (R,): text counts on after t, h and w
    following = step(model, cache, position, sampling.max_new_tokens)
    banned = torch.tensor(sorted({*model.config.vision_token_ids, *sampling.banned_ids}), device=device)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    seen = seen_tokens(prompts, G, logits.shape[1]) if sampling.repetition_penalty != 1 else None
    done = torch.zeros(R, dtype=torch.bool, device=device)
    if device.type == "cpu" and sampling.temperature:
        generator = Uniforms(generator, R, sampling.max_new_tokens)
    steps = []  # (ids, logprobs, done before this token), all (R,)
    for t in range(sampling.max_new_tokens):
        ids, logp = sample(logits, sampling, banned, seen, generator)
        steps.append((ids, logp, done))
        if on_token:
            for row in (~done).nonzero()[:, 0].tolist():
                on_token(row, int(ids[row]))
        done = done | torch.isin(ids, stops)
        last_step = t + 1 == sampling.max_new_tokens
        if last_step or ((device.type == "cpu" or t % STOP_CHECK == 0) and bool(done.all())):
            break
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        logits = following(ids, t)
        cache.used += 1
    model.train(was_training)
    return collect(steps, done, len(lengths), G)


def seen_tokens(prompts: Packed, G: int, V: int) -> Tensor:
    """(R, V) bool: the tokens of each row's prompt."""
    lengths = torch.tensor(prompts.segments.q_lengths, device=prompts.input_ids.device)
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    seen = torch.zeros(len(lengths), V, dtype=torch.bool, device=lengths.device)
    seen[row, prompts.input_ids] = True
    return seen.repeat_interleave(G, 0)


def collect(steps: list, done: Tensor, N: int, G: int) -> list[list[Completion]]:
    """Device columns -> one Completion a row, each cut after its stop token."""
    ids = torch.stack([s[0] for s in steps], 1).tolist()
    logp = torch.stack([s[1] for s in steps], 1).tolist()
    length = (~torch.stack([s[2] for s in steps], 1)).sum(1).tolist()  # tokens drawn while the row was open
    finished = done.tolist()
    rows = [Completion(i[:n], p[:n], f) for i, p, n, f in zip(ids, logp, length, finished)]
    return [rows[n * G : (n + 1) * G] for n in range(N)]

"""Sampling: a clip is encoded once, its prompt prefilled once, and the prompt's keys and values are stored once for all
G completions of its group. Each completion (a row) keeps only its own keys and values, one slot a token.

    prompt cache   (N, K, longest prompt, D) a layer        own cache   (N*G, K, S slots, D) a layer

Row r belongs to prompt r // G. A step computes R = N*G new tokens through the same decoder layers as training; the
attention it hands to them reads both caches and takes one softmax over prompt keys and own keys together.

PlainDecoder runs on any device; `ops.decoder` may make a faster one (model/fast/). The hub's generation_config is never
read: its near-zero temperature would make every row of a group the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packed import Packed
from model.quantized import Quantized, head_product

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


@torch.no_grad()
def generate(
    model,
    prompts: Packed,
    sampling: Sampling,
    num_generations: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    decoder: Callable | None = None,
) -> list[list[Completion]]:
    """Sample `num_generations` completions of each prompt.

    model: a Qwen2_5_VL. prompts: packed prompts on its device, one causal segment each. generator: on that device; or
    a list of one a prompt: then what a prompt draws does not depend on the prompts it is sampled with.
    on_token(row, id) is called for every token as it is drawn. decoder: makes the decoder, instead of the model's own.
    Returns a list of G completions for each prompt.
    """
    assert prompts.segments.prefix is None, "prompts are plain causal segments"
    make_decoder, was_training = decoder or model.ops.decoder or PlainDecoder, model.training
    model.eval()  # no dropout
    decoder = None
    try:
        decoder = make_decoder(model, prompts, sampling, num_generations, generator)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=prompts.input_ids.device)
        done = torch.zeros(len(decoder.ids), dtype=torch.bool, device=stops.device)  # rows that have ended
        looked = 0
        for t in range(sampling.max_new_tokens):
            decoder.draw(t)
            if on_token:
                token = decoder.ids[:, t].tolist()
                for row in (~done).nonzero()[:, 0].tolist():
                    on_token(row, token[row])
            if on_token or t % decoder.look_every == 0:
                done |= torch.isin(decoder.ids[:, looked : t + 1], stops).any(1)
                looked = t + 1
                if bool(done.all()):
                    break
        return collect(decoder.ids[:, : t + 1], decoder.logprobs[:, : t + 1], stops, num_generations)
    finally:
        model.train(was_training)
        if decoder:
            decoder.close()


def collect(ids: Tensor, logprobs: Tensor, stops: Tensor, G: int) -> list[list[Completion]]:
    """(R, T) drawn tokens -> one Completion a row, each cut after its first stop token."""
    stopped = torch.isin(ids, stops)
    finished = stopped.any(1)
    length = torch.where(finished, stopped.int().argmax(1) + 1, ids.shape[1])
    columns = zip(ids.tolist(), logprobs.tolist(), length.tolist(), finished.tolist())
    rows = [Completion(i[:n], p[:n], f) for i, p, n, f in columns]
    return [rows[first : first + G] for first in range(0, len(rows), G)]


class PlainDecoder:
    """Draws tokens for R = N*G rows, in plain PyTorch: any device, dtype and option. Making one prefills the prompts.

    ids (R, >= limit) int64 and logprobs (R, >= limit) float32: column t is filled by draw(t). Rows that have ended go
    on drawing; their further tokens are cut off.
    """

    prompt_bucket, own_bucket = 1, 1  # slots of the caches are rounded up to these

    def __init__(self, model, prompts: Packed, sampling: Sampling, G: int, generator):
        self.model, self.sampling, self.noise = model, sampling, generator
        lengths, limit = prompts.segments.q_lengths, sampling.max_new_tokens
        device, R = prompts.input_ids.device, len(lengths) * G
        self.look_every = 1 if device.type == "cpu" else STOP_CHECK
        self.ids = torch.zeros(R, limit, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(R, limit, device=device)
        longest = -(-max(lengths) // self.prompt_bucket) * self.prompt_bucket
        self.cache = GroupCache(model, lengths, G, longest, -(-max(1, limit - 1) // self.own_bucket) * self.own_bucket)
        hidden = model(prompts, store=self.cache.store)
        last = prompts.segments.cu_q[1:].long() - 1
        self.head_product = head_product if isinstance(model.head_weight, Quantized) else F.linear
        logits = self.head_product(hidden[last], model.head_weight)
        self.logits = logits.repeat_interleave(G, 0)  # each row draws its first token
        ends = torch.stack([p.max() for p in prompts.position_ids.split(lengths, dim=1)]) + 1
        self.position = ends.repeat_interleave(G)  # (R,): text counts on after t, h and w
        self.banned = torch.tensor(sorted({*model.config.vision_token_ids, *sampling.banned_ids}), device=device)
        self.seen = None
        if sampling.repetition_penalty != 1:  # (R, V) bool: the tokens of a row's prompt, then its own too
            row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
            seen = torch.zeros(len(lengths), self.logits.shape[1], dtype=torch.bool, device=device)
            seen[row, prompts.input_ids] = True
            self.seen = seen.repeat_interleave(G, 0)
        if device.type == "cpu" and sampling.temperature:
            self.noise = uniforms(generator, R, limit)

    def draw(self, t: int) -> None:
        """Draw token t of every row; t = 0, 1, … in turn."""
        if t:
            before = self.ids[:, t - 1]
            if self.seen is not None:
                self.seen.scatter_(1, before[:, None], True)
            self.logits = self.step(before, t - 1)
            self.cache.used += 1
        noise = self.noise[:, t] if isinstance(self.noise, Tensor) else self.noise
        self.ids[:, t], self.logprobs[:, t] = sample(self.logits, self.sampling, self.banned, self.seen, noise)

    def close(self) -> None:
        """Free what the rollout took beside the results."""

    def step(self, ids: Tensor, t: int) -> Tensor:
        """Token t of every row, ids (R,), through the decoder layers of training: logits of the next, (R, V)."""
        packed = Packed(ids, (self.position + t).expand(3, -1), segments=None)
        return self.head_product(self.model(packed, self.cache.step), self.model.head_weight)


class GroupCache:
    """Keys and values of N prompts and of their N*G completions, for every layer. longest, slots: of the two caches."""

    def __init__(self, model, lengths: list[int], G: int, longest: int, slots: int):
        c, weight, N, self.G = model.config, model.model.norm.weight, len(lengths), G
        self.lengths, self.used = lengths, 0  # used: slots filled in every row
        L, K, D = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        self.prompt_k, self.prompt_v = (weight.new_zeros(L, N, K, longest, D) for _ in range(2))
        self.own_k, self.own_v = (weight.new_zeros(L, N * G, K, slots, D) for _ in range(2))
        padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]  # of shorter prompts
        hidden = torch.zeros(padding.shape).masked_fill(padding, float("-inf")).to(weight.device, weight.dtype)
        self.hidden = hidden.repeat_interleave(K, 0)[:, None]  # (N*K, 1, longest)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write down the prompts' keys and values, packed (T, K, D)."""
        for n, (keys, values) in enumerate(zip(k.split(self.lengths), v.split(self.lengths))):
            self.prompt_k[layer, n, :, : len(keys)] = keys.transpose(0, 1)
            self.prompt_v[layer, n, :, : len(values)] = values.transpose(0, 1)

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token a row. q: (R, H, D); k, v: (R, K, D). Returns (R, H, D)."""
        (R, H, D), K, G, now = q.shape, k.shape[1], self.G, self.used + 1
        N, h = R // G, H // K
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


def sample(logits: Tensor, sampling: Sampling, banned: Tensor, seen: Tensor | None, noise) -> tuple[Tensor, Tensor]:
    """Draw one token a row. logits: (R, V). seen: (R, V) bool for the repetition penalty, or None. noise: see draw.

    Returns ids (R,) int64 and their log-probs (R,) float32 under the untruncated policy (see Completion). Logits that
    are not finite give some id of the vocabulary and a log-prob that is not finite either.
    """
    logits = logits.float()
    logits.index_fill_(1, banned, float("-inf"))
    greedy = sampling.temperature == 0
    scores = logp = (logits if sampling.temperature in (0, 1) else logits / sampling.temperature).log_softmax(-1)
    if seen is not None:
        p = sampling.repetition_penalty  # CTRL (Keskar et al., 2019; arXiv 1909.05858), sign-aware as in transformers
        scores = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
        scores = scores if greedy else scores / sampling.temperature
    ids = scores.argmax(-1) if greedy else draw(truncate(scores, sampling), noise)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Keep the top-k tokens, then the smallest set whose mass reaches top-p (Holtzman et al., 2020; 1904.09751)."""
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = (mass_before >= sampling.top_p) & (mass_before > 0)  # the first stays, also for top_p 0
        drop = torch.empty_like(beyond).scatter_(1, order, beyond)
        scores = scores.masked_fill(drop, float("-inf"))
    return scores


def uniforms(generator, rows: int, steps: int) -> Tensor:
    """The random numbers of a whole rollout on a CPU, (rows, steps, 1) in [0, 1), from one generator or a list of one a
    prompt. Drawn at once, for calls cost more than numbers."""
    own = generator if isinstance(generator, list) else [generator]
    numbers = torch.empty(rows, steps, 1, dtype=torch.float64)
    for rows_of_one, source in zip(numbers.chunk(len(own)), own):
        rows_of_one.uniform_(generator=source)
    return numbers


def draw(scores: Tensor, noise) -> Tensor:
    """One index a row from softmax(scores). noise: on a GPU a generator, or a list of one a prompt; on a CPU (R, 1).

    On a GPU by the exponential race: argmin of -log(u) / p is index i with chance p_i, and needs no host sync, as
    torch.multinomial does. On a CPU by one random number a row, for V of them cost more than a decoding step: the first
    token whose cumulative chance reaches it."""
    if isinstance(noise, Tensor):
        chances = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        # (0, 1] of the sum: never reached by a chance of 0
        ids = torch.searchsorted(chances, (1 - noise) * chances[:, -1:])[:, 0]
        return ids.clamp(max=scores.shape[1] - 1)  # where the chances are no numbers
    race, own = torch.empty_like(scores), noise if isinstance(noise, list) else [noise]
    for rows, source in zip(race.chunk(len(own)), own):
        rows.exponential_(generator=source)
    return (scores.softmax(-1) / race).argmax(-1)

"""Decoding against transformers' generate, against the full forward, and sampling against exact probabilities."""

from dataclasses import replace

import pytest
import torch
from conftest import Sequence, pack_sequences, random_model
from test_model import CASES

import lora
from config import SFT
from model.decode import PlainDecoder, Sampling, draw, generate, truncate, uniforms
from model.qwen import target_logprobs
from model.rope import mrope_position_ids

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def rows_with_answer(model, sequence: Sequence, ids: list[int]):
    """The training forward over prompt + answer: (hidden rows that predict the answer, the answer)."""
    whole = Sequence.__new__(Sequence)
    whole.__dict__.update(sequence.__dict__)
    whole.ids = sequence.ids + ids
    whole.positions = mrope_position_ids(whole.ids, whole.grids, whole.seconds, model.config)
    with torch.no_grad():
        hidden = model(pack_sequences([whole]))
    return hidden[len(sequence.ids) - 1 : -1], torch.tensor(ids)


@pytest.mark.parametrize("shape", ["tied", "grouped"])
@pytest.mark.parametrize("case", ["text", "image", "video"])
def test_greedy_equals_transformers_generate(oracle, shape, case):
    """The clip's time span stays within max(h, w): there transformers' positions are right too (facts of the rule)."""
    ours, theirs, _ = oracle(shape)
    parts = [4, ("video", 2, 8, 8, 0.5), 9] if case == "video" else CASES[case]
    sequence = Sequence(ours.config, parts)
    mine = generate(ours, pack_sequences([sequence]), replace(GREEDY, stop_ids=(2,)))[0][0]
    inputs = sequence.for_transformers(positions=False)
    banned = [[i] for i in ours.config.vision_token_ids]
    reference = theirs.generate(
        **inputs, max_new_tokens=12, do_sample=False, bad_words_ids=banned, pad_token_id=0, eos_token_id=2
    )
    expected = reference[0, len(sequence.ids) :].tolist()
    assert mine.ids == expected and len(set(expected)) > 3


@pytest.mark.parametrize("penalty", [1.3])
def test_repetition_penalty_equals_transformers(oracle, penalty):
    ours, theirs, _ = oracle("grouped")
    sequence = Sequence(ours.config, CASES["text"])
    mine = generate(ours, pack_sequences([sequence]), replace(GREEDY, repetition_penalty=penalty))[0][0]
    banned = [[i] for i in ours.config.vision_token_ids]
    reference = theirs.generate(
        **sequence.for_transformers(positions=False), max_new_tokens=12, do_sample=False, bad_words_ids=banned,
        repetition_penalty=penalty, pad_token_id=0, eos_token_id=259,
    )  # fmt: skip
    assert mine.ids[: len(reference[0]) - len(sequence.ids)] == reference[0, len(sequence.ids) :].tolist()


def test_cached_group_decoding_equals_the_training_forward():
    """Different prompts in one batch, four rows each: every kept log-prob is what the full forward gives."""
    model = random_model("grouped")
    sequences = [Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(("video", "text", "mixed"))]
    sampling = Sampling(max_new_tokens=9, temperature=0.8, stop_ids=tuple(range(3, 40)))
    groups = generate(model, pack_sequences(sequences), sampling, 4, torch.Generator().manual_seed(0))
    banned, lengths = torch.tensor(model.config.vision_token_ids), set()
    for sequence, group in zip(sequences, groups):
        for row in group:
            hidden, ids = rows_with_answer(model, sequence, row.ids)
            logp, _, _ = target_logprobs(hidden, model.head_weight, ids, 0.8, banned)
            assert (logp - torch.tensor(row.logprobs)).abs().max() < 1e-4
            assert row.finished == (row.ids[-1] in sampling.stop_ids)
            assert all(i not in sampling.stop_ids for i in row.ids[:-1])
            lengths.add(len(row.ids))
    assert len(lengths) > 2  # rows did end on their own


def test_rows_of_a_batch_equal_rows_alone():
    model = random_model("untied")
    sequences = [Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(("images", "text", "videos"))]
    together = generate(model, pack_sequences(sequences), GREEDY)
    for sequence, group in zip(sequences, together):
        assert generate(model, pack_sequences([sequence]), GREEDY)[0][0].ids == group[0].ids


def test_sampling_follows_the_exact_distribution():
    """First tokens of 20,000 rows of one group against the softmax: chi-square, 5 sigma. Each row draws its own."""
    model = random_model("tied")
    prompt = pack_sequences([Sequence(model.config, [6])])
    R, temperature = 20_000, 1.5
    rows = generate(model, prompt, Sampling(1, temperature), R, torch.Generator().manual_seed(1))[0]
    logits = model.logits(prompt)[-1].detach() / temperature
    logits[model.config.vision_token_ids] = float("-inf")
    expected = logits.softmax(-1) * R
    counts = torch.bincount(torch.tensor([r.ids[0] for r in rows]), minlength=260).float()
    big = expected >= 5
    chi2 = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    rest = float((counts[~big].sum() - expected[~big].sum()).abs() / expected[~big].sum().clamp(min=1).sqrt())
    freedom = int(big.sum()) - 1
    assert freedom > 20 and abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 and rest < 5, (chi2, freedom, rest)


def test_vision_tokens_are_never_drawn():
    model = random_model("tied")
    with torch.no_grad():
        model.head_weight[model.config.vision_token_ids] *= 50  # they would win nearly always
    prompt = pack_sequences([Sequence(model.config, [6])])
    for temperature in (0.0, 1.0):
        for row in generate(model, prompt, Sampling(8, temperature), 16)[0]:
            assert not set(row.ids) & set(model.config.vision_token_ids)


def test_top_k_and_top_p_against_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(32, 100, generator=torch.Generator().manual_seed(0)) * 3
    for k, p in ((5, 1.0), (0, 0.8), (20, 0.6), (0, 1e-9), (1, 1.0)):
        expected = TopKLogitsWarper(k)(None, scores) if k else scores
        expected = TopPLogitsWarper(p)(None, expected) if p < 1 else expected
        assert truncate(scores, Sampling(top_k=k, top_p=p)).isinf().equal(expected.isinf()), (k, p)


def test_same_seed_same_rows_and_streaming():
    model = random_model("tied")
    prompt = pack_sequences([Sequence(model.config, CASES["video"])])
    streamed: list[tuple[int, int]] = []

    def run(seed, on_token=None):
        return generate(
            model, prompt, Sampling(6, stop_ids=(5, 6, 7)), 3, torch.Generator().manual_seed(seed), on_token
        )[0]

    first = run(3, lambda row, token: streamed.append((row, token)))
    assert [r.ids for r in first] == [r.ids for r in run(3)] != [r.ids for r in run(4)]
    assert [[t for r, t in streamed if r == i] for i in range(3)] == [r.ids for r in first]


@pytest.mark.parametrize("cases", [("video", "text"), ("video",), ("video", "video")], ids=["two", "one", "equal"])
def test_fused_decoding_equals_the_decoder_layers(cases):
    """With adapters, prompts of one length (then each row has its own copy) or two, grouped heads: the same draws, and
    log-probs within rounding."""
    model = random_model("grouped").eval()
    lora.inject(model, SFT(lora_rank=4, lora_alpha=8))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(lora.FLAT):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    prompts = pack_sequences([Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(cases)])
    results = []
    for decoder in (None, PlainDecoder):
        noise = torch.Generator().manual_seed(0)
        results.append(generate(model, prompts, Sampling(12, 1.0), 3, noise, decoder=decoder))
    for fast, slow in zip(sum(results[0], []), sum(results[1], []), strict=True):
        assert fast.ids == slow.ids
        assert torch.allclose(torch.tensor(fast.logprobs), torch.tensor(slow.logprobs), atol=1e-4, rtol=1e-4)


def test_a_token_without_chance_is_never_drawn():
    scores = torch.full((20_000, 6), float("-inf"))
    scores[:, [1, 4]] = torch.tensor([0.2, 0.8]).log()
    ids = draw(scores, uniforms(torch.Generator().manual_seed(0), 20_000, 1)[:, 0])
    counts = ids.bincount(minlength=6).tolist()
    assert counts[1] + counts[4] == 20_000 and abs(counts[4] / 20_000 - 0.8) < 0.015, counts  # 5 standard deviations


def test_a_failed_rollout_leaves_the_model_as_it_was():
    """Dropout is off while it samples, and on again behind it, also when memory runs out in between."""
    model = random_model("tied").train()
    lora.inject(model, SFT(lora_rank=4, lora_alpha=8, lora_dropout=0.5))
    prompt, modes, closed = pack_sequences([Sequence(model.config, [6])]), [], []

    class Failing(PlainDecoder):
        def draw(self, t):
            modes.append(self.model.training)
            if t == 2:
                raise torch.OutOfMemoryError("no memory")
            super().draw(t)

        def close(self):
            closed.append(True)

    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompt, Sampling(5), 2, decoder=Failing)
    assert modes == [False] * 3 and model.training and closed == [True]

"""Decoding against transformers' generate, sampling against exact probabilities; the fused form: test_quantized.py."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Sequence, pack_sequences, random_model
from test_model import CASES

from model.decode import Sampling, generate, truncate
from model.qwen import target_logprobs
from model.rope import mrope_position_ids

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def logprobs_of(model, sequence: Sequence, ids: list[int], temperature: float):
    """Of an answer, by the training forward over prompt + answer, (n,)."""
    whole, device = copy.copy(sequence), model.head_weight.device
    whole.ids = sequence.ids + ids
    whole.positions = mrope_position_ids(whole.ids, whole.grids, whole.seconds, model.config)
    with torch.no_grad():
        hidden = model(pack_sequences([whole]).to(device))[len(sequence.ids) - 1 : -1]
    banned = torch.tensor(model.config.vision_token_ids, device=device)
    return target_logprobs(hidden, model.head_weight, torch.tensor(ids, device=device), temperature, banned)[0]


@pytest.mark.parametrize("shape", ["tied", "grouped"])
@pytest.mark.parametrize("case, penalty", [("text", 1.0), ("text", 1.3), ("image", 1.0), ("video", 1.0)])
def test_greedy_equals_transformers_generate(oracle, shape, case, penalty):
    """The clip's time span stays within max(h, w): there transformers' positions are right too (facts of the rule)."""
    ours, theirs, _ = oracle(shape)
    sequence = Sequence(ours.config, [4, ("video", 2, 8, 8, 0.5), 9] if case == "video" else CASES[case])
    sampling = replace(GREEDY, stop_ids=(2,), repetition_penalty=penalty)
    mine = generate(ours, pack_sequences([sequence]), sampling)[0][0]
    reference = theirs.generate(
        **sequence.for_transformers(positions=False), max_new_tokens=12, do_sample=False, pad_token_id=0,
        eos_token_id=2, bad_words_ids=[[i] for i in ours.config.vision_token_ids], repetition_penalty=penalty,
    )  # fmt: skip
    expected = reference[0, len(sequence.ids) :].tolist()
    assert mine.ids == expected and len(set(expected)) > 3


def check_distribution(ids: torch.Tensor, chances: torch.Tensor, slack: float = 0.0) -> None:
    """Drawn ids against exact probabilities (V,): chi-square, 5 sigma. slack: of the numbers' count."""
    expected, counts = chances * len(ids), torch.bincount(ids, minlength=len(chances)).float()
    big = expected >= 5
    chi2, freedom = float(((counts - expected)[big] ** 2 / expected[big]).sum()), int(big.sum()) - 1
    assert freedom > 3 and abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 + slack * len(ids), (chi2, freedom)
    rest = expected[~big].sum()
    assert abs(float(counts[~big].sum() - rest)) < 5 * float(rest.clamp(min=1).sqrt()) + slack * len(ids)


def test_sampling_follows_the_exact_distribution():
    """First tokens of 20,000 rows of one group. Each row draws its own; vision tokens, which would win, never."""
    model = random_model("tied")
    with torch.no_grad():
        model.head_weight[model.config.vision_token_ids] *= 50
    prompt = pack_sequences([Sequence(model.config, [6])])
    rows = generate(model, prompt, Sampling(1, 1.5), 20_000, torch.Generator().manual_seed(1))[0]
    logits = model.logits(prompt)[-1].detach() / 1.5
    assert int(logits.argmax()) in model.config.vision_token_ids
    logits[model.config.vision_token_ids] = float("-inf")
    check_distribution(torch.tensor([r.ids[0] for r in rows]), logits.softmax(-1))
    assert generate(model, prompt, Sampling(1, 0.0))[0][0].ids == [int(logits.argmax())]


def test_top_k_and_top_p_against_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(32, 100, generator=torch.Generator().manual_seed(0)) * 3
    for k, p in ((5, 1.0), (0, 0.8), (20, 0.6), (0, 1e-9), (0, 0.0), (1, 1.0)):
        expected = TopKLogitsWarper(k)(None, scores) if k else scores
        expected = TopPLogitsWarper(p)(None, expected) if p < 1 else expected
        assert truncate(scores, Sampling(top_k=k, top_p=p)).isinf().equal(expected.isinf()), (k, p)

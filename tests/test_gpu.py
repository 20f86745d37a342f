"""What only a GPU runs, against the plain forms: attention, CUDA graphs, and decoding (bf16). Skipped without CUDA."""

import copy

import pytest
import torch
from conftest import Sequence, config_dict, pack_sequences, random_model
from test_model import CASES

import lora
from config import LoraArgs
from model import loading, qwen
from model.adapters import shifted
from model.decode import GroupCache, PlainDecoder, Sampling, generate
from model.fast import decoder, gpu
from model.fast.graphs import GraphCache
from model.loading import ModelConfig
from model.quantized import BASE_DTYPES, quantise_base
from model.qwen import Packed, Qwen2_5_VL, Segments, target_logprobs
from model.rope import mrope_position_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels are Triton's")
DEVICE = "cuda"


# -- Plain forms of the decoding kernels


def attention_plain(q, prompt_k, prompt_v, lengths, own_k, own_v):
    """Of `attention_kernel` and `combine_kernel`, rotary done: q (R, H, D); prompt (N, Lp, K, D), own (R, S, K, D) up
    to now."""
    R, H, D = q.shape
    out, G = torch.empty_like(q), R // len(lengths)
    for r in range(R):
        n = r // G
        k, v = (torch.cat([a[n, : lengths[n]], b[r]]).float() for a, b in ((prompt_k, own_k), (prompt_v, own_v)))
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))  # (keys, H, D)
        weights = (torch.einsum("hd,shd->hs", q[r].float(), k) * D**-0.5).softmax(-1)
        out[r] = torch.einsum("hs,shd->hd", weights, v).to(q.dtype)
    return out


# -- Operations and the whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype):
    """Logits and gradients of a mixed batch through the GPU's own paths: Triton, flash attention, aligned widths. In
    bf16 they may be off by what the CPU's plain bf16 is off."""
    exact = random_model("grouped")
    sequence = Sequence(exact.config, CASES["mixed"])
    packed = pack_sequences([sequence, Sequence(exact.config, CASES["videos"], seed=1)])
    weight = torch.randn(len(packed.input_ids), 260, generator=torch.Generator().manual_seed(0))
    results = []
    for model, device in ((exact, "cpu"), (copy.deepcopy(exact), "cuda"), (copy.deepcopy(exact), "cpu")):
        model.to(device, torch.float32 if model is exact else dtype)
        logits = model.logits(packed.to(device))
        (logits.float().cpu() * weight).sum().backward()
        results.append([logits.detach().float().cpu(), *(p.grad.float().cpu() for p in model.parameters())])
    for right, ours, plain in zip(*results):
        assert (ours - right).norm() <= 1.5 * (plain - right).norm() + 1e-4 * right.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width, heads, size", [(1, 64, 1, 32), (130, 68, 3, 80), (2050, 3420, 16, 128)])
def test_operations_equal_the_plain_forms(rows, width, heads, size, dtype):
    """SwiGLU and rotary, outputs and gradients, as near to float32 as the plain forms are."""
    torch.manual_seed(0)
    gate, up = torch.randn(rows, width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    x, angle = torch.randn(rows, heads, size, device=DEVICE), torch.randn(rows, 1, size // 2, device=DEVICE)
    tables = angle.cos(), angle.sin()
    for name, inputs, rest in (("swiglu", (gate, up), ()), ("rotate", (x,), (tables,))):
        results = []
        plain = getattr(qwen, name)
        for form, kind in ((plain, torch.float32), (gpu.FORMS[name], dtype), (plain, dtype)):
            own = [i.to(kind).requires_grad_() for i in inputs]
            more = [tuple(t.to(kind) for t in r) for r in rest]
            out = form(*own, *more)
            results.append([out, *torch.autograd.grad((out * out.detach().float().cos()).sum(), own)])
        for exact, fast, slow in zip(*results):
            assert (fast.float() - exact).norm() <= 1.5 * (slow.float() - exact).norm() + 1e-5 * exact.norm(), name


# -- CUDA graphs


CLIPS = [["video"], ["images"], ["video", "text"]]


def batch(config, clips, text: int):
    """Packed clips, each followed by `text` tokens more."""
    return pack_sequences([Sequence(config, [*CASES[name], text], seed=i) for i, name in enumerate(clips)]).to(DEVICE)


def gradients(model, packed):
    """Loss and gradients of what is trained."""
    model.zero_grad()
    targets = packed.input_ids.roll(-1)
    logprobs, _, _ = target_logprobs(model(packed), model.head_weight, targets)
    loss = -(logprobs * torch.linspace(0, 1, len(targets), device=logprobs.device)).sum()
    loss.backward()
    return [loss.detach().clone()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]


def off(ours, right):
    return max(float((a - b).float().norm() / (b.float().norm() + 1e-6)) for a, b in zip(ours, right))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", ["adapters", "llm adapters", "everything"])
def test_captured_passes_equal_plain_ones(recompute, trained):
    """Loss and every gradient, batches of other sizes in between, memory full of NaN behind the buffers."""
    config = ModelConfig.from_dict(config_dict("tied"))
    model = loading.random_model(config, "cuda", torch.bfloat16, seed=0).train()
    if trained != "everything":
        args = LoraArgs(lora_rank=8, vision_lora=trained == "adapters", merger_lora=trained == "adapters")
        lora.inject(model, args)
        lora.set_trainable(model, args)
        with torch.no_grad():
            for home in lora.adapter_blocks(model):
                home.block.adapters.normal_(0, 0.05)
    model.gradient_checkpointing = recompute
    for p in model.parameters():  # as DeepSpeed does: this makes their place in autograd, on the stream of now
        p.place = p.requires_grad and p.expand_as(p).grad_fn.next_functions[0][0]
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).float()
    logged = []
    model.ops.graphs = GraphCache(logged.append)
    for turn in range(3):
        for text, clips in zip((30, 80, 55), CLIPS):
            packed = batch(config, clips, text + turn)
            right = gradients(plain, packed)
            junk = torch.full((64 << 20,), torch.nan, device="cuda")
            del junk
            noise = off(right, gradients(exact, packed))  # what bf16 itself is off
            assert off(gradients(model, packed), right) <= 2 * noise + 1e-3
    assert len(logged) >= 2, logged
    with torch.no_grad():
        assert off([model(packed)], [plain(packed)]) <= 0.05


def test_changed_weights_are_seen():
    """An update in place is seen by a replay; for another storage, or without adapters, no graph of before is used."""
    config = ModelConfig.from_dict(config_dict("tied"))
    model = loading.random_model(config, "cuda", torch.bfloat16, seed=0).train()
    lora.inject(model, LoraArgs(lora_rank=8))
    lora.set_trainable(model, LoraArgs(lora_rank=8))
    model.ops.graphs = GraphCache()
    packed = batch(config, CLIPS[0], 30)

    def both():
        captured = model(packed).detach()
        keep, model.ops.graphs = model.ops.graphs, None
        plain = model(packed).detach()
        model.ops.graphs = keep
        return off([captured], [plain])

    for _ in range(3):
        assert both() <= 0.02
    base = model(packed).detach()
    with torch.no_grad():
        for home in lora.adapter_blocks(model):
            home.block.adapters.normal_(0, 0.1)
    assert both() <= 0.02 and off([model(packed)], [base]) > 0.1
    snapshot = {name: torch.zeros_like(p) for name, p in lora.trainable_parameters(model)}
    for _ in range(3):
        with lora.reference(model, snapshot):
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        with lora.disabled(model), torch.no_grad():
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        assert both() <= 0.02


# -- Decoding


def relative(x, reference) -> float:
    return float((x.float() - reference.float()).norm() / reference.float().norm())


def add_adapters(model, rank: int = 5, seed: int = 9, size: float = 0.05) -> None:
    """Adapters on some of the decoder's linears."""
    args = LoraArgs(
        lora_rank=rank, lora_alpha=0.7 * rank, vision_lora=False, merger_lora=False,
        lora_namespan_exclude=["k_proj", "v_proj", "gate_proj"],
    )  # fmt: skip
    lora.inject(model, args)
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            for view, std in ((layer.lora_A, layer.in_features**-0.5), (layer.lora_B, size)):
                view.copy_(torch.randn(view.shape, generator=generator, device=view.device) * std)
    model.requires_grad_(False)


def gpu_model(shape: str, adapters: bool = True, kind: str = "bf16", size: float = 0.05) -> Qwen2_5_VL:
    """One of conftest's shapes, or the 3B model's own widths (config.json of Qwen2.5-VL-3B-Instruct) in two layers.
    kind: of its base. size: of the adapters' B."""
    if shape == "3B":
        raw = config_dict("grouped") | dict(
            hidden_size=2048, intermediate_size=11008, num_attention_heads=16, vocab_size=151_936,
            initializer_range=0.02, tie_word_embeddings=True,
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        )  # fmt: skip
        raw["vision_config"]["out_hidden_size"] = 2048
        model = loading.random_model(ModelConfig.from_dict(raw), DEVICE, torch.bfloat16)
        for p in model.parameters():
            if p.dim() == 1:
                p.data.add_(0.1 * torch.randn_like(p))
    else:
        model = random_model(shape).to(DEVICE, torch.bfloat16)
    model.requires_grad_(False).eval()
    quantise_base(model, kind)
    if adapters:
        add_adapters(model, size=size)
    return model


def prompts_of(model, lengths: list[int]) -> Packed:
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(3, 200, (n,), generator=generator) for n in lengths])
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1).contiguous()
    return Packed(ids, positions, Segments.causal(lengths)).to(DEVICE)


def test_merged_weights_are_the_sum_rounded_once():
    model = gpu_model("3B")
    with torch.no_grad():
        apart = [decoder.stacks_of(layer) for layer in model.model.layers]
        made = decoder.merged(apart, model.head_weight)
    for name, stack in apart[1].items():
        for w, whole in zip(stack, made[1][name], strict=True):
            exact = w.weight.float() if w.A is None else shifted(w.weight, w.A, w.B, w.scale)
            assert whole.A is None and whole.weight.is_contiguous() and relative(whole.weight, exact) < 2e-3, name
            assert (whole.weight == exact.to(torch.bfloat16)).float().mean() > 0.99, name


SIZES = [("3B", 1, 8), ("3B", 8, 8), ("3B", 3, 7), ("grouped", 2, 50), ("untied", 1, 1)]


@pytest.mark.parametrize("kind", BASE_DTYPES)
@pytest.mark.parametrize("shape, N, G", SIZES)
def test_a_step_equals_the_plain_forms(shape, N, G, kind):
    """Two tokens through the kernels; the second, which finds an own key, against the plain forms, kernel by kernel."""
    model = gpu_model(shape, kind=kind)
    prompts = prompts_of(model, [300 + 77 * n for n in range(N)])
    cache = GroupCache(model, prompts.segments.q_lengths, G, 1024, 128)
    with torch.no_grad():
        model(prompts, cache.prefill(prompts.segments, model.ops.attention))
        apart = [decoder.stacks_of(layer) for layer in model.model.layers]
        layers = decoder.merged(apart, model.head_weight) if kind == "bf16" else apart
    step = decoder.Step.fitting(model, N, G, cache, "greedy", layers, 0 if kind == "bf16" else 16)
    step.partial.fill_(float("nan"))
    banned = torch.tensor([4], device=DEVICE)
    alive = step.begin(model, layers, cache, prompts, Sampling(temperature=0.0), banned, None)
    assert (alive[0][0] is None) == (kind == "bf16")
    for _ in range(2):
        step.ids.copy_(torch.randint(3, 200, (N * G,), generator=torch.Generator().manual_seed(1)))
        ids = step.ids.clone()
        step.launch()
    x, found = model.model.embed_tokens(ids), {}
    R, H, K, D, eps = N * G, step.H, step.K, step.D, model.config.rms_norm_eps
    tables = [t[:, 1].repeat_interleave(G, 0)[:, None] for t in (step.cos, step.sin)]
    for i, (layer, w) in enumerate(zip(model.model.layers, layers)):
        q, k, v = qwen.linear(qwen.norm(x, layer.input_layernorm.weight, eps), *w["qkv"])
        q, k = (qwen.rotate(y.view(R, -1, D), tables) for y in (q, k))
        own_k, own_v = (x[i, :, :, :2].transpose(1, 2) for x in (cache.own_k, cache.own_v))
        found[f"key {i}"] = relative(own_k[:, 1], k)
        found[f"value {i}"] = relative(own_v[:, 1], v.view(R, K, D))
        lengths = prompts.segments.q_lengths
        prompt_k, prompt_v = (x[i].transpose(1, 2) for x in (cache.prompt_k, cache.prompt_v))
        out = attention_plain(q, prompt_k, prompt_v, lengths, own_k, own_v).view(R, H * D)
        x = x + qwen.linear(out, *w["o"])[0]
        inner = qwen.swiglu(*qwen.linear(qwen.norm(x, layer.post_attention_layernorm.weight, eps), *w["gate_up"]))
        x = x + qwen.linear(inner, *w["down"])[0]
    found |= {"attention": relative(step.mixed, out), "inner": relative(step.inner, inner), "x": relative(step.x, x)}
    found |= {"logits": relative(step.logits, qwen.norm(step.x, model.model.norm.weight, eps) @ model.head_weight.T)}
    bound = 2e-2 if shape == "3B" else 1e-1  # roundings; conftest's weights are large
    assert max(found.values()) < bound * (7 if kind == "fp8" else 1), found  # its inputs fall on other sides
    assert max(found["key 0"], found["value 0"]) < 2e-2, found
    scores = step.logits.float()
    scores[:, 4] = float("-inf")
    assert step.ids.equal(scores.argmax(-1))
    assert (step.all_logp[:, 2] - scores.log_softmax(-1).gather(1, step.ids[:, None])[:, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("shape, kind, size", [
    ("grouped", "bf16", 0.05), ("tied", "bf16", 1e-6), ("grouped", "int8", 1e-6), ("tied", "nf4", 1e-6),
    ("tied", "int8", 0.05), ("grouped", "nf4", 0.05), ("grouped", "fp8", 0.05),
])  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(40, 0.8, stop_ids=(7, 8, 9)), Sampling(40, 0.8, top_k=50, top_p=0.9)])
def test_log_probs_are_the_training_forwards(shape, kind, size, sampling):
    """As near to the float32 forward as the bf16 forward is; several prompts, with pictures, several rows each; also
    with an adapter as fresh as after one step at a rate of 1e-6."""
    model = gpu_model(shape, kind=kind, size=size)
    exact = copy.deepcopy(model).float()
    sequences = [Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(("video", "text", "mixed"))]
    groups = generate(model, pack_sequences(sequences).to(DEVICE), sampling, 4, torch.Generator(DEVICE).manual_seed(0))
    banned, ours, plain = torch.tensor(model.config.vision_token_ids, device=DEVICE), [], []
    for sequence, group in zip(sequences, groups):
        for row in group:
            assert row.finished == (row.ids[-1] in sampling.stop_ids)
            assert all(i not in sampling.stop_ids for i in row.ids[:-1])
            truth, ours_too = (logprobs_of(m, sequence, row.ids, banned) for m in (exact, model))
            ours.append(torch.tensor(row.logprobs, device=DEVICE) - truth)
            plain.append(ours_too - truth)
    ours, plain = torch.cat(ours), torch.cat(plain)
    found = [x.pow(2).mean().sqrt().item() for x in (ours, plain)]
    assert found[0] < 1.5 * found[1] + 1e-3, found
    assert ours.abs().max() < 4 * plain.abs().max() + 1e-3, (ours.abs().max(), plain.abs().max())


def logprobs_of(model, sequence, ids, banned):
    """The training forward over prompt + answer, at the tests' temperature."""
    whole = copy.copy(sequence)
    whole.ids = sequence.ids + ids
    whole.positions = mrope_position_ids(whole.ids, whole.grids, whole.seconds, model.config)
    with torch.no_grad():
        hidden = model(pack_sequences([whole]).to(DEVICE))[len(sequence.ids) - 1 : -1]
    return target_logprobs(hidden, model.head_weight, torch.tensor(ids, device=DEVICE), 0.8, banned)[0]


def test_first_and_second_tokens_follow_the_exact_distribution():
    """20,000 rows of one group; chi-square, 5 sigma."""
    model = gpu_model("tied", adapters=False)
    sequence, R = Sequence(model.config, [6]), 20_000
    prompt = pack_sequences([sequence]).to(DEVICE)
    rows = generate(model, prompt, Sampling(2, 0.7), R, torch.Generator(DEVICE).manual_seed(2))[0]
    first = torch.tensor([r.ids[0] for r in rows])
    common = first.mode().values.item()
    second = torch.tensor([r.ids[1] for r in rows if r.ids[0] == common])
    ids = torch.tensor([*sequence.ids, common], device=DEVICE)
    longer = Packed(ids, torch.arange(len(ids), device=DEVICE).expand(3, -1), Segments.causal([len(ids)]).to(DEVICE))
    logits = model.logits(longer)[-2:].float() / 0.7
    logits[:, model.config.vision_token_ids] = float("-inf")
    for drawn, p in zip((first, second), logits.softmax(-1).cpu()):
        expected, counts = p * len(drawn), torch.bincount(drawn, minlength=260).float()
        big = expected >= 5
        chi2, freedom = float(((counts - expected)[big] ** 2 / expected[big]).sum()), int(big.sum()) - 1
        slack = 5 * (2 * freedom) ** 0.5 + 0.01 * len(drawn)  # the second: bf16 logits of two paths differ by 0.1
        assert freedom > 3 and abs(chi2 - freedom) < slack, (chi2, freedom)


def test_same_seed_same_rows_streaming_and_early_end():
    model = gpu_model("grouped")
    prompt = pack_sequences([Sequence(model.config, CASES["video"])]).to(DEVICE)
    streamed: list[tuple[int, int]] = []
    sampling = Sampling(100, stop_ids=tuple(range(3, 60)))

    def run(seed, on_token=None):
        return generate(model, prompt, sampling, 3, torch.Generator(DEVICE).manual_seed(seed), on_token)[0]

    first = run(3, lambda row, token: streamed.append((row, token)))
    assert [r.ids for r in first] == [r.ids for r in run(3)] != [r.ids for r in run(4)]
    assert [[t for r, t in streamed if r == i] for i in range(3)] == [r.ids for r in first]
    assert all(r.finished for r in first)


def test_a_kept_graph_sees_new_adapters_and_frees_its_caches():
    model = gpu_model("grouped", size=0.0)
    prompt = pack_sequences([Sequence(model.config, CASES["text"])]).to(DEVICE)
    sampling = Sampling(30, temperature=0.0)
    before = generate(model, prompt, sampling, 2)[0]
    held = torch.cuda.memory_allocated()
    blocker = torch.empty(1 << 22, device=DEVICE)  # takes the place of what was freed: the next caches lie elsewhere
    with torch.no_grad():
        for home in lora.adapter_blocks(model):
            home.block.adapters.normal_(0, 0.1)
    after = generate(model, prompt, sampling, 2)[0]
    del blocker
    assert torch.cuda.memory_allocated() <= held
    assert before[0].ids != after[0].ids
    slow = generate(model, prompt, sampling, 2, decoder=PlainDecoder)[0]
    assert after[0].ids[0] == slow[0].ids[0]


def test_a_repetition_penalty_takes_the_plain_path():
    model = gpu_model("grouped")
    prompts = pack_sequences([Sequence(model.config, CASES["text"])]).to(DEVICE)
    for penalty, expected in ((1.1, PlainDecoder), (1.0, decoder.CudaDecoder)):
        sampling = Sampling(repetition_penalty=penalty)
        with torch.no_grad():
            assert type(decoder.make_decoder(model, prompts, sampling, 2, None)) is expected


@pytest.mark.parametrize("truncated", [0, 30])
def test_a_part_of_a_batch_draws_what_the_whole_batch_draws(truncated):
    """First tokens: the later ones may differ where a product over fewer rows rounds otherwise."""
    model = gpu_model("tied", adapters=False)
    sequences = [Sequence(model.config, [6 + k], seed=k) for k in range(4)]
    sampling = Sampling(1, 1.3, top_k=truncated)
    own = lambda numbers: [torch.Generator(DEVICE).manual_seed(k) for k in numbers]
    whole = generate(model, pack_sequences(sequences).to(DEVICE), sampling, 40, own(range(4)))
    half = generate(model, pack_sequences(sequences[2:]).to(DEVICE), sampling, 40, own([2, 3]))
    drawn, expected = ([c.ids[0] for group in groups for c in group] for groups in (half, whole[2:]))
    same = sum(a == b for a, b in zip(drawn, expected, strict=True))
    unrelated = generate(model, pack_sequences(sequences[2:]).to(DEVICE), sampling, 40, own([8, 9]))
    assert same >= 76 and sum(c.ids[0] == b for c, b in zip(sum(unrelated, []), expected, strict=True)) < 40


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stay_within_the_vocabulary(value, temperature):
    """And their log-probs tell: nothing is read from outside, no other row is touched."""
    model = gpu_model("3B", adapters=False)
    model.model.norm.weight.fill_(value)
    prompt = pack_sequences([Sequence(model.config, [6]), Sequence(model.config, [9])]).to(DEVICE)
    for group in generate(model, prompt, Sampling(20, temperature), 3, torch.Generator(DEVICE).manual_seed(0)):
        for row in group:
            assert all(0 <= i < model.config.vocab_size for i in row.ids)
            assert not any(torch.tensor(row.logprobs).isfinite())

"""What only a GPU runs, against the plain forms: attention, CUDA graphs, and decoding (bf16). Skipped without CUDA."""

import copy

import pytest
import torch
from conftest import Sequence, config_dict, pack_sequences, random_model
from test_decode import check_distribution, logprobs_of
from test_model import CASES

import lora
from config import LoraArgs
from model import loading, qwen
from model.decode import GroupCache, PlainDecoder, Sampling, generate
from model.fast import attention as fast_attention
from model.fast import decoder, gpu, portable
from model.fast.graphs import GraphCache
from model.loading import ModelConfig
from model.quantized import BASE_DTYPES, head_product
from model.qwen import Packed, Qwen2_5_VL, Segments, target_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels are Triton's")
DEVICE = "cuda"


def relative(x, reference) -> float:
    return float((x.float() - reference.float()).norm() / (reference.float().norm() + 1e-6))


def noise(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


# -- Operations and the whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype):
    """Logits and gradients of a mixed batch through the GPU's own paths: Triton, flash attention, aligned widths. In
    bf16 they may be off by what the CPU's plain bf16 is off."""
    exact, results = random_model("grouped"), []
    sequences = [Sequence(exact.config, CASES[name], seed=i) for i, name in enumerate(("mixed", "videos"))]
    packed = pack_sequences(sequences)
    weight = torch.randn(len(packed.input_ids), 260, generator=torch.Generator().manual_seed(0))
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
    """Norm, SwiGLU and rotary, outputs and gradients, as near to float32 as the plain forms are."""
    torch.manual_seed(0)
    gate, up = torch.randn(rows, width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    x, angle = torch.randn(rows, heads, size, device=DEVICE), torch.randn(rows, 1, size // 2, device=DEVICE)
    weight, grad = torch.rand(width, device=DEVICE), torch.randn(rows, 4000, device=DEVICE)
    for name, inputs, rest in (
        ("norm", (gate,), lambda kind: (weight.to(kind), 1e-6)),
        ("swiglu", (gate, up), lambda kind: ()),
        ("rotate", (x,), lambda kind: ((angle.cos().to(kind), angle.sin().to(kind)),)),
    ):
        results, plain = [], getattr(qwen, name)
        for form, kind in ((plain, torch.float32), (gpu.FORMS[name], dtype), (plain, dtype)):
            own = [i.to(kind).requires_grad_() for i in inputs]
            out = form(*own, *rest(kind))
            strided = grad.to(kind)[:, : out[0].numel()].view(out.shape)
            results.append([out, *torch.autograd.grad(out, own, strided)])
        for exact, fast, slow in zip(*results):
            assert (fast.float() - exact).norm() <= 1.5 * (slow.float() - exact).norm() + 1e-5 * exact.norm(), name


@pytest.mark.parametrize("lengths, kind", [
    ([9000, 8704], "dense"), ([700] * 13, "dense"), ([300, 70], "flash"), ([9000, 1, 1], "flash"), ([65, 64], "tower"),
    ([540] * 16, "tower dense"), ([[700, 256, 1, 300], [64, 5, 130], [130]], "prefix"),
])  # fmt: skip
def test_attention_is_as_near_to_float32_as_bf16_is(lengths, kind):
    """Long segments and those of one length by cuDNN, the others by FlashAttention."""
    (H, K, D), make = ((3, 3, 80), Segments.full) if "tower" in kind else ((4, 2, 128), Segments.causal)
    if kind == "prefix":
        segments = Segments.shared_prompt([n for n, *_ in lengths], [own for _, *own in lengths]).to(DEVICE)
    else:
        segments = make(lengths).to(DEVICE)
    make = lambda n: torch.randn(segments.num_tokens, n, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    inputs, weight = [make(n) for n in (H, K, K)], make(H).detach()
    if torch.cuda.get_device_capability()[0] == 9:
        _, again = (fast_attention.is_dense(inputs[0], segments.to(DEVICE)) for _ in range(2))  # a shape seen twice
        assert again == ("dense" in kind)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    right = qwen.attention(*exact, segments)
    out = fast_attention.attention(*inputs, segments)
    right = [right, *torch.autograd.grad(right, exact, weight.float())]
    for mine, other in zip([out, *torch.autograd.grad(out, inputs, weight)], right):
        assert relative(mine, other) < 0.006


@pytest.mark.parametrize("size", [80, 32, 20])
@pytest.mark.parametrize("lengths", [[64, 40, 0, 1, 64, 33], [7], [100, 30]])
def test_windows_are_as_near_to_float32_as_bf16_is(lengths, size):
    segments = Segments.full(lengths).to(DEVICE)
    qkv, angle = (torch.randn(sum(lengths), n, d, device=DEVICE) for n, d in ((9, size), (1, size // 2)))
    weight, made = torch.randn(sum(lengths), 3, size, device=DEVICE), []
    plain = Qwen2_5_VL(ModelConfig.from_dict(config_dict("tied"))).ops
    for form, kind in ((qwen.tower_attention, torch.float32), (gpu.FORMS["tower_attention"], torch.bfloat16)):
        own, tables = qkv.to(kind).requires_grad_(), (angle.cos().to(kind), angle.sin().to(kind))
        out = form(plain, own, tables, segments)
        made.append([out, *torch.autograd.grad((out * weight).sum(), own)])
    for exact, ours in zip(*made):
        assert relative(ours, exact) < 0.01


@pytest.mark.parametrize("temperature, banned", [(1.0, None), (0.7, torch.tensor([1, 5, 6]))])
@pytest.mark.parametrize("rows, vocabulary", [(7, 50), (100, 20_001)])
def test_log_probs_equal_the_whole_softmax(monkeypatch, rows, vocabulary, temperature, banned):
    """Log-probs, entropies, hits and gradients, in chunks; bf16 as near to float32 as the plain form is."""
    monkeypatch.setattr(portable, "CHUNK_BYTES", 4 * vocabulary * 33)
    hidden, head = torch.randn(rows, 24, device=DEVICE), torch.randn(vocabulary, 24, device=DEVICE)
    targets, made = torch.randint(7, vocabulary, (rows,), device=DEVICE), []
    banned, weight = None if banned is None else banned.to(DEVICE), torch.randn(rows, device=DEVICE)
    for form, kind in ((qwen.logprobs, 0), (target_logprobs, 0), (qwen.logprobs, 1), (target_logprobs, 1)):
        own = [x.to((torch.float32, torch.bfloat16)[kind]).requires_grad_() for x in (hidden, head)]
        logprobs, entropy, right = form(*own, targets, temperature, banned)
        assert form(*own, targets, temperature, banned, False)[1] is None
        made.append([logprobs, entropy, right, *torch.autograd.grad((logprobs * weight).sum(), own)])
    for exact, fast, plain_bf16, fast_bf16 in zip(*made):
        assert relative(fast, exact) < 1e-5 and relative(fast_bf16, exact) < 1.5 * relative(plain_bf16, exact) + 1e-3


# -- CUDA graphs


def trained_model(trained: str):
    model = loading.random_model(ModelConfig.from_dict(config_dict("tied")), DEVICE, torch.bfloat16, seed=0).train()
    if trained != "everything":
        args = LoraArgs(lora_rank=8, vision_lora=trained == "adapters", merger_lora=trained == "adapters")
        lora.inject(model, args)
        lora.set_trainable(model, args)
        change_adapters(model, 0.05)
    return model


@torch.no_grad()
def change_adapters(model, size: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(lora.FLAT):
            parameter.normal_(0, size)


def batch(config, clips, text: int):
    """Packed clips, each followed by `text` tokens more."""
    return pack_sequences([Sequence(config, [*CASES[name], text], seed=i) for i, name in enumerate(clips)]).to(DEVICE)


def gradients(model, packed):
    """Loss and gradients of what is trained."""
    model.zero_grad()
    targets = packed.input_ids.roll(-1)
    logprobs, _, _ = target_logprobs(model(packed), model.head_weight, targets)
    loss = -(logprobs * torch.linspace(0, 1, len(targets), device=DEVICE)).sum()
    loss.backward()
    return [loss.detach().clone()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]


def off(ours, right):
    return max(map(relative, ours, right))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", ["adapters", "llm adapters", "everything"])
def test_captured_passes_equal_plain_ones(recompute, trained):
    """Loss and every gradient, batches of other sizes in between, memory full of NaN behind the buffers."""
    model, logged = trained_model(trained), []
    model.gradient_checkpointing = recompute
    for p in model.parameters():  # as DeepSpeed does: this makes their place in autograd, on the stream of now
        p.place = p.requires_grad and p.expand_as(p).grad_fn.next_functions[0][0]
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    model.ops.graphs = GraphCache(logged.append, wait=True)
    for _ in range(2):
        gradients(model, batch(model.config, ["video"], 30))
    assert not logged
    model.ops.graphs.ready = True
    for turn in range(3):
        for text, clips in ((30, ["video"]), (80, ["images"]), (55, ["video", "text"])):
            packed = batch(model.config, clips, text + turn)
            if len(clips) == 2:  # the second as a completion of the first
                prompt, own = packed.segments.q_lengths
                packed.segments = Segments.shared_prompt([prompt], [[own]]).to(DEVICE)
            right = gradients(plain, packed)
            junk = torch.full((64 << 20,), torch.nan, device=DEVICE)
            del junk
            bound = 2 * off(right, gradients(exact, packed)) + 1e-3  # what bf16 itself is off
            assert off(gradients(model, packed), right) <= bound
    assert len(logged) >= 2, logged
    exact.ops.graphs, captures = GraphCache(logged.append), len(logged)
    for _ in range(3):
        gradients(exact, packed)
    assert len(logged) == captures, "dense attention, of float32, goes by the host's lengths"
    with torch.no_grad():
        assert off([model(packed)], [plain(packed)]) <= 0.05
        for n in range(3):  # keys and values of a prompt pass: plainly, captured, replayed
            stored, captures = [[], []], len(logged)
            for one, into in zip((model, plain), stored):
                one(packed, store=lambda layer, k, v, into=into: into.extend((k.clone(), v.clone())))
            assert len(stored[0]) == 2 * len(model.model.layers) and off(*stored) <= 0.05
            assert sum("DecoderLayer" in line for line in logged[captures:]) == (n == 1), logged


def test_changed_weights_are_seen():
    """An update in place is seen by a replay; for another storage, or without adapters, no graph of before is used."""
    model = trained_model("llm adapters")
    packed, graphs = batch(model.config, ["video"], 30), GraphCache()

    def both():
        model.ops.graphs = None
        plain = model(packed).detach()
        model.ops.graphs = graphs
        return off([model(packed).detach()], [plain])

    for _ in range(3):
        assert both() <= 0.02
    before = model(packed).detach()
    change_adapters(model, 0.1)
    assert both() <= 0.02 and off([model(packed)], [before]) > 0.1
    snapshot = {name: torch.zeros_like(p) for name, p in lora.trainable_parameters(model)}
    with lora.disabled(model), torch.no_grad():
        base = model(packed)
    for _ in range(3):
        with lora.reference(model, snapshot):
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        with lora.disabled(model), torch.no_grad():
            assert both() <= 0.02 and off([model(packed)], [base]) <= 0.02
        assert both() <= 0.02


# -- Decoding


def gpu_model(shape: str, adapters: bool = True, kind: str = "bf16", size: float = 0.05) -> Qwen2_5_VL:
    """One of conftest's shapes, or the 3B model's own widths (config.json of Qwen2.5-VL-3B-Instruct) in two layers, and
    adapters on some of the decoder's linears. kind: of its base; with "small" behind it a head of its own in int8 and
    the embedding in host memory. size: of the adapters' B."""
    kind, is_small = kind.split()[0], kind.endswith("small")
    if shape == "3B":
        raw = config_dict("grouped") | dict(
            hidden_size=2048, intermediate_size=11008, num_attention_heads=16, vocab_size=151_936,
            initializer_range=0.02, tie_word_embeddings=not is_small,
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        )  # fmt: skip
        raw["vision_config"]["out_hidden_size"] = 2048
        model = loading.random_model(ModelConfig.from_dict(raw), DEVICE, torch.bfloat16)
        for p in model.parameters():
            if p.dim() == 1:
                p.data.add_(0.1 * torch.randn_like(p))
    else:
        model = random_model(shape).to(DEVICE, torch.bfloat16)
    model.base_dtype, model.head_dtype, model.offload_embedding = kind, "int8" if is_small else "bf16", is_small
    loading.place_all(model.eval())
    if adapters:
        args = dict(lora_rank=5, lora_alpha=3.5, vision_lora=False, merger_lora=False)
        lora.inject(model, LoraArgs(**args, lora_namespan_exclude=["k_proj", "v_proj", "gate_proj"]))
        for _, layer in lora.lora_layers(model):
            for view, std in ((layer.lora_A, layer.in_features**-0.5), (layer.lora_B, size)):
                view.data.copy_(torch.randn(view.shape, generator=noise(9), device=DEVICE) * std)
    return model.requires_grad_(False)


def prompt_of(model, *cases) -> tuple[list[Sequence], Packed]:
    sequences = [Sequence(model.config, CASES.get(c, [c]), seed=i) for i, c in enumerate(cases)]
    return sequences, pack_sequences(sequences).to(DEVICE)


def attention_plain(q, cache, layer: int, G: int):
    """Of `attention_kernel` and `combine_kernel`, rotary done, two own keys. q (R, H, D)."""
    out = torch.empty_like(q)
    for r in range(len(q)):
        length = cache.lengths[r // G]
        pairs = ((cache.prompt_k, cache.own_k), (cache.prompt_v, cache.own_v))
        k, v = (torch.cat([a[layer, r // G, :, :length], b[layer, r, :, :2]], 1).float() for a, b in pairs)
        k, v = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in (k, v))  # (H, keys, D)
        weights = (torch.einsum("hd,hsd->hs", q[r].float(), k) * q.shape[2] ** -0.5).softmax(-1)
        out[r] = torch.einsum("hs,hsd->hd", weights, v).to(q.dtype)
    return out


@pytest.mark.parametrize("kind", [*BASE_DTYPES, "bf16 small", "nf4 small"])
@pytest.mark.parametrize(
    "shape, N, G", [("3B", 1, 8), ("3B", 8, 8), ("3B", 3, 7), ("grouped", 2, 50), ("untied", 1, 1)]
)
def test_a_step_equals_the_plain_forms(shape, N, G, kind):
    """Two tokens through the kernels; the second, which finds an own key, against the plain forms, kernel by kernel."""
    model = gpu_model(shape, kind=kind)
    _, prompts = prompt_of(model, *(300 + 77 * n for n in range(N)))
    cache = GroupCache(model, prompts.segments.q_lengths, G, 1024, 128)
    with torch.no_grad():
        model(prompts, store=cache.store)
        apart = [decoder.stacks_of(layer) for layer in model.model.layers]
        merges = model.base_dtype == "bf16"
        layers = decoder.merged(apart, model.model.norm.weight) if merges else apart
    step = decoder.Step.fitting(model, N, G, cache, "greedy", 0 if merges else 16)
    step.partial.fill_(float("nan"))
    banned = torch.tensor([4], device=DEVICE)
    alive = step.begin(model, layers, cache, prompts, Sampling(temperature=0.0), banned, None)
    assert (alive[0][0] is None) == merges
    for _ in range(2):
        ids = torch.randint(3, 200, (N * G,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        step.ids.copy_(ids)
        step.look_up()
        step.launch()
    x, stats = model.model.embed_tokens(ids), {}
    R, H, K, D, eps = N * G, step.H, step.K, step.D, model.config.rms_norm_eps
    tables = [t[:, 1].repeat_interleave(G, 0)[:, None] for t in (step.cos, step.sin)]
    for i, (layer, w) in enumerate(zip(model.model.layers, layers)):
        q, k, v = qwen.linear(qwen.norm(x, layer.input_layernorm.weight, eps), *w["qkv"])
        q, k = (qwen.rotate(y.view(R, -1, D), tables) for y in (q, k))
        stats |= {f"key {i}": relative(cache.own_k[i, :, :, 1], k)}
        stats |= {f"value {i}": relative(cache.own_v[i, :, :, 1], v.view(R, K, D))}
        out = attention_plain(q, cache, i, G).view(R, H * D)
        x = x + qwen.linear(out, *w["o"])[0]
        inner = qwen.swiglu(*qwen.linear(qwen.norm(x, layer.post_attention_layernorm.weight, eps), *w["gate_up"]))
        x = x + qwen.linear(inner, *w["down"])[0]
    times = head_product if model.head_dtype == "int8" else torch.nn.functional.linear
    logits = times(qwen.norm(step.x, model.model.norm.weight, eps), model.head_weight)
    pairs = {"attention": (step.mixed, out), "inner": (step.inner, inner), "x": (step.x, x), "": (step.logits, logits)}
    stats |= {name: relative(*pair) for name, pair in pairs.items()}
    bound = 2e-2 if shape == "3B" else 1e-1  # roundings; conftest's weights are large
    assert max(stats.values()) < bound * (7 if kind == "fp8" else 1), stats  # its inputs fall on other sides
    assert max(stats["key 0"], stats["value 0"]) < 2e-2, stats
    scores = step.logits.float()
    scores[:, 4] = float("-inf")
    assert step.ids.equal(scores.argmax(-1))
    assert (step.all_logp[:, 2] - scores.log_softmax(-1).gather(1, step.ids[:, None])[:, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("shape, kind, size", [
    ("grouped", "bf16", 0.05), ("tied", "bf16", 1e-6), ("grouped", "int8", 1e-6), ("tied", "nf4", 1e-6),
    ("tied", "int8", 0.05), ("grouped", "nf4", 0.05), ("grouped", "fp8", 0.05), ("untied", "bf16 small", 0.05),
    ("grouped", "nf4 small", 1e-6),
])  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(40, 0.8, stop_ids=(7, 8, 9)), Sampling(40, 0.8, top_k=50, top_p=0.9)])
def test_log_probs_are_the_training_forwards(shape, kind, size, sampling):
    """As near to the float32 forward as the bf16 forward is; several prompts, with pictures, several rows each; also
    with an adapter as fresh as after one step at a rate of 1e-6."""
    model, ours, plain = gpu_model(shape, kind=kind, size=size), [], []
    exact = copy.deepcopy(model).float()
    sequences, prompts = prompt_of(model, "video", "text", "mixed")
    for sequence, group in zip(sequences, generate(model, prompts, sampling, 4, noise(0))):
        for row in group:
            assert row.finished == (row.ids[-1] in sampling.stop_ids)
            assert all(i not in sampling.stop_ids for i in row.ids[:-1])
            truth, ours_too = (logprobs_of(m, sequence, row.ids, 0.8) for m in (exact, model))
            ours.append(torch.tensor(row.logprobs, device=DEVICE) - truth)
            plain.append(ours_too - truth)
    ours, plain = torch.cat(ours), torch.cat(plain)
    assert ours.square().mean().sqrt() < 1.5 * plain.square().mean().sqrt() + 1e-3
    assert ours.abs().max() < 4 * plain.abs().max() + 1e-3, (ours.abs().max(), plain.abs().max())


def test_first_and_second_tokens_follow_the_exact_distribution():
    """20,000 rows of one group. Vision tokens, which would win, are never drawn."""
    model = gpu_model("tied", adapters=False)
    model.head_weight[model.config.vision_token_ids] *= 50
    (sequence,), prompt = prompt_of(model, 6)
    ids = torch.tensor([r.ids for r in generate(model, prompt, Sampling(2, 0.7), 20_000, noise(2))[0]])
    common = ids[:, 0].mode().values.item()
    longer = Packed(torch.tensor([*sequence.ids, common]), torch.arange(7).expand(3, -1), Segments.causal([7])).to(
        DEVICE
    )
    logits = model.logits(longer)[-2:].float() / 0.7
    logits[:, model.config.vision_token_ids] = float("-inf")
    first, second = logits.softmax(-1).cpu()
    check_distribution(ids[:, 0], first, 0.01)  # bf16 logits of two paths differ by 0.1
    check_distribution(ids[ids[:, 0] == common, 1], second, 0.01)


def test_same_seed_same_rows_streaming_and_early_end():
    model, streamed = gpu_model("grouped"), []
    _, prompt = prompt_of(model, "video")

    def run(seed, on_token=None):
        return generate(model, prompt, Sampling(100, stop_ids=tuple(range(3, 60))), 3, noise(seed), on_token)[0]

    first = run(3, lambda row, token: streamed.append((row, token)))
    assert first == run(3) and [r.ids for r in first] != [r.ids for r in run(4)]
    assert [[t for r, t in streamed if r == i] for i in range(3)] == [r.ids for r in first]
    assert all(r.finished for r in first)


def test_a_kept_graph_sees_new_adapters_and_frees_its_caches():
    model, sampling = gpu_model("grouped", size=0.0), Sampling(30, temperature=0.0)
    _, prompt = prompt_of(model, "text")
    before = generate(model, prompt, sampling, 2)[0]
    held = torch.cuda.memory_allocated()
    blocker = torch.empty(1 << 22, device=DEVICE)  # takes the place of what was freed: the next caches lie elsewhere
    change_adapters(model, 0.1)
    after = generate(model, prompt, sampling, 2)[0]
    del blocker
    assert torch.cuda.memory_allocated() <= held and before[0].ids != after[0].ids
    assert after[0].ids[0] == generate(model, prompt, sampling, 2, decoder=PlainDecoder)[0][0].ids[0]


def test_the_plain_decoder_takes_what_the_kernels_do_not(monkeypatch):
    """A repetition penalty; and, with a warning, a rollout that has no room."""
    model = gpu_model("grouped")
    _, prompts = prompt_of(model, "text")
    make = lambda penalty: type(decoder.make_decoder(model, prompts, Sampling(repetition_penalty=penalty), 2, None))
    with torch.no_grad():
        assert make(1.1) is PlainDecoder and make(1.0) is decoder.CudaDecoder

        def no_room(*args):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(decoder, "merged", no_room)
        with pytest.warns(UserWarning, match="slow decoding"):
            assert make(1.0) is PlainDecoder


@pytest.mark.parametrize("truncated", [0, 30])
def test_a_part_of_a_batch_draws_what_the_whole_batch_draws(truncated):
    """First tokens: the later ones may differ where a product over fewer rows rounds otherwise."""
    model, sampling = gpu_model("tied", adapters=False), Sampling(1, 1.3, top_k=truncated)
    sequences, whole_prompts = prompt_of(model, 6, 7, 8, 9)
    half = pack_sequences(sequences[2:]).to(DEVICE)
    drawn = []
    for prompts, seeds in ((whole_prompts, (0, 1, 2, 3)), (half, (2, 3)), (half, (8, 9))):
        groups = generate(model, prompts, sampling, 40, [noise(seed) for seed in seeds])
        drawn.append(torch.tensor([c.ids[0] for group in groups[-2:] for c in group]))
    assert (drawn[0] == drawn[1]).sum() >= 76 and (drawn[0] == drawn[2]).sum() < 40


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stay_within_the_vocabulary(value, temperature):
    """And their log-probs tell: nothing is read from outside, no other row is touched."""
    model = gpu_model("3B", adapters=False)
    model.model.norm.weight.fill_(value)
    _, prompt = prompt_of(model, 6, 9)
    for row in sum(generate(model, prompt, Sampling(20, temperature), 3, noise(0)), []):
        assert all(0 <= i < model.config.vocab_size for i in row.ids)
        assert not any(torch.tensor(row.logprobs).isfinite())

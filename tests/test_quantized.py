"""Low-bit weights: the formats against bitsandbytes and exact arithmetic, products and gradients against those of the
dequantised weights, on a GPU its kernels against the plain forms."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import Sequence, config_dict, pack_sequences, refused
from runs import base, column, cut, grpo, release_run, sft  # noqa: F401 (fixtures)
from safetensors.torch import load_file
from test_model import CASES

import adapter_files
import infer
import lora
from checkpoint import read_json
from config import GRPO, SFT, LoraArgs, parse
from model import UserError, loading, qwen
from model import quantized as formats
from model.adapters import Weights
from model.decode import PlainDecoder, Sampling, generate
from model.fast import portable, quantized
from model.loading import ModelConfig, load_model, not_finite, save_model
from model.quantized import BASE_DTYPES, E4M3, EMBEDDING, HEAD, NF4, quantise, quantized_weights, rounded_rows
from model.qwen import target_logprobs

# ruff: noqa: F811 (fixtures are imported by name)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [kind for kind in BASE_DTYPES if kind != "bf16"]
SHAPES = [(1, 1), (5, 7), (13, 64), (16, 129), (40, 200), (24, 256)]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels are Triton's")


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- Formats


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e5])
def test_codes_are_the_nearest(kind, shape, size):
    """Of all numbers that the format has beside its scale, by brute force; and the dequantised numbers are these."""
    w = gaussian(*shape) * size
    q = quantise(w, kind, torch.float32)
    if kind == "nf4":
        grid, scale = NF4, q.scales.float().repeat_interleave(64, 1)[:, : shape[1]]
        codes = q.nf4_codes()[:, : shape[1]].long()
        assert q.codes.shape == (shape[0], -(-shape[1] // 128) * 64) and q.scales.dtype == torch.bfloat16
        largest = w.abs()[:, :64].amax(1).to(torch.bfloat16)
        assert q.scales[:, 0].equal(largest)
        again = NF4[codes] * scale
    elif kind == "int8":
        grid, scale, again = torch.arange(-127.0, 128.0), q.scales, q.codes.float() * q.scales
        assert q.codes.abs().amax(1).tolist() == [127] * shape[0]
    else:
        grid, scale = torch.arange(256).to(torch.uint8).view(E4M3).float(), q.scales
        grid, again = grid[grid.isfinite()], q.codes.view(E4M3).float() * q.scales
        assert torch.frexp(q.scales)[0].item() == 0.5 and 224 < float(w.abs().max() / q.scales) <= 448
        assert q.dequantise(torch.bfloat16).float().equal(again)
    assert q.dequantise(torch.float32).equal(again)
    unit = (w / scale).clamp(grid.min(), grid.max())
    best = (unit.flatten()[:, None] - grid).abs().amin(1).view(shape)
    assert ((unit - again / scale).abs() - best).max() <= 1e-5 * grid.max()
    for bad in (torch.nan, -torch.inf):  # not_finite looks at the scales
        w[0, 0] = bad
        assert not quantise(w, kind, torch.float32).scales.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_are_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(96, 512, dtype=dtype)
    w[3, 64:128] = 0
    if dtype == torch.float32:  # scales that bfloat16 holds, as those of released weights are
        w = w / w.view(96, 8, 64).abs().amax(2).clamp(min=1e-9).repeat_interleave(64, 1)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(w.shape)  # the first is in the high
    q = quantise(w, "nf4", torch.float32)
    assert q.nf4_codes().equal(theirs) and q.scales.float().flatten().equal(state.absmax)
    assert q.dequantise(torch.float32).equal(functional.dequantize_4bit(packed, state).float())


# -- Products


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("bias", [False, True], ids=["frozen", "trained bias"])
def test_products_and_gradients_are_those_of_the_dequantised_weights(kind, bias):
    """Two layers on one input with adapters. fp8 on the input rounded by rows."""
    layers, plain = [], []
    for seed, n in enumerate((24, 40)):
        q = quantise(gaussian(n, 72, seed=seed), kind, torch.float32)
        b = gaussian(n, seed=7).requires_grad_(bias)
        A, B = gaussian(4, 72, seed=8).requires_grad_(), gaussian(n, 4, seed=9).requires_grad_()
        layers.append(Weights(q, b, A, B, 0.5))
        plain.append(Weights(q.dequantise(torch.float32), b, A, B, 0.5))
    x = gaussian(9, 72, seed=3)
    weights = [gaussian(9, n, seed=4) for n in (24, 40)]
    params = [t for w in layers for t in w[1:4] if t.requires_grad]
    results = []
    for form, own in ((portable.linear, layers), (qwen.linear, layers), (qwen.linear, plain)):
        inp = x.clone().requires_grad_()
        outs = form(inp, *own)
        grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), [inp, *params])
        results.append([*outs, *grads])
    for fast, slow, exact in zip(*results, strict=True):
        assert (fast - slow).norm() <= 1e-5 * slow.norm()
        assert (slow - exact).norm() <= (0.04 if kind == "fp8" else 1e-6) * exact.norm()


# -- Kernels


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_plain_forms(shape, dtype):
    w = gaussian(*shape).to(DEVICE)
    for kind in LOW:
        q = quantise(w, kind, dtype)
        assert torch.equal(quantized.dequantise(q, dtype), q.dequantise(dtype)), kind
        wide = torch.zeros(shape[0] + 3, shape[1] + 5, dtype=dtype, device=DEVICE)
        quantized.dequantise(q, dtype, wide[: shape[0], : shape[1]])
        assert torch.equal(wide, F.pad(q.dequantise(dtype), (0, 5, 0, 3))), kind
    codes, scales = quantized.round_rows(w.to(dtype))
    expected, expected_scales = rounded_rows(w.to(dtype))
    assert torch.equal(scales, expected_scales)
    apart = (codes.float() - expected.float()).abs()  # a product with the reciprocal may fall on the other side
    assert (apart <= 0.13 * expected.float().abs()).all() and (apart > 0).float().mean() < 0.01


@needs_gpu
@pytest.mark.parametrize("T, N, K", [(600, 512, 256), (1025, 128, 1392)])
def test_fp8_products_on_a_gpu_multiply_the_codes(T, N, K):
    """Against the dequantised numbers in float64."""
    q = quantise(gaussian(N, K).to(DEVICE), "fp8", torch.bfloat16)
    x, bias = (gaussian(*shape, seed=3).to(DEVICE, torch.bfloat16) for shape in ((T, K), (N,)))
    codes, scales = rounded_rows(x)
    exact = (codes.float() * scales).double() @ q.dequantise(torch.float32).double().T + bias.double()
    assert (quantized.product(x, q, bias).double() - exact).norm() <= 5e-3 * exact.norm()


# -- Models


def noise():
    return torch.Generator(DEVICE).manual_seed(0)


def model_of(kind, shape="grouped"):
    return loading.random_model(ModelConfig.from_dict(config_dict(shape)), DEVICE, seed=0, base_dtype=kind).eval()


@pytest.mark.parametrize("kind", LOW)
def test_only_the_decoders_linears_are_low_bit(kind, tmp_path):
    """Loaded tensor by tensor, the same as quantised afterwards; logits are the dequantised model's."""
    whole = model_of("bf16")
    save_model(whole, tmp_path)
    loaded, made = load_model(tmp_path, DEVICE, base_dtype=kind), model_of(kind)
    names = {f"{n}.weight" for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and n[:6] == "model."}
    assert len(names) == 14
    for model in (loaded, made):
        low = quantized_weights(model)
        assert set(low) == names and {q.kind for q in low.values()} == {kind} and model.base_dtype == kind
        assert names.isdisjoint(dict(model.named_parameters())) and not not_finite(model)
    for name, q in quantized_weights(loaded).items():
        assert torch.equal(q.codes, quantized_weights(made)[name].codes)
        loading.put(whole, name, q.dequantise(torch.float32))
    packed = pack_sequences([Sequence(whole.config, CASES["mixed"])]).to(DEVICE)
    logits, expected = loaded.logits(packed), whole.logits(packed)
    assert (logits - expected).norm() <= (0.2 if kind == "fp8" else 1e-4) * expected.norm()


@pytest.mark.parametrize("kind", BASE_DTYPES)
@pytest.mark.parametrize("size", [1e-6, 0.05])
@pytest.mark.parametrize("cases", [("video", "text"), ("video",)], ids=["two", "one"])
def test_the_sampler_sees_the_smallest_adapter(kind, size, cases):
    """Draws and log-probs of the fused decoder are the layers', with an adapter as after one step at such a rate."""
    model = model_of(kind)
    lora.inject(model, LoraArgs(lora_rank=4))
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.lora_B.normal_(0, size)
    prompts = pack_sequences([Sequence(model.config, CASES[c], seed=i) for i, c in enumerate(cases)]).to(DEVICE)
    fused, layers = (generate(model, prompts, Sampling(8), 3, noise(), decoder=form) for form in (None, PlainDecoder))
    for row, slow in zip(sum(fused, []), sum(layers, []), strict=True):
        assert row.ids == slow.ids
        assert torch.allclose(torch.tensor(row.logprobs), torch.tensor(slow.logprobs), atol=1e-4)


# -- Runs


def stated(folder, option):
    """What adapter, checkpoint and run say of an option."""
    facts = [read_json(folder / file) for file in ("adapter_config.json", "trainer_state.json", "../run.json")]
    return [each.get("config", each)[option] for each in facts]


def merges(adapter, base, name, low):
    """Merges into the base's original and its quantised weights: (kind, a tensor of the base, of the merged model)."""
    original = load_file(base / "model.safetensors")[name].float()
    quantised = quantise(original, low, torch.float32).dequantise(torch.float32)
    for choice, kind, weight in (("original", "original", original), ("quantised", low, quantised)):
        out = adapter.parents[1] / f"merged_{choice}"
        lora.main(["merge", str(adapter), str(out), "--merge_base", choice])
        yield kind, weight, load_file(out / "model.safetensors")[name]


def test_a_run_on_a_low_bit_base_is_resumed_asked_and_merged(sft, base, capsys):
    """Adapter, state and infer.py name the base; merging leaves the original weights under it unless told otherwise."""
    whole = sft("whole", base_dtype="nf4", max_steps=4, save_steps=2)
    cut(whole, "again", 4)
    assert "--base_dtype: got 'int8', expected 'nf4'" in refused(sft, "again", base_dtype="int8", resume=True)
    release_run()
    again = sft("again", base_dtype="nf4", max_steps=4, resume=True)
    assert column(again, "loss") == column(whole, "loss")
    folder = whole / "checkpoint-4"
    assert stated(folder, "base_dtype") == ["nf4"] * 3
    assert {q.kind for q in quantized_weights(infer.Model(folder).network).values()} == {"nf4"}
    assert not quantized_weights(infer.Model(folder, base_dtype="bf16").network)
    lora.main(["check", str(folder)])
    assert ", as nf4: every tensor fits" in capsys.readouterr().out
    sft("again", base_dtype="bf16", model_ckpt=folder, dry_run=True)
    out = capsys.readouterr().out
    assert "with --base_dtype nf4 and goes on with bf16" in out and "again already holds a run; --resume" in out
    _, adapters = adapter_files.read_adapter(folder)
    q = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"
    delta = 2 * adapters[q + "B.weight"] @ adapters[q + "A.weight"]  # alpha 32 over rank 16
    name = "model.layers.0.mlp.up_proj.weight"
    for kind, weight, merged in merges(folder, base / "tiny", name, "nf4"):
        assert f"{kind} weights" in (out := capsys.readouterr().out), out
        assert float(out.split("adapter: median ")[1].split(",")[0]) > 0.1
        assert merged.equal((weight + delta).to(torch.bfloat16)), kind


# -- A head in int8, an embedding in host memory

SMALL = {"head_dtype": "int8", "offload_embedding": True}


@pytest.mark.parametrize("rows, width, vocabulary", [(1, 1, 5), (17, 24, 50), (9, 13, 41), (5, 72, 65)])
@pytest.mark.parametrize("temperature, banned", [(1.0, None), (0.7, torch.tensor([1, 4]))])
def test_log_probs_of_an_int8_head_are_those_of_its_numbers(monkeypatch, rows, width, vocabulary, temperature, banned):
    """And their gradients; seven rows of the head at a time, three of the hidden states."""
    whole = quantise(gaussian(vocabulary, width), "int8", torch.float32)
    monkeypatch.setattr(formats, "PIECE", 7 * width)
    monkeypatch.setattr(portable, "CHUNK_BYTES", 4 * vocabulary * 3)
    head, exact = quantise(gaussian(vocabulary, width), "int8", torch.float32), whole.dequantise(torch.float32)
    assert head.codes.equal(whole.codes) and head.scales.equal(whole.scales)
    blocks = [block.shape[0] for block in head.blocks()]
    assert sum(blocks) == vocabulary and max(blocks) == min(7, vocabulary)
    targets, made = torch.arange(rows) % (vocabulary - 5) + 5 if vocabulary > 5 else torch.tensor([2]), []
    for form, weight in ((qwen.logprobs, exact), (qwen.logprobs, head), (target_logprobs, head)):
        hidden = gaussian(rows, width, seed=3).requires_grad_()
        logprobs, entropy, right = form(hidden, weight, targets, temperature, banned)
        made.append([logprobs, entropy, right, *torch.autograd.grad((logprobs * gaussian(rows, seed=4)).sum(), hidden)])
    assert portable.FORMS["logprobs"] is qwen.fast_forms("cpu", torch.float32)["logprobs"]
    for plain, *others in zip(*made, strict=True):
        assert all(torch.allclose(plain.float(), other.float(), atol=1e-5, rtol=1e-4) for other in others)


def test_a_small_model_is_its_dequantised_one(tmp_path, monkeypatch):
    """Loaded and made; logits, embeddings to the bit, and what each decoder draws."""
    whole = model_of("bf16")
    save_model(whole, tmp_path)
    monkeypatch.setattr(formats, "PIECE", 50 * whole.config.hidden_size)  # of 260 rows
    loaded = load_model(tmp_path, DEVICE, **SMALL)
    made = loading.random_model(whole.config, DEVICE, seed=0, **SMALL)
    head = quantized_weights(loaded)[HEAD]
    assert set(quantized_weights(loaded)) == {HEAD} and head.codes.equal(quantized_weights(made)[HEAD].codes)
    assert {HEAD, EMBEDDING}.isdisjoint(dict(loaded.named_parameters())) and not not_finite(loaded)
    packed = pack_sequences([Sequence(whole.config, CASES["mixed"])]).to(DEVICE)
    embed, on_host = whole.model.embed_tokens, loaded.model.embed_tokens
    assert on_host(packed.input_ids).equal(embed(packed.input_ids)) and on_host.weight.device.type == "cpu"
    assert made.model.embed_tokens.weight.equal(on_host.weight)
    with torch.no_grad():
        whole.lm_head.weight.copy_(head.dequantise(torch.float32))
    assert torch.allclose(loaded.logits(packed), whole.logits(packed), atol=1e-4, rtol=1e-4)
    prompt = pack_sequences([Sequence(whole.config, CASES["video"])]).to(DEVICE)
    choices = (loaded, None), (loaded, PlainDecoder), (whole, PlainDecoder)
    drawn = [generate(model, prompt, Sampling(12), 3, noise(), decoder=decoder)[0] for model, decoder in choices]
    assert all([row.ids for row in rows] == [row.ids for row in drawn[0]] for rows in drawn)
    loaded.bfloat16()
    assert on_host(packed.input_ids).dtype == head.dtype == torch.bfloat16 and head.codes.dtype == torch.int8
    on_host.weight[7] = float("nan")
    assert not_finite(loaded) == [EMBEDDING]


@pytest.fixture(scope="module")
def untied(base, tmp_path_factory):
    """runs.py's random checkpoint with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(base / "tiny", folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    save_model(loading.random_model(ModelConfig.from_dict(config)), folder)
    return folder


def test_runs_of_a_small_model(untied, sft, grpo, base, capsys):
    """SFT with one option and with both; GRPO and infer.py follow the adapter; merge takes the original head."""
    head = sft("head", model_id=untied, head_dtype="int8", max_steps=2)
    whole = sft("whole", model_id=untied, max_steps=2, **SMALL)
    assert column(whole, "loss", "grad_norm") == column(head, "loss", "grad_norm")
    assert "--offload_embedding has no effect" in capsys.readouterr().out
    adapter = whole / "checkpoint-2"
    assert stated(adapter, "head_dtype") == ["int8"] * 3
    assert "--head_dtype: got 'bf16', expected 'int8'" in refused(sft, "whole", head_dtype="bf16", resume=True)
    release_run()
    after = grpo("after", model_id=untied, model_ckpt=adapter, max_steps=1, offload_embedding=True)
    out = capsys.readouterr().out
    assert "--head_dtype int8, which the adapter was trained on" in out and column(after, "updated") == [True]
    network = infer.Model(adapter, offload_embedding=True).network
    assert set(quantized_weights(network)) == {HEAD} and network.offload_embedding
    assert not quantized_weights(infer.Model(adapter, head_dtype="bf16").network)
    for kind, weight, merged in merges(adapter, untied, HEAD, "int8"):
        assert merged.equal(weight.to(torch.bfloat16)), kind


def test_where_small_models_are_refused(untied, base, sft, capsys):
    for option, value in SMALL.items():
        message = refused(sft, "tied", dry_run=True, **{option: value})
        assert f"--{option}: the head of this model is its embedding" in message
        for cls in (SFT, GRPO):
            with pytest.raises(UserError, match=f"--{option}: got {value!r}, expected .* stay frozen"):
                parse(cls, [f"--{option}={value}", "--freeze_llm=False", "--llm_lora=False"])
    with pytest.raises(UserError, match="--head_dtype: the head"):
        infer.Model(base / "tiny", head_dtype="int8").network  # noqa: B018
    sft("planned", model_id=untied, dry_run=True, **SMALL)
    numbers = sum(p.numel() for p in loading.empty_model(ModelConfig.from_folder(untied)).parameters())
    assert f" of {numbers:,} parameters" in capsys.readouterr().out

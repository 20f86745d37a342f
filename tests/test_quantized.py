"""Low-bit weights: the formats against bitsandbytes and exact arithmetic, products and gradients against those of the
dequantised weights, Triton's kernels (by its interpreter where there is no GPU) against the plain forms."""

import json
import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from conftest import Sequence, config_dict, pack_sequences
from runs import base, column, release_run, sft  # noqa: F401 (fixtures)
from safetensors.torch import load_file
from test_model import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

import adapter_files
import infer
import lora
from bench.workloads import model_config
from config import LoraArgs
from memory import count
from model import UserError, loading, qwen
from model.adapters import Weights
from model.decode import PlainDecoder, Sampling, generate
from model.fast import decoder, linears, portable, quantized
from model.loading import ModelConfig, load_model, not_finite, save_model
from model.quantized import BASE_DTYPES, E4M3, NF4, quantise, quantise_base, quantized_weights, rounded_rows

# ruff: noqa: F811 (fixtures are imported by name)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [kind for kind in BASE_DTYPES if kind != "bf16"]
SHAPES = [(1, 1), (5, 7), (13, 64), (16, 129), (40, 200), (24, 256)]
needs_triton = pytest.mark.skipif(quantized.triton is None, reason="Triton is not installed")


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- Formats


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_of_255_steps_a_row(shape):
    w = gaussian(*shape)
    q = quantise(w, "int8", torch.float32)
    steps = w.double() / (w.double().abs().amax(1, keepdim=True) / 127)
    assert q.codes.dtype == torch.int8 and q.codes.abs().amax(1).tolist() == [127] * shape[0]
    assert (q.codes.double() - steps).abs().max() <= 0.5 + 1e-4
    assert torch.equal(q.dequantise(torch.float32), q.codes.float() * q.scales)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 448.0, 3e5])
def test_fp8_has_one_power_of_two_and_is_exact_in_bf16(shape, size):
    w = gaussian(*shape) * size
    q = quantise(w, "fp8", torch.bfloat16)
    scale = float(q.scales)
    assert torch.frexp(q.scales)[0].item() == 0.5 and 224 < float(w.abs().max()) / scale <= 448
    exact = q.codes.view(E4M3).double() * scale
    assert torch.equal(q.dequantise(torch.bfloat16).double(), exact)
    grid = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).double() * scale  # all that are not negative
    nearest = (w.double().abs().flatten()[:, None] - grid).abs().amin(1).view(shape)
    assert ((w.double() - exact).abs() - nearest).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_code_of_each_block(shape, dtype):
    w = gaussian(*shape, dtype=dtype)
    q = quantise(w, "nf4", torch.float32)
    codes, again = q.nf4_codes()[:, : shape[1]], q.dequantise(torch.float32)
    for first in range(0, shape[1], 64):
        block = w[:, first : first + 64].float()
        scale = block.abs().amax(1).to(torch.bfloat16).float()[:, None]
        unit = (block / scale).clamp(-1, 1)
        error = (unit[..., None] - NF4).abs()
        assert (error.gather(2, codes[:, first : first + 64, None].long())[..., 0] - error.amin(2)).max() < 1e-6
        assert torch.equal(again[:, first : first + 64], NF4[codes[:, first : first + 64].long()] * scale)
    assert q.codes.shape == (shape[0], -(-shape[1] // 128) * 64) and q.scales.dtype == torch.bfloat16


def test_nf4_between_two_codes_is_the_lower_and_zeros_stay():
    middles = (NF4[1:] + NF4[:-1]) / 2
    w = torch.zeros(2, 64)
    w[0, :15], w[0, 15] = middles, 1.0
    q = quantise(w, "nf4", torch.float32)
    assert q.nf4_codes()[0, :16].tolist() == [*range(15), 15] and q.nf4_codes()[1].tolist() == [7] * 128
    assert not q.dequantise(torch.float32)[1].any()


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


@pytest.mark.parametrize("kind, level", [("int8", 0.0083), ("fp8", 0.0265), ("nf4", 0.0920)])
def test_errors_of_gaussian_weights(kind, level):
    """Of the weights' size; measured apart with other code."""
    w = gaussian(256, 4096)
    error = (quantise(w, kind, torch.float32).dequantise(torch.float32) - w).norm() / w.norm()
    assert abs(float(error) / level - 1) < 0.05


def test_rows_of_an_input_are_rounded_apart():
    x = gaussian(3, 50) * torch.tensor([[1e-3], [0.0], [1e4]])
    codes, scales = rounded_rows(x)
    assert (codes.float().abs().amax(1) == torch.tensor([448.0, 0.0, 448.0])).all() and scales.shape == (3, 1)
    assert ((codes.float() * scales - x).norm(dim=1) <= 0.03 * x.norm(dim=1)).all()


# -- Products


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("bias", [False, True], ids=["frozen", "trained bias"])
def test_products_and_gradients_are_those_of_the_dequantised_weights(kind, bias):
    """Two layers on one input with adapters. fp8 on the input rounded by rows; its gradient is rounded as well."""
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
        assert (fast - slow).norm() <= (0.04 if kind == "fp8" else 1e-5) * slow.norm()
        assert (slow - exact).norm() <= (0.04 if kind == "fp8" else 1e-6) * exact.norm()
    assert results[0][0].allclose(results[1][0], atol=1e-4), "only the gradient of fp8 differs"


def test_what_a_pass_keeps_for_the_backward_is_no_weight():
    q = quantise(gaussian(512, 512), "nf4", torch.bfloat16)
    layer = Weights(q, None, gaussian(4, 512).requires_grad_(), gaussian(512, 4).requires_grad_(), 1.0)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        portable.linear(gaussian(8, 512), layer)[0].sum().backward()
    assert max(sizes) == 8 * 512


@pytest.mark.parametrize("T, K, N", [(5, 2048, 11008), (513, 11008, 2048), (1, 16, 32)])
def test_layouts_of_fp8_products_are_what_cuda_takes(T, K, N):
    """A GPU's own checks without a GPU: operands of another layout, or of other sizes, are refused."""
    with FakeTensorMode():
        codes, scales = torch.empty(T, K, device="cuda").to(E4M3), torch.empty(T, 1, device="cuda")
        weight, scale = torch.empty(N, K, device="cuda").to(E4M3), torch.empty(1, 1, device="cuda")
        assert quantized.scaled_product(codes, scales, weight, scale).shape == (T, N)
        columns = torch.empty(K, N, device="cuda").to(E4M3)  # the bytes of weight.t(), row by row
        back = torch.empty(T, N, device="cuda").to(E4M3)
        assert quantized.scaled_product(back, scales, columns, scale).shape == (T, K)
        with pytest.raises(RuntimeError):
            narrow = torch.empty(N, K + 4, device="cuda").to(E4M3), torch.empty(T, K + 4, device="cuda").to(E4M3)
            quantized.scaled_product(narrow[1], scales, narrow[0], scale)


# -- Kernels


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_plain_forms(shape, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts to bf16 where a GPU rounds")
    w = gaussian(*shape).to(DEVICE)
    for kind in ("int8", "nf4"):
        q = quantise(w, kind, dtype)
        assert torch.equal(quantized.dequantise_by_kernel(q, dtype), q.dequantise(dtype)), kind
    codes, scales = quantized.round_rows_by_kernel(w.to(dtype))
    expected, expected_scales = rounded_rows(w.to(dtype))
    assert torch.equal(scales, expected_scales)
    if DEVICE == "cuda":  # the interpreter cuts to e4m3, too
        apart = (codes.float() - expected.float()).abs()  # a product with the reciprocal may fall on the other side
        assert (apart <= 0.13 * expected.float().abs()).all() and (apart > 0).float().mean() < 0.01


@pytest.mark.skipif(DEVICE == "cpu", reason="torch._scaled_mm of 2.11 has no row scales on a CPU")
@pytest.mark.parametrize("T, N, K", [(600, 512, 256), (1025, 128, 1392)])
def test_fp8_products_on_a_gpu_multiply_the_codes(T, N, K):
    """Against the dequantised numbers in float64, and the transposed bytes."""
    q = quantise(gaussian(N, K).to(DEVICE), "fp8", torch.bfloat16)
    x, g, bias = (gaussian(*shape, seed=3).to(DEVICE, torch.bfloat16) for shape in ((T, K), (T, N), (N,)))
    assert quantized.multiplies_codes(x, q) and quantized.transposed(q.codes).equal(q.codes.t())
    whole = q.dequantise(torch.float32).double()
    exact = [(codes.float() * scales).double() for codes, scales in map(rounded_rows, (x, g))]
    for out, expected in (
        (quantized.product(x, q, bias), exact[0] @ whole.T + bias.double()),
        (quantized.product_back(g, q, x.clone()), exact[1] @ whole + x.double()),
    ):
        assert (out.double() - expected).norm() <= 5e-3 * expected.norm()


@needs_triton
@pytest.mark.parametrize("kind", BASE_DTYPES)
@pytest.mark.parametrize("name, K, split", [("qkv", 256, 1), ("o", 200, 2), ("gate_up", 256, 1), ("down", 384, 3)])
def test_a_decoding_product_equals_the_plain_form(kind, name, K, split):
    """Five rows padded to 16, adapters of rank 16; float32 in the interpreter, bf16 on a GPU."""
    on_gpu, R, eps = DEVICE == "cuda", 5, 1e-6
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = {"qkv": [64, 32, 32], "o": [96], "gate_up": [80, 80], "down": [70]}[name]
    make = lambda *shape, seed=0: gaussian(*shape, seed=seed).to(DEVICE, dtype)
    stack = []
    for seed, n in enumerate(sizes):
        weight = make(n, K, seed=seed) / 16
        weight = weight if kind == "bf16" else quantise(weight, kind, dtype)
        bias = make(n, seed=seed + 4) if name == "qkv" else None
        stack.append(Weights(weight, bias, make(16, K, seed=seed + 5) / 16, make(n, 16, seed=seed + 8), 0.5))
    x, residual, norm = make(R, K, seed=20), make(R, sum(sizes), seed=21), make(sum(sizes), seed=22)
    adapters = decoder.Adapters([{stack_name: stack for stack_name in decoder.STACKS}], x)
    A, B = adapters.A[name][0], adapters.B[name][0]
    stored = [w.weight if kind == "bf16" else w.weight.codes for w in stack]
    scales = [None if kind == "bf16" else w.weight.scales for w in stack]
    cells = [*stored, *[None] * (3 - len(stack)), *scales, *[None] * (3 - len(stack)), A, B, norm]
    table = torch.tensor([0 if t is None else t.data_ptr() for t in cells], device=DEVICE)
    real = {"device": DEVICE, "dtype": torch.float32}
    squares = torch.zeros(2, 16, **real)  # of two pieces of x
    squares[:, :R] = x.float().square().view(R, 2, -1).sum(2).T
    has_norm, swiglu, has_residual = name in ("qkv", "gate_up"), name == "gate_up", name in ("o", "down")
    N, tile = sizes[0] if swiglu else sum(sizes), 32
    out, scaled = torch.empty(R, N, device=DEVICE, dtype=dtype), torch.empty(R, N, device=DEVICE, dtype=dtype)
    numbers = lambda *shape: torch.zeros(*shape, device=DEVICE, dtype=torch.int32)
    ssq_out, ready, ranks = torch.zeros(-(-N // tile), 16, **real), numbers(4), 16 * len(stack)
    taken, x_scale = x, torch.empty(R, **real)
    if kind == "fp8":
        codes, factor = rounded_rows(x)
        taken, x_scale = codes.to(dtype), factor.flatten()
    parts = sizes[:2] if name == "qkv" else [N, 0]
    linears.linear_kernel[(-(-N // tile) * split + ranks // 16 * 2,)](
        taken, x_scale, x, table, 0, 2, torch.cat([w.bias for w in stack]) if name == "qkv" else x, squares, out,
        residual, ssq_out, scaled, quantized.pairs(x.device), torch.empty(split * 16 * 32 * 8, **real), numbers(64),
        torch.empty(16, ranks, device=DEVICE, dtype=dtype), torch.empty(2 * 16 * ranks, **real), numbers(8), ready, R,
        eps, N=N, N_0=parts[0], N_1=parts[1], K=K, KIND=linears.KINDS[kind], STRIDE=stored[0].shape[1],
        SLOTS=2 * has_norm, BLOCK_SLOTS=2, R_PAD=16, BIAS=name == "qkv", SWIGLU=swiglu, RESIDUAL=has_residual,
        SPLIT=split, RANK=16, RANKS=ranks, H_SPLIT=2, BLOCK_M=16, BLOCK_N=tile, BLOCK_K=128, AHEAD=0,
        ASM=on_gpu, PDL=False,
    )  # fmt: skip
    assert ready.tolist() == [0, 0, ranks // 16, 0]
    exact = [w._replace(**{f: None if t is None else t.float() for f, t in zip("AB", (w.A, w.B))}) for w in stack]
    exact = [w._replace(weight=w.weight.float() if kind == "bf16" else w.weight) for w in exact]
    factor = (x.float().square().mean(1, keepdim=True) + eps).rsqrt() if has_norm else 1
    outs = qwen.linear(x.float(), *(w._replace(bias=None) for w in exact))
    outs = [y * factor + (0 if w.bias is None else w.bias.float()) for y, w in zip(outs, exact)]
    expected = qwen.swiglu(*outs) if swiglu else torch.cat(outs, 1)
    expected = expected + residual.float() if has_residual else expected
    bound = 0.01 if on_gpu else 1e-4
    assert (out.float() - expected).norm() <= bound * expected.norm()
    if has_residual:
        assert (scaled.float() - expected * norm.float()).norm() <= bound * (expected * norm.float()).norm()
        assert torch.allclose(ssq_out.sum(0)[:R], out.float().square().sum(1), rtol=1e-3)


# -- Models


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


@pytest.mark.parametrize("size, kind, gib", [("3B", "int8", 4.41), ("7B", "nf4", 6.52), ("72B", "nf4", 40.70)])
def test_memory_of_a_base_at_its_released_size(size, kind, gib):
    """By arithmetic, made with other code; tower and embeddings in bf16."""
    with torch.device("meta"):
        model = qwen.Qwen2_5_VL(model_config(size)).to(torch.bfloat16)
    quantise_base(model, kind)
    counts = count(model)
    assert abs((2 * counts.base + counts.low_bit) / 2**30 - gib) < 0.01


def test_a_low_bit_model_moves_and_names_what_is_not_finite(tmp_path):
    model = model_of("nf4")
    scales = model.model.layers[0].mlp.up_proj.weight.scales
    model.to(torch.bfloat16)
    q = model.model.layers[0].mlp.up_proj.weight
    assert q.dtype == torch.bfloat16 and q.scales.equal(scales) and q.codes.dtype == torch.uint8
    scales[1, 0] = float("nan")
    assert not_finite(model) == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("size", [1e-6, 0.05])
def test_the_sampler_sees_the_smallest_adapter(kind, size):
    """Log-probs of what was sampled are the training forward's, with an adapter as after one step at such a rate."""
    model = model_of(kind)
    lora.inject(model, LoraArgs(lora_rank=4))
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            layer.lora_B.normal_(0, size)
    packed = pack_sequences([Sequence(model.config, CASES["video"])]).to(DEVICE)
    rows = generate(model, packed, Sampling(8), 3, torch.Generator(DEVICE).manual_seed(0))[0]
    again = generate(model, packed, Sampling(8), 3, torch.Generator(DEVICE).manual_seed(0), decoder=PlainDecoder)[0]
    for row, slow in zip(rows, again):
        assert row.ids == slow.ids
        assert torch.allclose(torch.tensor(row.logprobs), torch.tensor(slow.logprobs), atol=1e-4)


# -- Runs


def test_a_run_on_a_low_bit_base_is_resumed_asked_and_merged(sft, base, tmp_path, capsys):
    """Adapter, state and infer.py name the base; merging leaves the original weights under it unless told otherwise."""
    whole = sft("whole", base_dtype="nf4", max_steps=4, save_steps=2)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-4")
    with pytest.raises(UserError, match="a nf4 base, got --base_dtype int8; give nf4"):
        sft("again", base_dtype="int8", max_steps=4, resume=True)
    release_run()
    again = sft("again", base_dtype="nf4", max_steps=4, resume=True)
    assert column(again, "loss") == column(whole, "loss")
    folder = whole / "checkpoint-4"
    assert json.loads((folder / "adapter_config.json").read_text())["base_dtype"] == "nf4"
    assert json.loads((folder / "trainer_state.json").read_text())["config"]["base_dtype"] == "nf4"
    assert json.loads((whole / "run.json").read_text())["config"]["base_dtype"] == "nf4"
    assert {q.kind for q in quantized_weights(infer.Model(folder).network).values()} == {"nf4"}
    assert not quantized_weights(infer.Model(folder, base_dtype="bf16").network)
    capsys.readouterr()
    tensors = {}
    for kind in ("original", "quantised"):
        lora.main(["merge", str(folder), str(tmp_path / kind), "--merge_base", kind])
        assert f"{kind if kind == 'original' else 'nf4'} weights" in (out := capsys.readouterr().out), out
        assert float(out.split("adapter: median ")[1].split(",")[0]) > 0.1
        tensors[kind] = load_file(tmp_path / kind / "model.safetensors")
    _, adapters = adapter_files.read_adapter(folder)
    q = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"
    delta = 2 * adapters[q + "B.weight"] @ adapters[q + "A.weight"]  # alpha 32 over rank 16
    name = "model.layers.0.mlp.up_proj.weight"
    original = load_file(base / "tiny/model.safetensors")[name].float()
    low = quantise(original, "nf4", torch.float32).dequantise(torch.float32)
    for kind, weight in (("original", original), ("quantised", low)):
        assert tensors[kind][name].equal((weight + delta).to(torch.bfloat16)), kind


@pytest.mark.parametrize(
    "flags", [{"freeze_llm": False, "llm_lora": False}, {"lora_enable": False, "tune_merger": True}]
)
def test_a_low_bit_base_is_not_trained_itself(sft, flags):
    with pytest.raises(UserError, match="--base_dtype: found 'int8', expected bf16"):
        sft("run", base_dtype="int8", **flags)

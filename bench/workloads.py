"""What the benchmarks share: Qwen2.5-VL's released shapes with random weights, packed batches of made-up clips, the
machine's measured ceilings and arithmetic floors, medians, the table, and transformers' model as the peer.

    S   the smallest real use: a 2x4x4 grid (8 video tokens), 72 prompt tokens, 128 answer tokens
    R   a real clip: 16 frames of 252x420, grid 8x18x30 (1,080 video tokens), 82 prompt tokens, 256 completion tokens
    E   the embedded model's own, for a CPU: 8 frames of 56x56, grid 4x4x4 (16 video tokens), 101 prompt tokens and a
        chain of thought of 80
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from adapter_files import hf_name
from bench.flops import head_flops, language_flops, vision_flops
from lora import adapter_blocks, targets
from model.fast.graphs import GraphCache
from model.loading import ModelConfig, random_model
from model.packed import IGNORE, Packed, Segments
from model.qwen import Qwen2_5_VL, normalise_patches
from model.rope import mrope_position_ids
from video import Options, frame_size

LONG = 10  # seconds
TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"

# hidden, MLP, layers, heads, kv heads, rows of the embedding, tied, merger's output; config.json of each hub repository
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def config_dict(size: str) -> dict:
    """config.json of Qwen2.5-VL-{size}-Instruct, as far as the model reads it."""
    C, inner, L, H, K, V, tied, vision_inner = SIZES[size]
    vision = dict(
        model_type="qwen2_5_vl", depth=32, hidden_size=1280, num_heads=16, intermediate_size=vision_inner,
        out_hidden_size=C, in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
    )  # fmt: skip
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_size=C,
        intermediate_size=inner, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, vocab_size=V,
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        hidden_act="silu", max_position_embeddings=128000, tie_word_embeddings=tied, vision_config=vision,
        vision_start_token_id=151652, vision_end_token_id=151653, image_token_id=151655, video_token_id=151656,
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


def model_config(size: str = "3B") -> ModelConfig:
    """A released size, or `tiny`: the embedded model's shape."""
    return ModelConfig.from_folder(TINY) if size == "tiny" else ModelConfig.from_dict(config_dict(size))


@dataclass
class Workload:
    """One sample's size: its clip's grid (patches), text tokens around it, tokens to be answered."""

    grid: tuple[int, int, int]
    prompt: int  # text tokens of the prompt, vision start and end included
    completion: int

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4

    @property
    def prompt_tokens(self) -> int:
        return self.prompt + self.video_tokens


S = Workload((2, 4, 4), 72, 128)
R = Workload((8, 18, 30), 82, 256)
E = Workload((4, 4, 4), 101, 80)
NAMED = {"S": S, "R": R, "E": E}


def random_prompt(config: ModelConfig, work: Workload, generator: torch.Generator):
    """-> (ids list, positions (3, Lp), patches (P, 1176) uint8)."""
    words = torch.randint(0, min(150_000, config.vision_start_token_id), (work.prompt,), generator=generator).tolist()
    ids = words[:20] + [config.vision_start_token_id] + [config.video_token_id] * work.video_tokens
    ids += [config.vision_end_token_id] + words[22:]
    positions = torch.from_numpy(mrope_position_ids(ids, [work.grid], [1.0], config))
    t, h, w = work.grid
    return ids, positions, torch.randint(0, 256, (t * h * w, 1176), generator=generator, dtype=torch.uint8)


def sft_batch(config: ModelConfig, work: Workload, batch: int, seed: int = 0) -> Packed:
    """`batch` samples packed; targets on the answer only."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions, patches, targets = [], [], [], []
    for _ in range(batch):
        prompt, place, pixels = random_prompt(config, work, generator)
        answer = torch.randint(0, 1000 if config.vocab_size > 1000 else 200, (work.completion,), generator=generator)
        ids.append(torch.cat([torch.tensor(prompt), answer]))
        after = place.max() + 1 + torch.arange(work.completion)
        positions.append(torch.cat([place, after.expand(3, -1)], dim=1))
        target = torch.full_like(ids[-1], IGNORE)
        target[len(prompt) - 1 : -1] = answer
        targets.append(target)
        patches.append(pixels)
    return Packed(
        torch.cat(ids), torch.cat(positions, 1), Segments.causal([len(i) for i in ids]), torch.cat(patches),
        [work.grid] * batch, torch.cat(targets),
    )  # fmt: skip


def prompt_batch(config: ModelConfig, work: Workload, prompts: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    made = [random_prompt(config, work, generator) for _ in range(prompts)]
    return Packed(
        torch.tensor([i for m in made for i in m[0]]), torch.cat([m[1] for m in made], 1),
        Segments.causal([len(m[0]) for m in made]), torch.cat([m[2] for m in made]), [work.grid] * prompts,
    )  # fmt: skip


def sync(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(function, device, repeats: int = 5, warmup: int = 2) -> tuple[float, float, float]:
    """(median, min, max) seconds of function(), the device waited for."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        function()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def ceilings(device) -> tuple[float, float]:
    """This machine's measured matrix rate (FLOP/s) and copy rate (bytes/s, read + write)."""
    cuda = torch.device(device).type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matrix = 2 * n**3 / timed(lambda: a @ b, device)[0]
    x = torch.empty((4 << 30) if cuda else (64 << 20), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return matrix, 2 * x.numel() / timed(lambda: y.copy_(x), device)[0]


def forward_flops(config: ModelConfig, work: Workload, group: int = 1, head_tokens: int = 0) -> float:
    """Arithmetic of one pass over a clip, its prompt once, `group` completions of it, and the head for some tokens."""
    language = language_flops(config, work.prompt_tokens, [work.completion] * group)
    return vision_flops(config, work.grid) + language + head_flops(config, head_tokens)


def step_bytes(model, work: Workload, N: int, G: int, mean_own: float) -> float:
    """Fewest bytes of a decoding step: layers and head once, a prompt's keys and values once, a row's own once."""
    config, size = model.config, model.head_weight.element_size()
    layers = sum(p.numel() for p in model.model.layers.state_dict().values())
    merged = sum(a.block.adapters.numel() for a in adapter_blocks(model) if a.block in [*model.model.layers])
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    own = token * N * (work.prompt_tokens + G * mean_own)
    return size * (layers - merged + model.head_weight.numel() + own)  # sampling merges adapters into the weights


def linear_flops(config: ModelConfig, work: Workload, head_tokens: int, recompute: bool, group: int = 1) -> float:
    """Arithmetic floor of one sample's (or group's) training step: products with frozen weights (forward, gradient to
    the input, and forward again under recomputation) and attention's; adapters and everything elementwise left out.
    The head goes three times, for its logits are not kept."""
    head = forward_flops(config, work, group, head_tokens) - forward_flops(config, work, group)
    return (3 if recompute else 2) * forward_flops(config, work, group) + 3 * head


# -- Command line


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that sft.py, grpo.py and vision.py share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    size = "3B" if cuda else "tiny"
    parser.add_argument("--model", default=size, choices=[*SIZES, "tiny"], help=f"shape, random weights; here {size}")
    told = "S R (on a CPU E S R), and own where a size is given"
    parser.add_argument("--work", nargs="+", choices=[*NAMED, "own"], help=told)
    own = parser.add_argument_group("own workload; what is not given is R's")
    own.add_argument("--frames", type=int, nargs="+", help="one row each")
    own.add_argument("--size", help="HEIGHTxWIDTH of a frame in pixels, or budget: 360x640 within the pixel budget")
    own.add_argument("--prompt", type=int, help="text tokens")
    own.add_argument("--completion", type=int, help="tokens answered")
    own.add_argument("--group", type=int, default=8, help="completions of a prompt (GRPO)")
    own.add_argument("--batch", type=int, help="samples, clips or prompts a step")
    parser.add_argument("--recompute", type=yes_no, default=cuda, metavar="True|False", help="activation recomputation")
    parser.add_argument("--cuda_graphs", type=yes_no, default=cuda, metavar="True|False", help="captured passes")
    parser.add_argument("--lora_rank", type=int, default=64 if cuda else 16, help="alpha is the same")
    parser.add_argument("--memory_limit_gib", type=float, help="hold this process to so much GPU memory")
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    parser.add_argument("--peer", action="store_true", help="the usual software on the same work, in the same run")
    return parser


def yes_no(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected True or False")
    return text.lower() in ("true", "1")


def chosen(args) -> list[tuple[str, Workload]]:
    """[(name, workload)]: S and R, E on a CPU, and one for every --frames if any size of one's own is given."""
    given = any(x is not None for x in (args.frames, args.size, args.prompt, args.completion, args.batch))
    usual = (["S", "R"] if torch.cuda.is_available() else ["E", "S", "R"]) + ["own"] * given
    found = []
    for name in args.work or usual:
        if name in NAMED:
            found.append((name, NAMED[name]))
            continue
        for frames in args.frames or [2 * R.grid[0]]:
            if args.size == "budget":
                h, w, _ = frame_size("video", 360, 640, frames, Options())
            else:
                h, w = map(int, args.size.split("x")) if args.size else (14 * R.grid[1], 14 * R.grid[2])
            grid = frames // 2, h // 28 * 2, w // 28 * 2
            own = Workload(grid, args.prompt or R.prompt, args.completion or R.completion)
            found.append((f"{frames}f {h}x{w}", own))
    return found


# -- Table


# key of a row, heading, format, factor
COLUMNS = (
    ("work", "work", "<22", None), ("who", "who", "<19", None),
    ("seconds", "median s", "9.4f", 1), ("least", "min", "9.4f", 1), ("most", "max", "9.4f", 1),
    ("tokens_s", "tokens/s", "10.0f", 1), ("flop_s", "TFLOP/s", "8.4g", 1e-12), ("matrix_share", "of peak", "7.1%", 1),
    ("byte_s", "GB/s", "6.0f", 1e-9), ("copy_share", "of copy", "7.1%", 1), ("peak_gib", "GiB", "6.2f", 1),
    ("floor", "floor s", "9.2g", 1), ("ratio", "x floor", "7.2f", 1),
)  # fmt: skip


def print_row(row: dict | None) -> None:
    """One line of the table, `-` for what a row has not; None: the headings."""
    cells = []
    for key, heading, form, factor in COLUMNS:
        width, left = int("".join(c for c in form.split(".")[0] if c.isdigit())), form[0] == "<"
        value = heading if row is None else row.get(key, "-")
        text = value if isinstance(value, str) else format(value * factor, form)
        cells.append(text.ljust(width) if left else text.rjust(width))
    print("  ".join(cells), flush=True)


class Bench:
    """One benchmark's run: the machine and its ceilings, the model, the table as it grows, the JSON line at the end."""

    def __init__(self, name: str, args):
        self.name, self.args, self.rows = name, args, []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.matrix, self.copy = ceilings(self.device)
        if self.cuda:
            torch.cuda.empty_cache()
            if args.memory_limit_gib:
                total = torch.cuda.get_device_properties(self.device).total_memory
                torch.cuda.set_per_process_memory_fraction(args.memory_limit_gib * 2**30 / total)
        torch.manual_seed(0)
        self.config = model_config(args.model)
        self.model = random_model(self.config, self.device, self.dtype).requires_grad_(False)
        self.model.gradient_checkpointing = args.recompute
        self.model.ops.graphs = GraphCache() if self.cuda and args.cuda_graphs else None
        self.machine = torch.cuda.get_device_name() if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        print(f"{args.model} in {str(self.dtype)[6:]}, LoRA r={args.lora_rank}, recomputation {args.recompute}")
        print(f"{self.machine}, torch {torch.__version__}: product {self.matrix / 1e12:.3g} TFLOP/s, copy "
              f"{self.copy / 1e9:.0f} GB/s")  # fmt: skip
        print_row(None)

    def lora(self, kind):
        """kind: config.SFT or GRPO. Its settings with this run's adapters on every linear layer."""
        rank, recompute = self.args.lora_rank, self.args.recompute
        return kind(lora_rank=rank, lora_alpha=rank, gradient_checkpointing=recompute, learning_rate=1e-4)

    def measure(self, work: str, contestants: dict, tokens: int, flops: float = 0.0, **more) -> dict:
        """Time the functions of {who: function}, in turns, and print their rows: {who: row}.

        tokens and flops: of one call, the floor's arithmetic; more: see add. On a CPU also the processor's time, which
        other programs on the machine hardly change.
        """
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = {who: [] for who in contestants}
        try:
            warm = 1 + self.cuda  # turns that do not count
            while min(map(len, found.values())) < self.args.repeats:
                turn = {who: self.clock(function) for who, function in contestants.items()}
                if warm and max(wall for wall, _ in turn.values()) > LONG:
                    warm = 1  # of so long a turn, what happens only once is a small part
                for who, times in turn.items():
                    found[who] += [] if warm else [times]
                warm = max(0, warm - 1)
        except torch.OutOfMemoryError:
            return {who: self.add(work, who, note="out of memory") for who in contestants}
        rows = {}
        for who, times in found.items():
            wall, busy = zip(*times)
            spread = statistics.median(wall), min(wall), max(wall)
            rows[who] = self.add(work, who, spread, tokens, flops, cpu_seconds=statistics.median(busy), **more)
        return rows

    def sync(self) -> None:
        sync(self.device)

    def clock(self, function) -> tuple[float, float]:
        """(wall, processor) seconds of one call."""
        self.sync()
        start, busy = time.perf_counter(), time.process_time()
        function()
        self.sync()
        return time.perf_counter() - start, time.process_time() - busy

    def add(self, work, who, times=None, tokens=0, flops=0.0, floor=None, moved=0.0, **more) -> dict:
        """A row of the table. times: (median, min, max) seconds; moved: bytes; floor: seconds, or else by flops."""
        row = {"work": work, "who": who} | more
        if times:
            row |= dict(zip(("seconds", "least", "most"), times)) | {"floor": floor or flops / self.matrix}
            row |= {"tokens_s": tokens / times[0], "ratio": times[0] / row["floor"]}
        if times and flops:
            row |= {"flop_s": flops / times[0], "matrix_share": flops / times[0] / self.matrix}
        if times and moved:
            row |= {"byte_s": moved / times[0], "copy_share": moved / times[0] / self.copy}
        if times and self.cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self.rows.append(row)
        print_row(row)
        if "note" in row:
            print(f"    {row['note']}", flush=True)
        return row

    def close(self) -> None:
        """How often the peer's time is ours, then everything as one JSON object: the last line."""
        ours = {row["work"]: row for row in self.rows if row["who"] == "ours" and "seconds" in row}
        ratios = {}
        for row in self.rows:
            if row["who"] != "ours" and row["work"] in ours and "seconds" in row:
                mine = ours[row["work"]]
                shares = [f"least {row['least'] / mine['least']:.2f} x"]
                if "cpu_seconds" in row and not self.cuda:
                    shares.append(f"processor time {row['cpu_seconds'] / mine['cpu_seconds']:.2f} x")
                ratios[f"{row['work']}: {row['who']}"] = ratio = row["seconds"] / mine["seconds"]
                print(f"{row['work']}: {row['who']} takes {ratio:.2f} x our time ({', '.join(shares)})")
        head = {"bench": self.name, "model": self.args.model, "machine": self.machine, "torch": torch.__version__}
        head |= {"matrix": self.matrix, "copy": self.copy, "args": vars(self.args)}
        print(json.dumps(head | {"peer_over_ours": ratios, "results": self.rows}))


# -- The peer: transformers + PEFT


def peer_model(model: Qwen2_5_VL):
    """transformers' model on the same weights, which it shares; SDPA. `model` carries no adapters yet."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**model.config.raw))
    state = {}
    for name, tensor in model.state_dict().items():
        state[hf_name(name)] = tensor
    state.setdefault("lm_head.weight", model.head_weight.detach())
    found = peer.load_state_dict(state, strict=False, assign=True)
    assert not found.missing_keys and not found.unexpected_keys, found
    for module in peer.modules():  # angles are buffers that no checkpoint holds: made on meta, so made again
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            for name in ("inv_freq", "original_inv_freq"):
                if hasattr(module, name):
                    setattr(module, name, getattr(fresh, name).to(model.head_weight.device))
    return peer.requires_grad_(False)


def peft_model(model: Qwen2_5_VL, args, recompute: bool):
    """transformers + PEFT: adapters on the same layers, in the weights' dtype (PEFT alone would take float32)."""
    from peft import LoraConfig, get_peft_model

    peer = peer_model(model)
    if recompute:
        peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = [hf_name(name) for name in targets(model, args)]
    config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=names)
    return get_peft_model(peer, config, autocast_adapter_dtype=False).train()


def peer_inputs(config: ModelConfig, packed: Packed, batch: int, dtype) -> dict:
    """A batch of equally long samples (or prompts) as transformers' keyword arguments, on packed's device."""
    ids = packed.input_ids.view(batch, -1)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=2 * (ids == config.video_token_id).int(),
        pixel_values_videos=normalise_patches(packed.patches, dtype), second_per_grid_ts=torch.ones(batch),
        video_grid_thw=torch.tensor(packed.grid_thw, device=ids.device),
    )  # fmt: skip

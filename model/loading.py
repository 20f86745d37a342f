"""A model from config.json and safetensors, and back: hub folders in, hub folders out.

Module names are the hub checkpoint's own, so loading needs no map beyond the two prefixes that transformers 4.52
introduced (`model.visual.*`, `model.language_model.*`). Sizes are read from config.json, never from defaults.
"""

import json
import os
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model import UserError, nearest_path
from model.quantized import LOW_BIT, put, quantise, quantized_weights
from model.qwen import Qwen2_5_VL

SHARD_BYTES = 5 << 30  # 5 GB a file, the habit of the hub


@dataclass
class VisionConfig:
    """`vision_config` of config.json. Defaults, for keys that hub files leave out, are transformers'
    Qwen2_5_VLVisionConfig's (configuration_qwen2_5_vl.py)."""

    hidden_size: int
    out_hidden_size: int
    intermediate_size: int
    depth: int = 32
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    tokens_per_second: float = 4
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    initializer_range: float = 0.02


@dataclass
class ModelConfig:
    """config.json, flat (hub files) or with a `text_config` (transformers >= 4.52)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    vision: VisionConfig
    initializer_range: float = 0.02
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was read; save_model writes it back

    @cached_property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @cached_property
    def vision_token_ids(self) -> list[int]:
        """Tokens that stand for pictures: never sampled."""
        ids = {self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id}
        if self.image_token_id == self.vision_end_token_id + 2:  # <|vision_pad|> between them has no key in config.json
            ids.add(self.vision_end_token_id + 1)
        return sorted(ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        path = Path(folder) / "config.json"
        if not path.exists():
            raise UserError(f"{folder}: no config.json in this folder; expected a Qwen2.5-VL checkpoint")
        return cls.from_dict(read_object(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config") -> "ModelConfig":
        """UserError for a config.json of another model, and for sizes that are missing or that no such model has."""
        for name in ("text_config", "vision_config", "rope_parameters", "rope_scaling"):
            if not isinstance(raw.get(name) or {}, dict):
                raise UserError(f"{source}: {name} is {str(raw[name])[:80]}, expected an object")
        text, vision = {**raw, **(raw.get("text_config") or {})}, raw.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        supported = [
            ("model_type", raw.get("model_type"), ("qwen2_5_vl",)),
            ("rope_scaling type", rope.get("type"), ("mrope", "default", None)),
            ("rope_scaling rope_type", rope.get("rope_type"), ("mrope", "default", None)),
            ("use_sliding_window", text.get("use_sliding_window"), (False, None)),
            ("hidden_act", text.get("hidden_act"), ("silu", None)),
            ("vision_config's hidden_act", vision.get("hidden_act"), ("silu", None)),
        ]
        for name, value, allowed in supported:
            if value not in allowed:
                expected = f"expected {allowed[0]}; this model is not supported"
                raise UserError(f"{source}: {name} is {str(value)[:80]}, {expected}")
        text["mrope_section"] = rope.get("mrope_section")
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
        text["tie_word_embeddings"] = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        text["vision"] = fill(VisionConfig, {"in_channels": vision.get("in_chans", 3)} | vision, source)
        return fill(cls, text | {"raw": raw}, source)


def fill(kind, values: dict, source: str):
    """A config dataclass from the values of its fields. UserError before anything of a nonsensical size is made."""
    values = {f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None}
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise UserError(f"{source}: missing {', '.join(sorted(missing))}; expected a Qwen2.5-VL config.json")
    for f in fields(kind):
        value, most = values.get(f.name, f.default), 1000 if f.name in ("num_hidden_layers", "depth") else 2**20
        if f.type is int and not (type(value) is int and 0 < value <= most):
            raise UserError(f"{source}: {f.name} is {str(value)[:80]}, expected a whole number from 1 to {most}")
        if f.type is float and not (isinstance(value, (int, float)) and 0 <= value < 1e12):
            raise UserError(f"{source}: {f.name} is {str(value)[:80]}, expected a number")
    return kind(**values)


# -- Models


def load_model(
    model_id: str | Path,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
    base_dtype: str = "bf16",
) -> Qwen2_5_VL:
    """A checkpoint's folder or hub id -> the model, with the fast operations of its device. All weights have
    requires_grad. Tensors go one by one from the file to their device and dtype. base_dtype: one of
    quantized.BASE_DTYPES, the format of the decoder layers' linears; bf16 stands for dtype.

    UserError that names every missing, surplus or misshapen tensor.
    """
    folder = resolve_folder(model_id, local_files_only)
    with torch.device("meta"):
        model = Qwen2_5_VL(ModelConfig.from_folder(folder)).to(dtype)
    expected, tensors, surplus = dict(model.state_dict()), {}, []
    for file in shard_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for key in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                    name = module_name(key)
                    if name == "lm_head.weight" and model.config.tie_word_embeddings:
                        continue  # a second copy of the embedding, written by some exporters
                    if name in expected:
                        tensor = shard.get_tensor(key).to(device)
                        low = base_dtype != "bf16" and LOW_BIT.fullmatch(name) and tensor.dim() == 2
                        tensors[name] = quantise(tensor, base_dtype, dtype) if low else tensor.to(dtype)
                    else:
                        surplus.append(key)
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    check_tensors(folder, expected, tensors, surplus)
    for name, tensor in tensors.items():
        put(model, name, tensor)
    model.base_dtype = base_dtype
    model.ops.bind(model.head_weight)
    return model.requires_grad_(True)


def random_model(
    config: "ModelConfig",
    device="cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    base_dtype: str = "bf16",
) -> Qwen2_5_VL:
    """A model of this shape with random weights, N(0, initializer_range^2) for matrices, as transformers starts one.
    Made on its device tensor by tensor, quantised as in load_model, with the fast operations of the device."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in list(model.named_parameters()):
        tensor = torch.empty(p.shape, device=device, dtype=dtype)
        std = (config.vision if name.startswith("visual") else config).initializer_range
        if p.dim() > 1:
            tensor.normal_(0.0, std, generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        low = base_dtype != "bf16" and LOW_BIT.fullmatch(name)
        put(model, name, quantise(tensor, base_dtype, dtype) if low else tensor)
    model.base_dtype = base_dtype
    model.ops.bind(model.head_weight)
    return model


def save_model(model: Qwen2_5_VL, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors shards under hub names; transformers and load_model read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(((name, t.to("cpu", dtype or t.dtype)) for name, t in model.state_dict().items()), folder)
    (folder / "config.json").write_text(json.dumps(model.config.raw, indent=2) + "\n")


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Names of the tensors that hold a NaN or an Inf: a low-bit weight's scales do then. One wait for the device."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {name: weight.scales for name, weight in quantized_weights(model).items()}
    names, largest = list(tensors), torch._foreach_norm(list(tensors.values()), torch.inf)  # of a NaN: NaN
    return [name for name, finite in zip(names, torch.stack(largest).isfinite().tolist()) if not finite]


# -- Files


def module_name(key: str) -> str:
    """A checkpoint's tensor name as ours: transformers >= 4.52 prefixes -> the hub's."""
    if key.startswith("model.visual."):
        return key.removeprefix("model.")
    if key.startswith("model.language_model."):
        return "model." + key.removeprefix("model.language_model.")
    return key


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. UserError for anything else; nothing that is no file is opened."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; expected JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download or save the checkpoint again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: weight_map is no object of file names; download the checkpoint again")
        names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"{index}: shard {name!r} is not a plain file name; do not trust this checkpoint")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing or no regular file; download the checkpoint again")
    return [folder / name for name in names]


def save_tensors(tensors: dict, path: Path) -> None:
    """A safetensors file that may be read by whom other new files may be: safetensors makes it for its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_shards(tensors, folder: Path, limit: int | None = None) -> list[str]:
    """(name, CPU tensor) one after the other -> model.safetensors, or several files and their index; their names.

    limit: bytes a file at most, if a tensor alone is not larger; no more than one file's tensors are held in memory.
    """
    limit, shard, shards, size = limit or SHARD_BYTES, {}, [], 0

    def flush():
        save_tensors(shard, folder / f".model-{len(shards)}.tmp")
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name], size = tensor.contiguous(), size + tensor.nbytes
    flush()
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = files if count > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        (folder / f".model-{i}.tmp").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, sizes in zip(files, shards) for name in sizes}
        index = {"metadata": {"total_size": sum(sum(s.values()) for s in shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def check_tensors(folder, expected: dict, tensors: dict, surplus: list[str]) -> None:
    """UserError that names what is missing, surplus or misshapen. expected, tensors: {name: tensor}."""
    wrong = [f"missing {n}" for n in expected if n not in tensors]
    wrong += [f"surplus {n}" for n in surplus]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)}, expected {tuple(expected[n].shape)}"
        for n in tensors if tensors[n].shape != expected[n].shape
    ]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(wrong[:8])}{more}")


def resolve_folder(model_id: str | Path, local_files_only: bool = False, weights: bool = True) -> Path:
    """A checkpoint's folder: the path itself, or the hub's snapshot, downloaded at need (weights or not)."""
    if Path(model_id).is_dir():
        return Path(model_id)
    name = str(model_id)
    own = Path(__file__).resolve().parents[1] / name
    if own.is_dir():  # assets/tiny, from whichever folder the script was started in
        return own
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        expected = f"expected a checkpoint's folder or 'owner/name'{nearest_path(name)}"
        raise UserError(f"{name}: no such folder, and not a hub id; {expected}")
    from huggingface_hub import snapshot_download  # slow to import, needed only here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        message = f"not a local folder, and the hub gave nothing ({reason}); download it: hf download {name}"
        raise UserError(f"{name}: {message}{nearest_path(name)}") from None

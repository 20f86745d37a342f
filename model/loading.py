"""A model from config.json and safetensors, and back: hub folders in, hub folders out.

Module names are the hub checkpoint's own, so loading needs no map beyond the two prefixes that transformers 4.52
introduced (`model.visual.*`, `model.language_model.*`). Sizes are read from config.json, never from defaults.
"""

import json
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import lcm
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import UserError, nearest_path
from model.quantized import EMBEDDING, HEAD, HostEmbedding, format_of, put, quantise, quantized_weights
from model.qwen import Qwen2_5_VL


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
    vision: VisionConfig
    tie_word_embeddings: bool = False
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
        if not path.is_file():
            problem = f"{folder}: no config.json in it, expected a model's folder"
            raise UserError(f"{problem}; an adapter or a run is given as --model_ckpt, a whole model as checkpoint-N")
        return cls.from_dict(read_object(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config") -> "ModelConfig":
        """UserError for a config.json of another model, and for sizes that are missing or that no such model has."""
        try:
            # transformers 4.52 to 4.56 repeat image_token_id in text_config, as null
            own = {key: value for key, value in (raw.get("text_config") or {}).items() if value is not None}
            text, vision = raw | own, {"in_channels": 3} | raw["vision_config"]
            rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
            text |= {"mrope_section": rope.get("mrope_section"), "vision": fill(VisionConfig, vision), "raw": raw}
            for name, value, allowed in [
                ("model_type", raw.get("model_type"), ("qwen2_5_vl",)),
                ("rope_scaling type", rope.get("rope_type", rope.get("type")), ("mrope", "default", None)),
                ("use_sliding_window", text.get("use_sliding_window"), (False, None)),
                ("hidden_act", text.get("hidden_act"), ("silu", None)),
                ("vision_config's hidden_act", vision.get("hidden_act"), ("silu", None)),
            ]:
                if value not in allowed:
                    raise ValueError(f"{name} is {value}, expected {allowed[0]}")
            tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")  # before 5 the latter counted
            config = fill(cls, {"rope_theta": rope.get("rope_theta")} | text | {"tie_word_embeddings": tied})
            for name, size, unit in [
                ("hidden_size", config.hidden_size, 8 * config.num_attention_heads),  # 8: adapters.ALIGN
                ("num_attention_heads", config.num_attention_heads, config.num_key_value_heads),
                ("vision_config's hidden_size", config.vision.hidden_size, lcm(8, 4 * config.vision.num_heads)),
            ]:
                if size % unit:
                    raise ValueError(f"{name} is {size}, expected a multiple of {unit}")
            if 2 * sum(config.mrope_section) != config.head_dim:
                raise ValueError(f"mrope_section is {config.mrope_section}, expected a sum of {config.head_dim // 2}")
            return config
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{source}: no Qwen2.5-VL that is supported ({str(error)[:200]})") from None


def fill(kind, values: dict):
    """A config dataclass from the values of its fields. ValueError before anything of a nonsensical size is made."""
    values = {f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None}
    config = kind(**values)
    for f in fields(kind):
        value = getattr(config, f.name)
        if f.type is int and not (type(value) is int and 0 < value <= 2**20):
            raise ValueError(f"{f.name} is {value}, expected a whole number above 0")
    return config


# -- Models


def formats_of(cfg) -> dict:
    """How frozen weights are kept, by the options of a config: what `empty_model` and those below take."""
    return {name: getattr(cfg, name) for name in ("base_dtype", "head_dtype", "offload_embedding")}


def empty_model(config: ModelConfig, base_dtype="bf16", head_dtype="bf16", offload_embedding=False) -> Qwen2_5_VL:
    """Names and shapes, on the device `meta`. The formats are for `place`. UserError where the head is the embedding,
    which has to stay whole on the device."""
    if config.tie_word_embeddings and (head_dtype != "bf16" or offload_embedding):
        option = "offload_embedding" if offload_embedding else "head_dtype"
        problem = "the head of this model is its embedding (as in 3B), expected a head of its own (7B and larger)"
        raise UserError(f"--{option}: {problem}; leave it out")
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    model.base_dtype, model.head_dtype, model.offload_embedding = base_dtype, head_dtype, offload_embedding
    return model


def place(model: Qwen2_5_VL, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Give a model one of its weights in this dtype, or as its formats say of this one."""
    kind = format_of(name, model.base_dtype, model.head_dtype)
    if name == EMBEDDING and model.offload_embedding:
        if not tensor.is_meta:
            tensor = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda).copy_(tensor)
        model.model.embed_tokens = HostEmbedding(tensor)
    else:
        put(model, name, tensor.to(dtype) if kind == "bf16" else quantise(tensor, kind, dtype))


def place_all(model: Qwen2_5_VL) -> None:
    """Keep weights that are there already as the formats say; loading does it while they come."""
    for name, p in list(model.named_parameters()):
        place(model, name, p.detach(), p.dtype)


def load_model(model_id, device="cpu", dtype=torch.float32, local_files_only=False, **formats) -> Qwen2_5_VL:
    """A checkpoint's folder or hub id -> the model. Tensors go one by one from the file to their device and dtype.
    formats, of empty_model: base_dtype, one of quantized.BASE_DTYPES, of the decoder layers' linears; head_dtype, bf16
    or int8 (bf16 stands for dtype in both); offload_embedding.

    UserError that names missing, surplus and misshapen tensors.
    """
    folder = resolve_folder(model_id, local_files_only)
    model = empty_model(ModelConfig.from_folder(folder), **formats)
    expected, actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, {}
    for file in shard_files(folder):
        for name, tensor in read_tensors(file, device):
            if name == HEAD and model.config.tie_word_embeddings:
                continue  # a second copy of the embedding, written by some exporters
            actual[name] = tuple(tensor.shape)
            if actual[name] == expected.get(name):
                place(model, name, tensor.to(device), dtype)
    if actual != expected:
        raise UserError(f"{folder}: tensors do not fit config.json: {differences(actual, expected)}")
    model.ops.bind(model.head_weight)
    return model


def random_model(config: ModelConfig, device="cpu", dtype=torch.float32, seed=0, **formats) -> Qwen2_5_VL:
    """A model of this shape with random weights, N(0, initializer_range^2) for matrices, as transformers starts one.
    Made on its device tensor by tensor. formats: of empty_model."""
    model, generator = empty_model(config, **formats), torch.Generator(device).manual_seed(seed)
    for name, p in list(model.named_parameters()):
        tensor = torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0, device=device, dtype=dtype)
        if p.dim() > 1:
            std = (config.vision if name.startswith("visual") else config).initializer_range
            tensor.normal_(0.0, std, generator=generator)
        place(model, name, tensor, dtype)
    model.ops.bind(model.head_weight)
    return model


def write_tensors(tensors: dict, path: Path) -> None:
    """A safetensors file that others may read as far as they may read other new files; the library makes it private."""
    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def save_model(model: Qwen2_5_VL, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors under hub names; transformers and load_model read them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to("cpu", dtype or t.dtype).contiguous() for name, t in model.state_dict().items()}
    write_tensors(tensors, Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(model.config.raw, indent=2) + "\n")


@torch.no_grad()
def not_finite(model: Qwen2_5_VL) -> list[str]:
    """Names of the tensors that hold a NaN or an Inf: a low-bit weight's scales do then. One wait for the device."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {name: weight.scales for name, weight in quantized_weights(model).items()}
    names, largest = list(tensors), torch._foreach_norm(list(tensors.values()), torch.inf)  # of a NaN: NaN
    wrong = [name for name, finite in zip(names, torch.stack(largest).isfinite().tolist()) if not finite]
    if model.offload_embedding and not model.model.embed_tokens.weight.norm(torch.inf).isfinite():
        wrong.append(EMBEDDING)
    return wrong


# -- Files


def module_name(key: str) -> str:
    """A checkpoint's tensor name as ours: transformers >= 4.52 prefixes -> the hub's."""
    for theirs, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. UserError for anything else; nothing that is no file is opened."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else "no such file"
    except (OSError, ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {str(content)[:80]}; expected a file with a JSON object")
    return content


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there is one."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else ["weight_map"]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            source = index if index.exists() else folder
            raise UserError(f"{source}: {name} is missing, or is not a plain file name; download the checkpoint again")
    return [folder / name for name in names]


def read_tensors(file: Path, device="cpu"):
    """(our name, tensor) one after the other. UserError for a file that is cut off or no safetensors."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            for key in shard.keys():  # noqa: SIM118 (a file handle, not a dict)
                yield module_name(key), shard.get_tensor(key)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def differences(actual: dict, expected: dict) -> str:
    """What two {tensor's name: shape} do not share, in words: three at most."""
    wrong = [
        f"{name}: got {actual.get(name, 'no tensor')}, expected {expected.get(name, 'none of this name')}"
        for name in sorted(actual.keys() | expected.keys())
        if actual.get(name) != expected.get(name)
    ]
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def resolve_folder(model_id: str | Path, local_files_only: bool = False, weights: bool = True) -> Path:
    """A checkpoint's folder: the path itself, or the hub's snapshot, downloaded at need (weights or not)."""
    name = str(model_id)
    for folder in (Path(name), Path(__file__).resolve().parents[1] / name):  # assets/tiny, wherever the script began
        if folder.is_dir():
            return folder
    expected = f"expected a checkpoint's folder or 'owner/name'{nearest_path(name)}"
    no_id = UserError(f"{name}: no such folder, and not a hub id; {expected}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise no_id
    from huggingface_hub import snapshot_download  # slow to import, needed only here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except HFValidationError:  # a space in it, nothing behind the slash
        raise no_id from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"no such folder, and the hub gave nothing ({str(error).strip().splitlines()[0]})"
        raise UserError(f"{name}: {reason}; download it: hf download {name}{nearest_path(name)}") from None

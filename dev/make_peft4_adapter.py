"""Makes tests/peft4: an adapter as PEFT 0.14.0 saves it under transformers 4.51.3, and the logits it gives there.

Run by hand, never by the tests, in an environment of its own:
    pip install torch transformers==4.51.3 peft==0.14.0 av pytest && python dev/make_peft4_adapter.py
The base is not kept: its weights are arithmetic, so the tests make the same ones.
"""

# ruff: noqa: E402
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from conftest import config_dict
from safetensors.torch import save_file

from model.loading import ModelConfig, random_model, save_model

FOLDER = ROOT / "tests" / "peft4"
# text, a clip of one grid step (2 frames of 56x56, 4 merged tokens), text; ids of conftest's shapes
IDS = [5, 6, 7, 250, 254, 254, 254, 254, 251, 8, 9, 10]
GRID = (1, 4, 4)


def waves(shape, pitch):
    """Numbers between -0.3 and 0.3 that every machine makes alike."""
    count = torch.Size(shape).numel()
    return (0.3 * torch.sin(pitch * torch.arange(count, dtype=torch.float64))).to(torch.float32).reshape(shape)


def arithmetic_base(folder):
    """A small Qwen2.5-VL, written by us, for transformers and for us."""
    model = random_model(ModelConfig.from_dict(config_dict("tied")))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(waves(parameter.shape, 0.7 + 0.01 * i) + (1.0 if "norm" in name or "ln_q" in name else 0.0))
    save_model(model, folder)
    return folder


def patches():
    return waves((16, 1176), 0.31) * 5


def main():
    import peft
    import transformers

    assert (transformers.__version__, peft.__version__) == ("4.51.3", "0.14.0")
    with tempfile.TemporaryDirectory() as base:
        arithmetic_base(base)
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    options = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    targets = ["q_proj", "v_proj", "qkv", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options)).eval()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(p for p in model.named_parameters() if "lora_" in p[0]):
            parameter.copy_(waves(parameter.shape, 1.3 + 0.01 * i))
        clip = {"pixel_values_videos": patches(), "video_grid_thw": torch.tensor([GRID])}
        positions = torch.arange(len(IDS)).expand(3, 1, -1)
        logits = model(input_ids=torch.tensor([IDS]), position_ids=positions, **clip).logits[0]
    model.peft_config["default"].base_model_name_or_path = "arithmetic"
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink()
    save_file({"logits": logits[-2:].contiguous()}, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()

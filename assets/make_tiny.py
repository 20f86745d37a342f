"""Makes the tiny base checkpoint, assets/tiny. `make tiny` runs the whole recipe.

    python assets/make_tiny.py init OUT          a tokenizer and random weights
    python assets/make_tiny.py clips ...         generate.py's options: questions about balls, none about direction
    python train_sft.py --config configs/tiny_base.py
    python assets/make_tiny.py export RUN assets/tiny      bf16 weights and tokenizer, without the rest

The architecture is Qwen2.5-VL's with small numbers. initializer_range is 0.1: at this width transformers' 0.02 costs
twice the steps. tokens_per_second is 8, so that the four grid steps of a one-second clip of eight frames stand at times
0, 2, 4, 6; at the released 2 they would share two.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import generate
from checkpoint import newest_checkpoint
from clips import CORNERS, DIRECTIONS, FPS, OPTIONS, SIGNS, Clip, draw_clip, explain
from config import QUESTION, Generate, cli, parse
from model import UserError
from model.loading import ModelConfig, load_model, random_model, save_model

# The base task's labels, as often as their share: two clips towards corners for each along an axis
LABELS = (*DIRECTIONS, *CORNERS, *CORNERS)
SMALL, LARGE = 9.0, 14.0  # a ball below is called small, above large; between them its size is not asked

# Qwen2.5-VL's special tokens, in the order of its vocabulary (151643 to 151656 there)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# The pre-tokenizer of Qwen2's tokenizer.json: words, single digits, punctuation, spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's chat form for typed content parts; ours is rendered in data.py, this is for transformers' users
CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}\
{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# -- What the base is taught: sight, but never direction


def some_answer(rng: np.random.Generator) -> str:
    """An answer to the direction question about no clip in particular, in any of its forms."""
    label = str(rng.choice(list(DIRECTIONS)))
    if rng.random() < 0.5:
        return f"Answer: {OPTIONS[label]}"
    return explain(draw_clip(rng, label, 64, 30).track(), label, rng, int(rng.integers(0, 4)))


def base_turns(clip: Clip, rng: np.random.Generator, coordinates: bool = False) -> list[tuple[str, str]]:
    """Questions that need the same sight as direction does, but never direction itself: where to on a diagonal, along
    which axis, what it looks like. The echo turn shows the words of the direction answers, for LoRA leaves their
    embeddings frozen."""
    if clip.label in CORNERS:
        turns = [("Towards which corner does the ball move?", clip.label)]
    else:
        axis = "horizontally" if SIGNS[clip.label][0] else "vertically"
        turns = [("Does the ball move horizontally or vertically?", axis)]
    looks = [("What colour is the ball?", clip.ball), ("What colour is the background?", clip.background)]
    radius = clip.radius / max(1.0, clip.size / 64)
    if not SMALL <= radius <= LARGE:
        looks.append(("Is the ball small or large?", "small" if radius < SMALL else "large"))
    turns.append(looks[rng.integers(len(looks))])
    if coordinates:
        track = clip.track()
        k = rng.choice(np.flatnonzero(track.inside))
        turns.append((f"Where is the ball at {track.times[k]:.1f} s?", f"({track.xy[k, 0]:.0f}, {track.xy[k, 1]:.0f})"))
    echo = some_answer(rng)
    return [*turns, (f"Repeat: {echo}", echo)]


def task_texts(count: int = 2000, seed: int = 0) -> list[str]:
    """Texts of both tasks, `count` draws of each, for training a small tokenizer."""
    rng = np.random.default_rng([seed, 3])
    texts = [QUESTION, *(f"Answer: {option}" for option in OPTIONS.values())]
    for k in range(count):
        clip = draw_clip(rng, LABELS[k % 12], 64, 30)
        texts += [text for turn in base_turns(clip, rng, coordinates=True) for text in turn]
        texts.append(some_answer(rng))
    return texts


def base_dataset(cfg: Generate, out: Path, work: Path) -> tuple[dict, dict]:
    """generate.py's drawn_dataset with other labels and questions."""
    jobs = generate.plan(cfg, LABELS, stream=2)
    records = {"train": [], "val": []}
    for job, (clip, _) in zip(jobs, generate.make_clips(cfg, jobs, work / "videos"), strict=True):
        turns = base_turns(clip, np.random.default_rng([cfg.seed, 5, job.index]))
        entry = generate.record(job.name, f"{job.name}.mp4", turns, generate.facts_of(clip))
        records[job.split].append(entry)
    return records, {"fps": FPS, "counts": generate.count_labels(records), "cot": {}}


# -- The checkpoint


def make_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE as Qwen2's, trained on the tasks' own texts: any text can be written, theirs in few tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)  # last, as in Qwen's vocabulary
    return tokenizer


def config_dict(tokenizer: Tokenizer) -> dict:
    vision = dict(
        model_type="qwen2_5_vl", hidden_size=48, out_hidden_size=64, intermediate_size=144, depth=2, num_heads=2,
        in_chans=3, patch_size=14, spatial_patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
        tokens_per_second=8, window_size=112, fullatt_block_indexes=[1], hidden_act="silu", initializer_range=0.1,
    )  # fmt: skip
    ids = {n: tokenizer.token_to_id(f"<|{n}|>") for n in ("vision_start", "vision_end", "image_pad", "video_pad")}
    rows = -(-tokenizer.get_vocab_size() // 16) * 16  # the released models too have more rows than tokens
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_size=64,
        intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=rows,
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6]), hidden_act="silu",
        max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=True, torch_dtype="bfloat16",
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"), eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_config=vision,
    )  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and the small files beside it that transformers reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], model_max_length=4096, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    pixels = dict(
        min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor",
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")


def init(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(task_texts(), vocab_size=512)
    write_tokenizer(tokenizer, folder)
    model = random_model(ModelConfig.from_dict(config_dict(tokenizer)), seed=0)
    save_model(model, folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {count:,} random parameters, {tokenizer.get_vocab_size()} tokens")


def export(checkpoint: Path, folder: Path) -> None:
    """A trained checkpoint -> bf16 weights in one file, with the tokenizer it was trained with."""
    if not (checkpoint / "config.json").exists():  # a run's folder
        checkpoint = newest_checkpoint(checkpoint) or checkpoint
    model = load_model(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*"):
        stale.unlink()
    save_model(model, folder, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.2f} MB")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "init":
        return init(Path(sys.argv[2]))
    if len(sys.argv) > 2 and sys.argv[1] == "clips":
        return generate.generate(parse(Generate, sys.argv[2:]), base_dataset)
    if len(sys.argv) == 4 and sys.argv[1] == "export":
        return export(Path(sys.argv[2]), Path(sys.argv[3]))
    raise UserError("expected: make_tiny.py init FOLDER, make_tiny.py clips --…, or make_tiny.py export RUN FOLDER")


if __name__ == "__main__":
    cli(main)

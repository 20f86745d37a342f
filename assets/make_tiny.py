"""Makes the tiny base checkpoint, assets/tiny. `make tiny` runs the whole recipe.

    python assets/make_tiny.py init OUT          a tokenizer and random weights, for the settings in assets/tiny/*.json
    python assets/make_tiny.py clips ...         generate.py's options: questions about balls, none about direction
    python train_sft.py --config configs/tiny_base.py
    python assets/make_tiny.py export RUN assets/tiny      bf16 weights and tokenizer, without the rest

config.json is Qwen2.5-VL's with small numbers. initializer_range is 0.1: at this width transformers' 0.02 costs twice
the steps. tokens_per_second is 8, so that the four grid steps of a one-second clip of eight frames stand at times 0, 2,
4, 6; at the released 2 they would share two.
"""

import json
import shutil
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"
sys.path.insert(0, str(TINY.parents[1]))

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import generate
from checkpoint import newest_checkpoint
from clips import CORNERS, DIRECTIONS, FPS, OPTIONS, SIGNS, Clip, draw_clip, explain
from config import QUESTION, Generate, cli, parse
from model import UserError
from model.loading import ModelConfig, load_model, random_model, save_model

SETTINGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
LABELS = (*DIRECTIONS, *CORNERS, *CORNERS)  # the base task's, as often as their share: twice as many towards corners

# The pre-tokenizer of Qwen2's tokenizer.json: words, single digits, punctuation, spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def base_turns(clip: Clip, rng: np.random.Generator, coordinates: bool = False) -> list[tuple[str, str]]:
    """Questions that need the same sight as direction does, but never direction itself: where to on a diagonal, along
    which axis, what it looks like. The echo turn shows the words of the direction answers, for LoRA leaves their
    embeddings frozen."""
    axis = "horizontally" if SIGNS[clip.label][0] else "vertically"
    towards, along = "Towards which corner does the ball move?", "Does the ball move horizontally or vertically?"
    turns = [(towards, clip.label) if clip.label in CORNERS else (along, axis)]
    looks = [("What colour is the ball?", clip.ball), ("What colour is the background?", clip.background)]
    radius = clip.radius / max(1.0, clip.size / 64)
    if not 9 <= radius <= 14:  # between them its size is not asked
        looks.append(("Is the ball small or large?", "small" if radius < 9 else "large"))
    turns.append(looks[rng.integers(len(looks))])
    if coordinates:
        track = clip.track()
        k = rng.choice(np.flatnonzero(track.inside))
        turns.append((f"Where is the ball at {track.times[k]:.1f} s?", f"({track.xy[k, 0]:.0f}, {track.xy[k, 1]:.0f})"))
    echo = some_answer(rng)
    return [*turns, (f"Repeat: {echo}", echo)]


def some_answer(rng: np.random.Generator) -> str:
    """An answer to the direction question about no clip in particular, in any of its forms."""
    label = str(rng.choice(list(DIRECTIONS)))
    if rng.random() < 0.5:
        return f"Answer: {OPTIONS[label]}"
    return explain(draw_clip(rng, label, 64, 30), rng, int(rng.integers(0, 4)))


def base_dataset(cfg: Generate, out: Path, work: Path) -> tuple[list, dict]:
    """generate.py's drawn_dataset with other labels and questions."""
    jobs, records = generate.plan(cfg, LABELS, stream=2), []
    generate.write_clips(cfg, jobs, work / "videos")
    for i, job in enumerate(jobs):
        turns = base_turns(job.clip, np.random.default_rng([cfg.seed, 5, i]))
        entry = generate.record(job.name, f"{job.name}.mp4", turns, generate.facts_of(job.clip))
        records.append((job.split, entry))
    return records, {"fps": FPS, "cot": {}}


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE as Qwen2's, trained on draws of both tasks: any text can be written, theirs in few tokens."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = [settings["pad_token"], *settings["additional_special_tokens"]]
    rng = np.random.default_rng([0, 3])
    texts = [QUESTION, *(f"Answer: {option}" for option in OPTIONS.values())]
    for k in range(2000):
        clip = draw_clip(rng, LABELS[k % 12], 64, 30)
        texts += [text for turn in base_turns(clip, rng, coordinates=True) for text in turn]
        texts.append(some_answer(rng))
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    words = {"vocab_size": 512 - len(special), "initial_alphabet": byte_level.alphabet(), "min_frequency": 2}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **words))
    tokenizer.add_special_tokens(special)  # last, as in Qwen's vocabulary
    return tokenizer


def init(folder: Path) -> None:
    """assets/tiny's settings with a new tokenizer and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETTINGS:
        shutil.copyfile(TINY / name, folder / name)
    make_tokenizer(folder).save(str(folder / "tokenizer.json"))
    save_model(random_model(ModelConfig.from_folder(folder), seed=0), folder)


def export(checkpoint: Path, folder: Path) -> None:
    """A trained checkpoint, or a run's newest -> bf16 weights in one file, with the tokenizer it was trained with."""
    if not (checkpoint / "config.json").exists():
        checkpoint = newest_checkpoint(checkpoint) or checkpoint
    model = load_model(checkpoint)
    save_model(model, folder, dtype=torch.bfloat16)
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")


def main() -> None:
    match sys.argv[1:]:
        case ["init", folder]:
            init(Path(folder))
        case ["clips", *flags]:
            generate.generate(parse(Generate, flags), base_dataset)
        case ["export", run, folder]:
            export(Path(run), Path(folder))
        case _:
            raise UserError("expected: make_tiny.py init FOLDER, clips --…, or export RUN FOLDER")


if __name__ == "__main__":
    cli(main)

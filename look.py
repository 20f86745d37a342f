"""`python data.py FILE...`: what the model will see of each video, image, folder of frames or dataset."""

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from clips import png, strip
from config import Look, ignored_options, parse
from data import Processor, load_tokenizer
from model import UserError, nearest_path
from model.loading import ModelConfig, resolve_folder
from model.rope import mrope_position_ids
from records import IMAGE_SUFFIXES, TABLE_SUFFIXES, read_records, read_turns
from video import TEMPORAL, from_patches


def main(argv: list[str] | None = None) -> None:
    args = parse(Look, argv)
    for line in ignored_options(args):
        print(f"note: {line}", file=sys.stderr)
    folder = resolve_folder(args.model_id, args.local_files_only)
    processor = Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), args)
    for file in args.files:
        for line in look_at_file(file, processor, args.json, args.text):
            print(line)
    if args.preview:
        write_preview(records_of(args.files[0], args.text)[0], processor, args.preview)


def look_at_file(file: str, processor: Processor, as_json: bool, question: str) -> Iterator[str]:
    """The lines that describe one file; with as_json, JSON: one for each record, or for the clip."""
    records, is_dataset = records_of(file, question)
    names = [f"sample {i}" for i in range(len(records))] if is_dataset else [file]
    decode = as_json or not is_dataset
    results = (look_at(processor, records[i], name, is_dataset, decode) for i, name in enumerate(names))
    if as_json:
        yield from map(json.dumps, results)
        return
    results = list(results)
    refused = [f"{name}: {result['refused']}" for name, result in zip(names, results) if "refused" in result]
    if len(refused) == len(results):
        raise UserError(f"none of {len(refused)} can be used; the first: {refused[0]}" if is_dataset else refused[0])
    yield file
    if is_dataset:
        lengths = [result["tokens"] for result in results if "tokens" in result]
        low, median, high = np.percentile(lengths, (0, 50, 100))
        yield f"  samples {len(lengths)}, {sum(lengths)} tokens: {low:g} to {high:g} a sample, median {median:g}"
        yield from (f"  skipped: {error}" for error in refused[:8])
        yield from [f"  skipped: {len(refused) - 8} more; --json has them all"] * (len(refused) > 8)
    else:
        (result,) = results
        plain = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
        for key, value in {**result["clips"][0], "prompt_tokens": result["tokens"]}.items():
            yield f"  {key:<16}{' '.join(map(plain, value)) if isinstance(value, list | tuple) else plain(value)}"
        yield from (f"  note: {note}" for note in result["warnings"])


def records_of(file: str, question: str) -> tuple:
    """(records, whether they are a dataset's) of a dataset, or of a clip and a question about it."""
    if file.lower().endswith((".json", ".jsonl", *TABLE_SUFFIXES)) and not Path(file).is_dir():
        return read_records(file), True
    return [{"messages": [{"role": "user", "content": [clip_part(file), question]}]}], False


def clip_part(file: str | Path, image_folder: str | None = None) -> dict:
    """A video, an image, or a folder of frames as a part of a message: in the current folder, else the image_folder."""
    path = Path(file)
    if not (path.exists() or image_folder or "://" in str(file)):
        expected = f"expected a video, an image, or a folder of frames{nearest_path(path)}"
        raise UserError(f"{file}: no such file; {expected}")
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
    return {"type": kind, "path": str(path.absolute() if path.exists() else file)}


def look_at(processor: Processor, record: dict, name: str, answer: bool, decode: bool) -> dict:
    """What the model will see of a record: learned texts, clips, tokens, warnings; or refused, why. decode: the frames
    too, so that a broken one is named."""
    try:
        ids, _, plans = processor.layout(record, answer, name)
        for plan in plans if decode else []:
            processor.read(plan, "none", name)
        turns = read_turns(record, name)
    except UserError as error:
        return {"refused": str(error), "clips": [], "warnings": []}
    learned = [turn.text for turn in turns if turn.role == "assistant" and turn.trained and answer]
    clips, warnings = [], [note for plan in plans for note in plan.notes]
    for plan in plans:
        (height, width), fps, frames = plan.source_size, plan.source_fps, plan.total_frames  # of the file
        clip = {"paths": plan.paths, "frames": frames, "width": width, "height": height, "fps": fps}
        clip |= {"seconds": frames / fps if fps else 0.0, "indices": plan.indices, "times": plan.times}
        clip |= {"time_ids": time_ids(plan.grid_thw, plan.second_per_grid, processor.config)}
        clip |= {"second_per_grid": plan.second_per_grid, "size": plan.size, "grid_thw": plan.grid_thw}
        clips.append(clip | {"tokens": plan.num_tokens})
        if repeated := sum(a == b for a, b in pairwise(clip["time_ids"])):
            rate = f"{TEMPORAL / plan.second_per_grid:.3g} frames a second are too many to be told apart"
            warnings.append(f"{repeated} grid step(s) share the time id of the one before: {rate}")
    if name in processor.rebudgeted:
        warnings.append(processor.rebudgeted.pop(name))
    return {"learned": learned, "clips": clips, "tokens": len(ids), "warnings": warnings}


def time_ids(grid: tuple[int, int, int], second_per_grid: float, config: ModelConfig) -> list[int]:
    """The temporal position of each grid step of a clip, from 0."""
    tokens = math.prod(grid) // 4  # one for 2 x 2 patches
    positions = mrope_position_ids([config.video_token_id] * tokens, [grid], [second_per_grid], config)
    return positions[0, :: tokens // grid[0]].tolist()


def write_preview(records, processor: Processor, path: str) -> None:
    """A PNG of the frames of the first record's clips, eight in a row."""
    example = processor.encode(records[0], answer=False)
    if example.patches is None:
        raise UserError(f"--preview: {example.name} has no clip, expected a video or an image")
    patches = example.patches.split([math.prod(grid) for grid in example.grid_thw])
    clips = [from_patches(each.numpy(), grid) for each, grid in zip(patches, example.grid_thw)]
    rows = [strip(frames[i : i + 8]) for frames in clips for i in range(0, len(frames), 8)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png(np.concatenate(rows)))

"""`python data.py FILE...`: what the model will see of each video, image, folder of frames or dataset."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from clips import png, strip
from config import Look, ignored_options, parse
from data import Processor, load_tokenizer
from model import UserError
from model.loading import ModelConfig, resolve_folder
from model.rope import mrope_position_ids
from records import IMAGE_SUFFIXES, TABLE_SUFFIXES, read_records, read_turns
from video import TEMPORAL, ClipPlan, from_patches

SHOWN = 8  # samples that cannot be used, named one by one; frames in a row of a preview


def main(argv: list[str] | None = None) -> None:
    args = parse(Look, argv)
    for line in ignored_options(args):
        print(f"note: {line}", file=sys.stderr if args.json else sys.stdout)
    folder = resolve_folder(args.model_id, args.local_files_only)
    processor = Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), args)
    for file in args.files:
        for line in look_at_file(file, processor, args.json, args.text):
            print(line)
    if args.preview:
        write_preview(args.files[0], processor, args.text, args.preview)


def look_at_file(file: str, processor: Processor, as_json: bool, question: str) -> Iterator[str]:
    """The lines that describe one file; with as_json, JSON: one for each record, or for the clip."""
    records, is_dataset = records_of(file, question)
    processor.rebudgeted.clear()  # of the file before

    def results() -> Iterator[dict]:
        for i in range(len(records)):
            try:
                name, decode = f"sample {i}" if is_dataset else file, as_json or not is_dataset
                yield look_at(processor, records[i], name, is_dataset, decode)
            except UserError as error:
                if not (is_dataset or as_json):
                    raise
                yield {"refused": str(error), "clips": [], "warnings": []}

    if as_json:
        yield from map(json.dumps, results())
    elif is_dataset:
        yield from describe_dataset(file, processor, results())
    else:
        yield from describe_clip(file, next(results()), processor.args.max_seq_length)


def records_of(file: str, question: str) -> tuple[Sequence[dict], bool]:
    """(records, whether they are a dataset's) of a dataset, or of a video or image and a question about it."""
    if file.lower().endswith((".json", ".jsonl", *TABLE_SUFFIXES)) and not os.path.isdir(file):
        return read_records(file), True
    kind = "image" if file.lower().endswith(IMAGE_SUFFIXES) else "video"
    part = {"type": kind, "path": os.path.abspath(file) if os.path.exists(file) else file}
    return [{"messages": [{"role": "user", "content": [part, question]}]}], False


def look_at(processor: Processor, record: dict, name: str, answer: bool = True, decode: bool = False) -> dict:
    """What the model will see of a record. decode: the frames too, so that a broken one is named. UserError where the
    record is refused."""
    ids, _, plans = processor.layout(record, answer, name)
    for plan in plans if decode else []:
        processor.read(plan, "none", name)
    learned = [turn.text for turn in read_turns(record, name) if turn.role == "assistant" and turn.trained and answer]
    warnings = [note for plan in plans for note in plan.notes]
    clips = [look_at_clip(plan, processor.config, warnings) for plan in plans]
    if name in processor.rebudgeted:
        warnings.append(processor.rebudgeted[name])
    return {"learned": learned, "clips": clips, "tokens": len(ids), "warnings": warnings}


def look_at_clip(plan: ClipPlan, config: ModelConfig, warnings: list[str]) -> dict:
    """Facts of a clip's file, and of what is taken of it. Adds to the warnings."""
    pads = [config.video_token_id] * plan.num_tokens
    positions = mrope_position_ids(pads, [plan.grid_thw], [plan.second_per_grid], config)
    time_ids = positions[0, :: plan.num_tokens // plan.grid_thw[0]].tolist()
    same = sum(a == b for a, b in pairwise(time_ids)) if plan.kind == "video" else 0
    if same:
        rate, most = TEMPORAL / plan.second_per_grid, config.vision.tokens_per_second * TEMPORAL
        rates = f"{rate:.3g} frames a second are sampled, at most {most:g} are told apart"
        warnings.append(f"{same} grid step(s) share the time id of the one before: {rates}")
    return {
        "paths": list(plan.paths),
        "frames": plan.total_frames,  # of the source, as its size, rate and seconds
        "width": plan.source_size[1],
        "height": plan.source_size[0],
        "fps": plan.source_fps,
        "seconds": plan.total_frames / plan.source_fps if plan.source_fps else 0.0,
        "indices": list(plan.indices),
        "times": list(plan.times),
        "time_ids": time_ids,
        "second_per_grid": plan.second_per_grid,
        "size": list(plan.size),
        "grid_thw": list(plan.grid_thw),
        "tokens": plan.num_tokens,
    }


def describe_clip(file: str, result: dict, limit: int) -> Iterator[str]:
    yield file
    for clip in result["clips"]:
        t, rows, columns = clip["grid_thw"]
        yield f"  source    {clip['frames']} frame(s), {clip['width']} x {clip['height']}, {clip['fps']:.6g} fps"
        yield f"  frames    {len(clip['indices'])}: {' '.join(map(str, clip['indices']))}"
        yield f"  seconds   {' '.join(f'{second:.2f}' for second in clip['times'])}"
        grid = f"grid {t} x {rows} x {columns} patches, {clip['tokens']} tokens"
        yield f"  size      {clip['size'][1]} x {clip['size'][0]}, {grid}"
        if clip["second_per_grid"]:
            yield f"  time ids  {' '.join(map(str, clip['time_ids']))}  ({clip['second_per_grid']:.4g} s a grid step)"
    yield from (f"  note      {note}" for note in result["warnings"])
    yield f"  prompt    {result['tokens']} tokens with the question, limit {limit}"


def describe_dataset(file: str, processor: Processor, results: Iterable[dict]) -> Iterator[str]:
    """Lengths of a dataset's samples, and which of them are refused."""
    lengths, refused = [], []
    for i, result in enumerate(results):
        if "refused" in result:
            refused.append(f"  skipped   sample {i}: {result['refused']}")
        else:
            lengths.append(result["tokens"])
    if not lengths:
        first = refused[0].partition(": ")[2]
        raise UserError(f"{file}: none of its {len(refused)} samples can be used; the first: {first}")
    low, median, high = np.percentile(lengths, (0, 50, 100))
    spread = f"{low:.0f} to {high:.0f} a sample, median {median:.0f}"
    yield f"{file}\n  samples   {len(lengths)}, {sum(lengths)} tokens: {spread}"
    yield from (f"  rebudget  {name}: {frames}" for name, frames in processor.rebudgeted.items())
    yield from refused[:SHOWN]
    if len(refused) > SHOWN:
        yield f"  skipped   {len(refused) - SHOWN} more"


def write_preview(file: str, processor: Processor, question: str, path: str) -> None:
    """A PNG of the file's frames, or those of a dataset's first record, from left to right. UserError without any."""
    example = processor.encode(records_of(file, question)[0][0], answer=False)
    if example.patches is None:
        raise UserError(f"--preview: {example.name} has no clip, expected a video or an image")
    ends = np.cumsum([math.prod(grid) for grid in example.grid_thw])[:-1]
    clips = [from_patches(*clip) for clip in zip(np.split(example.patches.numpy(), ends), example.grid_thw)]
    rows = [strip(frames[i : i + SHOWN]) for frames in clips for i in range(0, len(frames), SHOWN)]
    page = np.full((sum(len(row) for row in rows), max(row.shape[1] for row in rows), 3), 255, np.uint8)
    top = 0
    for row in rows:
        page[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    try:
        Path(path).write_bytes(png(page))
    except OSError as error:
        raise UserError(f"--preview: {path} cannot be written ({error.strerror}); choose another file") from None

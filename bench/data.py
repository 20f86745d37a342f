"""How fast clips become batches: Processor.encode without its cache, on 1 and on N threads, in clips/s and frames/s.

    python bench/data.py                               # drawn clips: 64x64 of one second, 640x360 h264 of ten
    python bench/data.py a.mp4 b.mkv --fps 4           # and files of one's own
    python bench/data.py --peer                        # qwen-vl-utils with decord and torchcodec, where installed

Ours goes from file to token ids, positions and patch rows; the peer from file to resized frames, which the processor
would still have to cut into patches. Both choose the same frames and sizes. There is no floor: what matters is that the
GPU's appetite (SFT of R: 8 clips of 16 frames a second and H100) is met. "ours x": our rate over this one's; "cpu x":
its processor time over ours. The last line is one JSON object.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import av
import numpy as np
import torch
from workloads import TINY

from clips import draw_clip, render, write_mp4
from config import VideoArgs
from data import Processor, load_tokenizer
from model.loading import ModelConfig

SMALL = {"nframes": 8, "resized_height": 56, "resized_width": 56}  # how the embedded model sees a 64x64 clip


def draw_small(folder: Path, count: int) -> list[str]:
    """64x64 clips of one second, as generate.py draws them."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        paths.append(folder / f"small{i}.mp4")
        write_mp4(paths[-1], render(draw_clip(rng, "Ascending", 64, 30)))
    return list(map(str, paths))


def draw_large(path: Path, seconds: int = 10, fps: int = 30) -> str:
    """A 640x360 h264 film: a bright square over a sliding, noisy gradient, with ordinary keyframes and B-frames."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (360, 640, 3))
    ramp = np.linspace(0, 160, 640)[None, :, None] + np.linspace(0, 50, 360)[:, None, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(seconds * fps):
            frame = np.roll(ramp + noise, 2 * i, axis=1).astype(np.uint8)
            frame[100:180, (3 * i) % 560 : (3 * i) % 560 + 80] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def ours(options: dict):
    """-> function: file -> number of frames, by our Processor."""
    args = VideoArgs(cache_mb=0, allow_outside_files=True)
    processor = Processor(load_tokenizer(TINY), ModelConfig.from_folder(TINY), args)

    def read(path):
        part = {"type": "video", "video": path} | options
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "Where to?"}]}]
        return len(processor.encode({"messages": turns}, answer=False).frame_indices[0])

    return read


def peers(options: dict) -> dict:
    """{name: function, or why there is none} of qwen-vl-utils' readers."""
    found = {}
    for decoder in ("decord", "torchcodec"):
        try:
            importlib.import_module(decoder)
            read = partial(read_with, importlib.import_module("qwen_vl_utils.vision_process"), decoder, options)
        except (ImportError, RuntimeError, OSError) as error:  # not there, or made for another torch or FFmpeg
            read = f"not usable here: {str(error).strip().splitlines()[0]}"
        found[f"qwen-vl-utils, {decoder}"] = read
    return found


def read_with(vision_process, decoder, options, path):
    if vision_process.FORCE_QWENVL_VIDEO_READER != decoder:  # what its environment variable sets, read at import
        vision_process.FORCE_QWENVL_VIDEO_READER = decoder
        vision_process.get_video_reader_backend.cache_clear()
    video, facts = vision_process.fetch_video({"video": path} | options, return_video_metadata=True)
    assert facts["video_backend"] == decoder, f"asked for {decoder}, it fell back to {facts['video_backend']}"
    return len(video)


def round_of(read, paths: list[str], threads: int) -> tuple[float, float]:
    """(wall, processor) seconds to read all paths once."""
    with ThreadPoolExecutor(threads) as pool:
        start, busy = time.perf_counter(), time.process_time()
        list(pool.map(read, paths))
        return time.perf_counter() - start, time.process_time() - busy


def compare(name: str, paths: list[str], options: dict, args) -> list[dict]:
    """Rows of one set of files. The readers take turns, so that a busy machine slows them alike."""
    readers, rows = {"ours": ours(options)} | (peers(options) if args.peer else {}), []
    for who, why in readers.items():
        if isinstance(why, str):
            print(f"{name:<22}  {who:<26}  {why}", flush=True)
            rows.append({"files": name, "who": who, "note": why})
    readers = {who: read for who, read in readers.items() if not isinstance(read, str)}
    frames = {who: sum(map(read, paths)) / len(paths) for who, read in readers.items()}  # and files into the page cache
    for threads in dict.fromkeys((1, args.threads)):
        again = paths * max(1, round(args.seconds * threads / round_of(readers["ours"], paths, 1)[0]))
        found = {who: [] for who in readers}
        for _ in range(args.repeats):
            for who, read in readers.items():
                found[who].append(round_of(read, again, threads))
        mine = [statistics.median(column) for column in zip(*found["ours"])]
        for who, times in found.items():
            (wall, busy), rates = map(statistics.median, zip(*times)), [len(again) / wall for wall, _ in times]
            row = {"files": name, "who": who, "threads": threads, "clips_s": len(again) / wall, "frames": frames[who]}
            row |= {"least": min(rates), "most": max(rates), "frames_s": len(again) / wall * frames[who]}
            row |= {"ours_over_this": wall / mine[0], "processor_over_ours": busy / mine[1]}
            spread = f"{row['clips_s']:>8.1f}  {row['least']:>8.1f}  {row['most']:>8.1f}"
            ratios = f"{row['ours_over_this']:>6.2f}  {row['processor_over_ours']:>6.2f}"
            told = f"{row['frames_s']:>8.0f}  {frames[who]:>6.0f}  {ratios}"
            print(f"{name:<22}  {who:<26}  {threads:>7}  {spread}  {told}", flush=True)
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="videos of one's own, besides the drawn ones")
    parser.add_argument("--fps", type=float, default=2.0, help="frames taken a second of the large ones and one's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.5, help="about the length of a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="qwen-vl-utils on the same files")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the trainer's threads: many clips side by side, not many threads to a frame
    print(f"{'files':<22}  {'who':<26}  threads   clips/s       min       max  frames/s  frames  ours x   cpu x")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        results += compare("64x64, 1 s", draw_small(Path(folder), 16), SMALL, args)
        results += compare("640x360 h264, 10 s", [draw_large(Path(folder) / "large.mp4")], {"fps": args.fps}, args)
        for path in args.files:
            results += compare(Path(path).name[:22], [path], {"fps": args.fps}, args)
    print(json.dumps({"bench": "data", "cores": os.cpu_count(), "args": vars(args), "results": results}))


if __name__ == "__main__":
    main()

"""How fast clips become Examples: clips per second and CPU time a clip, without and with worker processes.

    python bench/loading.py                          # drawn clips: 64x64 of one second
    python bench/loading.py a.mp4 b.mkv --fps 4      # files of one's own
    python bench/loading.py --peer                   # also qwen-vl-utils with decord and torchcodec, where installed

Ours goes from file to token ids, positions and patch rows; the peer from file to resized frames. Both choose the same
frames and sizes. CPU time counts this process and its workers. The last line is one JSON object.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from clips import draw_clip, render, write_mp4
from config import VideoArgs
from data import Processor, load_tokenizer
from loader import Samples
from model.loading import ModelConfig

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
SMALL = {"nframes": 8, "resized_height": 56, "resized_width": 56}  # how the tiny model sees a 64x64 clip


def ours(options: dict, workers: int):
    """-> function: paths -> they are read once, with so many worker processes."""
    processor = Processor(load_tokenizer(TINY), ModelConfig.from_folder(TINY), VideoArgs(cache_mb=0))

    def read(paths):
        parts = [{"type": "video", "video": path} | options for path in paths]
        records = [{"messages": [{"role": "user", "content": [part, "Where to?"]}]} for part in parts]
        assert all(
            not isinstance(e, tuple) for e in Samples(records, processor, False).read(range(len(paths)), workers)
        )

    return read


def peer(options: dict, decoder: str):
    """-> function: paths -> they are read once by qwen-vl-utils with this decoder. ImportError where there is none."""
    importlib.import_module(decoder)
    vision_process = importlib.import_module("qwen_vl_utils.vision_process")

    def read(paths):
        vision_process.FORCE_QWENVL_VIDEO_READER = decoder  # what its environment variable sets, read at import
        vision_process.get_video_reader_backend.cache_clear()
        for path in paths:
            _, facts = vision_process.fetch_video({"video": path} | options, return_video_metadata=True)
            assert facts["video_backend"] == decoder, f"{facts['video_backend']} was taken, expected {decoder}"

    return read


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="videos of one's own, besides the drawn ones")
    parser.add_argument("--fps", type=float, default=2.0, help="frames taken a second of one's own")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=200, help="small clips a round; a tenth as many of the others")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="qwen-vl-utils on the same files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rng, drawn = np.random.default_rng(0), [f"{folder}/{i}.mp4" for i in range(16)]
        for path in drawn:
            write_mp4(path, render(draw_clip(rng, "Ascending", 64, 30)))
        sets = [("64x64, 1 s", drawn * args.clips, SMALL, args.clips)]
        sets += [(Path(f).name[:20], [f] * args.clips, {"fps": args.fps}, max(1, args.clips // 10)) for f in args.files]
        print(f"{'files':<20}  {'reader':<26}  clips/s  CPU ms a clip")
        for name, paths, options, count in sets:
            readers = {f"{workers} workers": ours(options, workers) for workers in args.workers}
            for decoder in ("decord", "torchcodec") if args.peer else ():
                try:
                    readers[f"qwen-vl-utils, {decoder}"] = peer(options, decoder)
                except (ImportError, RuntimeError, OSError) as error:  # not there, or made for another torch or FFmpeg
                    print(f"{decoder} is not usable here: {str(error).strip().splitlines()[0]}")
            rounds = {who: [] for who in readers}
            for i in range(args.repeats + 1):  # they take turns, so that a busy machine slows them alike
                for who, read in readers.items():
                    wall, cpu = time.perf_counter(), sum(os.times()[:4])
                    read(paths[:count])
                    wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
                    rounds[who] += [(count / wall, 1000 * cpu / count)] * (i > 0)  # the first fills the page cache
            for who, times in rounds.items():
                rate, cpu = map(statistics.median, zip(*times))
                print(f"{name:<20}  {who:<26}  {rate:>7.1f}  {cpu:>13.2f}", flush=True)
                results.append({"files": name, "reader": who, "clips_s": rate, "cpu_ms": cpu})
    print(json.dumps({"bench": "loading", "cores": os.cpu_count(), "args": vars(args), "results": results}))


if __name__ == "__main__":
    main()

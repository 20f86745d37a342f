"""A clip and a question -> the answer, token by token; a dataset -> how often it is right, and whether time matters.

    python infer.py video.mp4 [--question "…"]     a video, a gif, an image, or a folder of frames
    python infer.py --data_path val.json           accuracy, confusion, and both with frames reversed, shuffled, blank
    python infer.py --data_path val.json --output predictions.jsonl     a line for each answer; goes on where it stopped
    python infer.py --benchmark mvbench DIR        a public benchmark from its own files (docs/benchmarks.md)

The newest adapter under output/ is used if it was made for this base, and clips are read as it was trained on them.
The hub's generation_config is never read: decoding is greedy unless --temperature says otherwise.
"""

# ruff: noqa: E402, I001
from config import ignored_options, Infer, VideoArgs, as_dict, cli, parse, split_list  # first: it handles Ctrl-C

import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

from records import IMAGE_SUFFIXES, read_records, record_name, spread
from cli import from_file
from model import UserError, nearest_path
from answers import answer_span, extract_answer, parse_options
from checkpoint import BEST, STATE, find_adapter, read_json, sha256


def main(argv=None):
    cfg = parse(Infer, argv)
    adapter, why = choose_adapter(cfg)
    for line in (why, *read_as_trained(cfg, adapter), *ignored_options(cfg)):
        print(f"note: {line}")
    if cfg.benchmark:
        from benchmarks import Task  # not at the top: it imports torch

        benchmark = Task(cfg)
        task = benchmark.records
    else:
        task = spread(read_records(cfg.data_path), cfg.max_samples, cfg.seed) if cfg.data_path else clip_record(cfg)
    processor = load_processor(cfg)
    if cfg.data_path or cfg.benchmark:
        facts = judge(cfg, adapter, load_model(cfg, adapter), processor, task)
        facts |= {"benchmark": benchmark.report()} if cfg.benchmark else {}
    else:
        # before the weights are read: a broken clip ends here
        example = processor.encode(task, answer=False, name=cfg.video)
        facts = answer(cfg, load_model(cfg, adapter), processor, example)
    if cfg.json:
        print(json.dumps({**facts, "model_id": cfg.model_id, "adapter": adapter and str(adapter)}))


# -- Model and adapter


def choose_adapter(cfg):
    """-> (folder or None, a line that says why). UserError for a --model_ckpt that is no adapter."""
    folder = None if cfg.model_ckpt is None else find_adapter(cfg.model_ckpt)
    if folder is None:
        why = "no adapter found under output/" if cfg.model_ckpt == "" else "no adapter, as --model_ckpt says"
        return None, f"{why}: the base model answers"
    if cfg.model_ckpt == "":
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or cfg.model_id
        if Path(base).resolve() != Path(cfg.model_id).resolve():  # where they are hub ids, this compares the ids
            why = f"the newest adapter, {folder}, was made for {base} and is not used with {cfg.model_id}"
            return None, f"{why}; give --model_id {base}, or --model_ckpt"
    return folder, f"adapter {folder}{below_start(folder)}"


def below_start(folder):
    """What is to say of a GRPO run whose best checkpoint answers worse than the policy that it began with."""
    path = folder.parent / BEST
    best = read_json(path) if path.exists() else {}
    if not (isinstance(best, dict) and best.get("below_start") and folder.name == f"checkpoint-{best['step']}"):
        return ""
    end, start = best["accuracy"], best["start_accuracy"]
    return f", the best of its run, but {end:.1%} is less than the {start:.1%} of its start"


def read_as_trained(cfg, adapter):
    """Take the video options of the adapter's run, or of the model's, where the command line says nothing: other frames
    or sizes cost accuracy. Changes cfg; returns lines to print. Checkpoints from elsewhere say nothing of this."""
    path, before = Path(adapter or cfg.model_id) / STATE, as_dict(cfg)
    state = read_json(path) if path.exists() else {}
    trained = state.get("config", {}) if isinstance(state, dict) else None
    if not isinstance(trained, dict):
        raise UserError(f"{path}: its config is no object; take another checkpoint")
    own = {"image_folder", "max_seq_length", "overlong", "cache_mb"}
    names = as_dict(VideoArgs()).keys() - own
    for name in names & trained.keys() - cfg.given:
        setattr(cfg, name, from_file(VideoArgs, name, trained[name], path))
    cfg.settle(cfg.given)
    try:
        cfg.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    taken = [name for name in sorted(names) if getattr(cfg, name) != before[name]]
    return [f"--{name} {getattr(cfg, name)}, as in training" for name in taken]


def load_processor(cfg):
    from data import Processor, load_tokenizer  # not at the top: it imports torch, and --help must not wait for that
    from model.loading import ModelConfig, resolve_folder

    folder = resolve_folder(cfg.model_id, cfg.local_files_only)
    return Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), cfg)


def load_model(cfg, adapter):
    """The model on its device. In fp32 the adapter is added to the weights: one product a layer instead of three, equal
    up to rounding. In bf16 the weights here stay as they are; on a GPU the sampler makes its own merged copy, rounded
    once (model/fast/decoder.py)."""
    import torch

    from adapter_files import load_adapter
    from lora import merge
    from model.loading import load_model, not_finite

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    can = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if (can if cfg.bf16 is None else cfg.bf16) else torch.float32
    model = load_model(cfg.model_id, device, dtype, cfg.local_files_only).requires_grad_(False).eval()
    count, state = sum(p.numel() for p in model.parameters()), "no adapter"
    if adapter is not None:
        load_adapter(model, adapter)
    if names := not_finite(model):
        raise UserError(f"{adapter or cfg.model_id}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}")
    if adapter is not None and dtype == torch.float32:
        merge(model)
        state = "adapter merged: in fp32 that is exact up to rounding"
    elif adapter is not None:
        state = "adapter beside the weights" + (", merged into the sampler's copy" if device.type == "cuda" else "")
    print(f"model: {cfg.model_id}, {count:,} parameters, {str(dtype)[6:]} on {device}; {state}")
    return model


def sampling_of(cfg, sampler):
    from model.decode import Sampling

    filters = cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty
    return Sampling(cfg.max_new_tokens, *filters, stop_ids=sampler.stop_ids)


def decode(processor, ids):
    """Text without the tokens that end an answer; any other special token is shown."""
    stops = processor.im_end, processor.token_id("<|endoftext|>")
    return processor.backend.decode([i for i in ids if i not in stops], skip_special_tokens=False)


# -- One clip


def clip_record(cfg):
    """The record that asks cfg.text about cfg.video: a file, or a folder of images, the frames of one clip."""
    path, source = Path(cfg.video), cfg.video
    if path.is_dir():
        images = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        images.sort(key=lambda p: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", p.name))])
        if len(images) < 2:
            raise UserError(f"{path}: {len(images)} images in this folder; expected the frames of a clip, at least 2")
        source = [[str(p) for p in images]]
        if len(images) < (cfg.nframes or 0) and "nframes" not in cfg.given:
            print(f"note: {path} has {len(images)} frames, all are taken: --nframes {cfg.nframes} was not given")
            cfg.nframes = None
    elif not path.exists() and not cfg.image_folder:
        raise UserError(f"{path}: no such file; expected a video, an image, or a folder of frames{nearest_path(path)}")
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir() else "video"
    text = cfg.text if f"<{kind}>" in cfg.text else f"<{kind}>\n{cfg.text}"
    return {kind: source, "conversations": [{"from": "human", "value": text}]}


class Stream:
    """Writes text as tokens come. A character of several bytes may span several tokens: it waits until it is whole."""

    def __init__(self, processor):
        self.processor, self.held = processor, []

    def add(self, _row, token):
        self.held.append(token)
        # U+FFFD is what a decoder gives for bytes that are no character, or not yet
        if not decode(self.processor, self.held).endswith("\ufffd"):
            self.close()

    def close(self):
        print(decode(self.processor, self.held), end="", flush=True)
        self.held = []


def answer(cfg, model, processor, example):
    """Stream the answer about one clip, print reasoning and final answer apart; returns the facts for --json."""
    from rollouts import Sampler

    (t, h, w), indices, config = example.grid_thw[0], example.frame_indices[0], model.config
    print(f"clip: {cfg.video}: frames {' '.join(map(str, indices))}; {14 * w} x {14 * h}\nquestion: {cfg.text}\n")
    sampler, stream, started = Sampler(model, processor, cfg), Stream(processor), time.perf_counter()
    ((completion,),) = sampler([example], sampling_of(cfg, sampler), 1, [cfg.seed], stream.add)
    seconds = time.perf_counter() - started
    stream.close()
    if not all(map(math.isfinite, completion.logprobs)):
        problem = f"{cfg.model_id}: the model's logits are not finite, so there is no answer"
        raise UserError(f"{problem}; take another checkpoint, or --bf16 False")
    text = decode(processor, completion.ids)
    thought = text.partition("<think>")[2].partition("</think>")[0].strip()  # also one that was never closed
    options = parse_options(cfg.text)
    letter = extract_answer(text, options) if options else None
    final = f"({letter}) {options[letter]}" if letter else answer_span(text) or ""
    unsure = "   (names no option, or contradicts itself)" if options and not letter else ""
    print(f"\n\nreasoning: {thought or '(none)'}\nanswer: {final or '(none)'}{unsure}")
    if not completion.finished:
        print(f"note: cut off after {len(completion.ids)} tokens; --max_new_tokens sets the limit")
    is_pad = [i in (config.video_token_id, config.image_token_id) for i in example.ids.tolist()]
    times = example.position_ids[0][is_pad].reshape(t, -1)[:, 0]  # of each grid step, as the model gets them
    return dict(
        answer=final, option=letter, reasoning=thought or None, text=text, finished=completion.finished,
        prompt_tokens=len(example), completion_tokens=len(completion.ids), frames=indices, grid_thw=[t, h, w],
        second_per_grid=example.second_per_grid[0], time_ids=(times - times[0]).tolist(), seconds=round(seconds, 4),
    )  # fmt: skip


# -- A dataset


def judge(cfg, adapter, model, processor, records):
    """Ask every record as it is and under each control, print the tables; returns the facts for --json."""
    from data import CONTROLS
    from evaluate import chance, confusion_of, evaluate, measure
    from rollouts import Sampler

    started, results, sampler = time.perf_counter(), {}, Sampler(model, processor, cfg)
    made = made_by(cfg, adapter)
    known, write = read_predictions(cfg.output, records, made), prediction_writer(cfg.output, records, made)
    for control in CONTROLS:
        if control == "none" or control in split_list(cfg.controls or ""):
            file = {"known": known, "on_answer": write} if control == "none" else {}
            results[control] = evaluate(sampler, records, sampling_of(cfg, sampler), cfg.seed, control, **file)
            if not results["none"].count:
                first = next(iter(results["none"].skipped.values()))
                what = f"{cfg.data_path or cfg.video}: none of {len(records)} can be asked"
                raise UserError(f"{what}; the first: {first}")
    plain = results["none"]
    for error in plain.skipped.values():
        print(f"skipped: {error}", file=sys.stderr)
    facts = {control: measure(result.answers, plain.answers) for control, result in results.items()}
    blind, confusion = chance(plain.answers), confusion_of(plain.answers)
    show(facts, results, blind, confusion)
    tasks = by_task(plain.answers, records)
    for task, (right, count) in tasks.items() if len(tasks) > 1 else ():
        print(f"{task:<24}{right:g}/{count}{right / count:>10.1%}")
    whole = {"data_path": cfg.data_path, **facts.pop("none"), "skipped": len(plain.skipped), "chance": blind}
    whole |= {key: facts.get("reversed", {}).get(key) for key in ("changed", "flipped")}
    whole["tasks"] = {task: {"right": right, "count": count} for task, (right, count) in tasks.items()}
    return whole | {"confusion": confusion, "controls": facts, "seconds": round(time.perf_counter() - started, 2)}


def task_of(sample):
    return sample.problem_type or ("multiple choice" if sample.options else "open")


def by_task(answers, records):
    """{task: [sum of accuracy rewards, how many answers]}, by the records' problem_type."""
    from rewards import sample_from_record

    tasks = {}
    for number, (*_, right) in answers.items():
        each = tasks.setdefault(task_of(sample_from_record(records[number])), [0, 0])
        each[0] += right
        each[1] += 1
    return dict(sorted(tasks.items()))


def read_predictions(path, records, made_by):
    """{number: answer} of the lines that an earlier run wrote, a last one cut short left out. UserError where they are
    not of these records, or not made_by this model and these settings."""
    known = {}
    if path is None or not Path(path).exists():
        return known
    data = Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        for row in map(json.loads, whole.splitlines()):
            record = records[row["number"]]
            if row["id"] != record.get("id", record_name(record)) or row["made_by"] != made_by:
                raise ValueError(f"line {len(known) + 1} is of {row['id']}, by {row['made_by']}")
            known[row["number"]] = row["true"], row["said"], row["options"], row["right"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem = f"--output: {path} holds other lines than predictions of these records by this model ({error})"
        raise UserError(f"{problem}; choose another file") from None
    if whole != data:
        Path(path).write_bytes(whole)
    print(f"note: {len(known)} of {len(records)} answers are taken from {path}")
    return known


def made_by(cfg, adapter):
    """What an answer depends on besides its record, for the lines of a predictions file."""
    view = {name: value for name, value in as_dict(cfg).items() if name in as_dict(VideoArgs()) and name != "cache_mb"}
    names = "max_new_tokens temperature top_p top_k seed repetition_penalty max_samples benchmark prompt"
    sampling = {name: getattr(cfg, name) for name in names.split()}
    weights = sha256(adapter / "adapter_model.safetensors")[:16] if adapter else None
    settings = hashlib.sha256(repr(sorted((view | sampling).items())).encode()).hexdigest()[:16]
    return {"model_id": cfg.model_id, "adapter": weights, "settings": settings}


def prediction_writer(path, records, made_by):
    """A function that appends one answer to the file, for evaluate(); None without a file."""
    from checkpoint import append_lines
    from rewards import format

    def write(number, sample, text, answer):
        true, said, options, right = answer
        record = records[number]
        row = {"number": number, "id": record.get("id", record_name(record)), "task": task_of(sample)}
        row |= {"prompt": sample.question, "text": text, "answer": sample.answer, "true": true, "said": said}
        row |= {"options": options, "right": right, "rewards": {"accuracy": right, "format": format(text, sample)}}
        append_lines(path, [row | {"made_by": made_by}])

    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write
    return None


def show(facts, results, chance, confusion, most=8):
    """The table of the controls, and the confusion table where it has at most so many different answers."""

    def share(value):
        return "-" if value is None else f"{value:.1%}"

    print(f"\n{'frames':<12}{'right':>10}{'accuracy':>10}   {'95 % interval':<18}{'changed':>8}{'flipped':>9}")
    for control, row in facts.items():
        name, right = {"none": "as they are"}.get(control, control), f"{row['right']:g}/{row['count']}"
        if not row["count"]:
            print(f"{name:<12}not possible: {next(iter(results[control].skipped.values()))}")
            continue
        interval = " to ".join(map(share, row["interval"]))
        against = "" if control == "none" else f"{share(row['changed']):>8}{share(row['flipped']):>9}"
        print(f"{name:<12}{right:>10}{share(row['accuracy']):>10}   {interval:<18}{against}".rstrip())
    print(f"chance is {share(chance)}; changed: other than for the clip as it is; flipped: become the opposite")
    columns = sorted({said for row in confusion.values() for said in row})
    if len({*confusion, *columns}) <= most:
        width = max(map(len, [*confusion, *columns, "true / said"]))
        print()
        for head, row in {"true / said": {c: c for c in columns}, **confusion}.items():
            print(f"{head:<{width}}" + "".join(f"  {row[said]:>{width}}" for said in columns))


if __name__ == "__main__":
    cli(main)

"""A clip and a question -> the answer, token by token; a dataset -> how often it is right, and whether time matters.

    python infer.py video.mp4 [--question "…"]     a video, a gif, an image, or a folder of frames
    python infer.py --data_path val.json           accuracy, confusion, and both with frames reversed, shuffled, blank
    python infer.py --data_path val.json --output predictions.jsonl     a line for each answer; goes on where it stopped
    python infer.py --benchmark mvbench DIR        a public benchmark from its own files (docs/benchmarks.md)

    from infer import Model
    model = Model("output/my_run", max_new_tokens=64)      # a run, a checkpoint, a whole model, or a hub id
    model.ask("clip.mp4", "What happens?").answer          # or .text, .reasoning
    model.evaluate("val.json", controls="none").accuracy

The newest adapter under output/ is used if it was made for this base, and clips are read as it was trained on them.
The hub's generation_config is never read: decoding is greedy unless --temperature says otherwise.
"""

# ruff: noqa: E402, I001
from config import QUESTION, ignored_options, Infer, VideoArgs, as_dict, cli, parse, split_list  # first: Ctrl-C

import json
import logging
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue

from records import IMAGE_SUFFIXES, TAG, read_records, spread
from cli import from_file
from latest import grpo_command
from model import UserError, nearest_path
from answers import answer_span, extract_answer, parse_options
from checkpoint import BEST, STATE, best_checkpoint, checkpoints, find_adapter, newest_checkpoint, read_json

log = logging.getLogger("infer")


class Model:
    """A trained model that answers questions about clips. Its weights are read when the first answer is wanted.

    model: a run's folder (its best checkpoint, or its newest if none was evaluated), a checkpoint, an adapter, a whole
    model's folder, or a hub id; "" = the newest adapter under output/, else the tiny model.
    options: those of `python infer.py --help all`, by their names there, with the same defaults; ask, stream and
    evaluate take them too, for one call. argv: the same as words of a command line.
    Every mistake is a UserError (model/__init__.py), a ValueError of one line.
    """

    def __init__(self, model: str | Path = "", argv=(), **options):
        self.argv = [*argv, *as_flags(model_options(model) | options)]
        self.cfg = parse(Infer, self.argv)
        self.adapter, why = choose_adapter(self.cfg)
        self.folder = Path(self.adapter or self.cfg.model_id)
        self.notes = [why, *read_as_trained(self.cfg, self.folder)]
        question = read_state(self.folder).get("question")
        self.trained_on = question if isinstance(question, dict) else {}

    # -- Ask

    def ask(self, clips, question: str = "", on_text=None, **options) -> "Answer":
        """The answer about one clip, or about a list of clips and images in this order.

        A clip: a video, a gif, an image, or a folder of frames. question "": what the model was trained to answer.
        on_text: called with each piece of text as it is drawn. UserError for a clip that cannot be read.
        """
        cfg = self.options(**options)
        return self.answer(self.example(clips, question, cfg), cfg, on_text)

    def stream(self, clips, question: str = "", **options):
        """Yields the answer's text in pieces as they are drawn, and returns the Answer. A loop that is left early waits
        for the rest of it."""
        cfg, pieces = self.options(**options), SimpleQueue()
        example = self.example(clips, question, cfg)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.answer, example, cfg, pieces.put)
            answer.add_done_callback(lambda _: pieces.put(None))
            yield from iter(pieces.get, None)
        return answer.result()

    def evaluate(self, data, **options):
        """An evaluate.Evaluation of a dataset's file, or of a list of records: accuracy, interval, by_task, confusion,
        skipped, and in `controls` the same with the frames changed (controls="none": only as they are)."""
        from data import CONTROLS
        from evaluate import Predictions, evaluate, made_by
        from rollouts import Sampler

        is_file = isinstance(data, str | Path)
        cfg = self.options(**options, **({"data_path": data} if is_file else {}))
        records = spread(read_records(data) if is_file else data, cfg.max_samples, cfg.seed)
        if not len(records):
            raise UserError("evaluate: found no records, expected at least one")
        sampler = Sampler(self.network, self.processor_for(cfg), cfg)
        predictions = Predictions(cfg.output, records, made_by(cfg, self.adapter)) if cfg.output else None
        again = partial(evaluate, sampler, records, sampling_of(cfg, sampler), cfg.seed)
        result = again(predictions=predictions)
        if not result.count:
            first = next(iter(result.skipped.values()))
            name = cfg.data_path or cfg.video or "records"
            raise UserError(f"{name}: none of {len(records)} can be asked; the first: {first}")
        result.controls = {name: again(name) for name in CONTROLS[1:] if name in split_list(cfg.controls or "")}
        return result

    @property
    def question(self) -> str:
        """What is asked where nothing else is: --question, or what the run was trained to answer."""
        return self.cfg.text if self.cfg.question or self.cfg.prompt else self.trained_on.get("text") or QUESTION

    # -- What an answer takes

    def options(self, **changes) -> Infer:
        """The options with some of them changed for one call."""
        if not changes:
            return self.cfg
        if fixed := {"model_id", "model_ckpt", "bf16", "base_dtype", "local_files_only"} & changes.keys():
            raise UserError(f"{min(fixed)}: cannot change from call to call; make another Model")
        cfg = parse(Infer, [*self.argv, *as_flags(changes)])
        cfg.model_id = self.cfg.model_id
        read_as_trained(cfg, self.folder)
        return cfg

    @cached_property
    def processor(self):
        """The data.Processor, which makes of a record what the model sees."""
        # not at the top: they import torch, and --help must not wait for that
        from data import Processor, load_tokenizer
        from model.loading import ModelConfig, resolve_folder

        folder = resolve_folder(self.cfg.model_id, self.cfg.local_files_only)
        return Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), self.cfg)

    def processor_for(self, cfg):
        """The same with other options; they share the decoded clips."""
        if cfg is self.cfg:
            return self.processor
        processor = type(self.processor)(self.processor.backend, self.processor.config, cfg)
        processor.cache = self.processor.cache
        return processor

    @cached_property
    def network(self):
        """The Qwen2_5_VL on its device, with its adapter.

        In fp32 the adapter is added to the weights: one product a layer instead of three, equal up to rounding. In bf16
        the weights here stay as they are, low-bit ones always; on a GPU the sampler makes its own merged copy of bf16
        weights, rounded once (model/fast/decoder.py).
        """
        import torch

        from adapter_files import CONFIG, load_adapter, trained_on
        from lora import merge
        from model.loading import load_model, not_finite

        cfg, device = self.cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        can = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if (can if cfg.bf16 is None else cfg.bf16) else torch.float32
        base = cfg.base_dtype
        if base == "auto":
            base = trained_on(read_json(self.adapter / CONFIG)) if self.adapter else "bf16"
        model = load_model(cfg.model_id, device, dtype, cfg.local_files_only, base).requires_grad_(False).eval()
        if self.adapter:
            load_adapter(model, self.adapter)
        if names := not_finite(model):
            raise UserError(f"{self.folder}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}")
        if self.adapter and dtype == torch.float32 and base == "bf16":
            merge(model)
        return model

    def example(self, clips, question="", cfg=None):
        """The question about clips as a data.Example. UserError for a clip that cannot be read."""
        cfg, question = cfg or self.cfg, question or self.question
        clips = [clips] if isinstance(clips, str | Path) else clips
        content = [*(clip_part(clip, cfg) for clip in clips), {"type": "text", "text": TAG.sub("", question)}]
        messages = [{"role": "user", "content": content}]
        if system := self.trained_on.get("system"):
            messages = [{"role": "system", "content": system}, *messages]
        name = ", ".join(map(str, clips)) or "the question"
        return self.processor_for(cfg).encode({"messages": messages}, answer=False, name=name)

    def answer(self, example, cfg, on_text=None) -> "Answer":
        """The answer to an Example; on_text as in ask."""
        from rollouts import Sampler

        processor = self.processor_for(cfg)
        sampler, pieces, began = Sampler(self.network, processor, cfg), Pieces(processor, on_text), time.perf_counter()
        ((completion,),) = sampler([example], sampling_of(cfg, sampler), 1, [cfg.seed], on_text and pieces.add)
        pieces.close()
        if not all(map(math.isfinite, completion.logprobs)):
            problem = f"{cfg.model_id}: the model's logits are not finite, so there is no answer"
            raise UserError(f"{problem}; take another checkpoint, or --bf16 False")
        question = example.record["messages"][-1]["content"][-1]["text"]
        text, options = decode(processor, completion.ids), parse_options(question)
        letter = extract_answer(text, options) if options else None
        return Answer(
            text=text,
            reasoning=text.partition("<think>")[2].partition("</think>")[0].strip() or None,
            answer=f"({letter}) {options[letter]}" if letter else answer_span(text) or "",
            option=letter,
            finished=completion.finished,
            prompt_tokens=len(example),
            completion_tokens=len(completion.ids),
            clips=list(clips_of(example, processor.config)),
            seconds=round(time.perf_counter() - began, 4),
        )


@dataclass
class Answer:
    """What a model said."""

    text: str  # all of it
    reasoning: str | None  # what stands in <think>, also where that was never closed
    answer: str  # what it settles on: the option with its letter, or the text in <answer>; "" = nothing
    option: str | None  # letter of that option; None where it names none, or contradicts itself
    finished: bool  # False: cut off at max_new_tokens
    prompt_tokens: int
    completion_tokens: int
    clips: list[dict]  # of each clip frames (their numbers), grid_thw, second_per_grid, time_ids
    seconds: float


class Pieces:
    """Tokens -> text, handed on as it comes. A character of several bytes may span several tokens: it waits until it is
    whole."""

    def __init__(self, processor, on_text):
        self.processor, self.on_text, self.held = processor, on_text, []

    def add(self, _row, token):
        self.held.append(token)
        # U+FFFD is what a decoder gives for bytes that are no character, or not yet
        if not decode(self.processor, self.held).endswith("\ufffd"):
            self.close()

    def close(self):
        if text := decode(self.processor, self.held):
            self.on_text(text)
        self.held = []


def decode(processor, ids):
    """Text without the tokens that end an answer; any other special token is shown."""
    stops = processor.im_end, processor.token_id("<|endoftext|>")
    return processor.backend.decode([i for i in ids if i not in stops], skip_special_tokens=False)


def sampling_of(cfg, sampler):
    from model.decode import Sampling

    filters = cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty
    return Sampling(cfg.max_new_tokens, *filters, stop_ids=sampler.stop_ids)


# -- Which model, and how it was trained


def as_flags(options: dict) -> list[str]:
    """Options as words of a command line, which parse() reads and checks."""
    return [f"--{name}={value}" for name, value in options.items()]


def model_options(model: str | Path) -> dict:
    """What a Model is made of, as --model_id and --model_ckpt: see its docstring."""
    path = Path(model)
    if not str(model):
        return {}
    if checkpoints(path):  # a run, of a whole model or of an adapter
        path = best_checkpoint(path) or newest_checkpoint(path) or path
    if (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        return {"model_id": path, "model_ckpt": None}
    is_hub_id = str(model).count("/") == 1 and not path.parent.is_dir()
    return {"model_id": model, "model_ckpt": None} if is_hub_id else {"model_ckpt": model}


def choose_adapter(cfg):
    """-> (folder or None, a line that says which and why). Without --model_id the base becomes the adapter's. UserError
    for a --model_ckpt that is no adapter."""
    newest = cfg.model_ckpt == ""
    folder = None if cfg.model_ckpt is None else find_adapter(cfg.model_ckpt)
    if folder is None:
        why = "no adapter found under output/" if newest else "no adapter, as --model_ckpt says"
        return None, f"{why}: {cfg.model_id} answers"
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or cfg.model_id
    if "model_id" not in cfg.given:
        cfg.model_id = base
    elif newest and Path(base).resolve() != Path(cfg.model_id).resolve():  # of hub ids this compares the ids
        why = f"the newest adapter, {folder}, was made for {base} and is not used with {cfg.model_id}"
        return None, f"{why}; give --model_id {base}, or --model_ckpt"
    run = "the run saved last under output/" if newest else "its run"
    best = read_json(folder.parent / BEST) if best_checkpoint(folder.parent) == folder else None
    if best is None:
        why = "as given" if Path(cfg.model_ckpt) == folder else f"the newest of {run}; none was evaluated"
    elif best.get("below_start"):
        end, start = best["accuracy"], best["start_accuracy"]
        why = f"the best of {run}, but {end:.1%} is less than the {start:.1%} of its start"
    else:
        why = f"the best of {run}, {best['accuracy']:.1%} of its held-out clips are right"
    return folder, f"adapter {folder}, {why}"


def read_state(folder):
    """trainer_state.json of a checkpoint, or of the model merged from it; {} where there is none."""
    state = read_json(folder / STATE) if (folder / STATE).exists() else {}
    return state if isinstance(state, dict) else {"config": None}


def read_as_trained(cfg, folder):
    """Take the video options of the run that a checkpoint is from, where the command line says nothing: other frames or
    sizes cost accuracy. Changes cfg; returns lines to print. Checkpoints from elsewhere say nothing of this."""
    path, trained, before = folder / STATE, read_state(folder).get("config", {}), as_dict(cfg)
    if not isinstance(trained, dict):
        raise UserError(f"{path}: its config is no object; take another checkpoint")
    names = as_dict(VideoArgs()).keys() - {"image_folder", "max_seq_length", "overlong", "cache_mb"}
    for name in names & trained.keys() - cfg.given:
        setattr(cfg, name, from_file(VideoArgs, name, trained[name], path))
    cfg.settle(cfg.given)
    try:
        cfg.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    taken = [name for name in sorted(names) if getattr(cfg, name) != before[name]]
    return [f"--{name} {getattr(cfg, name)}, as in training" for name in taken]


# -- Clips


def clip_part(clip: str | Path, cfg) -> dict:
    """A video, an image, or a folder of frames as a part of a message."""
    path = Path(clip)
    if "://" in str(clip):
        raise UserError(f"{clip} is a web address; download the file and name it instead")
    if not path.exists() and not cfg.image_folder:
        raise UserError(f"{path}: no such file; expected a video, an image, or a folder of frames{nearest_path(path)}")
    path = path.absolute() if path.exists() else path  # in the current folder before the image_folder
    is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    return {"type": "image" if is_image else "video", "path": str(path)}


def clips_of(example, config):
    """Yields facts about each clip of an Example."""
    import numpy as np

    times = example.position_ids[0][np.isin(example.ids, [config.video_token_id, config.image_token_id])]
    for frames, (t, h, w), seconds in zip(example.frame_indices, example.grid_thw, example.second_per_grid):
        own, times = np.split(times, [t * h * w // 4])  # a token for 2 x 2 patches
        own = own.reshape(t, -1)[:, 0]  # of each grid step, as the model gets them
        yield dict(frames=frames, grid_thw=[t, h, w], second_per_grid=seconds, time_ids=(own - own[0]).tolist())


# -- The command


def main(argv=None):
    model = Model(argv=sys.argv[1:] if argv is None else argv)
    cfg = model.cfg
    if not (cfg.video or cfg.data_path):
        expected = "a file: python infer.py video.mp4, or --data_path val.json"
        expected = f"the benchmark's folder: --benchmark {cfg.benchmark} DIR" if cfg.benchmark else expected
        raise UserError(f"no clip given; expected {expected}")
    for line in (*model.notes, *ignored_options(cfg)):
        print(f"note: {line}")
    if cfg.benchmark:
        from benchmarks import Task  # not at the top: it imports torch

        task = Task(cfg)
        facts, result = show_evaluation(model, task.records)
        facts["benchmark"] = task.report(result)
    else:
        facts = show_evaluation(model, read_records(cfg.data_path))[0] if cfg.data_path else show_answer(model)
        for line in grpo_command(model.adapter, cfg.model_ckpt):
            print(line)
    if cfg.json:
        print(json.dumps({**facts, "model_id": cfg.model_id, "adapter": model.adapter and str(model.adapter)}))


def describe(model):
    from lora import lora_layers
    from model.quantized import quantized_weights

    weight, base, low_bit = model.network.head_weight, model.network.base_dtype, quantized_weights(model.network)
    count = sum(p.numel() for name, p in model.network.named_parameters() if not name.endswith("adapters"))
    count += sum(w.numel() for w in low_bit.values())
    how = "beside the weights" if lora_layers(model.network) else "merged"
    how = f"; adapter {how}" if model.adapter else ""
    kind = str(weight.dtype)[6:] + (f", decoder layers in {base}" if low_bit else "")
    return f"model: {model.cfg.model_id}, {count:,} parameters, {kind} on {weight.device}{how}"


def show_answer(model):
    """Stream the answer about one clip, print reasoning and final answer apart; returns the facts for --json."""
    cfg = model.cfg
    if not (cfg.question or cfg.prompt) and model.trained_on:
        print(f"note: the question is {model.trained_on['origin']}; --question asks another")
    example = model.example(cfg.video)  # before the weights are read: a broken clip ends here
    print(describe(model))
    ((_, h, w),), (indices,) = example.grid_thw, example.frame_indices
    print(f"clip: {cfg.video}: frames {' '.join(map(str, indices))}; {14 * w} x {14 * h}\nquestion: {model.question}\n")
    answer = model.answer(example, cfg, partial(print, end="", flush=True))
    unsure = parse_options(model.question) and not answer.option
    print(f"\n\nreasoning: {answer.reasoning or '(none)'}")
    print(f"answer: {answer.answer or '(none)'}{'   (names no option, or contradicts itself)' if unsure else ''}")
    if not answer.finished:
        print(f"note: cut off after {answer.completion_tokens} tokens; --max_new_tokens sets the limit")
    facts = asdict(answer)
    (clip,) = facts.pop("clips")
    return facts | clip


def show_evaluation(model, records):
    """Evaluate records, print the tables; returns the facts for --json, and the Evaluation."""
    began, cfg = time.perf_counter(), model.cfg
    print(describe(model))
    result = model.evaluate(records)
    if result.known:
        print(f"note: {result.known} of {result.count} answers are taken from {cfg.output}")
    for error in result.skipped.values():
        print(f"skipped: {error}", file=sys.stderr)
    controls = {name: each.facts(result) for name, each in result.controls.items()}
    print_tables(result, controls)
    facts = {"data_path": cfg.data_path, **result.facts(result), "skipped": len(result.skipped)}
    facts |= {"chance": result.chance, "confusion": result.confusion, "controls": controls}
    facts |= {key: controls.get("reversed", {}).get(key) for key in ("changed", "flipped")}
    facts["tasks"] = {task: {"right": own.right, "count": own.count} for task, own in result.by_task.items()}
    return facts | {"seconds": round(time.perf_counter() - began, 2)}, result


def print_tables(result, controls, most=8):
    """The controls, the confusion where there are at most so many different answers, and the tasks."""
    share = lambda value: "-" if value is None else f"{value:.1%}"
    print(f"\n{'frames':<12}{'right':>10}{'accuracy':>10}   {'95 % interval':<18}{'changed':>8}{'flipped':>9}")
    for name, row in {"as they are": result.facts(result), **controls}.items():
        if not row["count"]:
            print(f"{name:<12}not possible: {next(iter(result.controls[name].skipped.values()))}")
            continue
        right, interval = f"{row['right']:g}/{row['count']}", " to ".join(map(share, row["interval"]))
        against = f"{share(row['changed']):>8}{share(row['flipped']):>9}" if name in controls else ""
        print(f"{name:<12}{right:>10}{share(row['accuracy']):>10}   {interval:<18}{against}".rstrip())
    choices = sum(answer["options"] > 0 for answer in result.answers.values())
    of = f" of the {choices} with options" if 0 < choices < result.count else ""
    print(
        f"chance is {share(result.chance)}{of}; changed: other than for the clip as it is; flipped: become the opposite"
    )
    confusion, tasks = result.confusion, result.by_task
    columns = sorted({said for row in confusion.values() for said in row})
    if len({*confusion, *columns}) <= most:
        width = max(map(len, [*confusion, *columns, "true / said"]))
        print()
        for head, row in {"true / said": {c: c for c in columns}, **confusion}.items():
            print(f"{head:<{width}}" + "".join(f"  {row[said]:>{width}}" for said in columns))
    for task, own in tasks.items() if len(tasks) > 1 else ():
        print(f"{task:<24}{own.right:g}/{own.count}{own.accuracy:>10.1%}")


if __name__ == "__main__":
    cli(main)

"""A clip and a question -> the answer, token by token; a dataset -> how often it is right, and whether time matters.

    python infer.py video.mp4 [--question "…"]     a video, a gif, an image, or a folder of frames
    python infer.py --data_path val.json           accuracy, confusion, and both with frames reversed, shuffled, blank
    python infer.py --data_path val.json --output predictions.jsonl     a line for each answer; goes on where it stopped
    python infer.py --benchmark mvbench DIR        a public benchmark from its own files (docs/benchmarks.md)

The newest adapter under output/ is used if it was made for this base, and clips are read as it was trained on them.
"""

# ruff: noqa: E402, I001
from config import QUESTION, ignored_options, Infer, VideoArgs, as_dict, cli, parse, split_list  # first: Ctrl-C

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue

from answers import answer_span, extract_answer, parse_options
from checkpoint import BEST, STATE, best_checkpoint, find_adapter, read_json
from cli import apply, from_file
from latest import grpo_command
from model import UserError
from records import TAG, read_records, spread

# What imports torch is imported where it is needed: --help must not wait for it

FIXED = "model_id model_ckpt bf16 base_dtype head_dtype offload_embedding"  # of a Model, besides its video options


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


class Model:
    """A trained model that answers questions about clips. Its weights are read when the first answer is wanted.

    model: a run's folder (its best checkpoint, else its newest), a checkpoint, an adapter, a whole model's folder, or a
    hub id; "" = the newest adapter under output/, else the tiny model. options: those of `python infer.py --help all`,
    argv: the same as words of a command line; they become `cfg`, and may be changed there. Mistakes are UserErrors.
    """

    def __init__(self, model: str | Path = "", argv=(), **options):
        # with a config.json, or a hub id; "" is no folder, though the current one may have a config.json
        is_base = model != "" and ((Path(model) / "config.json").exists() or not Path(model).parent.is_dir())
        options = ({"model_id": model, "model_ckpt": None} if is_base else {"model_ckpt": model}) | options
        self.cfg = cfg = parse(Infer, [*(f"--{name}={value}" for name, value in options.items()), *argv])
        self.adapter, why = choose_adapter(cfg)
        self.folder = Path(self.adapter or cfg.model_id)
        state = read_json(self.folder / STATE) if (self.folder / STATE).exists() else {}
        self.notes = [why, *read_as_trained(cfg, state.get("config", {}), self.folder / STATE)]
        trained_on = state.get("question") or {}  # text, system
        self.question = cfg.text if cfg.question or cfg.prompt else trained_on.get("text") or QUESTION
        self.system = trained_on.get("system")

    def ask(self, clips, question: str = "", on_text=None) -> Answer:
        """The answer about one clip, or a list of them: videos, gifs, images, folders of frames. question "": what the
        model was trained to answer. on_text: called with each piece of text. UserError for a clip that cannot be read.
        """
        from data import time_ids

        example = self.example(clips, question)  # before the weights are read: a broken clip ends here
        sampler, sampling = self.sampler(self.cfg)
        began = time.perf_counter()
        ((completion,),) = sampler([example], sampling, 1, [self.cfg.seed], on_text and self.show(on_text))
        if not all(map(math.isfinite, completion.logprobs)):
            problem = f"{self.folder}: the model's logits are not finite, so there is no answer"
            raise UserError(f"{problem}; take another checkpoint, or --bf16 False")
        ids = [token for token in completion.ids if token not in sampling.stop_ids]
        text = self.processor.backend.decode(ids, skip_special_tokens=False)
        choices = parse_options(question or self.question)
        letter = extract_answer(text, choices) if choices else None
        clips = []
        for frames, grid, seconds in zip(example.frame_indices, example.grid_thw, example.second_per_grid):
            positions = time_ids(grid, seconds, self.processor.config)
            clips.append(dict(frames=frames, grid_thw=[*grid], second_per_grid=seconds, time_ids=positions))
        return Answer(
            text=text,
            reasoning=text.partition("<think>")[2].partition("</think>")[0].strip() or None,
            answer=f"({letter}) {choices[letter]}" if letter else answer_span(text) or "",
            option=letter,
            finished=completion.finished,
            prompt_tokens=len(example),
            completion_tokens=len(completion.ids),
            clips=clips,
            seconds=round(time.perf_counter() - began, 4),
        )

    def stream(self, clips, question: str = ""):
        """Yields the answer's text in pieces as they are drawn, and returns the Answer. Leaving early waits for it."""
        pieces = SimpleQueue()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask, clips, question, pieces.put)
            answer.add_done_callback(lambda _: pieces.put(None))
            yield from iter(pieces.get, None)
        return answer.result()

    def evaluate(self, data, **options):
        """An evaluate.Evaluation of a dataset's file, or of a list of records: accuracy, interval, by_task, confusion,
        skipped, and in `controls` the same with the frames changed. options: of sampling, max_samples, output, controls
        ("none": only as they are), for this call."""
        from data import CONTROLS
        from evaluate import Predictions, evaluate

        cfg = replace(self.cfg)
        apply(cfg, [(name, value, "") for name, value in options.items()])
        if fixed := cfg.given & {*FIXED.split(), *as_dict(VideoArgs())}:
            raise UserError(f"evaluate: {min(fixed)} cannot change for one call; give it to Model")
        if options:  # else as they are: --benchmark sets a prompt beside a --question
            cfg.check()
        records = spread(read_records(data) if isinstance(data, str | Path) else data, cfg.max_samples, cfg.seed)
        if not len(records):
            raise UserError("evaluate: no records, expected at least one")
        predictions = Predictions(cfg, self.adapter, records) if cfg.output else None
        sampler, sampling = self.sampler(cfg)
        again = partial(evaluate, sampler, records, sampling, cfg.seed)
        result = again(predictions=predictions)
        if not result.count:
            first = next(iter(result.skipped.values()), "there are none")
            raise UserError(f"evaluate: none of {len(records)} records can be asked; the first: {first}")
        result.controls = {name: again(name) for name in CONTROLS[1:] if name in split_list(cfg.controls or "")}
        return result

    # -- What an answer takes

    def example(self, clips, question: str = ""):
        """The question about clips as a data.Example."""
        from data import clip_part

        clips = [clips] if isinstance(clips, str | Path) else clips
        parts = [clip_part(clip, self.cfg.image_folder) for clip in clips]
        text = {"type": "text", "text": TAG.sub("", question or self.question)}
        system = [{"role": "system", "content": self.system}] if self.system else []
        record = {"messages": [*system, {"role": "user", "content": [*parts, text]}]}
        return self.processor.encode(record, answer=False, name=", ".join(map(str, clips)))

    @cached_property
    def processor(self):
        """The data.Processor, which makes of a record what the model sees."""
        from data import Processor, load_tokenizer
        from model.loading import ModelConfig, resolve_folder

        folder = resolve_folder(self.cfg.model_id, self.cfg.local_files_only)
        return Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), self.cfg)

    @cached_property
    def network(self):
        """The Qwen2_5_VL on its device, with its adapter. In fp32 it is added to the weights: one product a layer
        instead of three, equal up to rounding. Else it stays apart; the GPU's sampler merges a copy of its own."""
        import torch

        from adapter_files import CONFIG, load_adapter, trained_on
        from lora import merge
        from model.loading import formats_of, load_model, not_finite

        cfg, on_gpu = self.cfg, torch.cuda.is_available()
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if (fast if cfg.bf16 is None else cfg.bf16) else torch.float32
        trained, formats = trained_on(read_json(self.adapter / CONFIG) if self.adapter else {}), formats_of(cfg)
        formats |= {name: kind for name, kind in trained.items() if formats[name] == "auto"}
        model = load_model(cfg.model_id, "cuda" if on_gpu else "cpu", dtype, cfg.local_files_only, **formats)
        model.requires_grad_(False).eval()
        if self.adapter:
            load_adapter(model, self.adapter)
        if names := not_finite(model):
            raise UserError(f"{self.folder}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}")
        if self.adapter and dtype == torch.float32 and model.base_dtype == "bf16":
            merge(model)
        return model

    def sampler(self, cfg):
        """(rollouts.Sampler, model.decode.Sampling)"""
        from model.decode import Sampling
        from rollouts import Sampler

        sampler = Sampler(self.network, self.processor, cfg)
        filters = cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty
        return sampler, Sampling(cfg.max_new_tokens, *filters, stop_ids=sampler.stop_ids)

    def show(self, on_text):
        """on_token of a sampler. A character of several bytes may span several tokens: it is shown when it is whole."""
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=False), self.processor.backend
        stops = self.processor.im_end, self.processor.token_id("<|endoftext|>")
        return lambda _row, token: token in stops or on_text(stream.step(backend, token) or "")


# -- Which model, and how it was trained


def choose_adapter(cfg):
    """-> (folder or None, a line that says which and why). Without --model_id the base becomes the adapter's."""
    newest = cfg.model_ckpt == ""
    folder = None if cfg.model_ckpt is None else find_adapter(cfg.model_ckpt)
    if folder is None:
        return None, f"no adapter{' under output/' if newest else ''}; answering with {cfg.model_id}"
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or cfg.model_id
    if "model_id" not in cfg.given:
        cfg.model_id = base
    elif newest and Path(base).resolve() != Path(cfg.model_id).resolve():  # of hub ids this compares the ids
        why = f"the newest adapter, {folder}, was made for {base} and is not used with {cfg.model_id}"
        return None, f"{why}; give --model_id {base}, or --model_ckpt"
    why = "of the run saved last under output/" if newest else "as given"
    if best_checkpoint(folder.parent) == folder:
        share = read_json(folder.parent / BEST)["accuracy"]
        why += f", the best checkpoint of its run: {share:.1%} of its held-out clips are right"
    return folder, f"adapter {folder}, {why}"


def read_as_trained(cfg, trained, path):
    """Take the video options of the run that a checkpoint is from, where the command line says nothing: other frames or
    sizes cost accuracy. trained: its options, {} if it says nothing of them. Changes cfg; returns lines to print."""
    if not isinstance(trained, dict):
        raise UserError(f"{path}: its config is no object; take another checkpoint")
    names = as_dict(VideoArgs()).keys() - {"image_folder", "max_seq_length", "overlong", "cache_mb"}
    before = as_dict(cfg)
    for name in names & trained.keys() - cfg.given:
        setattr(cfg, name, from_file(VideoArgs, name, trained[name], path))
    cfg.settle(cfg.given)
    try:
        cfg.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    taken = [name for name in sorted(names) if getattr(cfg, name) != before[name]]
    return [f"--{name} {getattr(cfg, name)}, as in training" for name in taken]


# -- The command


def main(argv=None):
    model = Model(argv=sys.argv[1:] if argv is None else argv)
    cfg, began = model.cfg, time.perf_counter()
    for line in (*model.notes, *ignored_options(cfg)):
        print(f"note: {line}")
    if not (cfg.video or (cfg.data_path and not cfg.benchmark)):
        expected = "python infer.py video.mp4, --data_path val.json, or --benchmark NAME DIR"
        raise UserError(f"no clip given; expected a file or a folder: {expected}")
    if cfg.benchmark:
        from benchmarks import Task

        task = Task(cfg)
        result = model.evaluate(task.records)
        facts = show_evaluation(model, result) | {"benchmark": task.report(result)}
    elif cfg.data_path:
        facts = show_evaluation(model, model.evaluate(cfg.data_path))
    else:
        facts = show_answer(model)
    for line in grpo_command(model.adapter, cfg.model_ckpt) if not cfg.benchmark else ():
        print(line)
    if cfg.json:
        facts = {"seconds": round(time.perf_counter() - began, 2), **facts, "model_id": cfg.model_id}
        print(json.dumps(facts | {"adapter": model.adapter and str(model.adapter)}))


def show_answer(model):
    """Stream the answer about one clip, print reasoning and final answer apart; returns the facts for --json."""
    print(f"question: {model.question}\n")
    answer = model.ask(model.cfg.video, on_text=partial(print, end="", flush=True))
    print(f"\n\nreasoning: {answer.reasoning or '(none)'}\nanswer: {answer.answer or '(none)'}")
    if not answer.finished:
        print(f"note: cut off after {answer.completion_tokens} tokens; --max_new_tokens sets the limit")
    facts = asdict(answer)
    (clip,) = facts.pop("clips")
    return facts | clip


def show_evaluation(model, result):
    """Print an Evaluation's tables; returns the facts for --json."""
    if result.known:
        print(f"note: {result.known} of {result.count} answers are taken from {model.cfg.output}")
    for error in result.skipped.values():
        print(f"skipped: {error}", file=sys.stderr)
    controls = {name: each.facts(result) for name, each in result.controls.items()}
    tasks = {task: own.facts(own) for task, own in result.by_task.items()}
    print_tables(result, controls, tasks if len(tasks) > 1 else {})
    facts = {"data_path": model.cfg.data_path, **result.facts(result), "skipped": len(result.skipped)}
    facts |= {"chance": result.chance, "confusion": result.confusion, "controls": controls}
    facts |= {key: controls.get("reversed", {}).get(key) for key in ("changed", "flipped")}
    return facts | {"tasks": {task: {"right": own["right"], "count": own["count"]} for task, own in tasks.items()}}


def print_tables(result, controls, tasks, most=8):
    """Accuracy as the frames are, of each task, and with the frames changed; the confusion of at most 8 answers."""
    share = lambda value: "-" if value is None else f"{value:.1%}"
    print(f"\n{'frames':<16}{'right':>10}{'accuracy':>10}   {'95 % interval':<18}{'changed':>8}{'flipped':>9}")
    for name, row in {"original": result.facts(result), **tasks, **controls}.items():
        right, interval = f"{row['right']:g}/{row['count']}", " to ".join(map(share, row["interval"] or ()))
        against = f"{share(row['changed']):>8}{share(row['flipped']):>9}" if name in controls else ""
        print(f"{name:<16}{right:>10}{share(row['accuracy']):>10}   {interval:<18}{against}".rstrip())
    for name, control in result.controls.items():
        if not control.count:
            print(f"{name} is not possible: {next(iter(control.skipped.values()))}")
    print(f"by chance {share(result.chance)}; changed: another answer than to the original; flipped: the opposite\n")
    table = result.confusion
    columns = sorted({said for row in table.values() for said in row})
    if len({*table, *columns}) <= most:
        width = max(map(len, [*table, *columns, "true / predicted"])) + 2
        for true, row in {"true / predicted": {said: said for said in columns}, **table}.items():
            print(f"{true:<{width}}" + "".join(f"{row[said]:>{width}}" for said in columns))


if __name__ == "__main__":
    cli(main, at_once=True)

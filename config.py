"""The options of every script: one flat dataclass per script, each default with its unit and its reason.

    from config import SFT, parse
    cfg = parse(SFT)      # defaults, then each --config file, then --name value or --name=value

The defaults suit the tiny model (assets/tiny) on a laptop; a larger --model_id brings those of its file in configs/.
The comment behind a default is its text in --help, a class's docstring the example there. Nothing here imports torch.
"""

from script import cli  # isort: skip  first, for it handles Ctrl-C

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cli import as_dict, changed, check, ignored_options, parse, split_list

__all__ = ["GRPO", "QUESTION", "SFT", "Adapter", "Generate", "Infer", "LoraArgs", "Look", "Report", "VideoArgs"]
__all__ += ["as_dict", "changed", "cli", "ignored_options", "parse", "split_list"]

# Types of options with what is expected besides, and whether a value is so; other numbers are above 0
Whole = Annotated[int, "at least 0", lambda v: v >= 0]
Seed = Annotated[int, "0 to 2**63 - 1", lambda v: 0 <= v < 2**63]
Weight = Annotated[float, "at least 0", lambda v: v >= 0]
Share = Annotated[float, "a number from 0 to 1", lambda v: 0 <= v <= 1]
Mass = Annotated[float, "a number above 0, at most 1", lambda v: 0 < v <= 1]
Decay = Annotated[float, "at least 0 and below 1", lambda v: 0 <= v < 1]
Several = Annotated[int, "at least 2", lambda v: v >= 2]
AtLeast8 = Annotated[int, "at least 8", lambda v: v >= 8]
TwoTo8 = Annotated[int, "2 to 8", lambda v: 2 <= v <= 8]
Pixels = Annotated[int, "an even number, at least 40", lambda v: v >= 40 and v % 2 == 0]
OrAll = Annotated[int, "-1 (all) or a count above 0", lambda v: v == -1 or v > 0]


def any_of(*names):
    """The type of some of these names, with commas between them."""
    return Annotated[str, f"names out of {', '.join(names)}", lambda text: {*split_list(text)} <= {*names}]


Augmentations, Trackers = any_of("blur", "crop"), any_of("none", "tensorboard", "wandb")
Controls = any_of("none", "reversed", "shuffled", "blank")

# The dataset's question, as generate.py writes it and infer.py asks it
QUESTION = "In which direction is the ball moving?\nOptions:\n"
QUESTION += "(A) Left to Right\n(B) Right to Left\n(C) Falling Down\n(D) Ascending"


class Options:
    given = frozenset()  # names that the command line or a config file set
    notes = ()  # what became of other trainers' names, and which defaults the model has chosen
    check = check  # UserError for values out of their range and for contradictions

    def settle(self, settings):
        """After each layer of settings: what they set beats a conflicting default, or an earlier layer's setting."""


@dataclass
class Generate(Options):
    """python generate.py --num_samples 1000 --cot"""

    # -- Dataset
    output_dir: str = "data/synthetic_videos"  # folder for videos/, train.json, val.json
    num_samples: AtLeast8 = 20  # clips in all, some of each class; 1000 teach the tiny model
    split: Share = 0.8  # share of the clips that goes to train.json; 0 < split < 1
    seed: Seed = 42  # same seed and options, same files
    overwrite: bool = False  # replace a dataset that is already in output_dir
    workers: Whole = 0  # threads that draw or read clips; 0 = one a core

    # -- Your own clips instead of drawn ones
    from_folder: str | None = None  # DIR/class/*.mp4, or DIR/train/class and DIR/val/class; clips stay where they are
    question: str = "What does the video show?"  # asked of each clip, above the options
    num_options: TwoTo8 = 4  # class names to choose from, the right one among them; 2 to 8
    hard_negatives: bool = False  # wrong options out of the names nearest the right one, instead of all

    # -- Clips
    task: Literal["direction", "time_span", "distance"] = "direction"  # which way, when, how far the ball moves
    frame_size: Pixels = 64  # width = height, even as yuv420p needs; the largest ball has 40
    video_length: AtLeast8 = 30  # frames, shown at 30 a second; 8 show the motion
    augment: Augmentations = ""  # any of blur,crop; one draw a clip, never one a frame
    augment_prob: Share = 0.2  # probability that a clip is augmented

    # -- Chains of thought
    cot: bool = False  # answers in <think>…</think><answer>…</answer> form
    cot_source: Literal["auto", "trajectory", "openai"] = "auto"  # auto: openai if OPENAI_API_KEY is set
    cot_model: str = "gpt-4o"  # OpenAI model name
    cot_workers: int = 4  # requests in flight
    cot_coordinates: Whole = 3  # positions named in a chain made from the trajectory

    def settle(self, settings):
        if self.from_folder is not None and "output_dir" not in self.given:
            self.output_dir = f"data/{Path(self.from_folder).resolve().name}"


@dataclass
class VideoArgs(Options):
    # -- Video and images
    image_folder: str | None = None  # folder of the clips; none = videos/ beside data_path, else its own folder
    fps: float = 2.0  # frames taken a second; 2 as qwen-vl-utils; giving it turns a default nframes off
    nframes: Several | None = 8  # frames a clip, even: 4 are too few when speeds vary; none = by fps
    min_frames: Several = 4  # frames, lower bound with fps; qwen-vl-utils FPS_MIN_FRAMES
    max_frames: Several = 768  # frames, upper bound with fps; qwen-vl-utils FPS_MAX_FRAMES
    video_min_pixels: int | None = 3136  # pixels a frame, 4·28²: a 64x64 clip becomes 56x56; none = 128·28²
    video_max_pixels: int | None = 3136  # pixels a frame; none = 768·28², qwen-vl-utils' bound
    video_resized_height: int | None = None  # pixels, with video_resized_width: exact size, rounded to 28
    video_resized_width: int | None = None  # pixels
    image_min_pixels: int | None = None  # pixels an image; none = 4·28²
    image_max_pixels: int | None = None  # pixels an image; none = 16384·28²
    image_resized_height: int | None = None  # pixels, with image_resized_width: exact size, rounded to 28
    image_resized_width: int | None = None  # pixels
    max_seq_length: int = 32768  # tokens a sample, its vision tokens included
    overlong: Literal["rebudget", "drop"] = "rebudget"  # a longer sample: fewer frames, or left out; never cut
    cache_mb: Whole = 1024  # MiB of decoded clips kept in memory where no worker processes decode them

    def settle(self, settings):
        if "fps" in settings and "nframes" not in settings:
            self.nframes = None
        if (self.video_min_pixels or 0) > (self.video_max_pixels or math.inf):
            if "video_min_pixels" not in settings:
                self.video_min_pixels = self.video_max_pixels
            elif "video_max_pixels" not in settings:
                self.video_max_pixels = self.video_min_pixels


@dataclass
class LoraArgs(Options):
    # -- What is trained
    lora_enable: bool = True  # adapters on the linear layers of the components below; False = only what is not frozen
    llm_lora: bool = True  # adapters in the language model
    vision_lora: bool = True  # adapters in the vision tower's blocks
    merger_lora: bool = True  # adapters in the merger between the two; tune_merger replaces them
    lora_rank: int = 16  # r; 16 suffices for the tiny model
    lora_alpha: float = 32  # the update is scaled by alpha / r
    lora_dropout: Share = 0.0  # probability, on the adapter's input; 0 keeps sampling and training log-probs equal
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead (rank-stabilised, arXiv 2312.03732)
    num_lora_modules: OrAll = -1  # adapt only the last N layers that match, vision before language; -1 = all
    lora_namespan_exclude: list[str] = field(default_factory=lambda: ["lm_head", "embed_tokens"])  # parts of names
    freeze_llm: bool = True  # False: train all of the language model, embeddings and head included
    freeze_vision_tower: bool = True  # False: train all of the vision tower, merger excluded
    tune_merger: bool = False  # True: train all of the merger


@dataclass
class SFT(VideoArgs, LoraArgs):
    """python train_sft.py --data_path my/train.json --output_dir output/my_run"""

    # -- Model, data, run
    model_id: str = "assets/tiny"  # base checkpoint: folder or hub id; the tiny one needs neither hub nor GPU
    model_ckpt: str | None = None  # adapter to continue from: its folder, a checkpoint-N or a run; none = a new one
    data_path: str = ""  # json(l); a.json:2,b.json:0.5 = a twice an epoch, half of b; "" = the run's, or made last
    eval_data_path: str | None = ""  # held-out set; "" = val.json beside data_path if it exists, none = no evaluation
    output_dir: str = "output/video_lora"  # the run's folder: checkpoints, metrics.jsonl, config
    overwrite: bool = False  # start anew in an output_dir that already holds a run
    resume: bool = False  # continue exactly where the run in output_dir stopped
    local_files_only: bool = False  # never contact the hub
    dry_run: bool = False  # print data, steps, parameters, memory and ignored flags, then stop; nothing is written

    # -- Precision, memory, DeepSpeed
    base_dtype: Literal["bf16", "fp8", "int8", "nf4"] = "bf16"  # the decoder's frozen linears; int8 for 3B, nf4 from 7B
    head_dtype: Literal["bf16", "int8"] = "bf16"  # the head, where it is not the embedding as in 3B: for small cards
    offload_embedding: bool = False  # the embedding stays in CPU memory, looked-up rows go to the GPU; not of 3B
    deepspeed: str | None = None  # json file whose keys override our ZeRO-2 settings
    offload_optimizer: bool = False  # optimizer state in CPU memory
    bf16: bool | None = None  # none = bf16 on CUDA, fp32 on CPU (there bf16 is slower)
    fp16: bool = False  # half precision with loss scaling, for cards without bf16
    tf32: bool = True  # TF32 for fp32 products on CUDA
    deterministic: bool = False  # on CUDA the same seed gives the same run bit for bit, slower; a CPU always does
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # recompute activations: all, none, or the blocks that must
    offload_activations: bool = False  # the inputs of recomputed blocks wait in CPU memory: long video on small cards
    cuda_graphs: bool = True  # small batches run as CUDA graphs; the first of a size takes a second to capture
    dataloader_num_workers: Whole = 0  # processes that decode ahead; 0 = none, and decoded clips are kept (cache_mb)

    # -- Batch and length
    num_train_epochs: float = 6.0  # passes over the data, may be a fraction; 192 steps on 1000 clips
    max_steps: OrAll = -1  # optimizer steps; -1 = by num_train_epochs
    per_device_train_batch_size: int = 32  # samples a micro-batch and process
    gradient_accumulation_steps: int = 1  # micro-batches an optimizer step
    pack_tokens: int | Literal["auto"] | None = "auto"  # tokens a micro-batch: a step is repacked; none = as given

    # -- Optimizer and schedule
    learning_rate: float = 3e-3  # AdamW's peak rate; for rank 16 on the tiny model
    vision_lr: float | None = None  # peak rate of the vision tower's tensors; none = learning_rate
    merger_lr: float | None = None  # peak rate of the merger's tensors; none = learning_rate
    weight_decay: Weight = 0.0  # never on biases and norms
    adam_beta1: Decay = 0.9  # first moment
    adam_beta2: Decay = 0.99  # second moment; 0.999 is too slow for a few hundred steps
    adam_epsilon: float = 1e-8  # AdamW's epsilon
    max_grad_norm: Weight = 1.0  # clip the global gradient norm; 0 = off
    warmup_ratio: Share = 0.15  # share of all steps with a rising rate; 29 of 192
    warmup_steps: Whole = 0  # steps; above 0 it beats warmup_ratio
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    min_lr_ratio: Share = 0.05  # the schedule ends at this share of the peak

    # -- Log, evaluate, save
    logging_steps: int = 1  # steps between lines on the console; metrics.jsonl has every step
    verbose: bool = False  # every number of metrics.jsonl in these lines, which otherwise have 100 columns
    report_to: Trackers = "none"  # any of tensorboard,wandb: metrics go there too; metrics.jsonl always
    eval_steps: Whole = 100  # steps between evaluations by free generation; 0 = only at the end
    eval_samples: int = 400  # held-out clips an evaluation, spread over the file by the seed; 400 give +-1.4 % at 98 %
    eval_controls: Whole = 100  # held-out clips asked thrice more at the end: reversed, shuffled, blank; 0 = none
    max_new_tokens: int = 256  # tokens an answer may take in an evaluation
    save_strategy: Literal["steps", "epoch", "no"] = "steps"  # steps, epoch, or no: only at the end
    save_steps: int = 100  # steps between checkpoints
    save_total_limit: int | None = 2  # checkpoints that stay, besides the best one; none = all
    seed: Seed = 42  # order of the data, adapters' start, sampling
    max_skip_share: Share = 0.05  # the run stops when more than this share of the samples is broken


@dataclass
class GRPO(SFT):
    """python train_grpo.py --data_path my/train.json --model_ckpt output/my_run"""

    output_dir: str = "output/grpo_video_lora"  # the run's folder: checkpoints, metrics.jsonl, rollouts.jsonl, config
    model_ckpt: str | None = ""  # adapter to continue from; "" = the newest under output/, none = a new one on the base
    num_train_epochs: float = 2.6  # rounds of prompts over the data; 84 steps on 1000 clips, 32 prompts each
    per_device_train_batch_size: int = 256  # completions a micro-batch and process: 32 prompts x 8; half learns slower
    learning_rate: float = 1e-3  # AdamW's peak rate; for rank 16 on the tiny model
    warmup_ratio: Share = 0.05  # share of all steps with a rising rate
    min_lr_ratio: Share = 0.1  # the schedule ends at this share of the peak
    eval_steps: Whole = 40  # steps between evaluations, greedy and sampled; 0 = only at the start and at the end
    max_new_tokens: int = 128  # tokens an answer may take in an evaluation; as max_completion_length

    # -- Groups
    num_generations: Several = 8  # completions a prompt (G)
    max_completion_length: int = 128  # tokens a completion; the dataset's chains of thought take about 80
    temperature: Weight = 1.0  # of sampling and of the log-probs alike
    top_p: Mass = 1.0  # 1 = off; below 1 the sampler is no longer the policy that is trained
    top_k: Whole = 0  # 0 = off; as top_p
    max_resample: Whole = 1  # more rounds of sampling, each with new prompts, until enough groups differ in accuracy
    rewards: str = "accuracy,format"  # of accuracy,format,temporal,judge, or my_rewards.py:name
    reward_weights: list[float] | None = field(default_factory=lambda: [1.0, 0.2])  # one a reward; none = 1 for all
    mask_truncated_completions: bool = False  # completions cut by the limit give no gradient

    # -- Loss
    beta: Weight = 0.02  # weight of the KL to the frozen reference; 0 = off, no reference pass
    reference: Literal["start", "base"] = "start"  # of the KL: the policy as the run began, or without adapter
    use_bias_correction_kl: bool = True  # KL times the ratio: an unbiased gradient that cannot explode
    epsilon: float = 0.2  # the ratio is clipped below at 1 - epsilon
    epsilon_high: float | None = None  # and above at 1 + epsilon_high; none = epsilon
    num_iterations: int = 1  # updates a set of rollouts; with 1 the ratio is 1 and nothing is clipped
    scale_rewards: Literal["group", "batch", "none"] = "group"  # advantages over the std of their group, the batch
    aggregation: Literal["token", "sequence", "constant"] = "token"  # mean of the loss: all tokens, by sequence, fixed
    importance_sampling_level: Literal["token", "sequence"] = "token"  # ratio of each token, or of the whole sequence
    sampler_is_cap: float | None = None  # truncate importance weights trainer/sampler here; none = no weights

    def settle(self, settings):
        """The default weights belong to the default rewards."""
        super().settle(settings)
        if "rewards" in settings and "reward_weights" not in settings:
            self.reward_weights = None


@dataclass
class View(VideoArgs):
    model_id: str = "assets/tiny"  # base checkpoint: folder or hub id (or --base_model)
    local_files_only: bool = False  # never contact the hub
    question: str = ""  # what to ask of each clip; "" = the dataset's question

    @property
    def text(self):
        """The question. Shells hand over \\n in quotes as two characters: it is a line break."""
        return (self.question or getattr(self, "prompt", "") or QUESTION).replace("\\n", "\n")


@dataclass
class Look(View):
    """python data.py clip.mp4 my/train.json"""

    files: list[str] = field(default_factory=list, metadata={"positional": True})  # clips, images, folders, json(l)
    json: bool = False  # one JSON line a record or clip: learned texts or refused, clips, warnings
    preview: str | None = None  # .png to write: frames of the first file, or its first record, as the model sees them


@dataclass
class Infer(View):
    """python infer.py video.mp4 --question 'What happens?'"""

    video: str | None = field(default=None, metadata={"positional": True})  # file to ask about (or --video_path)
    prompt: str = ""  # question under another name; of a benchmark: official (its own) or video-r1
    json: bool = False  # last line: one JSON object
    model_ckpt: str | None = ""  # adapter; "" = the newest under output/ if any, none = the base alone
    bf16: bool | None = None  # none = bf16 on CUDA, fp32 on CPU
    base_dtype: Literal["auto", "bf16", "fp8", "int8", "nf4"] = "auto"  # auto: the base that the adapter was trained on
    head_dtype: Literal["auto", "bf16", "int8"] = "auto"  # of the head, as base_dtype
    offload_embedding: bool = False  # the embedding stays in CPU memory, looked-up rows go to the GPU; not of 3B
    max_new_tokens: int = 256  # tokens; chains of thought fit
    temperature: Weight = 0.0  # 0 = always the likeliest token
    top_p: Mass = 1.0  # sample from the likeliest tokens of this mass; 1 = off
    top_k: Whole = 0  # sample from this many tokens; 0 = off
    repetition_penalty: float = 1.0  # divides the logits of tokens already there; 1 = off
    seed: Seed = 42  # of sampling; the shuffled control's orders follow from the samples' names

    # -- A dataset instead of one clip
    data_path: str | None = None  # json or jsonl to evaluate: accuracy, confusion, reversed, shuffled, blanked
    benchmark: str | None = None  # a public one, its folder behind it: --benchmark mvbench DIR; docs/benchmarks.md
    controls: Controls | None = "reversed,shuffled,blank"  # evaluate again with the frames in each state; none = off
    output: str | None = None  # .jsonl to write, a line for each answer as it comes; one that is there is continued
    max_samples: int | None = None  # evaluate only N, spread over the file by the seed; none = all
    dataloader_num_workers: Whole = 0  # processes that read clips ahead


@dataclass
class Adapter(Options):
    """python lora.py merge output/video_lora output/merged"""

    command: str = field(default="", metadata={"positional": True})  # merge or check
    model_ckpt: str | None = field(default=None, metadata={"positional": True})  # adapter: its folder, or a run
    model_id: str = ""  # its base checkpoint: folder or hub id; "" = the one that the adapter names
    local_files_only: bool = False  # never contact the hub
    output_dir: str | None = field(default=None, metadata={"positional": True})  # new folder for the merged model
    merge_base: Literal["original", "quantised"] = "original"  # of an adapter trained on a low-bit base: merge into


@dataclass
class Report(Options):
    """python report.py output/video_lora"""

    runs: list[str] = field(default_factory=list, metadata={"positional": True})  # folders; several are compared
    output: str | None = None  # file to write; none = report.html in the run's folder, compare.html beside several

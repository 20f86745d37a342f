"""The options of every script: flat typed dataclasses, one a script, every default with its unit and its reason.

    from config import SFT, parse
    cfg = parse(SFT)      # defaults, then --config FILE.py (plain assignments), then --name value or --name=value

The defaults of training and inference are for the embedded model (assets/tiny) on a laptop; configs/ holds the diffs
for larger ones. The comment beside a default is also its line in --help; ignored_options says which of the given ones
have no effect. Standard library only: --help must not wait for torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cli import CONVERT, as_dict, at_least, changed, cli, names_of, one_of, parse, positive, require, split_list, within
from model import UserError, nearest

__all__ = ["GRPO", "QUESTION", "SFT", "Adapter", "Generate", "Infer", "LoraArgs", "Look", "Report", "VideoArgs"]
__all__ += ["as_dict", "changed", "cli", "ignored_options", "parse", "split_list"]

# The dataset's question, as generate.py writes it and infer.py asks it.
QUESTION = (
    "In which direction is the ball moving?\n"
    "Options:\n(A) Left to Right\n(B) Right to Left\n(C) Falling Down\n(D) Ascending"
)


@dataclass
class Generate:
    # -- Dataset
    output_dir: str = "data/synthetic_videos"  # folder for videos/, train.json, val.json
    num_samples: int = 20  # clips in all; 1000 teach the embedded model
    split: float = 0.8  # share of the clips that goes to train.json; 0 < split < 1
    seed: int = 42  # same seed and options, same files
    overwrite: bool = False  # replace a dataset that is already in output_dir
    workers: int = 0  # processes that draw and encode; 0 = one a core
    task: str = "direction"  # direction, or base: the questions the embedded model was made with
    base_coordinates: bool = False  # base only: also ask for the ball's coordinates

    # -- Your own clips instead of drawn ones
    from_folder: str | None = None  # DIR/class/*.mp4, or DIR/train/class and DIR/val/class; clips stay where they are
    question: str = "What does the video show?"  # asked of each clip, above the options
    num_options: int = 4  # class names to choose from, the right one among them; 2 to 8
    hard_negatives: bool = False  # wrong options out of the names nearest the right one, instead of all

    # -- Clips
    frame_size: int = 64  # pixels, width = height; small enough for a laptop
    video_length: int = 30  # frames, shown at 30 a second
    style: str = "varied"  # varied (only motion tells the class), or plain: white ball, radius 20, 5 px a frame
    augment: str = ""  # any of blur,crop; one draw a clip, never one a frame
    augment_prob: float = 0.2  # probability that a clip is augmented

    # -- Chains of thought
    cot: bool = False  # answers in <think>…</think><answer>…</answer> form
    cot_source: str = "auto"  # trajectory (free, offline), openai, or auto: openai if OPENAI_API_KEY is set
    cot_model: str = "gpt-4o"  # OpenAI model name
    cot_workers: int = 4  # requests in flight
    cot_coordinates: int = 3  # positions named in a chain made from the trajectory

    def settle(self, settings):
        """A folder of clips makes a dataset of its own name."""
        if self.from_folder is not None and "output_dir" not in self.given:
            self.output_dir = f"data/{Path(self.from_folder).resolve().name}"

    def check(self):
        require(0 < self.split < 1, "split", self.split, "a share between 0 and 1, both excluded")
        at_least(self, 2, "num_samples", "video_length")
        at_least(self, 16, "frame_size")
        at_least(self, 1, "cot_workers")
        at_least(self, 0, "seed", "workers", "cot_coordinates")
        within(self, 0, 1, "augment_prob")
        within(self, 2, 8, "num_options")
        require(bool(self.question.strip()), "question", self.question, "some text")
        one_of(self, "style", "varied", "plain")
        one_of(self, "task", "direction", "base")
        one_of(self, "cot_source", "auto", "trajectory", "openai")
        names_of(self, "augment", "blur", "crop")


@dataclass
class VideoArgs:
    # -- Video and images
    image_folder: str | None = None  # folder of the clips; none = videos/ beside data_path, else its own folder
    allow_outside_files: bool = False  # also files outside that folder: absolute names, "..", links that lead out
    allow_remote_files: bool = False  # also http and https addresses of public hosts, fetched once into remote_folder
    remote_folder: str = "data/remote"  # where they are kept
    remote_max_mb: int = 512  # MiB a remote file may have
    remote_seconds: float = 120.0  # seconds its download may take, from the first byte sent to the last received
    fps: float = 2.0  # frames taken a second; 2 as qwen-vl-utils; giving it turns a default nframes off
    nframes: int | None = None  # frames a clip, even; none = by fps
    min_frames: int = 4  # frames, lower bound with fps; qwen-vl-utils FPS_MIN_FRAMES
    max_frames: int = 768  # frames, upper bound with fps; qwen-vl-utils FPS_MAX_FRAMES
    video_min_pixels: int | None = None  # pixels a frame; none = 128·28², qwen-vl-utils' bound
    video_max_pixels: int | None = None  # pixels a frame; none = 768·28²; an explicit max beats a default min
    video_resized_height: int | None = None  # pixels, with video_resized_width: exact size, rounded to 28
    video_resized_width: int | None = None  # pixels
    image_min_pixels: int | None = None  # pixels an image; none = 4·28²
    image_max_pixels: int | None = None  # pixels an image; none = 16384·28²
    image_resized_height: int | None = None  # pixels, with image_resized_width: exact size, rounded to 28
    image_resized_width: int | None = None  # pixels
    max_seq_length: int = 32768  # tokens a sample, its vision tokens included
    overlong: str = "rebudget"  # a longer sample gets fewer frames (rebudget) or is left out (drop); never cut
    cache_mb: int = 1024  # MiB of decoded clips kept in memory; a clip is decoded once, not once an epoch

    def check(self):
        positive(self, "fps")
        at_least(self, 2, "nframes", "min_frames", "max_frames")
        at_least(self, 1, "max_seq_length")
        at_least(self, 0, "cache_mb")
        at_least(self, 1, "remote_max_mb")
        positive(self, "remote_seconds")
        one_of(self, "overlong", "rebudget", "drop")
        low, high = self.min_frames, self.max_frames
        require(low <= high, "min_frames", low, f"at most max_frames {high}")
        for kind in ("video", "image"):
            low, high, height, width = (getattr(self, name) for name in size_flags(kind))
            at_least(self, 1, *size_flags(kind))
            ordered = low is None or high is None or low <= high
            require(ordered, f"{kind}_min_pixels", low, f"at most {kind}_max_pixels {high}")
            require(
                (height is None) == (width is None),
                f"{kind}_resized_height",
                height,
                f"given together with --{kind}_resized_width (found {width!r})",
            )

    def settle(self, settings):
        """After a layer of settings: what it names beats a conflicting default or setting of an earlier layer."""
        if "fps" in settings and "nframes" not in settings:
            self.nframes = None
        for kind in ("video", "image"):
            low, high = size_flags(kind)[:2]
            lower, upper = getattr(self, low), getattr(self, high)
            if lower is not None and upper is not None and lower > upper:
                if low not in settings:
                    setattr(self, low, upper)
                elif high not in settings:
                    setattr(self, high, lower)


def size_flags(kind):
    return f"{kind}_min_pixels", f"{kind}_max_pixels", f"{kind}_resized_height", f"{kind}_resized_width"


@dataclass
class LoraArgs:
    # -- What is trained
    lora_enable: bool = True  # adapters on the linear layers of the parts below; False = only what is not frozen
    llm_lora: bool = True  # adapters in the language model
    vision_lora: bool = True  # adapters in the vision tower's blocks
    merger_lora: bool = True  # adapters in the merger between the two; tune_merger replaces them
    lora_rank: int = 16  # r; 16 suffices for the embedded model
    lora_alpha: float = 32  # the update is scaled by alpha / r
    lora_dropout: float = 0.0  # probability, on the adapter's input; 0 keeps sampling and training log-probs equal
    lora_bias: str = "none"  # biases trained too: none, all, or lora_only (those of adapted layers)
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead (rank-stabilised, arXiv 2312.03732)
    num_lora_modules: int = -1  # adapt only the last N layers found, vision before language; -1 = all
    lora_namespan_exclude: list[str] = field(default_factory=lambda: ["lm_head", "embed_tokens"])  # name parts left out
    freeze_llm: bool = True  # False: train all of the language model, embeddings and head included
    freeze_vision_tower: bool = True  # False: train all of the vision tower, merger excluded
    tune_merger: bool = False  # True: train all of the merger

    def check(self):
        at_least(self, 1, "lora_rank")
        positive(self, "lora_alpha")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a probability, at least 0 and below 1")
        one_of(self, "lora_bias", "none", "all", "lora_only")
        n = self.num_lora_modules
        require(n == -1 or n > 0, "num_lora_modules", n, "-1 (all) or a count above 0")
        if not self.lora_enable:
            trained = not self.freeze_llm or not self.freeze_vision_tower or self.tune_merger
            require(trained, "lora_enable", False, "True, or a part that is not frozen: nothing is left to train")
            return
        for lora, freeze in (("llm_lora", "freeze_llm"), ("vision_lora", "freeze_vision_tower")):
            clash = getattr(self, lora) and not getattr(self, freeze)
            expected = f"True while {lora} is on (a part has adapters or is trained whole): add --{lora} False"
            require(not clash, freeze, False, expected)
        some = self.llm_lora or self.vision_lora or (self.merger_lora and not self.tune_merger)
        expected = "False, or one of llm_lora, vision_lora, merger_lora: no part carries an adapter"
        require(some, "lora_enable", True, expected)


@dataclass
class CommonTrain(VideoArgs, LoraArgs):
    # -- Model, data, run
    model_id: str = "assets/tiny"  # base checkpoint: folder or hub id; the embedded one needs neither hub nor GPU
    model_ckpt: str | None = None  # adapter to go on from: its folder, a checkpoint-N or a run; none = a new one
    data_path: str = "data/synthetic_videos/train.json"  # json or jsonl of conversations
    eval_data_path: str | None = ""  # held-out set; "" = val.json beside data_path if it is there, none = no evaluation
    output_dir: str = "output/run"  # the run's folder: checkpoints, metrics.jsonl, config
    overwrite: bool = False  # start anew in an output_dir that already holds a run
    resume: bool = False  # go on exactly where the run in output_dir stopped
    local_files_only: bool = False  # never ask the hub

    # -- Plan
    dry_run: bool = False  # tell data, steps, parameters, memory, time and idle flags, then stop; nothing is written

    # -- Precision, memory, DeepSpeed
    deepspeed: str | None = None  # json file whose keys override our ZeRO-2 settings
    offload_optimizer: bool = False  # optimizer state in CPU memory
    bf16: bool | None = None  # none = bf16 on CUDA, fp32 on CPU (there bf16 is slower)
    fp16: bool = False  # half precision with loss scaling, for cards without bf16
    tf32: bool = True  # TF32 for fp32 products on CUDA
    deterministic: bool = False  # on CUDA the same seed gives the same run bit for bit, slower; on a CPU it does anyway
    gradient_checkpointing: bool = False  # recompute activations a block; the embedded model has no need of it
    cuda_graphs: bool = True  # passes of small batches as CUDA graphs; the first of a size takes a second to make
    dataloader_num_workers: int = 2  # threads that decode ahead; one a core of a laptop

    # -- Batch and length
    num_train_epochs: float = 1.0  # passes over the data; may be a fraction
    max_steps: int = -1  # optimizer steps; -1 = by num_train_epochs
    per_device_train_batch_size: int = 32  # samples a micro-batch and process
    gradient_accumulation_steps: int = 1  # micro-batches an optimizer step
    pack_tokens: int | None = 8192  # a rank's samples of a step go into the fewest micro-batches of at most so many
    # tokens, whatever batch size and accumulation say; the update is the same; none = micro-batches as given

    # -- Optimizer and schedule
    learning_rate: float = 1e-3  # AdamW's peak rate
    vision_lr: float | None = None  # peak rate of the vision tower's tensors; none = learning_rate
    merger_lr: float | None = None  # peak rate of the merger's tensors; none = learning_rate
    weight_decay: float = 0.0  # never on biases and norms
    adam_beta1: float = 0.9  # first moment
    adam_beta2: float = 0.99  # second moment; 0.999 is too slow for a few hundred steps
    adam_epsilon: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 1.0  # clip the global gradient norm; 0 = off
    warmup_ratio: float = 0.0  # share of all steps with a rising rate
    warmup_steps: int = 0  # steps; above 0 it beats warmup_ratio
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant; all after the warm-up
    min_lr_ratio: float = 0.0  # the schedule ends at this share of the peak

    # -- Log, evaluate, save
    logging_steps: int = 1  # steps between lines on the console; metrics.jsonl has every step
    report_to: str = "none"  # any of tensorboard,wandb: metrics, rollouts and clips go there too; metrics.jsonl always
    eval_steps: int = 100  # steps between evaluations by free generation; 0 = only at the end
    eval_samples: int = 400  # held-out clips an evaluation, spread over the file by the seed; 400 give +-1.4 % at 98 %
    eval_controls: int = 100  # held-out clips asked thrice more at the end: reversed, shuffled, blank; 0 = not
    max_new_tokens: int = 256  # tokens an answer may take in an evaluation
    save_strategy: str = "steps"  # steps, epoch, or no: only at the end
    save_steps: int = 100  # steps between checkpoints
    save_total_limit: int | None = 2  # checkpoints kept, the best one beside them; none = all
    seed: int = 42  # order of the data, adapters' start, sampling
    max_skip_share: float = 0.05  # the run stops when more than this share of the samples is broken

    # -- Accepted for other trainers' commands
    use_liger: bool = False  # no effect here
    disable_flash_attn2: bool = False  # no effect here
    lazy_preprocess: bool = True  # no effect here
    remove_unused_columns: bool = False  # no effect here

    # the embedded model's view of a 64x64 clip
    nframes: int | None = 8  # frames a clip: 4 are too few when speeds vary; none = by fps
    video_min_pixels: int | None = 3136  # pixels a frame, 4·28²: a 64x64 clip becomes 56x56
    video_max_pixels: int | None = 3136  # pixels a frame; an explicit max beats a default min

    def check(self):
        VideoArgs.check(self)
        LoraArgs.check(self)
        positive(self, "num_train_epochs", "learning_rate", "vision_lr", "merger_lr", "adam_epsilon")
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "pack_tokens", "logging_steps")
        at_least(self, 1, "save_steps", "save_total_limit", "eval_samples", "max_new_tokens")
        at_least(self, 0, "weight_decay", "max_grad_norm", "warmup_steps", "eval_steps", "eval_controls")
        at_least(self, 0, "dataloader_num_workers", "seed")
        within(self, 0, 1, "warmup_ratio", "min_lr_ratio", "max_skip_share")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        n = self.max_steps
        require(n == -1 or n > 0, "max_steps", n, "-1 (by epochs) or a count above 0")
        one_of(self, "lr_scheduler_type", "cosine", "linear", "constant")
        one_of(self, "save_strategy", "steps", "epoch", "no")
        wanted = [name for name in split_list(self.report_to) if name not in ("tensorboard", "wandb")]
        expected = "none, or names out of tensorboard, wandb, separated by commas"
        hint = nearest(wanted[0], ("none", "tensorboard", "wandb")) if wanted else ""
        require(not wanted or self.report_to == "none", "report_to", self.report_to, expected + hint)
        require(not (self.bf16 and self.fp16), "fp16", True, "False while --bf16 is True: choose one")
        require(not (self.resume and self.overwrite), "resume", True, "False while --overwrite is True: choose one")


@dataclass
class SFT(CommonTrain):
    output_dir: str = "output/video_lora"  # the run's folder: checkpoints, metrics.jsonl, config
    num_train_epochs: float = 6.0  # passes over the data; 192 steps on 1000 clips
    learning_rate: float = 3e-3  # AdamW's peak rate; for rank 16 on the embedded model (2e-4 for the 3B)
    warmup_ratio: float = 0.15  # share of all steps with a rising rate; 29 of 192
    min_lr_ratio: float = 0.05  # the schedule ends at this share of the peak


@dataclass
class GRPO(CommonTrain):
    output_dir: str = "output/grpo_video_lora"  # the run's folder: checkpoints, metrics.jsonl, rollouts.jsonl, config
    model_ckpt: str | None = ""  # adapter to go on from; "" = the newest under output/, none = a new one on the base
    num_train_epochs: float = 4.0  # passes over the data; 84 steps on 1000 clips, 48 prompts each
    per_device_train_batch_size: int = 256  # completions a micro-batch and process: 32 prompts x 8; half learns slower
    learning_rate: float = 1e-3  # AdamW's peak rate; for rank 16 on the embedded model, not measured on the 3B
    warmup_ratio: float = 0.05  # share of all steps with a rising rate
    min_lr_ratio: float = 0.1  # the schedule ends at this share of the peak
    eval_steps: int = 40  # steps between evaluations, greedy and sampled; 0 = only before the first step and at the end
    max_new_tokens: int = 128  # tokens an answer may take in an evaluation; as max_completion_length

    # -- Groups
    num_generations: int = 8  # completions a prompt (G)
    max_completion_length: int = 128  # tokens a completion; the dataset's chains of thought take about 80
    temperature: float = 1.0  # of sampling and of the log-probs alike
    top_p: float = 1.0  # 1 = off; below 1 the sampler is no longer the policy that is trained
    top_k: int = 0  # 0 = off; as top_p
    max_resample: int = 1  # more rounds of sampling, each with new prompts, until enough groups differ in accuracy
    rewards: str = "accuracy,format"  # names, or my_rewards.py:name, separated by commas
    # one a reward; none = 1 for all, also where rewards is given alone. What breaks the format is seldom what makes an
    # answer wrong, so it weighs less.
    reward_weights: list[float] | None = field(default_factory=lambda: [1.0, 0.2])  # one a reward; none = 1 for all
    mask_truncated_completions: bool = False  # completions cut by the limit give no gradient

    # -- Loss
    beta: float = 0.02  # weight of the KL to the frozen reference; 0 = off, no reference pass
    reference: str = "start"  # KL is measured against the policy as the run began (start), or without adapter (base)
    use_bias_correction_kl: bool = True  # KL times the ratio: an unbiased gradient that cannot explode
    epsilon: float = 0.2  # the ratio is clipped below at 1 - epsilon
    epsilon_high: float | None = None  # and above at 1 + epsilon_high; none = epsilon
    num_iterations: int = 1  # updates a set of rollouts; with 1 the ratio is 1 and nothing is clipped
    scale_rewards: str = "group"  # advantages over the std of their group, of the batch, or none
    aggregation: str = "token"  # mean over tokens of the whole batch, over each sequence first, or by constant length
    importance_sampling_level: str = "token"  # ratio of each token, or of the whole sequence
    sampler_is_cap: float | None = None  # truncate importance weights trainer/sampler here; none = no weights

    # -- Show
    log_completions: int = 10  # steps between two rollouts on the console; 0 = never; rollouts.jsonl has all

    def settle(self, settings):
        """The default weights are those of the default rewards."""
        CommonTrain.settle(self, settings)
        if "rewards" in settings and "reward_weights" not in settings:
            self.reward_weights = None

    def check(self):
        CommonTrain.check(self)
        at_least(self, 2, "num_generations")
        at_least(self, 1, "max_completion_length", "num_iterations")
        at_least(self, 0, "beta", "top_k", "log_completions", "max_resample")
        positive(self, "temperature", "epsilon", "epsilon_high", "sampler_is_cap", "top_p")
        within(self, 0, 1, "top_p")
        one_of(self, "scale_rewards", "group", "batch", "none")
        one_of(self, "aggregation", "token", "sequence", "constant")
        one_of(self, "importance_sampling_level", "token", "sequence")
        one_of(self, "reference", "start", "base")
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        text = f"a divisor of per_device_train_batch_size x gradient_accumulation_steps = {size}: groups are whole"
        require(size % self.num_generations == 0, "num_generations", self.num_generations, text)
        adapters_only = self.lora_enable and self.freeze_llm and self.freeze_vision_tower and not self.tune_merger
        adapters_only = adapters_only and self.lora_bias == "none"
        expected = "start: with --lora_enable False, or a part trained whole, nothing keeps the base's weights"
        require(self.reference == "start" or adapters_only, "reference", self.reference, expected)
        names = split_list(self.rewards)
        require(bool(names), "rewards", self.rewards, "at least one name")
        weights = self.reward_weights
        fits = weights is None or len(weights) == len(names)
        require(fits, "reward_weights", weights, f"{len(names)} numbers, one a reward")


def typed(question):
    """The dataset's question for an empty one. Shells hand over \\n in quotes as two characters: it is a line break."""
    return (question or QUESTION).replace("\\n", "\n")


@dataclass
class Asked(VideoArgs):
    """What data.py shows is what infer.py asks about."""

    # -- Model
    model_id: str = "assets/tiny"  # base checkpoint: folder or hub id (or --base_model)
    local_files_only: bool = False  # never ask the hub

    # as in training on the embedded model
    nframes: int | None = 8  # frames a clip; none = by fps
    video_min_pixels: int | None = 3136  # pixels a frame, 4·28²: a 64x64 clip becomes 56x56
    video_max_pixels: int | None = 3136  # pixels a frame; an explicit max beats a default min


@dataclass
class Look(Asked):
    """data.py's."""

    aliases: ClassVar = {"base_model": "model_id"}

    # -- What to look at
    files: list[str] = field(default_factory=list, metadata={"positional": True})  # videos, images, json, jsonl
    question: str = ""  # asked of each video or image, for its count of tokens; "" = the dataset's question

    @property
    def text(self):
        return typed(self.question)

    def check(self):
        Asked.check(self)
        require(bool(self.files), "files", self.files, "one at least: python data.py clip.mp4 my/train.json")


@dataclass
class Infer(Asked):
    aliases: ClassVar = {"base_model": "model_id", "video_path": "video"}

    # -- One clip
    video: str | None = field(default=None, metadata={"positional": True})  # file to ask about (or --video_path)
    question: str = ""  # what to ask; "" = the dataset's question
    prompt: str = ""  # the same under another name; \n typed as two characters is a line break in both
    json: bool = False  # last line: one JSON object

    # -- Model
    model_ckpt: str | None = ""  # adapter; "" = the newest under output/ if any, none = the base alone
    bf16: bool | None = None  # none = bf16 on CUDA, fp32 on CPU

    # -- Sampling
    max_new_tokens: int = 256  # tokens; chains of thought fit
    temperature: float = 0.0  # 0 = always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens of this mass; 1 = off
    top_k: int = 0  # sample from this many tokens; 0 = off
    repetition_penalty: float = 1.0  # divides the logits of tokens already there; 1 = off
    seed: int = 42  # of sampling; the shuffled control's orders follow from the samples' names

    # -- A dataset instead of one clip
    data_path: str | None = None  # json or jsonl to evaluate: accuracy, confusion, reversed, shuffled, blanked
    controls: str | None = "reversed,shuffled,blank"  # the same once more with the frames in this state; none = not
    max_samples: int | None = None  # evaluate only N, spread over the file by the seed; none = all
    batch_size: int = 32  # clips decoded together; sampling keeps their caches in memory
    cuda_graphs: bool = True  # passes of small batches as CUDA graphs; the first of a size takes a second to make
    dataloader_num_workers: int = 2  # threads that read clips ahead

    @property
    def text(self):
        return typed(self.question or self.prompt)

    def check(self):
        Asked.check(self)
        at_least(self, 1, "max_new_tokens", "max_samples", "batch_size")
        at_least(self, 0, "temperature", "top_k", "seed", "dataloader_num_workers")
        positive(self, "top_p", "repetition_penalty")
        within(self, 0, 1, "top_p")
        require(not (self.question and self.prompt), "prompt", self.prompt, "to stand alone: --question says the same")
        names_of(self, "controls", "none", "reversed", "shuffled", "blank")
        alone = not (self.video and self.data_path)
        require(alone, "data_path", self.data_path, "to stand alone: one clip or a dataset")
        expected = "a file: python infer.py video.mp4, or --data_path val.json"
        require(self.video or self.data_path, "video", self.video, expected)


@dataclass
class Adapter:
    """lora.py's commands."""

    aliases: ClassVar = {"model_ckpt": "adapter"}

    # -- What to do
    command: str = field(default="", metadata={"positional": True})  # merge or check
    adapter: str | None = field(default=None, metadata={"positional": True})  # folder, or a run (or --model_ckpt)
    model_id: str = ""  # its base checkpoint: folder or hub id; "" = the one that the adapter names
    local_files_only: bool = False  # never ask the hub

    # -- merge: a whole model, as transformers and vLLM load it
    output_dir: str | None = field(default=None, metadata={"positional": True})  # folder to write, new or empty
    shard_gb: float = 5.0  # GB a file at most, and about what is held in memory; 5 as on the hub

    def check(self):
        if self.command == "convert":
            raise UserError(f"convert: was removed; {CONVERT}")
        one_of(self, "command", "merge", "check")
        expected = f"an adapter's folder: python lora.py {self.command} output/video_lora"
        require(self.adapter is not None, "adapter", self.adapter, expected)
        writes = self.command == "merge"
        expected = f"a new folder to write: python lora.py merge {self.adapter} OUT"
        require(self.output_dir or not writes, "output_dir", self.output_dir, expected)
        positive(self, "shard_gb")


@dataclass
class Report:
    """report.py's."""

    # -- What to show
    runs: list[str] = field(default_factory=list, metadata={"positional": True})  # folders; several lie over each other
    output: str | None = None  # file to write; none = report.html in the run's folder, compare.html beside several

    def check(self):
        require(bool(self.runs), "runs", self.runs, "a run's folder: python report.py output/video_lora")


# -- Options that have no effect


def ignored_options(cfg):
    """One line for each option that was given but has no effect beside the others, and for each default of the tiny
    model that another model is about to get."""
    ignored = [(name, why) for cls, rules in IGNORED for names, applies, why in rules if isinstance(cfg, cls)
               for name in names.split() if name in cfg.given and applies(cfg)]  # fmt: skip
    lines = [f"--{name} has no effect: {why}" for name, why in ignored]
    if isinstance(cfg, VideoArgs) and cfg.model_id != type(cfg)().model_id:
        if not {"nframes", "fps", "video_max_pixels", "video_resized_height"} & cfg.given:
            view = f"{cfg.nframes} frames of {cfg.video_max_pixels} pixels"
            lines.append(f"clips are read as for the tiny model, {view}: see --fps, --nframes, --video_max_pixels")
        if hasattr(cfg, "learning_rate") and "learning_rate" not in cfg.given:
            lines.append(f"--learning_rate {cfg.learning_rate:g} suits the tiny model; the 3B takes 2e-4")
    return lines


# class: (options, when they have no effect, why)
IGNORED = [
    (CommonTrain, [
        ("use_liger", lambda c: True, "the (T, V) logits are never held here, there is nothing for Liger to replace"),
        ("disable_flash_attn2", lambda c: True, "attention is PyTorch's own, the flash-attn package is never used"),
        ("lazy_preprocess", lambda c: True, "clips are always read when they are needed, and kept (cache_mb)"),
        ("remove_unused_columns", lambda c: True, "samples are no table, no column is dropped"),
        ("num_train_epochs", lambda c: c.max_steps != -1, "max_steps is given and decides"),
        ("warmup_ratio", lambda c: c.warmup_steps > 0, "warmup_steps is given and decides"),
        ("save_steps", lambda c: c.save_strategy != "steps", "save_strategy is not steps"),
        ("eval_steps eval_samples max_new_tokens", lambda c: c.eval_data_path is None, "nothing is evaluated"),
        ("model_ckpt", lambda c: not c.lora_enable and c.model_ckpt, "lora_enable is False: no adapter is loaded"),
    ]),
    (VideoArgs, [
        ("fps min_frames max_frames", lambda c: c.nframes is not None, "nframes decides; --nframes none turns it off"),
        ("video_min_pixels video_max_pixels", lambda c: c.video_resized_height, "video_resized_height decides"),
        ("image_min_pixels image_max_pixels", lambda c: c.image_resized_height, "image_resized_height decides"),
    ]),
    (LoraArgs, [
        ("lora_rank lora_alpha lora_dropout lora_bias use_rslora num_lora_modules llm_lora vision_lora merger_lora",
         lambda c: not c.lora_enable, "lora_enable is False"),
    ]),
    (GRPO, [
        ("lora_dropout", lambda c: True, "it is off in GRPO: the policy that is updated must be the one that sampled"),
        ("reference use_bias_correction_kl", lambda c: c.beta == 0, "beta is 0, there is no KL"),
        ("epsilon epsilon_high", lambda c: c.num_iterations == 1, "one update a set of rollouts: every ratio is 1"),
    ]),
    (Generate, [
        ("num_samples task frame_size video_length style augment augment_prob", lambda c: c.from_folder is not None,
         "clips of --from_folder are taken as they are"),
        ("question num_options hard_negatives", lambda c: c.from_folder is None, "it is for --from_folder"),
        ("cot_source cot_model cot_workers cot_coordinates", lambda c: not c.cot, "there is no --cot"),
    ]),
    (Infer, [
        ("top_p top_k", lambda c: c.temperature == 0, "temperature 0 takes the likeliest token"),
        ("controls max_samples batch_size", lambda c: c.data_path is None, "it is for a dataset (--data_path)"),
        ("question prompt", lambda c: c.data_path is not None, "a dataset brings its own questions"),
    ]),
]  # fmt: skip

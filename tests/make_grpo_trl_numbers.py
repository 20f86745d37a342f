"""Makes tests/grpo_trl_numbers.json: GRPO losses and gradients out of TRL's own GRPOTrainer.

Run by hand, never by the tests: `pip install trl==1.16.0 accelerate datasets && python tests/make_grpo_trl_numbers.py`.

Everything but the network is TRL's: the trainer is built on a tiny random text model; its sampler is replaced by fixed
completions, its reward function by fixed rewards and its per-token log-prob function by fixed tensors (the policy's is
a leaf that wants a gradient). So `_generate_and_score_completions` makes TRL's advantages, masks, importance weights
and token counts, and `_compute_loss` makes TRL's loss; backward makes d loss / d log-prob.
"""

import json
import tempfile
import types
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

OUT = Path(__file__).with_name("grpo_trl_numbers.json")
G = 4  # completions a prompt
LENGTHS = [5, 2, 7, 4, 3, 7, 1, 6, 2, 6, 4, 3]  # three prompts of four completions
MAX_LENGTH = 7
TRUNCATED = [length == MAX_LENGTH for length in LENGTHS]  # these end without the end token
REWARDS = [1.2, 0.0, 1.0, 0.2, 0.2, 1.2, 1.2, 0.0, 1.2, 1.2, 1.2, 1.2]  # the last group has no variance
EOS, PAD, WORD = 1, 0, 2

UNBIASED = {"use_bias_correction_kl": True}  # TRL 1.16's default: the KL term is multiplied by the ratio
PLAIN_KL = {"use_bias_correction_kl": False}
OLD = {"num_iterations": 2}
SEQUENCE = {"importance_sampling_level": "sequence"}
MASK = {"mask_truncated_completions": True}
# name -> GRPOConfig arguments; "sampler" turns on the vLLM importance weights (token_truncate) without a vLLM.
SETTINGS = {
    "sequence mean (loss_type grpo)": {"loss_type": "grpo"},
    "token mean (loss_type bnpo)": {"loss_type": "bnpo"},
    "token mean (loss_type dapo)": {"loss_type": "dapo"},
    "constant (loss_type dr_grpo)": {"loss_type": "dr_grpo"},
    "scale_rewards batch": {"loss_type": "dapo", "scale_rewards": "batch"},
    "scale_rewards none": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "plain KL": dict(loss_type="grpo", beta=0.04, **PLAIN_KL),
    "plain KL, token mean": dict(loss_type="dapo", beta=0.5, **PLAIN_KL),
    "unbiased KL": dict(loss_type="grpo", beta=0.04, **UNBIASED),
    "unbiased KL, token mean": dict(loss_type="dapo", beta=0.5, **UNBIASED),
    "old log-probs": dict(loss_type="grpo", **OLD),
    "old log-probs, epsilon_high": dict(loss_type="dapo", epsilon=0.1, epsilon_high=0.28, **OLD),
    "old log-probs, plain KL, constant": dict(loss_type="dr_grpo", beta=0.1, epsilon_high=0.3, **OLD, **PLAIN_KL),
    "old log-probs, unbiased KL": dict(loss_type="dapo", beta=0.1, **OLD, **UNBIASED),
    "sequence ratio": dict(loss_type="grpo", epsilon=0.03, **OLD, **SEQUENCE),
    "sequence ratio, plain KL, epsilon_high": dict(
        loss_type="grpo", epsilon=0.02, epsilon_high=0.05, beta=0.04, **OLD, **SEQUENCE, **PLAIN_KL
    ),
    "sequence ratio, unbiased KL": dict(loss_type="grpo", beta=0.2, **OLD, **SEQUENCE, **UNBIASED),
    "sequence ratio, token mean": dict(loss_type="dapo", **OLD, **SEQUENCE),
    "sequence ratio without old log-probs": dict(loss_type="grpo", **SEQUENCE),
    "masked truncated, sequence mean": dict(loss_type="grpo", beta=0.04, **MASK, **PLAIN_KL),
    "masked truncated, token mean": dict(loss_type="dapo", **MASK, **OLD),
    "masked truncated, constant": dict(loss_type="dr_grpo", **MASK),
    "masked truncated, sequence ratio": dict(loss_type="grpo", beta=0.1, **MASK, **OLD, **SEQUENCE),
    "sampler weights": dict(loss_type="dapo", sampler=1.15, **OLD),
    "sampler weights, sequence mean, unbiased KL": dict(loss_type="grpo", sampler=2.0, beta=0.04, **OLD, **UNBIASED),
}


def tiny_model():
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    vocab = {"<pad>": PAD, "<eos>": EOS, "word": WORD, "<unk>": 3}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return Qwen2ForCausalLM(config), fast


def padded(flat):
    """(N,) over the completions' tokens -> (B, T), zeros at the padding."""
    rows = torch.split(flat, LENGTHS)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def make_trainer(folder, knobs):
    model, tokenizer = tiny_model()
    model.save_pretrained(folder)  # TRL loads its reference model from the folder the policy came from
    model = Qwen2ForCausalLM.from_pretrained(folder)
    args = GRPOConfig(
        output_dir=folder,
        num_generations=G,
        per_device_train_batch_size=len(LENGTHS),
        report_to="none",
        max_completion_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **knobs,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: REWARDS,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "word"}] * 8),
    )
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train() would set it
    trainer.model.train()
    return trainer


def numbers(tensor):
    """float32 -> the 9 digits that tell it from its neighbours."""
    return [float(f"{value:.9g}") for value in tensor.tolist()]


def run(knobs, tensors):
    """One setting -> TRL's advantages, loss, gradient (N,) and logged shares."""
    knobs = dict(knobs)
    cap = knobs.pop("sampler", None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, knobs)
    ids = [[WORD] * n if cut else [WORD] * (n - 1) + [EOS] for n, cut in zip(LENGTHS, TRUNCATED)]
    sampler = [row.tolist() for row in torch.split(tensors["sampler"], LENGTHS)] if cap else None
    if cap:
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        trainer.vllm_importance_sampling_mode = "token_truncate"
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, cap
    prompt = [[WORD]] * len(LENGTHS)
    trainer._generate = types.MethodType(
        lambda self, prompts: (prompt, ids, None, ["word"] * len(LENGTHS), sampler, {}, None, None), trainer
    )
    leaf = tensors["logprobs"].clone().requires_grad_(True)
    stage = ["generate"]

    def log_probs(self, model, *args, **kwargs):
        if model is self.ref_model:
            return padded(tensors["ref"]), None, None
        return padded(leaf if stage[0] == "loss" else tensors["old"]), padded(tensors["entropy"]), None

    trainer._get_per_token_logps_and_entropies = types.MethodType(log_probs, trainer)
    inputs = trainer._generate_and_score_completions([{"prompt": "word"}] * len(LENGTHS))
    stage[0] = "loss"
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    shares = {
        key: trainer._metrics["train"][name][-1]
        for key, name in [
            ("kl", "kl"),
            ("clip_low", "clip_ratio/low_mean"),
            ("clip_high", "clip_ratio/high_mean"),
            ("entropy", "entropy"),
        ]
        if name in trainer._metrics["train"]
    }
    knobs["use_bias_correction_kl"] = trainer.args.use_bias_correction_kl
    return {
        "knobs": knobs, "sampler_is_cap": cap, "epsilon": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high,
        "beta": trainer.beta, "has_old": "old_per_token_logps" in inputs, "loss": loss.item(),
        "advantages": numbers(inputs["advantages"]), "gradient": numbers(leaf.grad), "shares": shares,
    }  # fmt: skip


def one_case_a_line(document):
    """JSON with one top-level entry, and one case, a line: short enough to read, and it diffs well."""
    cases = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in document["cases"].items())
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key != "cases")
    return "{\n" + head + ',\n "cases": {\n' + cases + "\n }\n}\n"


def main():
    torch.manual_seed(0)
    n = sum(LENGTHS)
    logprobs = -torch.rand(n) * 3
    tensors = {
        "logprobs": logprobs,
        "old": logprobs + 0.4 * torch.randn(n),
        "ref": logprobs + 0.4 * torch.randn(n),
        "entropy": torch.rand(n),
    }
    tensors["sampler"] = tensors["old"] + 0.2 * torch.randn(n)
    cases = {name: run(knobs, tensors) for name, knobs in SETTINGS.items()}
    made_with = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    document = {
        "made_with": made_with,
        "script": Path(__file__).name,
        "lengths": LENGTHS,
        "num_generations": G,
        "max_completion_length": MAX_LENGTH,
        "truncated": TRUNCATED,
        "rewards": REWARDS,
        "tensors": {key: numbers(value) for key, value in tensors.items()},
        "cases": cases,
    }
    for side in ("clip_low", "clip_high"):
        assert sum(case["shares"][side] > 0 for case in cases.values()) > 3, f"{side} too rare to test: change the seed"
    OUT.write_text(one_case_a_line(document))
    for name, case in cases.items():
        print(f"{case['loss']:+.6f}  {name}")


if __name__ == "__main__":
    main()

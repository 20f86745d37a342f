"""Makes the results in tests/grpo_trl_numbers.json, GRPO losses and gradients out of TRL's own GRPOTrainer, from the
inputs there: `tensors`, `rewards`, `lengths`, and of each case `knobs` (GRPOConfig's) and `sampler_is_cap`.

Run by hand, never by the tests: `pip install trl==1.16.0 accelerate datasets && python dev/make_grpo_trl_numbers.py`.

Everything but the network is TRL's: its sampler is replaced by fixed completions, its reward function by fixed rewards,
its per-token log-prob function by fixed tensors (the policy's is a leaf that wants a gradient).
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

FILE = Path(__file__).resolve().parents[1] / "tests" / "grpo_trl_numbers.json"
NUMBERS = json.loads(FILE.read_text())
LENGTHS = NUMBERS["lengths"]  # three prompts of four completions
EOS, PAD, WORD = 1, 0, 2
SHARES = {"kl": "kl", "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "entropy": "entropy"}


def padded(flat):
    """(N,) over the completions' tokens -> (B, T), zeros at the padding."""
    return torch.nn.utils.rnn.pad_sequence(torch.split(flat, LENGTHS), batch_first=True)


def make_trainer(folder, knobs):
    tokenizer = Tokenizer(WordLevel({"<pad>": PAD, "<eos>": EOS, "word": WORD, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    config = Qwen2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)  # TRL loads its reference model from the policy's folder
    args = GRPOConfig(
        output_dir=folder, num_generations=NUMBERS["num_generations"], per_device_train_batch_size=len(LENGTHS),
        report_to="none", max_completion_length=NUMBERS["max_completion_length"], use_cpu=True, bf16=False,
        gradient_checkpointing=False, **knobs,
    )  # fmt: skip
    data, model = Dataset.from_list([{"prompt": "word"}] * 8), Qwen2ForCausalLM.from_pretrained(folder)
    rewards = lambda completions, **_: NUMBERS["rewards"]
    trainer = GRPOTrainer(model, rewards, args=args, processing_class=fast, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train() would set it
    trainer.model.train()
    return trainer


def run(case, tensors):
    """One setting -> TRL's advantages, loss, gradient (N,) and logged shares."""
    cap = case["sampler_is_cap"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, case["knobs"])
    ids = [[WORD] * n if cut else [WORD] * (n - 1) + [EOS] for n, cut in zip(LENGTHS, NUMBERS["truncated"])]
    sampler = [row.tolist() for row in torch.split(tensors["sampler"], LENGTHS)] if cap else None
    if cap:  # the vLLM importance weights (token_truncate) without a vLLM
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        trainer.vllm_importance_sampling_mode = "token_truncate"
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, cap
    generated = [[WORD]] * len(LENGTHS), ids, None, ["word"] * len(LENGTHS), sampler, {}, None, None
    trainer._generate = types.MethodType(lambda self, prompts: generated, trainer)
    leaf = tensors["logprobs"].clone().requires_grad_(True)
    policy = [tensors["old"]]

    def log_probs(self, model, *args, **kwargs):
        if model is self.ref_model:
            return padded(tensors["ref"]), None, None
        return padded(policy[0]), padded(tensors["entropy"]), None

    trainer._get_per_token_logps_and_entropies = types.MethodType(log_probs, trainer)
    inputs = trainer._generate_and_score_completions([{"prompt": "word"}] * len(LENGTHS))
    policy[0] = leaf
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    logged = trainer._metrics["train"]
    return {
        "knobs": case["knobs"], "sampler_is_cap": cap, "epsilon": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high, "beta": trainer.beta, "has_old": "old_per_token_logps" in inputs,
        "loss": loss.item(), "advantages": inputs["advantages"].tolist(), "gradient": leaf.grad.tolist(),
        "shares": {key: logged[name][-1] for key, name in SHARES.items() if name in logged},
    }  # fmt: skip


def main():
    tensors = {name: torch.tensor(values) for name, values in NUMBERS["tensors"].items()}
    cases = {name: run(case, tensors) for name, case in NUMBERS["cases"].items()}
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    FILE.write_text(json.dumps(NUMBERS | {"made_with": versions, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()

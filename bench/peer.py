"""The usual software on the same work: transformers + PEFT as a careful user runs them, with FlashAttention 2 (torch's
own kernel, the same as the package's; on a CPU SDPA) and, where it is installed, Liger. It shares our frozen weights.
"""

import importlib.util
from functools import cache

import torch
from workloads import packed_samples

from adapter_files import hf_name
from lora import targets
from model.fast.attention import Flash
from model.packed import IGNORE, Segments
from model.qwen import normalise_patches


def transformers_inputs(packed, batch: int, config, dtype) -> dict:
    """A packed batch of equally long samples or prompts as transformers' keyword arguments; no padding."""
    ids = packed.input_ids.view(batch, -1)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), second_per_grid_ts=torch.ones(batch, device=ids.device),
        mm_token_type_ids=2 * (ids == config.video_token_id).int(),
        pixel_values_videos=normalise_patches(packed.patches, dtype),
        video_grid_thw=torch.tensor(packed.grid_thw, device=ids.device),
    )  # fmt: skip


class Peer:
    """Made before `bench.model` gets our adapters."""

    name = "peer"

    def __init__(self, bench):
        self.bench, cfg = bench, bench.cfg
        self.plain = peer_model(bench.model)  # for sampling, as if its adapters had been merged
        if "sft" in bench.args.kinds:
            from peft import LoraConfig, get_peft_model

            peer, names = peer_model(bench.model), [hf_name(name) for name in targets(bench.model, cfg)]
            keeps_all = cfg.gradient_checkpointing == "auto" and not bench.model.head_weight.is_cuda  # as ours does
            if cfg.gradient_checkpointing and not keeps_all:
                peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=names)
            # adapters in the weights' dtype: PEFT alone would take float32
            self.trained = get_peft_model(peer, lora, autocast_adapter_dtype=False).train()
            self.params = [p for p in self.trained.parameters() if p.requires_grad]
            betas = (cfg.adam_beta1, cfg.adam_beta2)
            self.adamw = torch.optim.AdamW(self.params, cfg.learning_rate, betas, cfg.adam_epsilon, fused=True)

    def sft(self, work, batch: int):
        bench, packed = self.bench, packed_samples(self.bench, work, batch, answer=True)
        inputs = transformers_inputs(packed, batch, bench.config, bench.dtype)
        labels = inputs["input_ids"].clone()
        labels[:, : work.prompt] = IGNORE

        def step():
            self.trained(**inputs, labels=labels, use_cache=False).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.params, bench.cfg.max_grad_norm)
            self.adamw.step()
            self.adamw.zero_grad()
            return float(norm)

        return step

    def rollout(self, work, count: int, tokens: int):
        """generate makes `group` copies of every prompt."""
        bench, packed = self.bench, packed_samples(self.bench, work, count)
        inputs = transformers_inputs(packed, count, bench.config, bench.dtype)
        draw = dict(do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=0)
        draw |= dict(num_return_sequences=bench.args.group, max_new_tokens=tokens, min_new_tokens=tokens)
        draw["bad_words_ids"] = [[i] for i in bench.config.vision_token_ids]
        return torch.no_grad()(lambda: self.plain.generate(**inputs, **draw))


def peer_model(model):
    """transformers' model on the weights of `model`; prints what it runs with."""
    from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**model.config.raw))
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    state.setdefault("lm_head.weight", model.head_weight.detach())
    result = peer.load_state_dict(state, strict=False, assign=True)
    assert not result.missing_keys and not result.unexpected_keys, result
    for module in peer.modules():  # angles are buffers that no checkpoint holds: made on meta, so made again
        for name in ("inv_freq", "original_inv_freq"):
            if hasattr(module, name):
                setattr(module, name, getattr(type(module)(module.config), name).to(model.head_weight.device))
    name = "SDPA"
    peer.set_attn_implementation("sdpa")
    if model.head_weight.is_cuda:
        name = "torch's FlashAttention 2"
        AttentionInterface.register("flash_attention_2", flash_torch)
        for config in (peer.config, peer.config.text_config, peer.config.vision_config):
            config._attn_implementation = "flash_attention_2"  # set_attn_implementation would look for the package
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl

        apply_liger_kernel_to_qwen2_5_vl(model=peer)
        name += ", Liger"
    print(f"peer: transformers + PEFT, {name}")
    return peer.requires_grad_(False).eval()


def flash_torch(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **_):
    """transformers' attention function. query (B, H, L, D), key and value (B, K, M, D) -> ((B, L, H, D), None).

    The vision tower gives its windows as cu_seq_lens_q, in one row; everything else is causal and not padded.
    """
    (B, _, L, _), M = query.shape, key.shape[2]
    if cu_seq_lens_q is None:
        segments = equal_segments(B, L, M, query.device)
    else:
        windows, longest = cu_seq_lens_q.int(), int(max_length_q)
        segments = Segments([], [], False, windows, windows, None, longest, longest, L)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # (T, H or K, D)
    return Flash.apply(*packed, segments).unflatten(0, (B, L)), None


@cache
def equal_segments(B: int, L: int, M: int, device) -> Segments:
    """B causal segments, each of L queries at the end of M keys."""
    return Segments.build([L] * B, [M] * B, True).to(device)

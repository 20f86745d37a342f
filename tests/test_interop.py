"""What leaves the repo opens elsewhere: merged models in transformers, adapters in PEFT, and PEFT's adapters here."""

import json
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from make_peft4_adapter import FOLDER as PEFT4
from make_peft4_adapter import GRID, IDS, arithmetic_base, patches
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

import lora
from config import QUESTION, Adapter, Infer, LoraArgs, parse
from data import Processor, load_tokenizer, pack
from drawing.clips import draw_clip, render, write_mp4
from interop import saved
from interop.commands import main
from interop.keys import LOADS, NEW, OLD, PART, REFUSES, UNTRAINED, verdicts
from interop.merged import base_tensors, generation_config, meta_model, write_merged
from model import UserError
from model.decode import Sampling, generate
from model.loading import load_model, write_shards
from model.qwen import IGNORE, Packed, Segments, normalise_patches, target_logprobs

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
SLOW = ["--fps", "2", "--video_resized_height", "252", "--video_resized_width", "252"]


def encode(path, answer=None, flags=()):
    """A question about a clip as the model sees it, with its answer where one is given."""
    config = meta_model(TINY).config
    turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}] + [{"from": "gpt", "value": answer}] * bool(answer)
    processor = Processor(load_tokenizer(TINY), config, parse(Infer, [str(path), *flags]))
    return processor.encode({"video": str(path), "conversations": turns}, answer=bool(answer))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "ball.mp4"
    write_mp4(path, render(draw_clip(np.random.default_rng(3), "Left to Right", 64, 60)))
    return path


ANSWER = "<think>Over time x grows, y stays the same.</think><answer>(A) Left to Right</answer>"


@pytest.fixture(scope="module")
def adapter(clip, tmp_path_factory):
    """An adapter of the embedded model that has learnt one answer by heart."""
    torch.manual_seed(0)
    model = load_model(TINY)
    lora.inject(model, LoraArgs(lora_rank=4, lora_alpha=8))
    batch = pack([encode(clip, ANSWER), encode(clip, ANSWER, SLOW)])
    optimizer = torch.optim.AdamW([p for _, p in lora.trainable_parameters(model)], lr=1e-2)
    for _ in range(40):
        keep = batch.targets != IGNORE
        loss = -target_logprobs(model(batch)[keep], model.head_weight, batch.targets[keep])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapter")
    saved.save_adapter(model, folder, TINY)
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """lora.py merge, into files of 100 kB at most."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    argv = ["merge", "--model_id", TINY, "--model_ckpt", adapter, "--output_dir", folder, "--shard_gb", "0.0001"]
    main(list(map(str, argv)))
    return folder


def greedy(base, example, adapter=None):
    """Our own greedy answer: token ids."""
    model = load_model(base).eval()
    if adapter:
        saved.load_adapter(model, adapter)
    tokenizer = load_tokenizer(TINY)
    stops = tuple(tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    ((completion,),) = generate(model, pack([example]), Sampling(64, 0.0, stop_ids=stops))
    return completion.ids


# -- merge


def test_a_merged_folder_is_complete(merged):
    names = {path.name for path in merged.iterdir()}
    small = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
    assert small | {"tokenizer_config.json", "model.safetensors.index.json"} < names
    assert "chat_template" in json.loads((merged / "tokenizer_config.json").read_text())
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and set(files) == {name for name in names if name.endswith(".safetensors")}
    tensors = {key: tensor for file in files for key, tensor in load_file(merged / file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors.keys() == index["weight_map"].keys() == dict(meta_model(TINY).named_parameters()).keys()
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all((merged / file).stat().st_size < max(100_000, largest) + 10_000 for file in files)


@pytest.mark.parametrize("flags", [[], SLOW])
def test_transformers_generates_our_own_greedy_answer(merged, adapter, clip, flags):
    """Model, tokenizer, template and generation config by transformers, from the merged folder alone. For a clip of two
    frames a second transformers' own positions are right; for eight a second (no flags) it is handed ours."""
    hf, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer, example = AutoTokenizer.from_pretrained(merged), encode(clip, flags=flags)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<|video_pad|>", "<|video_pad|>" * example.num_vision_tokens), return_tensors="pt")
    assert ids["input_ids"][0].tolist() == example.ids.tolist()
    theirs = {} if flags else {"position_ids": torch.from_numpy(example.position_ids)[:, None]}
    out = hf.eval().generate(
        **ids,
        **theirs,
        mm_token_type_ids=2 * (ids["input_ids"] == hf.config.video_token_id).int(),
        pixel_values_videos=normalise_patches(example.patches, torch.float32),
        video_grid_thw=torch.tensor(example.grid_thw),
        second_per_grid_ts=torch.tensor(example.second_per_grid),
        max_new_tokens=64,
    )
    new = out[0, len(example) :].tolist()
    assert tokenizer.decode(new, skip_special_tokens=True) == ANSWER
    assert new == greedy(merged, example) == greedy(TINY, example, adapter)


def test_merging_is_one_rounding_of_the_sum(merged, adapter):
    model = load_model(TINY)
    saved.load_adapter(model, adapter)
    lora.merge(model)
    lora.remove(model)
    again = load_model(merged).state_dict()
    for name, tensor in model.state_dict().items():
        assert again[name].equal(tensor.to(torch.bfloat16).float()), name


def test_merging_holds_one_file_and_no_model(adapter, tmp_path, monkeypatch):
    """Of the tensors handed on, no more than a file's are alive at any time."""
    limit, alive, most = 100_000, [], []

    def watched(tensors, folder, limit):
        def each():
            for name, tensor in tensors:
                alive.append((weakref.ref(tensor), tensor.nbytes))
                yield name, tensor
                del tensor
                most.append(sum(size for ref, size in alive if ref() is not None))

        return write_shards(each(), folder, limit)

    monkeypatch.setattr("interop.merged.write_shards", watched)
    files = write_merged(TINY, adapter, tmp_path, limit)
    largest = max(size for _, size in alive)
    assert len(files) > 3 and sum(size for _, size in alive) > 4 * limit
    assert max(most) <= limit + largest


def test_biases_and_a_whole_merger_are_merged_too(tmp_path):
    model = load_model(TINY)
    lora.inject(model, LoraArgs(lora_rank=2, lora_bias="all", tune_merger=True))
    with torch.no_grad():
        for _, parameter in lora.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    saved.save_adapter(model, tmp_path / "adapter", TINY)
    write_merged(TINY, tmp_path / "adapter", tmp_path, 10**9)
    assert (tmp_path / "model.safetensors").is_file()
    lora.merge(model)
    lora.remove(model)
    again = load_model(tmp_path).state_dict()
    assert all(again[name].equal(tensor.to(torch.bfloat16).float()) for name, tensor in model.state_dict().items())


def test_generation_config(merged, tmp_path):
    found = GenerationConfig.from_pretrained(merged)
    tokenizer = load_tokenizer(merged)
    stops = [tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")]
    assert not found.do_sample and sorted(found.eos_token_id) == stops and found.pad_token_id == stops[0]
    # the released file's keys (facts of a public copy): its stop tokens stay, its sampling does not
    hub = {"bos_token_id": 1, "pad_token_id": 1, "eos_token_id": [3, 1], "do_sample": True, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(hub | {"temperature": 1e-6}))
    made = generation_config(tmp_path, {"eos_token_id": 9})
    assert made == {"bos_token_id": 1, "eos_token_id": [3, 1], "pad_token_id": 1, "do_sample": False}


def test_infer_reads_clips_for_a_merged_model_as_for_its_adapter(adapter, clip, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "trainer_state.json").write_text(json.dumps({"config": {"nframes": 4}}))
    main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "model")])
    import infer

    cfg = parse(Infer, [str(clip), "--model_id", str(tmp_path / "model"), "--model_ckpt", "none"])
    assert infer.read_as_trained(cfg, None) == ["--nframes 4, as in training"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", ["merge, check, convert"]),
        ("merg", ["'merg'", "merge, check, convert"]),
        ("check", ["--adapter", "python lora.py check"]),
        ("check output/nowhere", ["no such folder", "output/nowhere"]),
        ("merge ADAPTER", ["--output_dir", "a new folder"]),
        ("merge ADAPTER --output_dir FULL", ["FULL", "already holds something"]),
        ("merge ADAPTER --output_dir NEW --model_id nowhere", ["nowhere", "no such folder"]),
        ("convert ADAPTER --output_dir NEW --keys 4", ["--keys", "transformers4"]),
        ("check ADAPTER --model_ckp x", ["did you mean model_ckpt"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(adapter, tmp_path, argv, words):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "keep").write_text("mine")
    places = {"ADAPTER": str(adapter), "FULL": str(tmp_path / "FULL"), "NEW": str(tmp_path / "NEW")}
    with pytest.raises(UserError) as error:
        main([places.get(word, word) for word in argv.split()])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["FULL", "keep"]


def test_a_base_that_does_not_fit_leaves_nothing(adapter, tmp_path):
    base = arithmetic_base(tmp_path / "base")
    with pytest.raises(UserError, match="is --model_id its base model"):
        main(["merge", str(adapter), "--model_id", str(base), "--output_dir", str(tmp_path / "new")])
    tensors = load_file(base / "model.safetensors")
    save_file({"model.extra": torch.ones(1)} | tensors, base / "model.safetensors")
    with pytest.raises(UserError, match="surplus model.extra"):
        next(base_tensors(base, meta_model(base)))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# -- check


def checked(capsys, folder, *flags):
    capsys.readouterr()
    main(["check", str(folder), *flags])
    return capsys.readouterr().out


def test_check_tells_what_an_adapter_is(adapter, capsys):
    out = checked(capsys, adapter)
    facts = ["rank      4, alpha 8", "llm 14, merger 2, vision 10", "q_proj x 2", "19,200 numbers", "float32"]
    count = sum(t.numel() for t in load_file(adapter / saved.TENSORS).values())
    assert count == 19_200
    for fact in [str(adapter), str(TINY), *facts, "keys      transformers5", "every tensor has its place"]:
        assert fact in out, fact
    assert "B 100.0%" in out and "UNTRAINED" not in out
    assert "not held against its base" in checked(capsys, adapter, "--model_id", "nowhere/at-all")


def test_check_knows_an_adapter_without_training(tmp_path, capsys):
    model = load_model(TINY)
    lora.inject(model, LoraArgs(lora_rank=2))
    saved.save_adapter(model, tmp_path, TINY)
    assert "B 0.0%; UNTRAINED: every B is zero, the adapter changes nothing" in checked(capsys, tmp_path)


def test_check_tells_what_does_not_fit(adapter, tmp_path, capsys):
    assert "does not load" in checked(capsys, adapter, "--model_id", str(arithmetic_base(tmp_path)))


def peft_outcome(base, folder):
    """What PEFT makes of an adapter under the transformers that is installed, by loading it."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys: the very thing that is easily overlooked
        try:
            model = peft.PeftModel.from_pretrained(hf, folder)
        except ValueError as error:
            assert "not found" in str(error)
            return REFUSES
    wanted = {saved.our_name(key) for key in saved.split_keys(saved.read_adapter(folder)[1], folder)[0]}
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    trained = [layer for layer in layers if layer.lora_B["default"].weight.any()]
    return UNTRAINED if not trained else LOADS if len(trained) == len(wanted) else PART


def variant(adapter, folder, change_key=lambda key: key, **config):
    """A copy of an adapter with other keys or settings."""
    found, tensors = saved.read_adapter(adapter)
    folder.mkdir(exist_ok=True)
    save_file({change_key(key): tensor for key, tensor in tensors.items()}, folder / saved.TENSORS)
    (folder / saved.CONFIG).write_text(json.dumps(found | config))
    return folder


WORDS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv attn.proj merger.mlp.0 merger.mlp.2"
SUFFIXES = {"target_modules": WORDS.split()}


@pytest.mark.parametrize(
    ("style", "change", "config", "verdict"),
    [
        (NEW, lambda key: key, {}, LOADS),
        (NEW, lambda key: key, SUFFIXES, LOADS),
        (NEW, lambda key: key, {"target_modules": r"model\..*(_proj|qkv|attn\.proj|mlp\.[02])"}, LOADS),
        (NEW, lambda key: key.replace(".weight", ".default.weight"), {}, LOADS),
        (NEW, lambda key: key.removeprefix("base_model.model."), {}, UNTRAINED),
        (OLD, lambda key: key, SUFFIXES, UNTRAINED),
        (OLD, lambda key: key.replace("model.visual.", "model.model.visual."), SUFFIXES, PART),
        (OLD, lambda key: key, {"target_modules": r"model\.layers\..*"}, REFUSES),
    ],
)
def test_check_says_what_peft_does(adapter, tmp_path, style, change, config, verdict):
    """PEFT and transformers 5 themselves are asked."""
    main(["convert", str(adapter), "--output_dir", str(tmp_path / "made"), "--keys", style])
    folder = variant(tmp_path / "made", tmp_path / "changed", change, **config)
    assert peft_outcome(TINY, folder) == verdict
    assert verdicts(*saved.read_adapter(folder), folder)["transformers 5"] == verdict


# -- convert, and adapters from elsewhere


def tensors_of(folder):
    return load_file(folder / saved.TENSORS)


def test_convert_there_and_back(adapter, tmp_path, capsys):
    main(["convert", str(adapter), "--output_dir", str(tmp_path / "old")])
    old = tensors_of(tmp_path / "old")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight" in old
    out = checked(capsys, tmp_path / "old")
    assert "on transformers 4.51: loads it\n" in out and "on transformers 4.52 to 4.57: loads it\n" in out
    assert "on transformers 5: loads it as untrained" in out and "python lora.py convert" in out
    main(["convert", str(tmp_path / "old"), "--output_dir", str(tmp_path / "new")])
    first, again = tensors_of(adapter), tensors_of(tmp_path / "new")
    assert first.keys() == again.keys() and all(first[key].equal(again[key]) for key in first)
    assert peft_outcome(TINY, tmp_path / "new") == LOADS


def logits_here(base, folder):
    model = load_model(base).eval()
    saved.load_adapter(model, folder)
    positions = torch.arange(len(IDS)).expand(3, -1).contiguous()
    with torch.no_grad():
        return model.logits(Packed(torch.tensor(IDS), positions, Segments.causal([len(IDS)]), patches(), [GRID]))


def test_an_adapter_of_transformers_4_and_peft_loads_here_and_is_converted(tmp_path):
    """tests/peft4 was written by PEFT 0.14.0 under transformers 4.51.3, with the logits that it gave there."""
    base = arithmetic_base(tmp_path / "base")
    expected = load_file(PEFT4 / "expected.safetensors")["logits"]
    ours = logits_here(base, PEFT4)
    torch.testing.assert_close(ours[-2:], expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (load_model(base).eval().logits(Packed(
            torch.tensor(IDS), torch.arange(len(IDS)).expand(3, -1).contiguous(), Segments.causal([len(IDS)]),
            patches(), [GRID],
        ))[-2:] - expected).abs().max() > 0.05  # fmt: skip
    told = verdicts(*saved.read_adapter(PEFT4), PEFT4)
    assert told["transformers 4.51"] == LOADS and told["transformers 5"] == UNTRAINED == peft_outcome(base, PEFT4)
    main(["convert", str(PEFT4), "--output_dir", str(tmp_path / "new")])
    assert peft_outcome(base, tmp_path / "new") == LOADS
    assert logits_here(base, tmp_path / "new").equal(ours)


def make_peft(folder, **options):
    """PEFT's own file under the transformers that is installed, with B drawn at random."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name or name.endswith(".bias") and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def hf_logits(model, example):
    ids = torch.from_numpy(example.ids)[None]
    with torch.no_grad():
        return model(
            input_ids=ids,
            position_ids=torch.from_numpy(example.position_ids)[:, None],
            pixel_values_videos=normalise_patches(example.patches, torch.float32),
            video_grid_thw=torch.tensor(example.grid_thw),
        ).logits[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "qkv"], "bias": "all"},
        {"target_modules": ["v_proj", "qkv"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": r".*visual.*"},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_makes_with_other_options_loads_alike(tmp_path, clip, options):
    theirs, example = make_peft(tmp_path, **options), encode(clip)
    model = load_model(TINY).eval()
    with torch.no_grad():
        plain = model.logits(pack([example]))
        saved.load_adapter(model, tmp_path)
        ours = model.logits(pack([example]))
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, hf_logits(theirs, example), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, ["use_dora", "merge it with PEFT"]),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, ["rank_pattern", "merge it with PEFT"]),
        ({"target_modules": ["q_proj"], "lora_bias": True}, ["lora_bias"]),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, ["modules_to_save", "embed_tokens"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ["lm_head"]),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ["lora_embedding_A"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["lm_head"]),
        ({"target_modules": ["q_proj", "patch_embed.proj"]}, ["patch_embed.proj"]),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, ["olora", "changes the base"]),
    ],
)
def test_what_is_no_plain_lora_is_refused_in_one_line(tmp_path, options, words):
    make_peft(tmp_path, **options)
    model = load_model(TINY)
    with pytest.raises(UserError) as error:
        saved.load_adapter(model, tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value) and not lora.lora_layers(model)
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules() if isinstance(module, nn.Linear))


def test_the_script_itself(adapter, tmp_path):
    """python lora.py, from another folder; --help imports no torch."""
    script = str(ROOT / "lora.py")
    done = subprocess.run([sys.executable, script, "check", adapter], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "every tensor has its place" in done.stdout, done.stderr
    code = "import sys, interop.commands as c\ntry: c.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name}" in done.stdout for name in ("command", "adapter", "output_dir", "keys", "shard_gb"))
    assert Adapter().shard_gb == 5.0

"""infer.py on drawn clips and a small random model; a dataset's tables on a stand-in that looks at the frames."""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import config_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import infer
from adapter_files import load_adapter, save_adapter
from checkpoint import write_whole
from config import QUESTION, Infer, LoraArgs, parse
from evaluate import opposite, wilson
from lora import inject, lora_layers
from model import UserError
from model.decode import Completion
from model.loading import ModelConfig, load_model, random_model, save_model

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
OPTIONS = ["(A) Left to Right", "(B) Right to Left", "(C) Falling Down", "(D) Ascending"]


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([QUESTION] * 4, trainer)
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint folder: random weights and its tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_level_tokenizer()
    raw = config_dict("tied", tokens_per_second=8, vocab=tokenizer.get_vocab_size())
    names = ("vision_start", "vision_end", "image", "video")
    tokens = ("vision_start", "vision_end", "image_pad", "video_pad")
    raw |= {f"{n}_token_id": tokenizer.token_to_id(f"<|{t}|>") for n, t in zip(names, tokens, strict=True)}
    save_model(random_model(ModelConfig.from_dict(raw), seed=3), folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def save_trained_adapter(base, folder, rank=4, named=None, extra=lambda beside: None):
    """An adapter that changes the answers, as if trained."""
    model = load_model(base)
    torch.manual_seed(rank)
    inject(model, LoraArgs(lora_rank=rank, lora_alpha=8))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.3)
    write_whole(Path(folder), lambda beside: (save_adapter(model, beside, named or base), extra(beside)))


def frames_of(direction, n=16, side=64):
    """(n, side, side, 3) uint8: a white square on black."""
    frames = np.zeros((n, side, side, 3), np.uint8)
    for i in range(n):
        along = 4 + round(i * (side - 28) / (n - 1))
        back = side - 20 - along
        x, y = {"A": (along, 20), "B": (back, 20), "C": (20, along), "D": (20, back)}[direction]
        frames[i, y : y + 16, x : x + 16] = 255
    return frames


def write_clip(path, frames):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=len(frames), options={"crf": "10"})
        stream.width = stream.height = frames.shape[1]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def write_image(path, frame):
    with av.open(str(path), "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = frame.shape[1], frame.shape[0], "rgb24"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames_of("A"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder: no adapter lies under output/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv):
    """-> (all of stdout, its last line as JSON)."""
    infer.main([*map(str, argv), "--json"])
    out = capsys.readouterr().out
    return out, json.loads(out.rstrip("\n").splitlines()[-1])


def test_json_of_a_clip(capsys, here, base, clip):
    out, found = run(capsys, clip, "--model_id", base, "--max_new_tokens", 12)
    promised = "answer text prompt_tokens completion_tokens frames grid_thw second_per_grid time_ids seconds"
    assert set(promised.split()) <= set(found)
    assert found["frames"] == [0, 2, 4, 6, 9, 11, 13, 15] and found["grid_thw"] == [4, 4, 4]
    assert found["second_per_grid"] == 0.25  # 8 frames of 1 s, two a step
    assert found["time_ids"] == [0, 2, 4, 6]  # tokens_per_second 8
    assert found["completion_tokens"] == 12 and not found["finished"] and "cut off after 12 tokens" in out
    assert found["adapter"] is None and "no adapter found under output/" in out
    assert found["text"] in out and "reasoning:" in out and "\nanswer:" in out
    again = run(capsys, clip, "--model_id", base, "--max_new_tokens", 12)[1]
    assert again["text"] == found["text"]  # greedy


def test_what_is_asked(capsys, here, base, clip):
    default = run(capsys, clip, "--model_id", base, "--max_new_tokens", 1)[1]
    typed = run(capsys, clip, "--model_id", base, "--max_new_tokens", 1, "--prompt", QUESTION.replace("\n", "\\n"))[1]
    assert typed["prompt_tokens"] == default["prompt_tokens"]
    flags = ("--base_model", base, "--question", "Where?", "--max_new_tokens", 1, "--fps", 4)
    out, other = run(capsys, "--video_path", clip, *flags)
    assert other["prompt_tokens"] < default["prompt_tokens"] and other["grid_thw"] == [2, 4, 4]
    assert "question: Where?" in out


def test_sampling_follows_the_seed(capsys, here, base, clip):
    flags = (clip, "--model_id", base, "--max_new_tokens", 16, "--temperature", 1.5)
    one, again, two = (run(capsys, *flags, "--seed", seed)[1]["text"] for seed in (1, 1, 2))
    assert one == again != two


def test_image_and_folder_of_frames(capsys, here, base):
    frames = frames_of("A", n=12)
    (here / "frames").mkdir()
    for i, frame in enumerate(frames):
        write_image(here / "frames" / f"frame{i}.png", frame)  # frame10 comes after frame9
    out, found = run(capsys, "frames", "--model_id", base, "--max_new_tokens", 1)
    assert found["frames"] == [0, 2, 3, 5, 6, 8, 9, 11] and found["grid_thw"] == [4, 4, 4]
    record = infer.clip_record(parse(Infer, ["frames"]))
    assert [Path(p).name for p in record["video"][0]][8:11] == ["frame8.png", "frame9.png", "frame10.png"]
    for i in range(5, 12):
        (here / "frames" / f"frame{i}.png").unlink()
    out, found = run(capsys, "frames", "--model_id", base, "--max_new_tokens", 1)
    assert found["frames"] == [0, 1, 2, 3, 4, 4] and "has 5 frames, all are taken" in out
    image = run(capsys, "frames/frame0.png", "--model_id", base, "--max_new_tokens", 1)[1]
    assert image["frames"] == [0] and image["time_ids"] == [0] and image["grid_thw"][0] == 1


def test_newest_adapter_is_used_and_told(capsys, here, base, clip):
    plain = run(capsys, clip, "--model_id", base)[1]
    save_trained_adapter(base, here / "output/a/checkpoint-5", rank=2)
    save_trained_adapter(base, here / "output/b/checkpoint-7", rank=4)
    out, found = run(capsys, clip, "--model_id", base)
    assert found["adapter"] == "output/b/checkpoint-7" and "adapter output/b/checkpoint-7" in out
    assert "merged" in out and found["text"] != plain["text"]
    assert run(capsys, clip, "--model_id", base, "--model_ckpt", "none")[1]["text"] == plain["text"]
    chosen = run(capsys, clip, "--model_id", base, "--model_ckpt", "output/a")[1]
    assert chosen["adapter"] == "output/a/checkpoint-5" and chosen["text"] not in (plain["text"], found["text"])


def test_adapter_of_another_base_is_not_used_unasked(capsys, here, base, clip):
    save_trained_adapter(base, here / "output/a/checkpoint-5", named="someone/else")
    out, found = run(capsys, clip, "--model_id", base, "--max_new_tokens", 1)
    assert found["adapter"] is None and "was made for someone/else and is not used" in out


def test_clips_are_read_as_in_training(capsys, here, base, clip):
    folder = here / "output/a/checkpoint-5"
    trained = {"nframes": 12, "video_max_pixels": 784, "video_min_pixels": 784, "fps": 2.0, "seed": 7}
    state = json.dumps({"step": 5, "config": trained})
    save_trained_adapter(base, folder, extra=lambda beside: (beside / "trainer_state.json").write_text(state))
    out, found = run(capsys, clip, "--model_id", base, "--max_new_tokens", 1)
    assert found["grid_thw"] == [6, 2, 2] and "--nframes 12, as in training" in out
    flags = ("--fps", 4, "--video_min_pixels", 3136)  # what is typed wins over what conflicts with it
    assert run(capsys, clip, "--model_id", base, "--max_new_tokens", 1, *flags)[1]["grid_thw"] == [2, 4, 4]
    (folder / "manifest.json").unlink()
    (folder / "trainer_state.json").write_text('{"global_step": 5}')  # as transformers' Trainer leaves it
    found = run(capsys, clip, "--model_id", base, "--max_new_tokens", 1, "--model_ckpt", folder)[1]
    assert found["adapter"] and found["grid_thw"] == [4, 4, 4]


def test_merged_adapter_gives_the_logits_of_the_adapter_beside(here, base, clip):
    save_trained_adapter(base, here / "adapter")
    from data import pack

    cfg = parse(Infer, [str(clip), "--model_id", str(base)])
    packed = pack([infer.load_processor(cfg).encode(infer.clip_record(cfg), answer=False)])
    beside = load_model(base)
    load_adapter(beside, here / "adapter")
    with torch.no_grad():
        difference = beside.logits(packed) - infer.load_model(cfg, here / "adapter").to("cpu").logits(packed)
    if not torch.cuda.is_available():
        assert difference.abs().max() < 1e-3


def test_streamed_text_is_whole(capsys, base):
    """Characters of two to four bytes, each byte a token of its own, and bytes that are no character at all."""
    cfg = parse(Infer, ["x.mp4", "--model_id", str(base)])
    processor = infer.load_processor(cfg)
    text = "é ж 漢字 🎾 end"
    tokens = processor.backend.encode(text).ids
    broken = processor.backend.encode("漢").ids[:2]
    assert len(tokens) > len(text)
    stream, seen = infer.Stream(processor), []
    for token in tokens:
        stream.add(0, token)
        seen.append(capsys.readouterr().out)
    assert "".join(seen) == text and not any("\ufffd" in piece for piece in seen)
    for token in [*broken, *tokens[-2:], *broken, processor.token_id("<|im_end|>")]:
        stream.add(0, token)
    stream.close()
    ids = [*broken, *tokens[-2:], *broken]
    assert capsys.readouterr().out == processor.backend.decode(ids, skip_special_tokens=False)


# -- A dataset


def centre(frame, axis):
    """Of what is bright in a (H, W) frame, along x (axis 0) or y (axis 1)."""
    sums = (frame > 128).float().sum(axis)
    return float(sums @ torch.arange(len(sums)).float() / sums.sum().clamp(min=1))


def watches(texts=OPTIONS):
    """A stand-in for rollouts.generate that follows the bright square; a blank clip looks to it like option A."""
    tokenizer = byte_level_tokenizer()

    def generate(model, prompts, sampling, num_generations=1, generator=None, on_token=None):
        groups, start = [], 0
        for t, h, w in prompts.grid_thw:
            x = prompts.patches[start : start + t * h * w].float()
            x = x.view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14).mean(5)  # (T, H/28, W/28, 2, 2, frame, y, x)
            x = x.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(2 * t, 14 * h, 14 * w)
            dx, dy = (centre(x[-1], axis) - centre(x[0], axis) for axis in (0, 1))
            answer = (dx < 0) if abs(dx) >= abs(dy) else 2 + (dy < 0)
            groups.append([Completion(tokenizer.encode(texts[answer]).ids, [], True)])
            start += t * h * w
        return groups

    return generate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "videos").mkdir()
    records = []
    for i, letter in enumerate("ABCDABCDA"):
        write_clip(folder / "videos" / f"{i}.mp4", frames_of(letter))
        turns = [("human", f"<video>\n{QUESTION}"), ("gpt", f"Answer: {OPTIONS['ABCD'.index(letter)]}")]
        records.append({"video": f"{i}.mp4", "conversations": [{"from": who, "value": said} for who, said in turns]})
    (folder / "val.json").write_text(json.dumps(records))
    return folder / "val.json"


def test_dataset_tables(capsys, monkeypatch, here, base, dataset):
    monkeypatch.setattr("rollouts.generate", watches())
    out, found = run(capsys, "--data_path", dataset, "--model_id", base)
    assert (found["right"], found["count"], found["skipped"], found["chance"]) == (9, 9, 0, 0.25)
    assert found["accuracy"] == 1.0 and found["interval"] == pytest.approx([0.7009, 1.0], abs=1e-4)
    assert found["confusion"]["Left to Right"] == {"Left to Right": 3} and len(found["confusion"]) == 4
    reversed_, blank = found["controls"]["reversed"], found["controls"]["blank"]
    assert found["flipped"] == reversed_["flipped"] == reversed_["changed"] == 1.0 and reversed_["accuracy"] == 0.0
    assert blank["right"] == 3 and set(found["controls"]) == {"reversed", "shuffled", "blank"}
    assert "9/9" in out and "100.0%" in out and re.search(r"reversed +0/9 +0.0% .* 100.0% +100.0%", out)
    assert re.search(r"Ascending +2 +0 +0 +0", out)


def test_predictions_are_written_as_they_come_and_continued(capsys, monkeypatch, here, base, dataset):
    asked, watch = [], watches()

    def generate(model, prompts, *rest, **more):
        asked.extend(prompts.names)
        return watch(model, prompts, *rest, **more)

    monkeypatch.setattr("rollouts.generate", generate)
    flags = ["--data_path", dataset, "--model_id", base, "--controls", "none", "--output", "out/predictions.jsonl"]
    whole = run(capsys, *flags)[1]
    path = here / "out/predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["number"] for row in rows] == list(range(9)) and {row["task"] for row in rows} == {"multiple choice"}
    assert rows[1]["answer"] == "Answer: (B) Right to Left" and rows[1]["said"] == "Right to Left"
    assert rows[1]["rewards"]["accuracy"] == rows[1]["right"] == 1
    path.write_text("".join(lines[:4]) + lines[4][:20])  # killed in its fifth line
    asked.clear()
    again = run(capsys, *flags)[1]
    assert len(asked) == 5 and path.read_text() == "".join(lines)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    with pytest.raises(UserError, match="by this model"):
        run(capsys, *flags, "--max_new_tokens", 9)
    path.write_text('{"number": 0, "id": "another"}\n')
    with pytest.raises(UserError, match="--output: out/predictions.jsonl holds other lines than"):
        run(capsys, *flags)


def test_model_that_ignores_time_is_found_out(capsys, monkeypatch, here, base, dataset):
    monkeypatch.setattr("rollouts.generate", watches(["It is (A)"] * 3 + ["no idea"]))
    eight = dataset.with_name("eight.json")  # two of each class
    eight.write_text(json.dumps(json.loads(dataset.read_text())[:8]))
    found = run(capsys, "--data_path", eight, "--model_id", base)[1]
    assert found["right"] == 2 and found["confusion"]["Ascending"] == {"(no answer)": 2}
    assert found["flipped"] == 0.0 and found["controls"]["reversed"]["changed"] == 0.5  # falling and ascending


def test_broken_records_are_skipped_and_named(capsys, monkeypatch, here, base, dataset):
    records = json.loads(dataset.read_text())[:3]
    (here / "videos").mkdir()
    for i in (0, 1):
        (here / "videos" / f"{i}.mp4").write_bytes((dataset.parent / "videos" / f"{i}.mp4").read_bytes())
    (here / "videos" / "2.mp4").write_bytes(b"no video")
    records.append({"video": "0.mp4", "conversations": records[0]["conversations"][:1]})
    (here / "val.json").write_text(json.dumps(records))
    monkeypatch.setattr("rollouts.generate", watches())
    infer.main(["--data_path", "val.json", "--model_id", str(base), "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert (found["right"], found["count"], found["skipped"]) == (2, 2, 2)
    assert "2.mp4" in err and "record has no answer" in err
    (here / "val.json").write_text(json.dumps(records[2:]))
    with pytest.raises(UserError, match="none of 2 can be asked; the first: .*2.mp4"):
        infer.main(["--data_path", "val.json", "--model_id", str(base)])


def test_shuffling_two_frames_is_reported_as_impossible(capsys, monkeypatch, here, base, dataset):
    monkeypatch.setattr("rollouts.generate", watches())
    out, found = run(capsys, "--data_path", dataset, "--model_id", base, "--nframes", 2, "--max_samples", 2)
    assert found["controls"]["shuffled"]["accuracy"] is None and re.search("shuffled +not possible: .*two orders", out)
    assert found["flipped"] == 1.0


def test_reasoning_and_answer_apart(capsys, monkeypatch, here, base, clip):
    def answers(text, *flags):
        monkeypatch.setattr("rollouts.generate", watches([text]))
        out, found = run(capsys, clip, "--model_id", base, *flags)
        shown = out.split("\n\nreasoning: ")[1].partition("\n{")[0]
        return shown, (found["reasoning"], found["answer"], found["option"])

    chain = "<think>It moves,\nnot (B).\n</think><answer>(A) Left to Right</answer>"
    assert answers(chain)[0] == "It moves,\nnot (B).\nanswer: (A) Left to Right"
    assert answers(chain)[1] == ("It moves,\nnot (B).", "(A) Left to Right", "A")
    assert answers("<think>It was cut")[1] == ("It was cut", "", None)
    assert answers("Answer: D")[1] == (None, "(D) Ascending", "D")
    assert "contradicts itself" in answers("Answer: (A) Ascending")[0]
    assert answers("<answer>red</answer>", "--question", "Which colour?")[1] == (None, "red", None)


def test_controls_can_be_left_out(capsys, monkeypatch, here, base, dataset):
    monkeypatch.setattr("rollouts.generate", watches())
    cfg = parse(Infer, ["--data_path", str(dataset), "--model_id", str(base), "--max_samples", "4"])
    processor, records = infer.load_processor(cfg), [*infer.read_records(dataset)][:4]
    lists = {None: [], "none": [], "reversed": ["reversed"], "blank,shuffled": ["shuffled", "blank"]}
    for controls, left in lists.items():
        cfg.controls = controls
        found = infer.judge(cfg, None, infer.load_model(cfg, None), processor, records)
        assert found["accuracy"] == 1.0 and list(found["controls"]) == left
        assert found["flipped"] == (1.0 if "reversed" in left else None)


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (right, count), interval in table.items():
        assert wilson(right, count) == pytest.approx(interval, abs=1e-4)


def test_opposites():
    assert opposite("Left to Right") == "right to left" and opposite("Right to Left") == "left to right"
    assert opposite("Falling Down") == "ascending" and opposite("Ascending") == "falling down"
    assert opposite("red") is None


# -- Mistakes


def test_mistakes_end_in_one_line(here, base, clip):
    (here / "empty.mp4").write_bytes(b"")
    (here / "broken.mp4").write_bytes(Path(clip).read_bytes()[:300])
    (here / "folder").mkdir()
    save_trained_adapter(base, here / "fits")
    (here / "short").mkdir()
    config = json.loads((here / "fits/adapter_config.json").read_text()) | {"r": 5}
    (here / "short/adapter_config.json").write_text(json.dumps(config))
    (here / "short/adapter_model.safetensors").write_bytes((here / "fits/adapter_model.safetensors").read_bytes())
    mistakes = {
        ("missing.mp4",): "missing.mp4: no such file",
        ("empty.mp4",): "empty.mp4.*empty",
        ("broken.mp4",): "broken.mp4",
        ("folder",): "folder: 0 images",
        (clip, "--model_ckpt", "short"): r"adapter short: .*lora_A: found \(4, 148\), expected \(5, 148\)",
        (clip, "--model_ckpt", "nowhere"): "nowhere: no such folder",
        (clip, "--question", "<|im_end|>"): "special token <|im_end|>",
        (clip, "--nframes", 40): "nframes 40 of a video with 16 frames",
        ("--data_path", "missing.json"): "missing.json: no such file",
        (clip, "--model_id", "nobody/nothing", "--local_files_only", "True"): "nobody/nothing: .*hub",
        (clip, "--qestion", "?"): "did you mean question",
        (): "video",
    }
    for argv, message in mistakes.items():
        argv = [*map(str, argv)] if "--model_id" in argv else [*map(str, argv), "--model_id", str(base)]
        with pytest.raises(UserError, match=message.replace("|", r"\|")) as error:
            infer.main(argv)
        assert "\n" not in str(error.value), argv


def test_as_a_command(here, base):
    command = [sys.executable, str(ROOT / "infer.py"), "missing.mp4", "--model_id", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: missing.mp4") and done.stderr.count("\n") == 1
    code = "import sys, infer; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules), 'slow --help'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_embedded_model_answers(capsys, monkeypatch, clip):
    if not (ROOT / "assets/tiny/config.json").exists():
        pytest.skip("no assets/tiny")
    monkeypatch.chdir(ROOT)
    out, found = run(capsys, clip, "--model_ckpt", "none")
    assert found["time_ids"] == [0, 2, 4, 6] and found["completion_tokens"] > 0 and found["model_id"] == "assets/tiny"

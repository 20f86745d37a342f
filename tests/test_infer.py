"""infer.py as a command and from Python, on drawn clips and a small random model; a dataset's tables on a stand-in that
looks at the frames."""

import json
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import TINY, move_adapters, refused
from runs import base, sft  # noqa: F401 (fixtures)

import generate
import infer
from adapter_files import save_adapter
from checkpoint import write_whole
from clips import png, write_mp4
from config import QUESTION, Generate, LoraArgs
from data import load_tokenizer, look_at_file
from evaluate import Evaluation, opposite, wilson
from infer import Model
from lora import inject
from model.decode import Completion
from model.loading import load_model
from rewards import Sample, accuracy
from video import from_patches

OPTIONS = ["(A) Left to Right", "(B) Right to Left", "(C) Falling Down", "(D) Ascending"]


@pytest.fixture(scope="session")
def tiny(base):  # noqa: F811
    """A random checkpoint with its tokenizer; base: that of runs.py, which has a dataset too."""
    return base / "tiny"


def save_trained_adapter(tiny, folder, rank=4, named=None, state=None):
    """An adapter that changes the answers, as if trained. state: its trainer_state.json."""
    model = load_model(tiny)
    inject(model, LoraArgs(lora_rank=rank, lora_alpha=8))
    move_adapters(model, 0.3, seed=rank)

    def fill(temporary):
        save_adapter(model, temporary, named or tiny)
        (temporary / "trainer_state.json").write_text(json.dumps(state or {}))

    write_whole(folder, fill)


def frames_of(direction, n=16):
    """(n, 64, 64, 3) uint8: a white square on black."""
    frames = np.zeros((n, 64, 64, 3), np.uint8)
    for frame, along in zip(frames, np.linspace(4, 40, n).round().astype(int)):
        x, y = {"A": (along, 20), "B": (44 - along, 20), "C": (20, along), "D": (20, 44 - along)}[direction]
        frame[y : y + 16, x : x + 16] = 255
    return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, frames_of("A"))
    return path


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


# -- One clip


def test_one_clip_its_question_and_sampling(capsys, here, tiny, clip):
    flags = (clip, "--model_id", tiny, "--max_new_tokens", 12)
    out, result = run(capsys, *flags)
    fields = "answer option reasoning text finished prompt_tokens completion_tokens frames grid_thw second_per_grid"
    assert set(result) == {*fields.split(), "time_ids", "seconds", "model_id", "adapter"}
    assert result["frames"] == [0, 2, 4, 6, 9, 11, 13, 15] and result["grid_thw"] == [4, 4, 4]
    assert result["second_per_grid"] == pytest.approx(2 / 15)  # 8 frames of 16 / 30 s, two a step
    assert result["time_ids"] == [0, 1, 2, 3]  # tokens_per_second 8
    assert result["completion_tokens"] == 12 and not result["finished"] and "cut off after 12 tokens" in out
    assert result["adapter"] is None and "no adapter under output/" in out
    assert result["text"] in out and "reasoning:" in out and "\nanswer:" in out
    assert run(capsys, *flags, "--prompt", QUESTION.replace("\n", "\\n"))[1]["text"] == result["text"]
    other = ("--base_model", tiny, "--question", "Where?", "--max_new_tokens", 1, "--fps", 7.5)
    out, other = run(capsys, "--video_path", clip, *other)
    assert other["prompt_tokens"] < result["prompt_tokens"] and other["grid_thw"] == [2, 4, 4]
    assert "question: Where?" in out
    one, again, two = (run(capsys, *flags, "--temperature", 1.5, "--seed", n)[1]["text"] for n in (1, 1, 2))
    assert one == again != two


def test_which_adapter_answers_and_why(capsys, here, tiny, clip):
    plain = run(capsys, clip, "--model_id", tiny)[1]
    save_trained_adapter(tiny, here / "output/a/checkpoint-5", rank=2)
    save_trained_adapter(tiny, here / "output/b/checkpoint-7", rank=4)
    out, result = run(capsys, clip)  # the tiny is the adapter's
    assert result["adapter"] == "output/b/checkpoint-7" and result["model_id"] == str(tiny)
    assert "adapter output/b/checkpoint-7, of the run saved last under output/\n" in out
    chosen = run(capsys, clip, "--model_id", tiny, "--model_ckpt", "output/a")[1]
    assert chosen["adapter"] == "output/a/checkpoint-5" and len({r["text"] for r in (plain, result, chosen)}) == 3
    assert run(capsys, clip, "--model_id", tiny, "--model_ckpt", "none")[1]["text"] == plain["text"]
    assert Model("output/b/checkpoint-7").notes == ["adapter output/b/checkpoint-7, as given"]
    (here / "config.json").write_text("{}")  # somebody else's
    assert str(Model().adapter) == "output/b/checkpoint-7"
    (here / "output/b/best.json").write_text(json.dumps({"step": 7, "accuracy": 0.4}))
    assert Model("output/b").notes[0].endswith("the best checkpoint of its run: 40.0% of its held-out clips are right")
    save_trained_adapter(tiny, here / "output/c/checkpoint-1", named="someone/else")
    out, result = run(capsys, clip, "--model_id", tiny, "--max_new_tokens", 1)
    assert result["adapter"] is None and "was made for someone/else and is not used" in out


def test_clips_are_read_as_in_training(capsys, here, tiny, clip):
    trained = {"nframes": 12, "video_max_pixels": 784, "video_min_pixels": 784, "fps": 2.0, "seed": 7}
    save_trained_adapter(tiny, here / "output/a/checkpoint-5", state={"step": 5, "config": trained})
    out, result = run(capsys, clip, "--max_new_tokens", 1)
    assert result["grid_thw"] == [6, 2, 2] and "--nframes 12, as in training" in out
    flags = ("--fps", 7.5, "--video_min_pixels", 3136)  # what is typed wins over what conflicts with it
    assert run(capsys, clip, "--max_new_tokens", 1, *flags)[1]["grid_thw"] == [2, 4, 4]
    model = Model("output/a", max_new_tokens=1)
    model.cfg.nframes = 4
    assert model.ask(clip).clips[0]["grid_thw"] == [2, 2, 2]


def test_a_run_is_asked_what_it_was_trained_on(base, sft):  # noqa: F811
    """On class folders' questions, which differ in their options."""
    records = json.loads((base / "data/train.json").read_text())
    for record, two in zip(records, [(0, 1), (2, 1), (3, 2), (0, 3)] * 4):
        lines = [f"({letter}) {OPTIONS[k][4:]}" for letter, k in zip("AB", two)]
        turns = "\n".join(["<video>\nWhich?\nOptions:", *lines]), lines[0]
        record["conversations"] = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns)]
    (base / "data/classes.json").write_text(json.dumps(records))
    folder = sft("run", data_path=base / "data/classes.json", max_steps=2, save_steps=1, save_total_limit=1)
    options = [f"({letter}) {words}" for letter, words in zip("ABCD", sorted(line[4:] for line in OPTIONS))]
    model = Model(folder)
    assert model.question == "\n".join(["Which?", "Options:", *options])
    own = next((base / "data/videos").iterdir())
    record = {"video": str(own), "conversations": [{"from": "human", "value": f"<video>\n{model.question}"}]}
    assert model.example(own).ids.tolist() == model.processor.encode(record, answer=False).ids.tolist()


def test_ask_from_python(capsys, here, tiny, clip, base):  # noqa: F811
    """With the calls that README names."""
    save_trained_adapter(tiny, here / "output/a/checkpoint-5")
    command = run(capsys, clip, "--max_new_tokens", 12, "--question", "Where?")[1]
    model, base_alone = Model("output/a", max_new_tokens=12), Model(tiny, max_new_tokens=12)
    answer = model.ask(str(clip), "Where?")
    assert (answer.text, answer.completion_tokens) == (command["text"], 12) and capsys.readouterr().out == ""
    assert base_alone.adapter is None and base_alone.ask(clip, "Where?").text != answer.text
    (here / "list").mkdir()
    (here / "list/adapter_config.json").write_text("[]")
    image = here / "image.png"
    image.write_bytes(png(frames_of("A")[0]))
    mixed = model.ask([image, clip, clip], "What is alike?")
    assert [each["frames"][-1] for each in mixed.clips] == [0, 15, 15] and len(mixed.clips[1]["time_ids"]) == 4
    assert mixed.prompt_tokens == model.ask([clip, clip], "What is alike?").prompt_tokens + 4 + 2
    assert model.ask([], "What?").clips == []  # no clip at all
    seen = json.loads(next(look_at_file(str(base / "data/val.json"), model.processor, True, "")))
    record = json.loads((base / "data/val.json").read_text())[0]
    assert seen["learned"] == [record["conversations"][1]["value"]] and seen["clips"][0]["grid_thw"] == [4, 4, 4]
    sample = Sample(QUESTION, "(A) Left to Right")
    assert [accuracy(text, sample) for text in ("Left to right.", "(B)", "")] == [1, 0, 0]
    assert "nowhere.mp4: no such file" in refused(lambda: list(model.stream("nowhere.mp4")))
    for function, option, value, words in (
        (Model, "temprature", 1, "did you mean temperature"),
        (Model, "model_id", "output/a/checkpoint-5", "adapter is given by --model_ckpt output/a/checkpoint-5"),
        (Model, "model", "list", "adapter_config.json: cannot be read"),
        (partial(model.evaluate, []), "fps", 1.0, "fps cannot change for one call"),
        (partial(model.evaluate, []), "temprature", 1, "did you mean temperature"),
        (partial(model.evaluate, []), "max_samples", -3, "--max_samples: got -3, expected a number above 0"),
        (partial(model.evaluate, []), "temperature", -1, "--temperature: got -1.0, expected at least 0"),
        (partial(model.evaluate, []), "controls", "reverse", "--controls: got 'reverse', expected names out of"),
    ):
        assert words in refused(function, **{option: value})


# -- Answers that are given: by a stand-in for rollouts.generate


def watches(texts=OPTIONS, names=None):
    """A stand-in that follows the bright square; a blank clip looks to it like option A.
    names: gets the names of the samples."""
    tokenizer = load_tokenizer(TINY)

    def generate(model, prompts, sampling, num_generations=1, generator=None, on_token=None):
        groups, start = [], 0
        if names is not None:
            names.extend(prompts.names)
        for grid in prompts.grid_thw:
            end = start + math.prod(grid)
            bright = from_patches(prompts.patches[start:end].numpy(), grid)[..., 0] > 128  # (F, H, W)
            centres = [np.argwhere(frame).mean(0) if frame.any() else np.zeros(2) for frame in bright]
            dy, dx = centres[-1] - centres[0]
            answer = (dx < 0) if abs(dx) >= abs(dy) else 2 + (dy < 0)
            ids, start = tokenizer.encode(texts[int(answer)]).ids, end
            for token in ids if on_token else []:
                on_token(0, token)
            groups.append([Completion(ids, [], True)])
        return groups

    return generate


def test_reasoning_and_answer_apart_and_streamed_text_is_whole(monkeypatch, here, tiny, clip):
    model = Model(tiny)

    def answer(text, question=""):
        monkeypatch.setattr("rollouts.generate", watches([text]))
        result = model.ask(clip, question)
        return result.reasoning, result.answer, result.option

    chain = "<think>It moves,\nnot (B).\n</think><answer>(A) Left to Right</answer>"
    assert answer(chain) == ("It moves,\nnot (B).", "(A) Left to Right", "A")
    assert answer("<think>It was cut") == ("It was cut", "", None)
    assert answer("Answer: D") == (None, "(D) Ascending", "D")
    assert answer("Answer: (A) Ascending") == (None, "(A) Ascending", None)  # contradicts itself
    assert answer("<answer>red</answer>", "Which colour?") == (None, "red", None)
    # characters of two to four bytes, each byte a token of its own; the token that ends an answer is not shown
    text = "é ж 漢字 🎾 end"
    monkeypatch.setattr("rollouts.generate", watches([text + "<|im_end|>"]))
    pieces = list(model.stream(clip))
    assert len(pieces) > 5 and "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Nine clips of four classes, a broken one, and a record without an answer."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "videos").mkdir()
    records = []
    for i, letter in enumerate("ABCDABCDAA"):
        write_mp4(folder / "videos" / f"{i}.mp4", frames_of(letter))
        turns = [("human", f"<video>\n{QUESTION}"), ("gpt", f"Answer: {OPTIONS['ABCD'.index(letter)]}")]
        records.append({"video": f"{i}.mp4", "conversations": [{"from": who, "value": said} for who, said in turns]})
    (folder / "videos/9.mp4").write_bytes(b"no video")
    records.append({"video": "0.mp4", "conversations": records[0]["conversations"][:1]})
    (folder / "val.json").write_text(json.dumps(records))
    return folder / "val.json"


def test_dataset_tables(capsys, monkeypatch, here, tiny, dataset):
    monkeypatch.setattr("rollouts.generate", watches())
    infer.main(["--data_path", str(dataset), "--model_id", str(tiny), "--json"])
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert (result["right"], result["count"], result["skipped"], result["chance"]) == (9, 9, 2, 0.25)
    assert "9.mp4" in err and "record has no answer" in err
    assert result["accuracy"] == 1.0 and result["interval"] == pytest.approx([0.7009, 1.0], abs=1e-4)
    assert result["confusion"]["Left to Right"] == {"Left to Right": 3} and len(result["confusion"]) == 4
    reversed_, blank = result["controls"]["reversed"], result["controls"]["blank"]
    assert result["flipped"] == reversed_["flipped"] == reversed_["changed"] == 1.0 and reversed_["accuracy"] == 0.0
    assert blank["right"] == 3 and set(result["controls"]) == {"reversed", "shuffled", "blank"}
    assert "9/9" in out and "100.0%" in out and re.search(r"reversed +0/9 +0.0% .* 100.0% +100.0%", out)
    assert re.search(r"Ascending +2 +0 +0 +0", out) and result["tasks"] == {"multiple choice": {"right": 9, "count": 9}}
    flags = ["--data_path", dataset, "--model_id", tiny, "--nframes", 2, "--controls", "shuffled"]
    out, result = run(capsys, *flags)
    assert result["controls"]["shuffled"]["accuracy"] is None
    assert re.search("shuffled is not possible: .*two orders", out)


def test_predictions_are_written_as_they_come_and_continued(capsys, monkeypatch, here, tiny, dataset):
    names = []
    monkeypatch.setattr("rollouts.generate", watches(names=names))
    flags = ["--data_path", dataset, "--model_id", tiny, "--controls", "none", "--output", "out/predictions.jsonl"]
    whole = run(capsys, *flags)[1]
    path = here / "out/predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["number"] for row in rows] == list(range(9)) and {row["task"] for row in rows} == {"multiple choice"}
    assert rows[1]["answer"] == "Answer: (B) Right to Left" and rows[1]["said"] == "Right to Left"
    assert rows[1]["rewards"]["accuracy"] == rows[1]["right"] == 1
    path.write_text("".join(lines[:4]) + lines[4][:20])  # killed in its fifth line
    names.clear()
    out, again = run(capsys, *flags)
    assert len(names) == 5 and path.read_text() == "".join(lines) and "4 of 9 answers are taken from" in out
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    same = shutil.copy(dataset, dataset.with_name("same.json"))
    run(capsys, *flags, "--data_path", same, "--model_ckpt", "none", "--local_files_only", "True")
    assert len(names) == 5, "the same model and records under other names"
    assert "by this model" in refused(run, capsys, *flags, "--max_new_tokens", 9)
    for output, words in ((same, "line 1 is no prediction"), (here, "Is a directory"), (same / "x", "File exists")):
        before = same.write_text(same.read_text().replace("\n", " ")) and same.read_bytes()  # a single line
        assert words in refused(run, capsys, *flags, "--output", output) and same.read_bytes() == before
    other = dataset.with_name("other.json")
    other.write_text(dataset.read_text().replace("(B) Right to Left", "(A) Left to Right"))
    assert "of these records" in refused(run, capsys, *flags, "--data_path", other)


def test_the_tiny_base_is_small_and_was_never_taught_direction(tmp_path):
    generate.generate(Generate(output_dir=str(tmp_path), num_samples=64, split=0.5, workers=1))
    records = json.loads((tmp_path / "val.json").read_text())
    model = Model(TINY, image_folder=str(tmp_path / "videos"), max_new_tokens=12)
    assert model.evaluate(records, controls="none").accuracy <= 0.4
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5e6


def test_wilson_interval_and_opposites():
    assert repr(Evaluation({0: {"right": 1.0}})) == "1 of 1 right (20.7% to 100.0%)"
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (right, count), interval in table.items():
        assert wilson(right, count) == pytest.approx(interval, abs=1e-4)
    for words, backwards in {"Left to Right": "right to left", "Falling Down": "ascending", "red": None}.items():
        assert opposite(words) == backwards

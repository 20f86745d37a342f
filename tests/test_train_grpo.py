"""GRPO end to end on a tiny random checkpoint: what is sampled is what is trained, the reference, resuming, ranks. The
loss itself is tested in test_grpo_loss.py, sampling in test_decode.py."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from runs import base, column, execute, grpo, lines, release_run, two_ranks, weights  # noqa: F401 (fixtures)
from safetensors.torch import load_file

import train_grpo
from adapter_files import save_adapter
from config import GRPO
from data import Example, Processor, load_tokenizer, pack, read_records
from grpo import grpo_loss, loss_normalizer
from lora import inject, lora_layers, trainable_parameters
from model import UserError
from model.loading import load_model
from model.packed import IGNORE
from rollouts import ALARM_STEPS, Alarm, Group, GroupSampler, Rollout, Sampler, differ, reward_metrics, score_groups

# ruff: noqa: F811 (fixtures are imported by name)


class OneRank:
    """As much of trainer.Run as sampling and comparing need."""

    def __init__(self, cfg, sampler=None):
        self.cfg, self.sampler, self.world = cfg, sampler, 1


@pytest.fixture(scope="session")
def bench(base):
    """(model with a random adapter, processor, prompts of two clips, cfg)"""
    model = load_model(base / "tiny")
    cfg = GRPO(num_generations=4, per_device_train_batch_size=8, max_completion_length=8, nframes=4)
    cfg.data_path = str(base / "data/few.json")
    torch.manual_seed(0)
    inject(model, cfg)
    shake(model)
    processor = Processor(load_tokenizer(base / "tiny"), model.config, cfg)
    records = read_records(cfg.data_path)
    return model, processor, [processor.encode(record, answer=False) for record in (records[0], records[1])], cfg


def shake(model, size=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def sampled(bench, prompts=None, seed=0, length=8):
    """Groups of the bench's prompts with made-up advantages, all of them to be trained on."""
    model, processor, own, cfg = bench
    torch.manual_seed(seed)
    cfg = replace(cfg, max_completion_length=length)
    prompts = own if prompts is None else prompts
    sampler = GroupSampler(OneRank(cfg, Sampler(model, processor, cfg)), [], None, 0)
    samples = sampler.sample(prompts, range(seed, seed + len(prompts)), cfg.num_generations)
    groups = [Group(k, len(prompt), rollouts, k) for k, (prompt, rollouts) in enumerate(zip(prompts, samples))]
    for k, rollout in enumerate(r for group in groups for r in group.rollouts):
        rollout.advantage = (-1) ** k * (1 + 0.1 * k)
    return groups


def micro_batches(prompts, groups, cfg):
    splits = train_grpo.split_micro_batches(groups, cfg, None)
    return [train_grpo.micro_batch(dict(enumerate(prompts)), rollouts) for rollouts in splits]


def test_the_training_forward_gives_the_samplers_logprobs(bench):
    model, _, prompts, cfg = bench
    groups = sampled(bench)
    (batch,) = micro_batches(prompts, groups, cfg)
    logprobs, _ = train_grpo.token_logprobs(model, model, batch, cfg)
    assert len({rollout.text for group in groups for rollout in group.rollouts}) > 4
    assert (logprobs - batch.sampler).abs().max() < 1e-4


def repeated_form(prompt, rollouts):
    """The reference form of a packed group: every completion behind its own copy of prompt and clip."""
    for rollout in rollouts:
        ids = np.array([*prompt.ids, *rollout.ids])
        after = prompt.position_ids.max() + 1 + np.arange(len(rollout.ids))
        targets = np.full(len(ids), IGNORE)
        targets[len(prompt) - 1 : -1] = rollout.ids
        positions = np.concatenate([prompt.position_ids, np.tile(after, (3, 1))], axis=1)
        yield replace(prompt, ids=ids, targets=targets, position_ids=positions)


@pytest.mark.parametrize("split", [8, 3], ids=["whole groups", "split groups"])
def test_the_shared_prompt_has_loss_and_gradients_of_the_repeated_form(bench, split):
    model, _, prompts, cfg = bench
    groups = sampled(bench)
    everyone = [rollout for group in groups for rollout in group.rollouts]
    for k, rollout in enumerate(everyone):  # completions of different lengths
        rollout.ids, rollout.logprobs = rollout.ids[: 1 + k], rollout.logprobs[: 1 + k]
    tokens = sum(len(rollout.ids) for rollout in everyone)
    normalizer = loss_normalizer("sequence", tokens, len(everyone), 8)

    def loss_of(batch):
        logprobs, entropy = train_grpo.token_logprobs(model, model, batch, cfg)
        noise = torch.linspace(-0.3, 0.3, tokens)[offset : offset + len(logprobs)]  # ratios and KL that are not 1 and 0
        known = {"old_logprobs": batch.sampler + noise, "ref_logprobs": batch.sampler - noise, "entropy": entropy}
        knobs = {"beta": 0.1, "aggregation": "sequence"}
        return grpo_loss(logprobs, batch.advantages, batch.completion, normalizer, **known, **knobs)[0]

    results = []
    for form in ("shared", "repeated"):
        model.zero_grad()
        total, offset = 0.0, 0
        batches = micro_batches(prompts, groups, replace_size(cfg, split))
        if form == "repeated":
            (batch,) = micro_batches(prompts, groups, cfg)
            batch.packed = pack(
                [e for p, group in zip(prompts, groups, strict=True) for e in repeated_form(p, group.rollouts)]
            )
            batch.rows = (batch.packed.targets != IGNORE).nonzero()[:, 0]
            batches = [batch]
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            total, offset = total + loss.item(), offset + len(batch.rows)
        results.append((total, {name: p.grad.clone() for name, p in trainable_parameters(model)}))
    (loss, gradients), (expected, reference) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert any(name.startswith("visual.blocks") for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).abs().max() <= 1e-5 * reference[name].abs().max(), name


def replace_size(cfg, size):
    other = GRPO(**{name: getattr(cfg, name) for name in ("num_generations", "max_completion_length", "nframes")})
    other.per_device_train_batch_size = size
    return other


def test_vision_tokens_are_neither_drawn_nor_in_the_softmax(bench):
    model, _, prompts, cfg = bench
    groups = sampled(bench)
    banned = set(model.config.vision_token_ids)
    assert not any(banned & set(rollout.ids) for group in groups for rollout in group.rollouts)
    (batch,) = micro_batches(prompts, groups, cfg)
    batch.packed.targets[batch.rows] = model.config.video_token_id
    assert (train_grpo.token_logprobs(model, model, batch, cfg)[0] == -torch.inf).all()


@pytest.mark.parametrize("control", ["blank", "reversed"])
def test_another_video_gives_other_rollouts_and_rewards(bench, base, control):
    _, processor, prompts, _ = bench
    rewards = train_grpo.load_rewards(f"{base}/rewards.py:vowels")
    seen = []
    for name in ("none", "none", control):
        examples = [processor.encode(prompt.record, answer=False, control=name) for prompt in prompts]
        groups = sampled(bench, examples, length=40)  # long enough for a weak effect of random weights to show
        records = [example.record for example in examples]
        score_groups(rewards, records, [group.rollouts for group in groups], [None] * len(groups), 8)
        seen.append([(rollout.text, rollout.reward) for group in groups for rollout in group.rollouts])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2] and [r for _, r in seen[0]] != [r for _, r in seen[2]]


def groups_of(rewards, accuracy=None):
    """Groups whose completions have these rewards; all texts are the same. accuracy: likewise, that component."""
    groups = []
    for g, values in enumerate(rewards):
        right = accuracy[g] if accuracy else values
        make = lambda a, r: Rollout(g, [5], [-1.0], True, "same", {"accuracy": a}, r, r > 0.5)  # noqa: B023
        groups.append(Group(g, 3, [make(a, r) for a, r in zip(right, values)], g))
        groups[-1].differs = differ(groups[-1].rollouts)
    return groups


def compare(groups, wanted, **options):
    return train_grpo.compare_within_groups(OneRank(GRPO(num_generations=2, **options)), groups, wanted)


def test_groups_are_known_by_index_not_by_text():
    groups = groups_of([[1.0, 0.0], [9.0, 8.0], [3.0, 3.0], [0.0, 5.0]])
    metrics, normalizer = compare(groups, 2, beta=0.0)
    advantages = [[r.advantage for r in group.rollouts] for group in groups]
    assert advantages[0] == pytest.approx([0.7070, -0.7070], abs=1e-4)
    assert advantages[1] == pytest.approx(advantages[0], abs=1e-4) and advantages[2] == [0.0, 0.0]
    assert [group.trained for group in groups] == [True, True, False, False]  # of those that differ the first
    assert normalizer == 4 and metrics["groups_counted"] == 2 and metrics["groups_differing"] == 3
    assert metrics["no_variance"] == 0.25 and metrics["reward"] == pytest.approx(3.625)


def test_groups_that_differ_in_accuracy_go_before_those_that_differ_in_length():
    groups = groups_of([[0.3, 0.0], [0.2, 0.2], [1.1, 0.0], [1.0, 0.0]], [[0, 0], [0, 0], [1, 0], [1, 0]])
    compare(groups, 3, beta=0.0)
    assert [group.trained for group in groups] == [True, False, True, True]
    groups = groups_of([[0.3, 0.0], [0.2, 0.2], [1.1, 0.0], [1.0, 0.0]], [[0, 0], [0, 0], [1, 0], [1, 0]])
    compare(groups, 2, beta=0.0)
    assert [group.trained for group in groups] == [False, False, True, True]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_groups_without_variance_are_trained_for_their_kl_alone(beta):
    groups = groups_of([[1.0, 1.0], [0.0, 0.0], [0.1, 0.1]])
    metrics, normalizer = compare(groups, 3, beta=beta)
    assert normalizer == 6  # their tokens count in the mean
    assert [group.trained for group in groups] == [beta > 0] * 3
    assert all(r.advantage == 0 for group in groups for r in group.rollouts)
    assert (metrics["all_right"], metrics["all_wrong"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_metrics_report_each_component_apart():
    good, bad = {"accuracy": 1.0, "format": 0.2}, {"accuracy": 0.0, "format": 0.0}
    rollouts = [Rollout(0, [5] * 4, [], True, "", good, 1.2, True), Rollout(0, [5] * 8, [], False, "", bad)]
    metrics = reward_metrics([Group(0, 9, rollouts)], [0.85])
    assert metrics["reward/accuracy"] == 0.5 and metrics["reward/format"] == 0.1
    assert metrics["reward_std"] == pytest.approx(0.8485, abs=1e-4)
    assert metrics["length"] == 6 and metrics["truncated"] == 0.5
    assert metrics["completion_tokens"] == 12 and metrics["prompt_tokens"] == 9


def test_alarms():
    alarm = Alarm()
    good = {"reward": 1.0, "reward_std": 0.4, "no_variance": 0.5}
    for step in range(1, 30):
        assert alarm.look(step, good) == []
    alarm = Alarm(json.loads(json.dumps(alarm.state)))  # as in a checkpoint
    warnings = [alarm.look(step, good | {"reward": 0.2}) for step in range(30, 50)]
    assert [text for texts in warnings for text in texts][0].startswith("reward collapses")
    assert sum(map(len, warnings)) == 2  # not at every step
    still, flat = Alarm(), good | {"no_variance": 1.0, "all_right": 1.0}
    warnings = [still.look(step, flat) for step in range(2 * ALARM_STEPS)]
    assert [bool(texts) for texts in warnings] == ([False] * (ALARM_STEPS - 1) + [True]) * 2
    assert warnings[-1][0].startswith("nothing to learn for 20 steps") and "all right 100%" in warnings[-1][0]


def test_it_learns_and_logs(grpo, base, capfd):
    options = {"max_steps": 24, "learning_rate": 2e-2, "data_path": base / "data/train.json"}
    options |= {"log_completions": 8, "logging_steps": 8}
    folder = grpo("run", **options, num_generations=8, per_device_train_batch_size=32, eval_steps=12, max_new_tokens=8,
                  eval_data_path=base / "data/val.json")  # fmt: skip
    reward = column(folder, "reward")
    assert np.mean(reward[-4:]) > np.mean(reward[:4]) + 0.025, reward  # over the same 16 prompts
    rows = lines(folder)[1]
    for name in ("reward", "reward_std", "reward/vowels", "reward/vowels_std", "all_right", "all_wrong", "no_variance",
                 "length", "truncated", "kl", "clipped", "entropy", "grad_norm", "sampler_gap", "sampler_gap_max",
                 "rollout_seconds", "update_seconds", "tokens_per_second", "loss", "lr"):  # fmt: skip
        assert isinstance(rows[name], float), name
    assert column(folder, "kl")[0] == pytest.approx(0, abs=1e-6) and column(folder, "kl")[-1] > 1e-3
    assert max(column(folder, "sampler_gap_max")) < 1e-4
    assert [line["step"] for line in lines(folder) if "eval_sampled_accuracy" in line] == [0, 12, 24]

    rollouts = lines(folder, "rollouts.jsonl")
    assert len(rollouts) == 24 * 4 * 8  # every completion
    first = rollouts[0]
    assert first["question"].startswith("<video>") and first["video"].endswith(".mp4") and first["answer"]
    detailed = [row for row in rollouts if "tokens" in row]
    assert all(row["n_tokens"] == len(row["tokens"]) == len(row["logprobs"]) for row in detailed)
    shown = {step: {row["prompt"] for row in detailed if row["step"] == step} for step in (1, 24)}
    assert all(1 <= len(prompts) <= 3 for prompts in shown.values()) and len(detailed) <= 24 * 3 * 8
    assert sum("question" in row for row in rollouts) == 24 * 4  # once a group
    assert first["reward"] == pytest.approx(first["rewards"]["vowels"])
    shown = capfd.readouterr().out
    assert "best of a group: reward" in shown and "worst of a group: reward" in shown and "greedy" in shown
    assert "step  8/24" in shown and "step  7/24" not in shown
    assert (folder / "report.html").exists()


def test_resume_goes_on_bit_for_bit(grpo):
    """Same rollouts, same update, and the reference is still the policy as the run began."""
    start = grpo("start", max_steps=2, learning_rate=1e-2)
    options = {"max_steps": 5, "save_steps": 2, "save_total_limit": "none", "learning_rate": 1e-2, "num_iterations": 2}
    options |= {"model_ckpt": start, "beta": 0.5}
    whole = grpo("whole", **options)
    broken = shutil.copytree(whole, whole.with_name("broken"))
    for step in (4, 5):
        shutil.rmtree(broken / f"checkpoint-{step}")
    grpo("broken", **options, resume=True)
    assert lines(whole, "rollouts.jsonl") == lines(broken, "rollouts.jsonl")
    for name in ("kl", "loss", "grad_norm", "reward", "entropy", "clipped"):
        assert column(whole, name) == column(broken, name), name
    for name in ("optimizer-00000.safetensors", "adapter_model.safetensors"):
        assert (whole / "checkpoint-5" / name).read_bytes() == (broken / "checkpoint-5" / name).read_bytes()
    starts = [load_file(p / "adapter_model.safetensors") for p in (start / "checkpoint-2", whole / "start_adapter")]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    kl = column(whole, "kl")
    assert kl[0] < 1e-6 and min(kl[1:]) > 1e-3


def test_more_is_sampled_until_enough_groups_differ(grpo, base, monkeypatch):
    """Only some prompts differ in accuracy: rounds go on until enough do; a resumed run goes on in the data."""
    (base / "some.py").write_text("""
def accuracy(text, sample):
    return float(len(text)) if "3" in sample.record["id"] else 0.0
""")
    records = [json.loads(json.dumps(record)) for record in read_records(base / "data/train.json")][:12]
    for k, record in enumerate(records):
        record["id"] = f"{k}-{'3' if k % 3 else '0'}"
    (base / "data/twelve.json").write_text(json.dumps(records))
    options = {"data_path": base / "data/twelve.json", "rewards": f"{base}/some.py:accuracy", "max_resample": 2}
    options |= {"per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2, "save_total_limit": "none"}
    whole = grpo("whole", **options)
    broken = shutil.copytree(whole, whole.with_name("broken"))
    assert set(column(whole, "rounds")) <= {1, 2, 3} and max(column(whole, "rounds")) > 1
    for rounds, differing in column(whole, "rounds", "groups_differing"):
        assert differing >= 2 or rounds == 3
    assert column(whole, "epoch")[-1] == sum(column(whole, "rounds")) / 6
    for step in (3, 4):
        shutil.rmtree(broken / f"checkpoint-{step}", ignore_errors=True)
    grpo("broken", **options, resume=True)
    assert lines(whole, "rollouts.jsonl") == lines(broken, "rollouts.jsonl")


def test_a_run_killed_before_its_first_checkpoint_has_its_adapter(grpo, base, tmp_path, monkeypatch):
    """Its own copy: that of the run that it went on from may be gone."""
    options = {"model_ckpt": tmp_path / "begun", "vision_lora": False, "merger_lora": False}
    model = load_model(base / "tiny")
    inject(model, GRPO(vision_lora=False, merger_lora=False))
    shake(model)
    save_adapter(model, tmp_path / "begun", base / "tiny")
    whole = grpo("whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "learn", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            grpo("run", **options)
    release_run()
    shutil.rmtree(tmp_path / "begun")
    assert lines(grpo("run", **options, resume=True), "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


def test_the_reference_stays_as_it_was(base):
    model, cfg = load_model(base / "tiny"), GRPO(nframes=4, beta=0.1)
    inject(model, cfg)
    shake(model)
    ids, positions = np.arange(5, 25), np.tile(np.arange(20), (3, 1))
    example = Example("text", ids, np.full(20, IGNORE), positions, None, [], [], [], [], 0, {})
    before = model(pack([example])).detach()
    frozen = train_grpo.freeze_reference(model, cfg)
    cfg.reference = "base"
    without = train_grpo.freeze_reference(model, cfg)
    shake(model, seed=1)
    now = model(pack([example])).detach()
    with frozen():
        assert torch.equal(model(pack([example])), before)
    with without():
        for _, layer in lora_layers(model):
            assert not layer.enabled
    assert torch.equal(model(pack([example])), now) and not torch.equal(now, before)


def test_beta_0_makes_no_reference_pass_and_a_large_one_holds_the_policy(grpo):
    free, held = (column(grpo(f"{beta}", max_steps=5, learning_rate=1e-2, beta=beta), "kl") for beta in (1e-9, 10.0))
    assert held[-1] < free[-1] / 3, (free, held)
    assert column(grpo("off", max_steps=2, beta=0), "kl") == []


def test_a_pack_cuts_no_group_that_fits():
    """Prompts of 10 tokens with three completions of 5: a group takes 25."""
    rollouts = [[Rollout(g, [1] * 5, [0.0] * 5, True, "") for _ in range(3)] for g in range(4)]
    groups = [Group(g, 10, each) for g, each in enumerate(rollouts)]
    split = partial(train_grpo.split_micro_batches, groups, GRPO())
    cut = lambda tokens: [[rollout.prompt for rollout in each] for each in split(tokens)]
    assert cut(60) == [[0] * 3 + [1] * 3, [2] * 3 + [3] * 3]  # 60 would have room for two prompts and eight completions
    assert cut(49) == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    assert cut(24) == [[g] * n for g in range(4) for n in (2, 1)]


@pytest.fixture(scope="session")
def two_steps(base):
    """Two steps of four prompts, or two: 16 completions a round."""
    return execute(train_grpo, base, base / "two_steps", max_steps=2, max_resample=1, save_steps=2)


def completions(folder):
    names = "step", "prompt", "id", "completion", "n_tokens", "trained"
    return [[row[name] for name in names] for row in lines(folder, "rollouts.jsonl")]


def farthest(one, other):
    """The largest difference between two runs, of their weights after step 2 and of what they logged."""
    mine, theirs = (weights(folder / "checkpoint-2") for folder in (one, other))
    differences = [float((mine[key] - theirs[key]).abs().max()) for key in mine]
    for name in ("reward", "kl", "kl_trained", "loss", "entropy", "grad_norm"):
        differences += [abs(x - y) for x, y in zip(column(one, name), column(other, name), strict=True)]
    return max(differences)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "pack_tokens": "none"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "pack_tokens": "none"},
        {"pack_tokens": 150},
    ],
    ids=["accumulated", "split groups", "packed"],
)
def test_how_the_batch_is_split_changes_nothing(grpo, two_steps, options):
    run = grpo("run", max_steps=2, max_resample=1, save_steps=2, **options)
    assert completions(run) == completions(two_steps)
    assert farthest(run, two_steps) < 1e-5


def test_two_ranks_equal_one(base, two_steps, tmp_path):
    """One group dropped or chosen as all ranks see it, counts over all ranks."""
    options = {"max_steps": 2, "max_resample": 1, "save_steps": 2, "per_device_train_batch_size": 8}
    run = two_ranks(train_grpo, base, tmp_path / "two", **options)
    assert completions(run) == completions(two_steps)
    assert farthest(run, two_steps) < 1e-5


def test_the_temporal_reward_samples_shuffled_frames_too(grpo, monkeypatch):
    seen, sample = [], GroupSampler.sample

    def watched(sampler, prompts, seeds, count):
        seen.append((count, [prompt.frame_indices[0] for prompt in prompts]))
        return sample(sampler, prompts, seeds, count)

    monkeypatch.setattr(GroupSampler, "sample", watched)
    folder = grpo("run", rewards="temporal,accuracy", max_steps=1)
    (every, ordered), (half, shuffled) = seen
    assert (every, half) == (4, 2) and ordered != shuffled and [sorted(f) for f in shuffled] == ordered
    assert lines(folder)[0]["reward/temporal"] == 0.0


def test_answers_that_cannot_be_read_are_named_and_counted(grpo, base, tmp_path, capfd):
    records = json.loads((base / "data/few.json").read_text())
    records[3]["conversations"][1]["value"] = "Answer: (E) Sideways"
    (tmp_path / "train.json").write_text(json.dumps(records))
    options = {"data_path": tmp_path / "train.json", "image_folder": base / "data/videos", "max_steps": 1}
    with pytest.raises(UserError, match="1 of 6 training samples cannot be read.*max_skip_share.*sample 3.*Sideways"):
        grpo("strict", **options)
    grpo("run", **options, max_skip_share=0.2)
    assert "sample 3" in capfd.readouterr().out


def test_the_flags_of_the_seeds_command(grpo, base, capfd):
    """Its GRPO command with our paths."""
    folder = grpo(
        "grpo_video_lora", image_folder=base / "data/videos", per_device_train_batch_size=8, num_generations=8,
        gradient_accumulation_steps=1, num_train_epochs=1, max_steps=-1, learning_rate=2e-4, disable_flash_attn2=True,
        bf16=True, fp16=False, freeze_llm=True, freeze_vision_tower=True, tune_merger=False, lora_enable=True,
        vision_lora=True, lora_rank=64, lora_alpha=64, lora_dropout=0.05, num_lora_modules=-1,
        lora_namespan_exclude="['lm_head','embed_tokens']", gradient_checkpointing=True, logging_steps=1,
        dataloader_num_workers=2,
    )  # fmt: skip
    assert len(column(folder, "reward")) == 6 and max(column(folder, "sampler_gap")) < 0.1  # bf16
    config = json.loads((folder / "checkpoint-6/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 64)
    assert "bfloat16" in capfd.readouterr().out

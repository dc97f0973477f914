"""The study of transfer: its order, its runs, its table."""

import json
import math
from dataclasses import replace

import pytest
import torch
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.studies import transfer_study
from sammed3d_backbone.recipes.studies.transfer_study import Config, Row, main, rows_of, run_config
from timm.models.vision_transformer_sam import VisionTransformerSAM

from sammed3d_backbone import config, encoder
from sammed3d_backbone.evaluation.scores import Score, differences
from sammed3d_backbone.loading.checkpoint import read, write


@pytest.fixture
def study(small, tmp_path):
    """Two draws of two arms, in seconds."""
    own = {**small, "drop_path_rate": 0.0}
    (tmp_path / "boxes.yaml").write_text(config.dump(finetune_unetr.Config(**own)))
    tensors = encoder("tiny", pretrained=False, img_size=16).state_dict()
    write(tmp_path / "tiny.safetensors", tensors, {})
    return Config(
        blocks=(f"{tmp_path / 'boxes.yaml'} 2 2 pretrained,scratch",),
        weights=str(tmp_path / "tiny.safetensors"),
        out=str(tmp_path / "study"),
    )


def test_the_committed_study_begins_with_all_arms_at_eight_labels(root):
    cfg = config.load(Config, root / "recipes/studies/transfer_study.yaml")
    assert cfg.weights == "tiny"
    rows = list(rows_of(cfg))
    controls = {"zero_encoder", "frozen", "frozen_random"}
    assert {row.arm for row in rows[:5]} == {"pretrained", "scratch", *controls}
    assert {row.labels for row in rows[:18]} == {"8"}
    assert len({row.name for row in rows}) == len(rows) == 18 + 3 * 9 + 2 * 4
    assert all(run_config(row, cfg).seed == row.draw for row in rows)


def test_the_long_study_differs_from_the_short_one_in_steps_and_takes_its_rates(root):
    studies = root / "recipes/studies"
    short, long = (
        config.load(Config, studies / f"transfer_study{which}.yaml") for which in ("", "_long")
    )
    for row in rows_of(long):
        ours, theirs = run_config(row, long), run_config(row, short)
        assert set(config.differences(ours, theirs)) == {"name", "steps", "validate_every"}
        assert ours.steps == 6 * theirs.steps


def test_the_study_of_adaptation_asks_for_each_way_of_it_once(root):
    cfg = config.load(Config, root / "recipes/studies/adaptation_study.yaml", ["weights=FILE"])
    made = {row.arm: run_config(row, cfg) for row in rows_of(cfg)}
    assert made.keys() == transfer_study.ARMS.keys() - {
        "zero_encoder",
        "frozen_random",
        *transfer_study.DECODERS,
    }
    assert (made["lora"].peft, made["bottleneck"].peft_size) == ("lora", 32)
    assert made["first_channel"].channel_gains == (1.0, 0.0)
    assert made["shared"].data == "hippocampus_channels"


def test_the_study_of_decoders_has_two_draws_of_each_with_steps_of_its_own(root):
    cfg = config.load(Config, root / "recipes/studies/decoder_study.yaml")
    made = {row: run_config(row, cfg) for row in rows_of(cfg)}
    assert len(made) == 2 * (1 + len(transfer_study.DECODERS))
    steps = {run.model: run.steps for run in made.values()}
    assert steps["unetr"] > steps["segresnet"] > steps["flexible_unet"]
    assert all(run.steps == 4 * run.validate_every for run in made.values())
    assert all(run.scratch and run.labels is None for run in made.values())


def test_the_strategies_begin_as_the_paper_says_with_one_epoch_each(root):
    cfg = config.load(Config, root / "recipes/studies/strategies.yaml")
    frozen, tuned, scratch = (run_config(row, cfg) for row in rows_of(cfg))
    assert (frozen.peft, tuned.peft, scratch.peft) == ("bottleneck", "none", "none")
    assert [run.weights for run in (frozen, tuned, scratch)] == ["sam_2d", "sam_2d", None]
    for run in (frozen, tuned, scratch):
        assert (run.variant, run.rel_pos, run.batch, run.steps) == ("vit_b", "axial", 1, 49)


@pytest.mark.slow
def test_the_strategies_run_side_by_side_and_the_table_says_what_each_began_with(
    study, tmp_path, runs
):
    flat = VisionTransformerSAM(
        img_size=32,
        patch_size=8,
        embed_dim=192,
        depth=12,
        num_heads=3,
        global_attn_indexes=tuple(range(12)),
        use_rel_pos=True,
        num_classes=0,
    ).state_dict()
    write(tmp_path / "flat.safetensors", flat, {})
    task = tmp_path / "boxes.yaml"
    study = replace(
        study,
        blocks=(f"{task} all 1 bottleneck,pretrained,scratch",),
        weights=str(tmp_path / "flat.safetensors"),
        settings=("rel_pos=axial", "inflate=center", "steps=2"),
    )
    main(study)
    text = (tmp_path / "study/table.md").read_text()
    frozen, tuned, scratch = json.loads((tmp_path / "study/table.json").read_text())
    for line in (frozen, tuned):
        start = line["origin"]["start"]
        assert start.startswith("weights from flat.safetensors")
        assert "patch_embed.proj.weight: (192, 3, 8, 8) -> (192, 1, 8, 8, 8), summed" in start
        assert "neck.*: 2-D, 256 channels -> random values" in start
        assert start in text
    assert scratch["origin"]["start"] == "tiny: random initialisation"
    assert text.count("### ") == 3
    assert "2 steps; fold 0" in frozen["origin"]["training"]
    costs = [line["cost"] for line in (frozen, tuned, scratch)]
    assert costs[0]["trained_parameters"] < costs[1]["trained_parameters"]
    assert costs[1]["trained_parameters"] == costs[1]["parameters"] == costs[2]["parameters"]
    name = "blocks.3.attn.qkv.weight"
    kept = [
        torch.equal(read(path)[0][f"encoder.{name}"], flat[name])
        for arm in ("bottleneck", "pretrained")
        for path in runs.glob(f"study/*_{arm}/last.safetensors")
    ]
    assert kept == [True, False]


@pytest.mark.slow
def test_arms_with_settings_of_their_own_are_compared_draw_by_draw(study, tmp_path):
    task = tmp_path / "boxes.yaml"
    blocks = (f"{task} all 1 scratch", f"{task} all 1 segresnet steps=2")
    main(replace(study, blocks=blocks))
    unetr, segresnet = json.loads((tmp_path / "study/table.json").read_text())
    assert (unetr["paired_draws"], segresnet["paired_draws"]) == (0, 1)
    assert segresnet["dice_gain"][0] is not None
    kept = config.load(
        finetune_unetr.Config, tmp_path / "study/boxes_all_draw0_segresnet/config.yaml"
    )
    assert (kept.model, kept.steps) == ("segresnet", 2)


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_ends_with_table_and_figure(study, tmp_path, monkeypatch):
    train, trained = finetune_unetr.main, []

    def train_three(cfg):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(cfg.name)
        return train(cfg)

    monkeypatch.setattr(finetune_unetr, "main", train_three)
    with pytest.raises(KeyboardInterrupt):
        main(study)
    partial = json.loads((tmp_path / "study/table.json").read_text())
    assert [line["draws"] for line in partial] == [2, 1]

    def train_rest(cfg):
        trained.append(cfg.name)
        return train(cfg)

    monkeypatch.setattr(finetune_unetr, "main", train_rest)
    main(study)
    main(study)
    assert len(trained) == len({*trained}) == 4
    with pytest.raises(ValueError, match=r"other values of \['lr'\]; give another out="):
        main(replace(study, settings=("lr=0.5",)))
    pretrained, scratch = json.loads((tmp_path / "study/table.json").read_text())
    assert pretrained["paired_draws"] == 2
    assert pretrained["dice_gain"][0] == pytest.approx(
        pretrained["dice"][0] - scratch["dice"][0], abs=2e-5
    )
    assert [steps for _, steps in pretrained["steps_to_scratch"]] == [4, 4]
    assert pretrained["cost"]["trained_parameters"] > 1e6
    assert "| boxes | 2 | pretrained | 2 |" in (tmp_path / "study/table.md").read_text()
    assert (tmp_path / "study/figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_arm_takes_the_rate_that_is_best_on_a_fold_that_is_not_reported(study, tmp_path):
    task = tmp_path / "boxes.yaml"
    rates = (1e-9, 1e-2)
    study = replace(
        study, blocks=(f"{task} 2 1 scratch,zero_encoder",), rates=rates, tuning_labels="2"
    )
    main(study)
    done = {path.name for path in (tmp_path / "study").iterdir() if path.is_dir()}
    arms = ("scratch", "zero_encoder")
    assert done == {
        f"boxes_2_draw0_{arm}{tried}" for arm in arms for tried in ("", "_lr1e-09", "_lr0.01")
    }

    def kept(name):
        return config.load(finetune_unetr.Config, tmp_path / "study" / name / "config.yaml")

    text = (tmp_path / "study/table.md").read_text()
    for arm in arms:
        trials = [kept(f"boxes_2_draw0_{arm}_lr{rate:g}") for rate in rates]
        assert [run.fold for run in trials] == [1, 1]
        assert tuple(run.scratch_lr for run in trials) == rates
        dice = [
            json.loads((tmp_path / f"study/boxes_2_draw0_{arm}_lr{rate:g}/scores.json").read_text())
            for rate in rates
        ]
        best = max(rates, key=lambda rate: dice[rates.index(rate)]["mean_dice"])
        reported = kept(f"boxes_2_draw0_{arm}")
        assert (reported.fold, reported.scratch_lr, reported.lr) == (0, best, best)
        shown = " | ".join(f"{100 * scores['mean_dice']:.2f}" for scores in dice)
        assert f"| boxes | {arm} | {shown} |" in text
    main(study)  # what is there is not another study's


def test_classes_are_compared_where_the_volume_holds_them_whole():
    def run_of(row, *dice):
        return {row: [Score(f"case {n}", f"person {n}", *each) for n, each in enumerate(dice)]}

    ours, twin = Row("boxes", "2", 0, "pretrained"), Row("boxes", "2", 0, "scratch")
    cut = replace(Score("case 9", "person 9", "cord", 0.1), truncated=True)
    scores = run_of(ours, ("cord", 0.9), ("cord", 0.7), ("lens", math.nan))
    baseline = run_of(twin, ("cord", 0.6), ("cord", 0.6), ("lens", math.nan))
    scores[ours].append(cut)
    gains = {ours: differences(scores[ours], [*baseline[twin], replace(cut, dice=0.9)])}
    found = transfer_study.by_class(scores, gains)
    assert (found["cord"]["cases"], found["cord"]["dice"][0]) == (2, 0.8)
    assert found["cord"]["dice_gain"][0] == pytest.approx(0.2)
    assert found["lens"] == {"cases": 0, "dice": [None] * 3, "dice_gain": [None] * 3}
    line = {"task": "boxes", "labels": "2", "arm": "pretrained", "classes": found}
    text = transfer_study.classes_shown([line])
    assert "| boxes | 2 | cord | 2 | pretrained | 80.00 (" in text
    assert "| boxes | 2 | lens | 0 | pretrained |  |  |" in text


def test_steps_are_counted_until_the_other_run_is_reached_at_its_end():
    baseline = [(100, 0.7), (200, 0.6)]  # its end counts, not its best
    rising = [(50, 0.5), (100, 0.6), (150, 0.8)]
    assert transfer_study.steps_to_reach(rising, baseline) == (100, 200)
    assert transfer_study.steps_to_reach(rising[:1], baseline) == (None, 200)


def test_arms_of_other_pretrainings_have_weights_of_their_own(runs):
    blocks = ("hippocampus 8 1 reconstruction,pretrained",)
    weights = ("reconstruction other/last.safetensors",)
    cfg = Config(blocks, weights="tiny", more_weights=weights)
    other, own = (run_config(row, cfg) for row in rows_of(cfg))
    assert (other.weights, own.weights) == (str(runs / "other/last.safetensors"), "tiny")
    assert not other.scratch
    with pytest.raises(ValueError, match=r"or give their weights by more_weights="):
        list(rows_of(replace(cfg, more_weights=())))


def test_results_stay_those_of_the_study_where_runs_lie_elsewhere(runs, tmp_path, monkeypatch):
    blocks = ("hippocampus 8 1 reconstruction",)
    cfg = Config(blocks, more_weights=("reconstruction other/last.safetensors",))
    (row,) = rows_of(cfg)
    (runs / "one").mkdir(parents=True)
    (runs / "one/config.yaml").write_text(config.dump(run_config(row, cfg)))
    kept = tmp_path / "kept/config.yaml"
    transfer_study.keep(runs / "one", kept.parent, ["config.yaml"])
    assert str(runs) not in kept.read_text()
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "elsewhere"))
    transfer_study.refuse_other(kept, run_config(row, cfg), finetune_unetr.FREE)
    changed = replace(cfg, more_weights=("reconstruction new/last.safetensors",))
    with pytest.raises(ValueError, match=r"other values of \['weights'\]"):
        transfer_study.refuse_other(kept, run_config(row, changed), finetune_unetr.FREE)


@pytest.mark.parametrize("entry", ["reconstruction", "frozen other.safetensors"])
def test_weights_of_no_arm_and_of_an_arm_that_has_some_are_refused(entry):
    with pytest.raises(ValueError, match="write it as ARM FILE, ARM none of"):
        list(rows_of(Config(("hippocampus 8 1 scratch",), more_weights=(entry,))))


@pytest.mark.parametrize(
    ("block", "remedy"),
    [
        ("hippocampus 8 pretrained", "write it as TASK LABELS DRAWS ARM,ARM"),
        ("hippocampus 8 3 pretraind", "choose among"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused(block, remedy):
    with pytest.raises(ValueError, match=remedy):
        list(rows_of(Config(blocks=(block,))))


def test_pretrained_arms_need_weights_before_anything_is_trained(tmp_path):
    study = Config(blocks=("hippocampus 8 1 scratch,pretrained",), out=str(tmp_path))
    with pytest.raises(ValueError, match="pass weights=FILE"):
        main(study)

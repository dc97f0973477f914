"""Dataclass <- YAML <- key=value."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from sammed3d_backbone import config


@dataclass(frozen=True)
class Knobs:
    name: str
    steps: int = 10
    lr: float = 1e-3
    fast: bool = False
    weights: str | None = None
    spacing: tuple[float, float, float] | None = (1.5, 1.5, 1.5)
    axes: tuple[int, ...] = ()
    model: Literal["small", "large"] = "small"
    precision: Literal["no", "bf16"] = "bf16"
    tags: tuple[str, ...] = field(default_factory=tuple)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "knobs.yaml"
    path.write_text("name: run\nlr: 1e-4\naxes: [0, 2]\n")
    return path


def test_a_file_fills_the_dataclass(file):
    knobs = config.load(Knobs, file)
    assert knobs == Knobs(name="run", lr=1e-4, axes=(0, 2))
    assert isinstance(knobs.lr, float)  # YAML 1.1 reads 1e-4 as a string


def test_the_command_line_wins(file):
    knobs = config.load(Knobs, file, ["lr=0.5", "fast=true", "spacing=null", "axes=[1]", "name=7"])
    assert knobs == Knobs(name="7", lr=0.5, fast=True, spacing=None, axes=(1,))


def test_text_from_the_command_line_stays_as_it_is(file):
    knobs = config.load(Knobs, file, ["name=010", "weights=yes"])
    assert (knobs.name, knobs.weights) == ("010", "yes")
    assert config.load(Knobs, file, ["weights=null"]).weights is None


def test_a_bare_no_is_the_word_where_that_is_a_choice(file):
    assert config.load(Knobs, file, ["precision=no"]).precision == "no"


def test_an_equals_sign_may_stand_in_the_value(file):
    assert config.load(Knobs, file, ["weights=user/repo:a=b.pth"]).weights == "user/repo:a=b.pth"


def test_what_is_dumped_is_read_back_equal(tmp_path):
    knobs = Knobs(name="1", lr=3e-4, weights=None, spacing=(1, 2, 3), tags=("a", "null"))
    path = tmp_path / "dumped.yaml"
    path.write_text(config.dump(knobs))
    assert config.load(Knobs, path) == knobs


def test_differences_name_both_values():
    assert config.differences(Knobs("a"), Knobs("a", steps=3)) == {"steps": (10, 3)}


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("stpes=3", "'steps'"),
        ("zzz=3", "zzz"),
        ("steps=many", "steps="),
        ("steps=1.5", "steps="),
        ("steps=true", "steps="),
        ("lr=fast", "lr="),
        ("lr=[1]", "lr="),
        ("fast=1", "fast="),
        ("name=null", "name="),
        ("spacing=[1, 2]", "spacing="),
        ("model=medium", "model="),
        ("steps", "key=value"),
        ("steps=[", "YAML"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(file, override, remedy):
    with pytest.raises(ValueError, match=remedy):
        config.load(Knobs, file, [override])


def test_a_missing_value_is_named(tmp_path):
    path = tmp_path / "knobs.yaml"
    path.write_text("steps: 3\n")
    with pytest.raises(ValueError, match="name"):
        config.load(Knobs, path)


def test_a_missing_file_says_what_to_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="configs"):
        config.load(Knobs, tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "remedy"), [("a: [", "YAML"), ("- a\n", "configs")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, remedy):
    path = tmp_path / "knobs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=remedy):
        config.load(Knobs, path)


def test_the_command_line_reports_in_one_line_and_leaves(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.parse(Knobs, [str(file), "stpes=3"])
    assert stopped.value.code == 2
    assert "'steps'" in capsys.readouterr().err


def test_help_lists_every_knob_with_its_default(capsys):
    with pytest.raises(SystemExit):
        config.parse(Knobs, ["--help"], description="What it does.")
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "steps: int = 10" in shown
    assert "name: str = (required)" in shown


def test_flags_are_no_knobs_and_stand_anywhere(file):
    flags = {"dry_run": "say what would happen"}
    for argv in ([str(file), "--dry-run", "steps=3"], ["--dry-run", str(file), "steps=3"]):
        assert config.parse(Knobs, argv, flags=flags) == (
            Knobs(name="run", lr=1e-4, axes=(0, 2), steps=3),
            {"dry_run": True},
        )
    assert config.parse(Knobs, [str(file)], flags=flags)[1] == {"dry_run": False}


def test_a_digest_stands_for_the_values_that_count():
    one = config.digest(Knobs("a"), leave_out=("name",))
    assert len(one) == 12
    assert one == config.digest(Knobs("b"), leave_out=("name",))
    assert one != config.digest(Knobs("a"))
    assert one != config.digest(Knobs("a", steps=11), leave_out=("name",))


def test_aliases_which_could_grow_without_end_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a [x, x]\nb: [*a, *a]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="aliases"):
        config.load(object, path)

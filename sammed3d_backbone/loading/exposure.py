"""Was a data set in the pretraining data of some weights?"""

import re
from dataclasses import dataclass
from typing import Literal

from sammed3d_backbone.loading.registry import Weights

# The Decathlon numbers its tasks; nnU-Net and MONAI name the folders after them.
_DECATHLON = {
    1: "BrainTumour",
    2: "Heart",
    3: "Liver",
    4: "Hippocampus",
    5: "Prostate",
    6: "Lung",
    7: "Pancreas",
    8: "HepaticVessel",
    9: "Spleen",
    10: "Colon",
}
# Task 1 calls itself by the series that it is made of, task 2 by what is segmented.
_DECATHLON_NAMES = {"brats": "BrainTumour", "leftatrium": "Heart"} | {
    name.lower(): name for name in _DECATHLON.values()
}
# Series whose members' names do not simply end in a year.
_SERIES = {"isles": ("ISLESSISS", "ISLESSPES"), "sega": ("SEG.A.2023",)}


@dataclass(frozen=True)
class Exposure:
    """Whether a data set was in the pretraining data of a network.

    Args:
        dataset: Name of the data set.
        verdict: "seen"; "related" for another edition of a listed series; "held out" where the
            source says so; "not listed"; "not known" where there is no list; "none" for
            random initialisation.
        sentence: Statement to print beside a score.
    """

    dataset: str
    verdict: Literal["seen", "related", "held out", "not listed", "not known", "none"]
    sentence: str

    def __str__(self) -> str:
        """The statement."""
        return self.sentence


def seen_in_pretraining(record: Weights | None, dataset_name: str) -> Exposure:
    """Whether a data set was in the pretraining data of some weights.

    Names are compared without case and punctuation; `MSD_Liver`, `Task03_Liver` and
    `Dataset003_Liver` are the same set, and a bare series such as `BraTS` stands for all of
    its editions. The Decathlon's dataset.json gives its tasks bare names such as `Liver`, so
    such a name is taken for the task.

    Args:
        record: The weights' record; None for random initialisation.
        dataset_name: The data set that a network is to be scored on.
    """
    if record is None:
        return Exposure(
            dataset_name, "none", "random initialisation: no data set was seen in pretraining"
        )
    if record.pretraining is None:
        return Exposure(
            dataset_name,
            "not known",
            f"the pretraining data of {record.name} are not known, nor whether {dataset_name} is "
            "among them",
        )
    stages = {entry.name: entry.stages for entry in record.pretraining}
    same, edition = _matches(dataset_name, tuple(stages))
    held, held_edition = _matches(dataset_name, record.held_out)
    if same:
        listed = ", ".join(f"{name} (stage {_joined(stages[name])})" for name in same)
        return Exposure(
            dataset_name,
            "seen",
            f"{dataset_name} was in the pretraining data of {record.name}: {listed}; a score "
            "on it is not a score on unseen data",
        )
    if held:
        return Exposure(
            dataset_name,
            "held out",
            f"{dataset_name} was held out of the pretraining data of {record.name} "
            f"(listed as {', '.join(held)})",
        )
    if edition or held_edition:
        listed = ", ".join((*edition, *(f"{name} (held out)" for name in held_edition)))
        return Exposure(
            dataset_name,
            "related",
            f"{dataset_name} itself is not listed in the pretraining data of {record.name}, "
            f"other editions are: {listed}; they may share cases",
        )
    rest = {
        None: "the list is incomplete",
        0: "the list is complete",
    }.get(record.undisclosed_sets, f"{record.undisclosed_sets} further sets are not public")
    return Exposure(
        dataset_name,
        "not listed",
        f"{dataset_name} is not in the published pretraining data of {record.name} ({rest})",
    )


def _joined(stages: tuple[int, ...]) -> str:
    return " and ".join(str(stage) for stage in stages)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _matches(name: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Listed names that are the same set, and those that are another edition of it."""
    plain = _plain(name)
    task = re.fullmatch(r"(?:msd)?(?:task|dataset)(\d{2,3})([a-z].*)", plain)
    if task:
        organ = _plain(_DECATHLON.get(int(task[1]), ""))
        plain = f"msd{organ}" if organ and task[2] == organ else task[2]
    exact = tuple(name for name in names if _plain(name) == plain)
    if exact:
        return exact, ()
    named = None if task else _DECATHLON_NAMES.get(plain)
    series = tuple(name for name in names if _series(name) == plain or name == f"MSD_{named}")
    if series:
        return series, ()
    return (), tuple(name for name in names if re.fullmatch(rf"{_series(name)}(v?\d.*)", plain))


def _series(name: str) -> str:
    """A dataset's name without its edition."""
    for series, members in _SERIES.items():
        if name in members:
            return series
    plain = _plain(name)
    return "msd" if plain.startswith("msd") else re.sub(r"\d+$", "", plain)

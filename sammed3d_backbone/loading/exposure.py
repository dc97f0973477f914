"""Was a data set in the pretraining data of some weights?"""

import re
from dataclasses import dataclass
from typing import Literal

from sammed3d_backbone.loading.registry import Weights

# The Decathlon numbers its tasks; nnU-Net and MONAI name the folders after them.
_TASKS = "BrainTumour Heart Liver Hippocampus Prostate Lung Pancreas HepaticVessel Spleen Colon"
_DECATHLON = dict(enumerate(_TASKS.split(), start=1))
# Task 1 calls itself by the series that it is made of, task 2 by what is segmented.
_DECATHLON_NAMES = {"brats": "BrainTumour", "leftatrium": "Heart"} | {
    name.lower(): name for name in _DECATHLON.values()
}
# Series whose members' names do not simply end in a year.
_SERIES = {"isles": ("ISLESSISS", "ISLESSPES"), "sega": ("SEG.A.2023",)}

Verdict = Literal["seen", "related", "held out", "not listed", "not known", "none"]


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
    verdict: Verdict
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
    verdict, sentence = _verdict(record, dataset_name)
    return Exposure(dataset_name, verdict, sentence)


def _verdict(record: Weights | None, dataset: str) -> tuple[Verdict, str]:
    if record is None:
        return "none", "random initialisation: no data set was seen in pretraining"
    data = f"the pretraining data of {record.name}"
    if record.pretraining is None:
        return "not known", f"{data} are not known, nor whether {dataset} is among them"
    stages = {entry.name: entry.stages for entry in record.pretraining}
    same, edition = _matches(dataset, tuple(stages))
    held, held_edition = _matches(dataset, record.held_out)
    if same:
        listed = ", ".join(
            f"{name} (stage {' and '.join(map(str, stages[name]))})" for name in same
        )
        return "seen", (
            f"{dataset} was in {data}: {listed}; a score on it is not a score on unseen data"
        )
    if held:
        return "held out", f"{dataset} was held out of {data} (listed as {', '.join(held)})"
    if edition or held_edition:
        listed = ", ".join((*edition, *(f"{name} (held out)" for name in held_edition)))
        return "related", (
            f"{dataset} itself is not listed in {data}, other editions are: {listed}; they may "
            "share cases"
        )
    undisclosed = {None: "the list is incomplete", 0: "the list is complete"}
    rest = undisclosed.get(
        record.undisclosed_sets, f"{record.undisclosed_sets} further sets are not public"
    )
    return "not listed", (
        f"{dataset} is not in the published pretraining data of {record.name} ({rest})"
    )


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

"""nnU-Net in its own environment: plan, measure, train for so many iterations, predict, evaluate.

    nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=... PYTHON trainer.py plan 1
    ... PYTHON trainer.py measure 10
    ... PYTHON trainer.py train 1200 SEED
    ... PYTHON trainer.py predict IN OUT
    ... PYTHON trainer.py evaluate REFERENCE PREDICTIONS

Needs nnU-Net and nothing of ours. Everything runs in one process on one CPU thread; each command
prints its figures as one line of JSON, the last. `nnUNet_extTrainer` names this folder.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "false"}

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

NUMBER, NAME = 1, "Dataset001_Peers"  # the one data set of the folders
CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"
EPOCHS = 40  # about, in which the learning rate falls; nnU-Net's 1,000 are of 250 iterations
CHECKPOINT = "checkpoint_final.pth"
SKIPPED = 2  # iterations that are not measured: memory is allocated in them


def cpu_seconds() -> float:
    """User and system time of this process and of the workers that it has ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class PeersTrainer(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's own training with another number of iterations, whose CPU time is measured.

    The learning rate falls to its end in about `EPOCHS` epochs. The time is that of training with
    its crops and augmentation; the one validation batch per epoch is not in it, and tells nothing.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device,
    ) -> None:  # the names are those of nnU-Net, which looks them up
        torch.set_num_threads(1)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_val_iterations_per_epoch = 1
        self.trained_cpu = 0.0
        self.step_cpu: list[float] = []
        self.logger.plot_progress_png = lambda *_: None  # a second of matplotlib per epoch

    def set_iterations(self, iterations: int) -> None:
        """Trains for at most so many iterations, in whole epochs."""
        self.num_iterations_per_epoch = max(1, round(iterations / EPOCHS))
        self.num_epochs = iterations // self.num_iterations_per_epoch

    def on_train_epoch_start(self) -> None:
        """Starts the clock."""
        super().on_train_epoch_start()
        self._began = self._stepped = cpu_seconds()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A step; its time has the making of the batch in it."""
        result: dict[str, Any] = super().train_step(batch)
        now = cpu_seconds()
        self.step_cpu.append(now - self._stepped)
        self._stepped = now
        return result

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Stops the clock."""
        self.trained_cpu += cpu_seconds() - self._began
        super().on_train_epoch_end(train_outputs)

    def save_checkpoint(self, filename: str) -> None:
        """Writes a checkpoint, except "best": it is chosen by a single batch of training cases."""
        if "best" not in Path(filename).name:
            super().save_checkpoint(filename)


def plan(memory_gb: float) -> dict[str, Any]:
    """Fingerprint, plans and preprocessed cases of the training folder."""
    os.environ.update(nnUNet_n_proc_DA="1")  # the planner sets so many threads
    planning.extract_fingerprint_dataset(NUMBER, num_processes=1, check_dataset_integrity=True)
    plans, name = planning.plan_experiment_dataset(NUMBER, gpu_memory_target_in_gb=memory_gb)
    planning.preprocess_dataset(NUMBER, name, [CONFIGURATION], num_processes=[1])
    made = plans["configurations"][CONFIGURATION]
    return {key: made[key] for key in ("patch_size", "batch_size", "spacing")}


def trained(iterations: int, seed: int, *, keep: bool = True) -> PeersTrainer:
    """A trainer after so many iterations on all cases of the folder."""
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws its crops from it)
    torch.manual_seed(seed)
    folder = Path(nnUNet_preprocessed) / NAME
    plans = json.loads((folder / f"{PLANS}.json").read_text(encoding="utf-8"))
    dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    trainer = PeersTrainer(
        {**plans, "continue_training": False}, CONFIGURATION, "all", dataset, torch.device("cpu")
    )
    trainer.disable_checkpointing = not keep
    trainer.set_iterations(iterations)
    trainer.run_training()
    return trainer


def measure(iterations: int) -> dict[str, Any]:
    """CPU seconds of an iteration, from a few."""
    steps = trained(iterations, 0, keep=False).step_cpu[SKIPPED:]
    return {"step_cpu_seconds": float(np.mean(steps)), "measured": len(steps)}


def train(iterations: int, seed: int) -> dict[str, Any]:
    """Trains, and returns the cost."""
    trainer = trained(iterations, seed)
    return {
        "iterations": len(trainer.step_cpu),
        "cpu_seconds": trainer.trained_cpu,
        "learning_rate_end": trainer.optimizer.param_groups[0]["lr"],
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "folder": str(trainer.output_folder_base),
    }


def predict(source: Path, target: Path) -> dict[str, Any]:
    """Predicts every scan of a folder without mirroring, case by case.

    The time is that of the cases, with reading and writing.
    """
    torch.set_num_threads(1)
    model = Path(nnUNet_results) / NAME
    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    (folder,) = model.glob(f"PeersTrainer__*__{CONFIGURATION}")
    predictor.initialize_from_trained_model_folder(str(folder), ("all",), CHECKPOINT)
    target.mkdir(parents=True, exist_ok=True)
    before, clock = cpu_seconds(), time.monotonic()
    scans = sorted(source.glob("*_0000.nii.gz"))
    for scan in scans:
        name = scan.name.removesuffix("_0000.nii.gz")
        predictor.predict_from_files_sequential([[str(scan)]], [str(target / name)])
    used, took = cpu_seconds() - before, time.monotonic() - clock
    return {"cases": len(scans), "cpu_seconds": used, "seconds": took}


def evaluate(reference: Path, predictions: Path) -> dict[str, Any]:
    """nnU-Net's own Dice: case -> value of the class -> Dice, NaN as null."""
    about = json.loads((reference.parent / "dataset.json").read_text(encoding="utf-8"))
    values = sorted(value for value in about["labels"].values() if value)
    found = {}
    for path in sorted(predictions.glob("*.nii.gz")):
        scores = compute_metrics(str(reference / path.name), str(path), SimpleITKIO(), values)
        dice = {value: float(scores["metrics"][value]["Dice"]) for value in values}
        found[path.name] = {k: None if np.isnan(v) else v for k, v in dice.items()}
    return found


def main() -> None:
    """Runs the command of the command line."""
    command, *words = sys.argv[1:]
    if command == "plan":
        figures = plan(float(words[0]))
    elif command == "measure":
        figures = measure(int(words[0]))
    elif command == "train":
        figures = train(int(words[0]), int(words[1]))
    elif command == "predict":
        figures = predict(Path(words[0]), Path(words[1]))
    elif command == "evaluate":
        figures = evaluate(Path(words[0]), Path(words[1]))
    else:
        sys.exit(f"{command} is not a command:{__doc__}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

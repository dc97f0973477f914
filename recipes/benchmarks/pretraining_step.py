"""CPU seconds of a step of the click pretraining, and of its parts, on one thread.

    python recipes/benchmarks/pretraining_step.py      # measures, writes pretraining_step.json

One synthetic crop with 8 objects and two clicks on each, forward and backward, without the
optimiser, for every size of ours, in float32 and with the encoder in bfloat16; then the parts, and
the step of a configuration in full. The smallest of several runs counts, which is what a busy
machine disturbs least; CPU seconds are those of the process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sammed3d_backbone.recipes import pretrain_promptable
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone import config, sam
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_cells import next_points, shares_of_cells
from sammed3d_backbone.pretraining.click_loss import Interaction
from sammed3d_backbone.pretraining.object_crops import Curriculum, ObjectStream, SyntheticSource
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.training import optim

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs/pretrain/tiny.yaml"
VARIANTS = ("tiny", "nano")
OBJECTS, CLICKS = 8, 2
RUNS = 5


def main() -> None:
    """Measures everything and writes the file."""
    torch.set_num_threads(1)
    stream = ObjectStream(
        [SyntheticSource()],
        [1.0],
        64,
        Curriculum((300, 300), (10, 10), 0),
        objects=OBJECTS,
        steps=CLICKS,
        samples=RUNS,
        seed=(0,),
        augment=pretrain_promptable.augmentation(),
        classes=6,
    )
    crop = {key: value.unsqueeze(0) for key, value in stream[0].items()}
    figures: dict[str, object] = {"crop": smallest(lambda: stream[0])}
    for name in tqdm(VARIANTS):
        network = sam(name, pretrained=False, rel_pos="axial")
        figures[name] = {
            precision: parts(network, crop, precision) for precision in ("float32", "bfloat16")
        }
    figures["tiny.yaml"] = whole_step(crop)
    about = {"objects": OBJECTS, "clicks": CLICKS, "cpu_seconds": figures, **provenance(HERE)}
    (HERE / "pretraining_step.json").write_text(json.dumps(about, indent=1) + "\n")


def parts(network: Sam3D, crop: dict[str, Tensor], precision: str) -> dict[str, float]:
    """CPU seconds of a step with two clicks, and of what it consists of."""
    interaction = Interaction(network)
    image, objects, draws, plan = (crop[key] for key in ("image", "objects", "draws", "plan"))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")

    def whole() -> None:
        with autocast:
            loss, _ = interaction(image, objects, draws, plan)
        loss.backward()

    def encoder() -> None:
        with autocast:
            encoding = network.encode(image)
        sum(t.float().mean() for t in (encoding.embedding, *encoding.maps)).backward()

    with torch.no_grad(), autocast:
        encoding = network.encode(image)
    truth = objects[0]
    share = shares_of_cells(truth, network.prompt_encoder.mask_size)
    mask = torch.zeros_like(share, dtype=torch.bool)

    def click() -> None:
        with autocast:
            loss, _ = interaction.on_encoding(encoding, objects, draws[:, :1], plan[:, :1])
        loss.backward()

    def click_without_gradient() -> None:
        with torch.no_grad(), autocast:
            interaction.on_encoding(encoding, objects, draws[:, :1], plan[:, :1])

    found = {
        "step": smallest(whole),
        "encoder": smallest(encoder),
        "a click on all objects": smallest(click),
        "the same without gradient": smallest(click_without_gradient),
        "next points": smallest(lambda: next_points(truth, share, mask, draws[0, 0], 0.5)),
    }
    network.zero_grad()
    return found


def whole_step(crop: dict[str, Tensor]) -> dict[str, float]:
    """CPU seconds of a step of the configuration: its crops, losses and optimiser."""
    cfg = config.load(pretrain_promptable.Config, CONFIG, [])
    network = pretrain_promptable.make_network(cfg, cfg.variant, warm_up=False, say=print)
    objective = pretrain_promptable.make_objective(cfg, network)
    repeats = -(-cfg.objects // OBJECTS)
    batch = {key: torch.cat([value] * cfg.batch) for key, value in crop.items()}
    batch["objects"] = batch["objects"].repeat(1, repeats, 1, 1, 1)[:, : cfg.objects]
    batch["draws"] = torch.rand(cfg.batch, cfg.interactions, cfg.objects, 3)
    named = nn.ModuleDict(dict(network.named_children()))
    optimizer = optim.part_scaled(named, dict.fromkeys(named, 1.0), name=cfg.optimizer)

    def losses() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.mixed_precision == "bf16"):
            loss, _ = objective(batch)
        loss.backward()

    step, optimiser = smallest(losses), smallest(optimizer.step)
    # The plan is drawn for every step: here with a loss after the first, third and seventh click.
    batch["plan"] = torch.tensor([[1, 0, 1, 0, 0, 0, 1]] * cfg.batch)
    clicks = cfg.batch * cfg.objects * batch["plan"].shape[1]
    return {
        "losses": step,
        "optimiser": optimiser,
        "clicks": clicks,
        "losses and optimiser for each click of an object": round((step + optimiser) / clicks, 4),
    }


def smallest(run: Callable[[], object]) -> float:
    """The fewest CPU seconds of several runs."""
    taken = []
    for _ in range(RUNS):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return round(min(taken), 4)


if __name__ == "__main__":
    main()

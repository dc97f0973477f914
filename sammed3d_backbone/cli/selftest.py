"""The command `sammed3d selftest`: compares this machine with outputs of the reference."""

import argparse
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.weights import MARKS, Finding, hash_finding, opened_weights

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands


def add_selftest(commands: "Commands") -> None:
    """Declares `sammed3d selftest`."""
    parser = commands.add_parser(
        "selftest",
        help="compare this machine with committed outputs of the reference",
        description="Needs no weights and no internet access. Exit code 1: a check failed.",
    )
    parser.add_argument("--weights", metavar="NAME|FILE", help="also check these weights")
    parser.set_defaults(run=_run_selftest)


def _run_selftest(args: argparse.Namespace) -> int:
    import torch

    from sammed3d_backbone import selftest

    verdicts: list[bool | None] = []
    worst = 0.0
    for check in selftest.run():
        print(f"{MARKS[check.is_right]}  {check.case}: {check.tensor}, error {check.error:.1e}")
        verdicts.append(check.is_right)
        worst = max(worst, check.error)
    for is_right, sentence in _weights_findings(args.weights) if args.weights else ():
        print(f"{MARKS[is_right]}  {sentence}")
        verdicts.append(is_right)
    failed = sum(verdict is False for verdict in verdicts)
    says = f"{failed} checks failed" if failed else "this machine computes what the reference does"
    print(
        f"{says}: worst relative error {worst:.1e}, allowed {selftest.TOLERANCE:.0e}, "
        f"torch {torch.__version__}"
    )
    return int(failed > 0)


def _weights_findings(weights: str) -> list[Finding]:
    """Checks that weights are listed, load strictly and give finite outputs."""
    import torch

    from sammed3d_backbone import encoder, sam
    from sammed3d_backbone.loading.checkpoint import OTHER_PARTS, CheckpointError
    from sammed3d_backbone.loading.opening import CARD_KEY
    from sammed3d_backbone.models.sam import Sam3D
    from sammed3d_backbone.selftest import phantom

    record, tensors, metadata = opened_weights(weights)
    if CARD_KEY in metadata:
        raise ValueError(f"{weights} is a fine-tuned model; check it with `sammed3d verify`")
    if record.variant is None:
        raise ValueError(f"{weights} has sizes that fit no known variant; see `sammed3d verify`")
    findings = [hash_finding(record)]
    build = sam if any(name.startswith(OTHER_PARTS) for name in tensors) else encoder
    try:
        network = build(record.variant, weights=weights).eval()
    except CheckpointError as error:
        return [*findings, (False, str(error))]
    findings.append((True, f"all {len(network.state_dict())} tensors of the weights load strictly"))
    volume = phantom(network.img_size)
    click = torch.tensor([[[n // 2 for n in network.img_size]]]), torch.ones(1, 1)
    with torch.inference_mode():
        answer = network(volume, click) if isinstance(network, Sam3D) else network(volume)
    what = "mask logits of a click" if build is sam else "image embedding"
    is_finite = bool(torch.isfinite(answer).all())
    return [*findings, (is_finite, f"{what} on a phantom: {'' if is_finite else 'not '}finite")]

"""Networks as files that run without this package: ONNX, and PyTorch's own exported programs.

The file is run before it is called done, since exporters may write wrong numbers without a word.
The batch is free, the size of the input is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sammed3d_backbone.files import atomic_path

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4  # largest difference, as a share of the largest output
EXAMPLE_BATCH = 2  # with 1, exporters take the batch for fixed
CHECKED_BATCHES = (1, 3)
Run = Callable[[Tensor], Tensor]


def require_export_name(path: Path) -> None:
    """Refuses a name that says no format, and ONNX where its libraries are missing.

    Raises:
        ValueError: If the name does not end in .onnx or .pt2, or a library is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{path} needs {error.name}; pip install 'sammed3d-backbone[onnx]'"
            ) from None


def export(
    network: nn.Module,
    path: Path,
    shape: Sequence[int],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> float:
    """Writes a network, runs the file on random input, and returns the largest difference.

    Args:
        network: Is set to evaluation mode; on the CPU.
        path: Ends in .onnx or .pt2.
        shape: Shape of one input, (C, X, Y, Z); outputs are one tensor.
        metadata: Text by name, kept in the file.
        overwrite: Whether to replace an existing file.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        FileExistsError: If the file exists and is not to be overwritten.
        ValueError: If the file's numbers differ from the network's; no file is left then.
    """
    network.eval()
    with torch.no_grad():
        program = torch.export.export(
            network,
            (torch.randn(EXAMPLE_BATCH, *shape),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names folders of this machine
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, overwrite=overwrite) as draft:
            write, opened = {".onnx": (_to_onnx, _opened_onnx), ".pt2": (_to_pt2, _opened_pt2)}[
                path.suffix
            ]
            write(program, draft, metadata)
            run = opened(draft)
            difference = max(_difference(network, run, n, shape) for n in CHECKED_BATCHES)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{path} is not written: its outputs differ by {difference:.2g} of the largest "
                    f"from the network's, {TOLERANCE:g} is allowed; try another version of torch "
                    "and onnxscript, or the other format"
                )
    return difference


def _difference(network: nn.Module, run: Run, batch: int, shape: Sequence[int]) -> float:
    x = torch.randn(batch, *shape)
    expected = network(x)
    return float((run(x) - expected).abs().max() / expected.abs().max())


def _to_pt2(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    torch.export.save(program, path, extra_files=dict(metadata))


def _opened_pt2(path: Path) -> Run:
    module: Run = torch.export.load(path).module()
    return module


def _to_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]
) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["output"],
    )
    assert written is not None  # as no file was named
    written.model.metadata_props.update(metadata)
    written.save(path)


def _opened_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])

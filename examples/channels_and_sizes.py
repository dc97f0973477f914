"""The encoder on data that do not look like its pretraining: more channels, other sizes.

python examples/channels_and_sizes.py
"""

import torch

from sammed3d_backbone import encoder


def show(what, network, scan):
    """One line per case: what goes in, what comes out."""
    with torch.inference_mode():
        embedding = network(scan)
    print(f"{what:42} {tuple(scan.shape)} -> {tuple(embedding.shape)}")


torch.manual_seed(0)

# Several sequences of one patient. Weights of one channel are repeated and divided, so that four
# equal channels give what the single one gave.
show("four channels", encoder("tiny", in_chans=4), torch.randn(1, 4, 64, 64, 64))

# A larger cube, chosen when building or later: the position table is resampled trilinearly.
network = encoder("tiny", img_size=80)
show("a larger cube", network, torch.randn(1, 1, 80, 80, 80))
network.set_input_size(72)
show("another cube, same network", network, torch.randn(1, 1, 72, 72, 72))

# A thin slab is padded to a cube, or goes through the correct per-axis positions, which the
# released weights were not trained with: fine-tune them, or train from scratch.
slab = torch.randn(1, 1, 64, 64, 24)
try:
    encoder("tiny", pretrained=False, img_size=(64, 64, 24))
except ValueError as error:
    print(f"released positions: {error}")
axial = encoder("tiny", pretrained=False, img_size=(64, 64, 24), rel_pos="axial")
show("a slab, axial positions", axial, slab)

# Less memory while training, the same gradients.
axial.set_grad_checkpointing()
axial(slab).square().mean().backward()

"""A UNETR on the encoder, built and trained for one step.

python examples/unetr_in_six_lines.py
"""

import torch
from monai.losses import DiceCELoss

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.unetr import unetr

torch.manual_seed(0)
scan = torch.randn(1, 1, 64, 64, 64)  # (B, C, X, Y, Z)
labels = (scan > 1).long()  # (B, 1, X, Y, Z), class 0 is background

backbone = encoder("tiny")  # or encoder(), the released network, for 128³ crops
network = unetr(backbone, out_channels=2)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
loss = DiceCELoss(to_onehot_y=True, softmax=True)(network(scan), labels)
loss.backward()
optimizer.step()

weights = sum(parameter.numel() for parameter in network.parameters())
print(f"{weights / 1e6:.1f} M parameters, loss {loss:.3f} before the step")

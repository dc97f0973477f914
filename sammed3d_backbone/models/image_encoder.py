"""The image encoder: patches -> transformer blocks -> neck.

Input: a normalised volume (B, C, X, Y, Z). Output: the neck's map for the mask decoder
(`forward`), or the token maps of any blocks for a segmentation decoder (`forward_intermediates`).
Array axes 0, 1, 2 of a volume are X, Y, Z; after reorientation they run towards R, A, S. The
names `rel_pos_d`, `rel_pos_h`, `rel_pos_w` are fixed by the checkpoint and belong to them in
this order. Letters: E token width, F neck width, x, y, z tokens per axis.

Reading weights, resampling volumes and downloads happen elsewhere.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sammed3d_backbone.models.attention import Attention, Grid, RelPos
from sammed3d_backbone.models.layers import LayerNorm3d, MLPBlock


class PatchConv(nn.Conv3d):
    """A convolution whose stride equals its kernel, as one matrix product: much faster on CPUs.

    Shapes:
        x: (B, C, X, Y, Z).
        returns: (B, E, x, y, z).
    """

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        patches = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, p))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, x, y, z, C * p**3)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(4, 1)


class PatchEmbed(nn.Module):
    """Cuts a volume into cubes and projects each to one token.

    Shapes:
        x: (B, C, X, Y, Z).
        returns: (B, x, y, z, E).
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.movedim(1, 4)


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual.

    Shapes:
        x: (B, x, y, z, E).
        returns: the same.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        window_size: int,
        table_grid: Grid,
        rel_pos: RelPos,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(
            embed_dim, num_heads, window_size=window_size, table_grid=table_grid, rel_pos=rel_pos
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLPBlock(embed_dim, int(embed_dim * mlp_ratio))
        self.drop_path: nn.Module = nn.Identity()
        if drop_path:
            from timm.layers import DropPath  # loads all of timm and torchvision

            self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class ImageEncoder3D(nn.Module):
    """Vision transformer over 3-D patches, with the released network's parameter names.

    Args:
        img_size: Input side in voxels: one number for a cube, or three (axial positions only).
        patch_size: Side of a cubic patch in voxels.
        embed_dim: Token width E.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        global_attn_indexes: Blocks that attend over the whole grid; the others over windows.
        window_size: Side of a window in tokens.
        out_chans: Width F of the neck's map.
        mlp_ratio: Hidden width of the MLPs over E.
        in_chans: Input channels C.
        rel_pos: "sammed3d", as the public weights were trained, cubes only; or "axial", the
            correct per-axis form, any box, for training from scratch or with fine-tuning.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.

    Attributes:
        pretrained_cfg: Record of the weights (`loading.registry.Weights`); None without.
        load_report: What loading did (`loading.fitting.LoadReport`); None without weights.
        channel_gains: Share of each input channel in the first layer, if it was given.

    Shapes:
        x: (B, C, X, Y, Z), the three sides equal to `img_size`.
        returns: (B, F, x, y, z).

    Raises:
        ValueError: If sizes contradict each other, or rel_pos="sammed3d" meets a non-cubic input.

    Source:
        github.com/uni-medical/SAM-Med3D, segment_anything/modeling/image_encoder3D.py at f3de1fa.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: Sequence[int],
        window_size: int = 14,
        out_chans: int = 384,
        mlp_ratio: float = 4.0,
        in_chans: int = 1,
        rel_pos: RelPos = "sammed3d",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if rel_pos not in ("sammed3d", "axial"):
            raise ValueError(f"rel_pos={rel_pos!r} is unknown; use 'sammed3d' or 'axial'")
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} does not split into {num_heads} heads; "
                f"make embed_dim a multiple of num_heads"
            )
        _require_patch(patch_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.in_chans = in_chans
        self.out_chans = out_chans
        self.num_heads = num_heads
        self.rel_pos: RelPos = rel_pos
        self.img_size = self._checked_size(img_size)
        self.grad_checkpointing = False
        self.pretrained_cfg: Any = None
        self.load_report: Any = None
        self.channel_gains: tuple[float, ...] | None = None
        grid = self.grid
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                window_size=0 if i in global_attn_indexes else window_size,
                table_grid=grid,
                rel_pos=rel_pos,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.neck: nn.Module = nn.Sequential(
            nn.Conv3d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm3d(out_chans),
            nn.Conv3d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm3d(out_chans),
        )
        self.feature_info = [
            {
                "num_chs": embed_dim,
                "num_chs_norm": out_chans,
                "reduction": patch_size,
                "module": f"blocks.{i}",
            }
            for i in range(depth)
        ]

    @property
    def grid(self) -> Grid:
        """Tokens per axis of the input it is set to."""
        x, y, z = (n // self.patch_size for n in self.img_size)
        return x, y, z

    @property
    def num_features(self) -> int:
        """Channels of the map that `forward` returns, by timm's name."""
        return self.out_chans

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The neck's map, as in timm's SAM encoder.

        Shapes:
            x: (B, C, X, Y, Z).
            returns: (B, F, x, y, z).
        """
        final: Tensor = self.forward_intermediates(x, 1)[0]
        return final

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:  # noqa: ANN401 (a tuple, or a list with intermediates_only=True)
        """Token maps after chosen blocks, with timm's arguments.

        Args:
            indices: Block numbers from 0 (negative ones count from the end), a number n for the
                last n blocks, or None for all.
            norm: Pass each map through the neck, as timm's SAM encoder does; there is no other
                norm after the blocks. Maps then have F channels.
            stop_early: Skip the blocks behind the last chosen one; implied by
                `intermediates_only`, since nothing reads them.
            output_fmt: Only "NCHW", timm's word for channels before the spatial axes.
            intermediates_only: Leave out the neck's map.

        Shapes:
            x: (B, C, X, Y, Z).
            returns: (B, F, x, y, z) and a list of (B, E, x, y, z), the raw residual stream, in
                the order of the blocks; or the list alone.

        Raises:
            ValueError: If the volume does not fit `img_size`, or an index is out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported")
        wanted = self._block_indices(indices)
        self._check_input(x)
        x = self.patch_embed(x) + self.pos_embed  # (B, x, y, z, E)
        last = max(wanted) + 1 if stop_early or intermediates_only else self.depth
        maps = []
        for i, block in enumerate(self.blocks[:last]):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in wanted:
                tokens = x.movedim(4, 1)  # (B, E, x, y, z)
                maps.append(self.neck(tokens) if norm else tokens)
        if intermediates_only:
            return maps
        return self.neck(x.movedim(4, 1)), maps

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Makes the encoder take volumes of another size.

        The position table is resampled trilinearly; relative tables stay as stored and are
        interpolated in `forward`, as in the reference.

        Args:
            img_size: Side in voxels, or three of them (axial positions only).

        Raises:
            ValueError: If the size is not a multiple of the patch, or not a cube with
                rel_pos="sammed3d".
        """
        self.img_size = self._checked_size(img_size)
        table = resample_pos_embed(self.pos_embed.detach(), self.grid)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def set_patch_size(self, patch_size: int) -> None:
        """Makes the encoder cut patches of another side, and as many of them as before.

        The input's sides change with the patch; `set_input_size` gives them back for another
        number of tokens. The filter is resampled, see `resample_patch_filter`.

        Args:
            patch_size: Side of a cubic patch in voxels.

        Raises:
            ValueError: If it is not positive.
        """
        _require_patch(patch_size)
        x, y, z = self.grid
        proj = self.patch_embed.proj
        filters = resample_patch_filter(proj.weight.detach(), patch_size)
        proj.weight = nn.Parameter(filters, requires_grad=proj.weight.requires_grad)
        proj.kernel_size = proj.stride = (patch_size, patch_size, patch_size)
        self.patch_size = patch_size
        self.img_size = (x * patch_size, y * patch_size, z * patch_size)
        self.feature_info = [{**info, "reduction": patch_size} for info in self.feature_info]

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,  # noqa: ARG002 (timm's)
    ) -> list[int]:
        """Removes what `forward_intermediates` with these indices does not need, as in timm.

        A module without gradient stalls multi-process training, so an adapter calls this once.

        Args:
            indices: Blocks that stay readable; the blocks behind the last of them are removed.
            prune_norm: Replace the neck by `nn.Identity()`, so that `forward` returns the map of
                the last block.
            prune_head: Ignored, there is no classifier head.

        Returns:
            The indices as block numbers from 0.
        """
        wanted = sorted(self._block_indices(indices))
        self.blocks = self.blocks[: wanted[-1] + 1]
        self.feature_info = self.feature_info[: wanted[-1] + 1]
        if prune_norm:
            self.neck = nn.Identity()
            self.out_chans = self.embed_dim
            self.feature_info = [{**i, "num_chs_norm": self.embed_dim} for i in self.feature_info]
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are recomputed in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables, to which weight decay is not applied."""
        tables = ("rel_pos_d", "rel_pos_h", "rel_pos_w")
        names = {name for name, _ in self.named_parameters() if name.endswith(tables)}
        return names | {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters by depth, for layer-wise learning rates.

        Args:
            coarse: One group for all blocks instead of one per block.
        """
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": r"^blocks" if coarse else [(r"^blocks\.(\d+)", None)],
            "neck": r"^neck",
        }

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        """Chosen blocks as numbers from 0."""
        if indices is None:
            return set(range(self.depth))
        if not isinstance(indices, Iterable):
            if not 1 <= indices <= self.depth:
                raise ValueError(
                    f"indices={indices}: expected a number of last blocks, 1 to {self.depth}, or a "
                    "list of block numbers"
                )
            return set(range(self.depth - int(indices), self.depth))
        chosen = [int(i) for i in indices]
        if not chosen or any(not -self.depth <= i < self.depth for i in chosen):
            raise ValueError(
                f"indices={chosen}: expected block numbers from {-self.depth} to {self.depth - 1}"
            )
        return {i % self.depth for i in chosen}

    def _checked_size(self, img_size: int | Sequence[int]) -> Grid:
        """The input size as three sides."""
        given = list(img_size) if isinstance(img_size, Iterable) else [img_size] * 3
        try:
            sides = tuple(int(n) for n in given)
        except (TypeError, ValueError, OverflowError):
            sides = ()
        if len(sides) != 3 or min(sides) < 1:
            raise ValueError(
                f"img_size={img_size!r} is not valid; expected one side in voxels, or three"
            )
        p = self.patch_size
        if any(n % p for n in sides):
            fit = tuple(-(-n // p) * p for n in sides)
            raise ValueError(
                f"img_size={sides} does not split into {p}-voxel patches; use {fit} and pad to it"
            )
        if self.rel_pos == "sammed3d" and len(set(sides)) > 1:
            raise ValueError(
                f"img_size={sides} is not a cube, and rel_pos='sammed3d' exists on cubes "
                f"only; pad the volume to {(max(sides),) * 3}, or use rel_pos='axial', which takes "
                f"any box but needs fine-tuning"
            )
        return sides[0], sides[1], sides[2]

    def _check_input(self, x: Tensor) -> None:
        """Refuses volumes that the position table does not fit, naming the way out."""
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor (B, {self.in_chans}, X, Y, Z), got {type(x)}")
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input of shape {tuple(x.shape)} is not (B, {self.in_chans}, X, Y, Z); "
                f"add the missing axes, or build the encoder with in_chans= your channels"
            )
        sides = tuple(x.shape[2:])
        if sides != self.img_size:
            size = self._checked_size(sides)
            raise ValueError(
                f"volume of {sides} voxels, but the encoder is set to {self.img_size}; "
                f"crop or pad it, or call set_input_size({size}) once"
            )


def _require_patch(patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size}: expected a side in voxels, 1 or more")


def resample_patch_filter(filters: Tensor, patch_size: int) -> Tensor:
    """Filters for patches of another side, which answer to a resampled patch as these to the patch.

    For larger patches the answer is exactly the same. For smaller ones, which have lost something,
    it is as near as can be in the mean square over patches of white noise.

    Source: Beyer et al., FlexiViT: one model for all patch sizes, CVPR 2023: the pseudo-inverse
        of the resampling. Trilinear resampling is one matrix per axis, and so is its inverse.

    Shapes:
        filters: (E, C, p, p, p).
        returns: (E, C, q, q, q), q = `patch_size`.
    """
    if filters.shape[-1] == patch_size:
        return filters.clone()
    units = torch.eye(filters.shape[-1], dtype=torch.float64, device=filters.device)
    resampling = F.interpolate(units[None], size=patch_size, mode="linear")[0]  # (p, q)
    inverse = torch.linalg.pinv(resampling)  # (q, p)
    axes = "ecxyz,ax,by,dz->ecabd"
    resampled = torch.einsum(axes, filters.double(), inverse, inverse, inverse)
    return resampled.to(filters.dtype).contiguous()


def resample_pos_embed(table: Tensor, grid: Grid) -> Tensor:
    """A position table on another token grid, trilinear between token centres.

    Shapes:
        table: (1, x, y, z, E).
        returns: (1, *grid, E).
    """
    if tuple(table.shape[1:4]) == grid:
        return table.clone()
    channels_first = table.movedim(-1, 1).float()  # (1, E, x, y, z)
    resampled = F.interpolate(channels_first, size=grid, mode="trilinear", align_corners=False)
    return resampled.movedim(1, -1).to(table.dtype).contiguous()

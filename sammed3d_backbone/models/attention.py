"""Attention over a 3-D token grid, whole or in windows, with SAM-Med3D's or axial positions.

Input: normalised tokens (B, X, Y, Z, E). Output: the same shape after attention and output
projection. Letters used here: B batch, E token width, A heads, C width of one head, N tokens of
a window, S side of a window, and for the *real* extents of one window (x, y, z).

**Two forms of relative position.** With q(i) the unscaled query at grid position i = (d, h, w) and
a key at (kd, kh, kw), the bias added to the logit is

    axial     q(d,h,w)·Rd[d,kd] + q(d,h,w)·Rh[h,kh] + q(d,h,w)·Rw[w,kw]
    sammed3d  q(d,h,w)·Rd[d,kw] + q(d,h,kd)·Rh[h,kw] + q(d,h,kh)·Rw[kh,kw]

where R.[i,j] is row i - j + S - 1 of the axis's table. The axial form is what the paper's text
describes. The form "sammed3d" is what the public code computes, because each term is broadcast with
one index too few; every public weight was trained with it, so it is the default. It reads other
queries along the last axis and exists on cubic grids only.

**Windows without padding.** The reference pads the grid with zeros to whole windows before the
qkv projection and does not mask them, so padded positions take softmax mass. They all share one
query, key and value: the parts (b_q, b_k, b_v) of the qkv bias. Hence attention over the padded
window equals attention over the real keys plus *one* key with value b_v, whose logit is the
log-sum-exp of all padded logits. With

    T[i,kw]  = q(i)·Rd[d,kw]
    U[kd,kw] = q(d,h,kd)·Rh[h,kw]     (the query is b_q where kd >= z: it is read along axis 2)
    V[kh,kw] = q(d,h,kh)·Rw[kh,kw]    (likewise where kh >= z)

the logits of row i factorise over (kd, kh) for a fixed kw, and so does the sum over the padded
part. A key is padded if kd >= x or kh >= y or kw >= z, so with sums over kd, kh in 0..S-1

    kw <  z:  M = (sum_{kd>=x} e^U)(sum_kh e^V) + (sum_{kd<x} e^U)(sum_{kh>=y} e^V)
    kw >= z:  M = (sum_kd e^U)(sum_kh e^V)
    logit of the extra key = log sum_kw e^{T[i,kw]} M[d,h,kw]

All terms are positive: computed with logsumexp and logaddexp nothing cancels. The key part b_k
of the bias adds q(i)·b_k to every logit of row i, padded or not, and drops out of the softmax;
it is left out everywhere. The textbook form on the padded window is in the tests.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RelPos = Literal["sammed3d", "axial"]
Grid = tuple[int, int, int]  # tokens per axis
CACHED_LOGITS = 2**18  # attention logits of a group of heads that a CPU works on at once


class Projection(nn.Linear):
    """Tokens -> queries, keys and values, without the key part of the bias.

    That part changes no output, so its gradient is 0. Summed up in floats it would be noise, which
    an optimiser that scales gradients by their size makes as large as any step. A module of its
    own, so that what wraps linear layers (LoRA) finds one.

    Shapes:
        x: (..., E).
        returns: (..., 3 E).
    """

    def forward(self, x: Tensor) -> Tensor:
        q_bias, k_bias, v_bias = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([q_bias, torch.zeros_like(k_bias), v_bias]))


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, on the grid or on windows of it.

    Args:
        embed_dim: Token width E.
        num_heads: Number of heads A.
        window_size: Side of a window in tokens, or 0 for the whole grid.
        table_grid: Tokens per axis for which the relative tables are made: a table has
            2 * n - 1 rows. Ignored with windows, whose tables have 2 * `window_size` - 1 rows.
        rel_pos: "sammed3d" or "axial"; see the module's text.

    Shapes:
        x: (B, X, Y, Z, E).
        returns: the same.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window_size: int,
        table_grid: Grid,
        rel_pos: RelPos,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.rel_pos = rel_pos
        head_dim = embed_dim // num_heads
        self.scale = head_dim**-0.5
        self.qkv = Projection(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        if window_size:
            table_grid = (window_size, window_size, window_size)
        # The letters d, h, w are the checkpoint's names for the array axes 0, 1, 2.
        self.rel_pos_d = nn.Parameter(torch.zeros(2 * table_grid[0] - 1, head_dim))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_grid[1] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_grid[2] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        side = self.window_size or max(x.shape[1:4])
        slabs = []
        for slab in x.split(side, dim=1):
            bars = []
            for bar in slab.split(side, dim=2):
                windows = [self._attend(window) for window in bar.split(side, dim=3)]
                bars.append(torch.cat(windows, dim=3))
            slabs.append(torch.cat(bars, dim=2))
        return torch.cat(slabs, dim=1)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention inside one window, or inside the grid where that is the window.

        Shapes:
            x: (B, x, y, z, E), real tokens only; an extent below S means padding behind it.
            returns: the same.
        """
        grid = (x.shape[1], x.shape[2], x.shape[3])
        pad_q, pad_v = self._padding(x) if self._is_padded(grid) else (None, None)
        q, k, v = self._projected(x.flatten(1, 3))  # (B * A, N, C)
        terms = self._axial(q, grid) if self.rel_pos == "axial" else self._sammed3d(q, pad_q, grid)
        if pad_v is not None:
            k, v = F.pad(k, (0, 0, 0, 1)), torch.cat([v, pad_v], dim=1)  # (Z, N + 1, C)
        # Terms that differ between queries join the matrix product as extra columns, whose keys are
        # indicators.
        q = torch.cat([q, terms.queries], dim=-1)
        # A sum, since PyTorch's legacy ONNX exporter would keep the batch of an expanded tensor.
        k = F.pad(k * self.scale, (0, terms.keys.shape[1])) + F.pad(terms.keys, (k.shape[2], 0))
        out = _attend_by_heads(q, k, v, terms.lines)  # (Z, N, C)
        out = out.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)  # (B, N, E)
        projected: Tensor = self.proj(out).unflatten(1, grid)
        return projected

    def _is_padded(self, grid: Grid) -> bool:
        """Whether padded positions take part in a window with these real extents."""
        return self.rel_pos == "sammed3d" and min(grid) < (self.window_size or grid[0])

    def _projected(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head.

        Shapes:
            tokens: (B, N, E).
            returns: (B * A, N, C) three times.
        """
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, A, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        return q, k, v

    def _padding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The query and the value that all padded positions share, by head.

        They are read through the module and not from its bias, so that hooks and adapters on it
        (LoRA, IA3, offloading) act on them, too.

        Shapes:
            x: (B, x, y, z, E).
            returns: (B * A, 1, C) twice.
        """
        # A product, since PyTorch's legacy ONNX exporter would keep the batch of new zeros.
        q, _, v = self._projected(x.detach()[:, 0, 0, :1] * 0)
        return q, v

    def _sammed3d(self, q: Tensor, pad_q: Tensor | None, grid: Grid) -> "Terms":
        """SAM-Med3D's relative positions and, where the window is padded, the extra key's logit.

        Faithful: the mis-broadcast axes and the unmasked window padding; pinned by
        `test_released_attention_equals_the_textbook_form`.

        Shapes:
            q: (Z, N, C), unscaled queries.
            pad_q: (Z, 1, C), the query of a padded position; None without padding.
        """
        x, y, z = grid
        side = self.window_size or x
        rel_d = _relative_rows(self.rel_pos_d, x, side).transpose(1, 2)  # (x, C, S)
        rel_h = _relative_rows(self.rel_pos_h, y, side).transpose(1, 2)  # (y, C, S)
        rel_w = _relative_rows(self.rel_pos_w, side, side).transpose(1, 2)  # (S, C, S)
        q = q.contiguous()  # two views of it follow
        t = torch.matmul(q.unflatten(1, (x, y * z)), rel_d).flatten(1, 2)  # (Z, N, S)
        lines = q.unflatten(1, (x * y, z))  # (Z, x * y, z, C)
        if pad_q is not None and z < side:
            pads = pad_q[:, None].expand(-1, x * y, side - z, -1)
            lines = torch.cat([lines, pads], dim=2)  # (Z, x * y, S, C)
        u = torch.matmul(lines.unflatten(1, (x, y)), rel_h).flatten(1, 2)  # (Z, x * y, S, S)
        v = torch.matmul(lines.flatten(0, 1).transpose(0, 1), rel_w)  # (S, Z * x * y, S)
        v = v.transpose(0, 1).unflatten(0, (-1, x * y))  # (Z, x * y, S, S)
        lines_bias = (u[:, :, :x, None, :z] + v[:, :, None, :y, :z]).flatten(2)  # (Z, x * y, N)
        keys = torch.eye(z, dtype=q.dtype, device=q.device).repeat(x * y, 1)  # (N, z)
        if pad_q is None:
            return Terms(t, keys, lines_bias)
        extra = _padding_logit(t.unflatten(1, (x * y, z)), u, v, grid).flatten(1)  # (Z, N)
        last = F.pad(keys.new_ones(1, 1), (z, 0))  # (1, z + 1)
        return Terms(
            queries=torch.cat([t[..., :z], extra[..., None]], dim=-1),  # (Z, N, z + 1)
            keys=torch.cat([F.pad(keys, (0, 1)), last]),  # (N + 1, z + 1)
            lines=F.pad(lines_bias, (0, 1)),  # (Z, x * y, N + 1)
        )

    def _axial(self, q: Tensor, grid: Grid) -> "Terms":
        """Relative positions per axis; padding takes no part.

        Shapes:
            q: (Z, N, C), unscaled queries.
        """
        q = q.unflatten(1, grid)  # (Z, x, y, z, C)
        queries, keys = [], []
        tables = (self.rel_pos_d, self.rel_pos_h, self.rel_pos_w)
        for axis, (n, table) in enumerate(zip(grid, tables, strict=True)):
            rows = _relative_rows(table, n, self.window_size or n)[:, :n]  # (n, n, C)
            # Not as products of transposed views, which ONNX's optimiser gets wrong.
            letter = "xyz"[axis]
            values = torch.einsum(f"bxyzc,{letter}kc->bxyzk", q, rows)  # (Z, x, y, z, n)
            queries.append(values.flatten(1, 3))
            place = [1, 1, 1, n]
            place[axis] = n
            eye = torch.eye(n, dtype=q.dtype, device=q.device).view(place)
            keys.append(eye.expand(*grid, n).flatten(0, 2))
        return Terms(torch.cat(queries, dim=-1), torch.cat(keys, dim=-1), None)


@dataclass(frozen=True)
class Terms:
    """The position part of the logits, as `queries @ keys.T + lines`.

    Shapes:
        queries: (Z, N, R), R values per query.
        keys: (K, R), indicators of the value that a key takes; K is N, or N + 1 with an extra key.
        lines: (Z, N / z, K), what all z queries of a line along the last axis share; or None.
    """

    queries: Tensor
    keys: Tensor
    lines: Tensor | None


def _attend_by_heads(q: Tensor, k: Tensor, v: Tensor, lines: Tensor | None) -> Tensor:
    """Softmax attention, a few heads at a time where the logits are to stay in a CPU's cache.

    Shapes:
        q: (Z, N, R + C).
        k: (Z, K, R + C).
        v: (Z, K, C).
        lines: (Z, N / z, K), added to the logits of z consecutive queries; or None.
        returns: (Z, N, C).
    """
    # A trace would keep the number of groups, which depends on the batch.
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    is_recorded = is_traced or torch.compiler.is_compiling()
    if q.device.type != "cpu" or is_recorded:
        return _softmax_product(q, k, v, lines)
    # Gradients need the logits; autocast and torch.vmap, in use without inference mode, have no
    # softmax into given memory.
    in_place = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    group = max(1, CACHED_LOGITS // (q.shape[1] * k.shape[1]))
    lines_of = itertools.repeat(None) if lines is None else lines.split(group)
    groups = zip(q.split(group), k.split(group), v.split(group), lines_of, strict=False)
    return torch.cat([_softmax_product(*parts, in_place=in_place) for parts in groups])


def _softmax_product(
    q: Tensor, k: Tensor, v: Tensor, lines: Tensor | None, *, in_place: bool = False
) -> Tensor:
    """One group's softmax attention, without copies of the logits if `in_place`, to the same bits.

    Shapes as in `_attend_by_heads`.
    """
    if lines is None:
        logits = torch.bmm(q, k.transpose(1, 2))
    else:
        repeats = q.shape[1] // lines.shape[1]
        spread = lines[:, :, None].expand(-1, -1, repeats, -1)
        if in_place:  # into memory of its own, which a view of the lines would not be
            spread = spread.clone(memory_format=torch.contiguous_format)
        logits = spread.flatten(1, 2)  # (Z, N, K)
        logits = (logits.baddbmm_ if in_place else logits.baddbmm)(q, k.transpose(1, 2))
    weights = torch.softmax(logits, dim=-1, out=logits) if in_place else logits.softmax(dim=-1)
    return torch.bmm(weights, v)


def _padding_logit(t: Tensor, u: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """The log-sum-exp of the logits of all padded keys; the module's text derives it.

    Shapes:
        t: (Z, x * y, z, S).
        u: (Z, x * y, S, S), axes kd, kw.
        v: (Z, x * y, S, S), axes kh, kw.
        returns: (Z, x * y, z).
    """
    x, y, z = grid
    side = t.shape[-1]
    v_all = v.logsumexp(dim=2)  # (Z, x * y, S)
    masses = []
    if x < side:
        masses.append(t[..., :z] + (u[:, :, x:, :z].logsumexp(dim=2) + v_all[..., :z])[:, :, None])
    if y < side:
        real_u, pad_v = u[:, :, :x, :z].logsumexp(dim=2), v[:, :, y:, :z].logsumexp(dim=2)
        masses.append(t[..., :z] + (real_u + pad_v)[:, :, None])
    if z < side:
        masses.append(t[..., z:] + (u[..., z:].logsumexp(dim=2) + v_all[..., z:])[:, :, None])
    return torch.cat(masses, dim=-1).logsumexp(dim=-1)


def _relative_rows(table: Tensor, queries: int, side: int) -> Tensor:
    """Row i - j + side - 1 of a table for every query i and key j, resampled if it is too short.

    Source: the reference resamples a stored table linearly to 2 * side - 1 rows when it is used.

    Shapes:
        table: (L, C).
        returns: (queries, side, C).
    """
    length = 2 * side - 1
    if len(table) != length:
        table = F.interpolate(table.t()[None], size=length, mode="linear")[0].t()  # (length, C)
    i = torch.arange(queries, device=table.device)[:, None]
    j = torch.arange(side, device=table.device)[None, :]
    return table[i - j + side - 1]

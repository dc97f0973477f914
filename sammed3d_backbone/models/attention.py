"""Attention over a 3-D token grid with relative positions: released or axial, whole grid or windows.

Comes in: normalised tokens (B, X, Y, Z, E); goes out: the same shape after attention and output
projection. Letters used here: B batch, E token width, A heads, C width of one head, N tokens of
a window, S side of a window, and for the *real* extents of one window (x, y, z).

**Two forms of relative position.** With q(i) the unscaled query at grid position i = (d, h, w) and
a key at (kd, kh, kw), the bias added to the logit is

    axial     q(d,h,w)·Rd[d,kd] + q(d,h,w)·Rh[h,kh] + q(d,h,w)·Rw[w,kw]
    released  q(d,h,w)·Rd[d,kw] + q(d,h,kd)·Rh[h,kw] + q(d,h,kh)·Rw[kh,kw]

where R.[i,j] is row i - j + S - 1 of the axis's table. The axial form is what the paper's text
describes. The released form is what the public code computes, because each term is broadcast with
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

RelPos = Literal["released", "axial"]
Grid = tuple[int, int, int]  # tokens per axis


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, on the grid or on windows of it.

    Args:
        embed_dim: Token width E.
        num_heads: Number of heads A.
        window_size: Side of a window in tokens, or 0 for the whole grid.
        table_grid: Tokens per axis for which the relative tables are made: a table has
            2 * n - 1 rows. Ignored with windows, whose tables have 2 * `window_size` - 1 rows.
        rel_pos: "released" or "axial"; see the module's text.

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
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        if window_size:
            table_grid = (window_size, window_size, window_size)
        # The letters d, h, w are the checkpoint's names for the array axes 0, 1, 2.
        self.rel_pos_d = nn.Parameter(torch.zeros(2 * table_grid[0] - 1, head_dim))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_grid[1] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_grid[2] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        side = self.window_size
        grid = x.shape[1:4]
        if not side or all(n <= side for n in grid):
            return self._attend(x)
        out = torch.empty_like(x)
        # Windows of equal real extents go through together: per axis there are whole windows and
        # at most one partial one, hence at most eight groups.
        for spans in itertools.product(*(_spans(n, side) for n in grid)):
            index = (slice(None), *(slice(start, stop) for start, stop, _ in spans))
            ex, ey, ez = (extent for _, _, extent in spans)
            windows = x[index].unflatten(3, (-1, ez)).unflatten(2, (-1, ey)).unflatten(1, (-1, ex))
            windows = windows.permute(0, 1, 3, 5, 2, 4, 6, 7)  # (B, nx, ny, nz, ex, ey, ez, E)
            y = self._attend(windows.flatten(0, 3)).view(windows.shape)
            y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, nx, ex, ny, ey, nz, ez, E)
            out[index] = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        """Attention inside each grid of a batch of equal grids or windows.

        Shapes:
            x: (B, x, y, z, E), real tokens only.
            returns: the same.
        """
        batch, *extents, _ = x.shape
        grid = (extents[0], extents[1], extents[2])
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        qkv = F.linear(x.flatten(1, 3), self.qkv.weight, bias)  # (B, N, 3 * E)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, A, N, C)
        q, k, v = qkv.flatten(1, 2).unbind(0)  # (B * A, N, C)
        if self.rel_pos == "axial":
            positions = self._axial(q, grid)
        else:
            b_q = q_bias.view(1, self.num_heads, -1).expand(batch, -1, -1).flatten(0, 1)
            b_v = v_bias.view(1, self.num_heads, 1, -1).expand(batch, -1, -1, -1).flatten(0, 1)
            positions = self._released(q, b_q, grid)
            if positions.extra_key:
                k = F.pad(k, (0, 0, 0, 1))  # (B * A, N + 1, C)
                v = torch.cat([v, b_v], dim=1)  # (B * A, N + 1, C)
        # Terms that depend on the query ride along in the matrix product, against one-hot keys.
        q = torch.cat([q * self.scale, positions.queries], dim=-1)
        k = torch.cat([k, positions.keys.expand(len(k), -1, -1)], dim=-1).transpose(1, 2)
        logits = torch.bmm(q, k) if positions.base is None else torch.baddbmm(positions.base, q, k)
        out = torch.bmm(logits.softmax(dim=-1), v)  # (B * A, N, C)
        out = out.unflatten(0, (batch, self.num_heads)).transpose(1, 2).flatten(2)  # (B, N, E)
        return self.proj(out).unflatten(1, grid)

    def _released(self, q: Tensor, b_q: Tensor, grid: Grid) -> "Positions":
        """Relative positions as the public weights were trained with them.

        Faithful: the mis-broadcast axes and the unmasked window padding; pinned by
        `test_released_bias_equals_the_textbook_form`.

        Shapes:
            q: (Z, N, C), unscaled queries of Z = B * A heads on the real grid (x, y, z).
            b_q: (Z, C), the query of a padded position.
        """
        x, y, z = grid
        side = self.window_size or x
        rel_d = _relative_rows(self.rel_pos_d, x, side)  # (x, S, C)
        rel_h = _relative_rows(self.rel_pos_h, y, side)  # (y, S, C)
        rel_w = _relative_rows(self.rel_pos_w, side, side)  # (S, S, C)
        along_z = q.reshape(-1, x * y, z, q.shape[-1])  # (Z, x * y, z, C)
        if z < side:
            pads = b_q[:, None, None, :].expand(-1, x * y, side - z, -1)
            along_z = torch.cat([along_z, pads], dim=2)  # (Z, x * y, S, C)
        t = torch.matmul(q.reshape(-1, x, y * z, q.shape[-1]), rel_d.mT)  # (Z, x, y * z, S)
        t = t.flatten(1, 2)  # (Z, N, S)
        u = torch.matmul(along_z.unflatten(1, (x, y)), rel_h.mT).flatten(1, 2)  # (Z, x * y, S, S)
        v = torch.matmul(along_z.flatten(0, 1).transpose(0, 1), rel_w.mT)  # (S, Z * x * y, S)
        v = v.transpose(0, 1).unflatten(0, (-1, x * y))  # (Z, x * y, S, S)
        # Every query along the last axis shares these terms.
        rows = (u[:, :, :x, None, :z] + v[:, :, None, :y, :z]).flatten(2)  # (Z, x * y, x * y * z)
        base = rows[:, :, None, :].expand(-1, -1, z, -1)  # (Z, x * y, z, N)
        keys = torch.eye(z, dtype=q.dtype, device=q.device).repeat(x * y, 1)  # (N, z)
        extra_key = min(grid) < side
        if extra_key:
            logit = _padding_logit(t.unflatten(1, (x * y, z)), u, v, grid)  # (Z, x * y, z)
            base = torch.cat([base, logit[..., None]], dim=-1)  # (Z, x * y, z, N + 1)
            keys = F.pad(keys, (0, 0, 0, 1))
        return Positions(
            queries=t[..., :z], keys=keys, base=base.flatten(1, 2), extra_key=extra_key
        )

    def _axial(self, q: Tensor, grid: Grid) -> "Positions":
        """Relative positions per axis; padding takes no part.

        Shapes:
            q: (Z, N, C), unscaled queries on the real grid (x, y, z).
        """
        side = self.window_size
        x, y, z = grid
        q_grid = q.unflatten(1, grid)  # (Z, x, y, z, C)
        queries = [
            torch.einsum(
                "ndhwc,dkc->ndhwk", q_grid, _relative_rows(self.rel_pos_d, x, side or x)[:, :x]
            ),
            torch.einsum(
                "ndhwc,hkc->ndhwk", q_grid, _relative_rows(self.rel_pos_h, y, side or y)[:, :y]
            ),
            torch.einsum(
                "ndhwc,wkc->ndhwk", q_grid, _relative_rows(self.rel_pos_w, z, side or z)[:, :z]
            ),
        ]
        eyes = [torch.eye(n, dtype=q.dtype, device=q.device) for n in grid]
        keys = [
            eyes[0][:, None, None, :].expand(x, y, z, x),
            eyes[1][None, :, None, :].expand(x, y, z, y),
            eyes[2][None, None, :, :].expand(x, y, z, z),
        ]
        return Positions(
            queries=torch.cat(queries, dim=-1).flatten(1, 3),  # (Z, N, x + y + z)
            keys=torch.cat(keys, dim=-1).flatten(0, 2),  # (N, x + y + z)
            base=None,
            extra_key=False,
        )


@dataclass(frozen=True)
class Positions:
    """The position part of the logits: `queries @ keys.T + base`.

    Shapes:
        queries: (Z, N, R), R relative values per query.
        keys: (N, R) or with an extra key (N + 1, R), rows that pick among them.
        base: (Z, N, N) or (Z, N, N + 1), or None for zero.
    """

    queries: Tensor
    keys: Tensor
    base: Tensor | None
    extra_key: bool


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


def _spans(tokens: int, side: int) -> list[tuple[int, int, int]]:
    """Start, stop and window extent of the whole windows along an axis, then of the partial one."""
    whole = tokens - tokens % side
    spans = [(0, whole, side), (whole, tokens, tokens - whole)]
    return [span for span in spans if span[0] < span[1]]

"""Attention in textbook form: the padded window, every logit, in float64."""

import itertools

import torch
import torch.nn.functional as F


def released_attention(attn, x):
    """The reference's window attention, padding included, term by term.

    Shapes:
        x: (B, X, Y, Z, E), a grid of any number of windows.
        returns: the same.
    """
    side = attn.window_size or x.shape[1]
    whole = [-(-n // side) * side for n in x.shape[1:4]]
    pad = [end for n, m in zip(x.shape[3:0:-1], whole[::-1], strict=True) for end in (0, m - n)]
    padded = F.pad(x, (0, 0, *pad))
    out = torch.zeros_like(padded)
    for start in itertools.product(*(range(0, n, side) for n in whole)):
        index = (slice(None), *(slice(s, s + side) for s in start))
        out[index] = _attend(attn, padded[index], _released_bias)
    return out[:, : x.shape[1], : x.shape[2], : x.shape[3]]


def axial_attention(attn, x):
    """Attention with per-axis positions inside windows of real tokens only."""
    sides = [attn.window_size or n for n in x.shape[1:4]]
    out = torch.zeros_like(x)
    for start in itertools.product(
        *(range(0, n, s) for n, s in zip(x.shape[1:4], sides, strict=True))
    ):
        index = (slice(None), *(slice(a, a + s) for a, s in zip(start, sides, strict=True)))
        out[index] = _attend(attn, x[index], _axial_bias)
    return out


def _attend(attn, x, bias_of):
    grid = x.shape[1:4]
    cells = list(itertools.product(*map(range, grid)))
    tokens = torch.stack([x[:, i, j, k] for i, j, k in cells], dim=1)  # (B, N, E)
    q, k, v = F.linear(tokens, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    heads = []
    width = q.shape[-1] // attn.num_heads
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[..., part] @ k[..., part].mT * width**-0.5 + bias_of(attn, q[..., part], cells)
        heads.append(logits.softmax(-1) @ v[..., part])
    out = attn.proj(torch.cat(heads, dim=-1))
    return out.unflatten(1, grid)


def _rows(table, n):
    length = 2 * n - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    return table


def _released_bias(attn, q, cells):
    """q(d,h,w)·Rd[d,kw] + q(d,h,kd)·Rh[h,kw] + q(d,h,kh)·Rw[kh,kw]."""
    side = attn.window_size or 1 + max(cells)[0]
    rd, rh, rw = (_rows(t, side) for t in (attn.rel_pos_d, attn.rel_pos_h, attn.rel_pos_w))
    at = {cell: n for n, cell in enumerate(cells)}
    bias = q.new_zeros(len(q), len(cells), len(cells))
    for (d, h, _w), i in at.items():
        for (kd, kh, kw), j in at.items():
            bias[:, i, j] = (
                q[:, i] @ rd[d - kw + side - 1]
                + q[:, at[d, h, kd]] @ rh[h - kw + side - 1]
                + q[:, at[d, h, kh]] @ rw[kh - kw + side - 1]
            )
    return bias


def _axial_bias(attn, q, cells):
    """q(d,h,w)·(Rd[d,kd] + Rh[h,kh] + Rw[w,kw])."""
    sides = [attn.window_size or 1 + n for n in max(cells)]
    tables = (attn.rel_pos_d, attn.rel_pos_h, attn.rel_pos_w)
    rows = [_rows(t, n) for t, n in zip(tables, sides, strict=True)]
    bias = q.new_zeros(len(q), len(cells), len(cells))
    for i, here in enumerate(cells):
        for j, there in enumerate(cells):
            steps = zip(rows, here, there, sides, strict=True)
            bias[:, i, j] = q[:, i] @ sum(r[a - b + n - 1] for r, a, b, n in steps)
    return bias

"""Window attention without padding, against the textbook form with it."""

import pytest
import torch
from textbook import axial_attention, released_attention
from torch import nn

from sammed3d_backbone.models import attention
from sammed3d_backbone.models.attention import Attention


def make(generator, *, window_size, rel_pos="sammed3d", table_grid=(4, 4, 4), std=0.3):
    attn = Attention(
        12, 3, window_size=window_size, table_grid=table_grid, rel_pos=rel_pos
    ).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return attn


def tokens(generator, *grid, batch=2):
    return torch.randn(batch, *grid, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("window_size", "side"),
    [(0, 3), (3, 3), (4, 3), (4, 2), (3, 1), (3, 4), (2, 3)],
    ids=["global", "exact", "padded", "half", "one-token", "partial", "many-partial"],
)
def test_released_attention_equals_the_textbook_form(generator, window_size, side):
    attn = make(generator, window_size=window_size, table_grid=(side,) * 3)
    x = tokens(generator, side, side, side)
    torch.testing.assert_close(attn(x), released_attention(attn, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 4, 2), (2, 4, 4), (4, 2, 4), (1, 2, 3)], ids=str)
def test_windows_that_are_no_cubes_read_padding_along_the_last_axis(generator, grid):
    attn = make(generator, window_size=4)
    x = tokens(generator, *grid)
    torch.testing.assert_close(attn(x), released_attention(attn, x), rtol=1e-12, atol=1e-12)


def test_nothing_cancels_where_real_tokens_dominate_the_softmax(generator):
    attn = make(generator, window_size=4, std=3.0)
    x = tokens(generator, 3, 3, 3)
    torch.testing.assert_close(attn(x), released_attention(attn, x), rtol=1e-9, atol=1e-9)


def test_the_gradients_equal_those_of_the_textbook_form(generator):
    attn = make(generator, window_size=4)
    x = tokens(generator, 3, 3, 2, batch=1).requires_grad_()
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    inputs = [x, *attn.parameters()]
    got = torch.autograd.grad((attn(x) * direction).sum(), inputs)
    want = torch.autograd.grad((released_attention(attn, x) * direction).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_stored_tables_of_another_length_are_interpolated(generator):
    attn = make(generator, window_size=0, table_grid=(5, 5, 5))
    x = tokens(generator, 3, 3, 3)
    torch.testing.assert_close(attn(x), released_attention(attn, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("window_size", "grid"),
    [(0, (2, 3, 4)), (4, (2, 3, 4)), (2, (3, 2, 5)), (3, (3, 3, 3))],
    ids=str,
)
def test_axial_attention_equals_the_direct_formula(generator, window_size, grid):
    attn = make(generator, window_size=window_size, rel_pos="axial", table_grid=grid)
    x = tokens(generator, *grid)
    torch.testing.assert_close(attn(x), axial_attention(attn, x), rtol=1e-12, atol=1e-12)


def test_dropping_the_padding_would_change_the_released_features(generator):
    attn = make(generator, window_size=4)
    x = tokens(generator, 3, 3, 3)
    padded = attn(x)
    attn.window_size = 3
    for name in ("rel_pos_d", "rel_pos_h", "rel_pos_w"):
        setattr(attn, name, nn.Parameter(getattr(attn, name)[1:-1]))
    assert (attn(x) - padded).norm() > 0.01 * padded.norm()


@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
def test_the_size_of_a_group_of_heads_does_not_show(generator, monkeypatch, rel_pos):
    attn = make(generator, window_size=4, rel_pos=rel_pos)
    x = tokens(generator, 3, 3, 3)
    whole = attn(x)
    monkeypatch.setattr(attention, "CACHED_LOGITS", 1)
    torch.testing.assert_close(attn(x), whole, rtol=1e-13, atol=1e-13)

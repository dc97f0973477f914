"""Small files that are whole at any moment."""

from pathlib import Path

import pytest

from sammed3d_backbone.files import write_text


def test_a_text_is_written_and_replaced(tmp_path):
    for text in ("one", "zwölf"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_breaks_off_leaves_the_earlier_text(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "whole")
    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: self.touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(tmp_path / "a.txt", "half")
    assert (tmp_path / "a.txt").read_bytes() == b"whole"

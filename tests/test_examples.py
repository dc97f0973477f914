"""Examples, README blocks and links, offline."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [
    page
    for folder in ("", "examples", "recipes", "recipes/benchmarks", "recipes/studies", "weights")
    for page in sorted((ROOT / folder).glob("*.md"))
]
BLOCKS = {
    f"{page.name}-{number}": block
    for page in PAGES
    if page.parent in (ROOT, ROOT / "examples")
    for number, block in enumerate(
        re.findall(
            r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    )
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty folder, where no hub can be asked and no window opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a block starts
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_offline_and_says_what_it_did(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_python_block_of_a_page_runs_by_itself(block):
    exec(compile(block, "<block>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: os.path.relpath(page, ROOT))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^):#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]

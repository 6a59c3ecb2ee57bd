"""README and docs/: their examples run as they stand, and their links lead somewhere."""

import logging
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.bnext("bnext's documentation")

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]


def examples():
    """Each block of Python, by page and line."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            line = text.count("\n", 0, block.start()) + 1
            yield pytest.param(block[1], id=f"{page.name}:{line}")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("example", list(examples()))
def test_example(example, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of them write files
    with caplog.at_level(logging.WARNING, logger="bnext"):
        exec(example, {"__name__": "__main__"})
    assert not caplog.records


@pytest.mark.skipif(not PAGES, reason="not in a checkout")
def test_every_page_has_an_example():
    for page in PAGES:
        assert "```python" in page.read_text(), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"

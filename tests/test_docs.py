"""Pages that are made, or that name things: they must not fall behind the code."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_config_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_config", ROOT / "docs" / "make_config.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.page((ROOT / "pgjax" / "config.py").read_text())
    assert page == (ROOT / "docs" / "config.md").read_text(), "run python docs/make_config.py"
    assert "`grpo.optimizer.learning_rate`" in page and "the best: highest held-out request F1" in page


def test_files_that_the_pages_name_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        named = re.findall(r"`((?:pgjax|tests|configs|docs|benchmarks)/[\w./]+\.(?:py|yaml|md|txt))`", text)
        linked = [str((page.parent / target).relative_to(ROOT)) for target in re.findall(r"\]\(([\w./]+)\)", text)]
        for name in named + linked:
            assert (ROOT / name).exists(), f"{page.name} names {name}"

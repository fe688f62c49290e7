"""The documentation: links lead somewhere, named files are there, each page says what it is good for."""

from pathlib import Path

import pytest

from tools.docs.pages import NAMES, ROOT, Page, find_broken, find_missing_files, find_names

FILES = [path for top in ("src", "tools", "tests") for path in (ROOT / top).rglob("*.py")]
CURRENT = [name for name in NAMES if name != "docs/log.md"]  # the log is history: it names what was there


def write_page(folder: Path, text: str) -> Page:
    (folder / "page.md").write_text(text)
    return Page("page.md", folder)


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    assert find_broken(Page(name) for name in NAMES) == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("#two-words-and-code", ""), ("other.md", ""), ("other.md#it", ""), ("#twice-1", ""), ("https://x.invalid/y", ""),
        ("#two-words", "no such heading"), ("other.md#its", "no such heading"), ("#twice-2", "no such heading"),
        ("missing.md", "no such file"), ("../", "no such file"),
    ],
)  # fmt: skip
def test_a_broken_link_is_found(tmp_path: Path, link: str, fault: str) -> None:
    (tmp_path / "other.md").write_text("# It\n")
    page = write_page(
        tmp_path, f"# A\n\n## Two words, and `code`\n\n| a |\n|---|\n| [x]({link}) |\n\n## Twice\n## Twice\n"
    )
    assert find_broken([page]) == ([f"page.md: {link}: {fault}"] if fault else [])


def test_no_page_names_a_python_file_that_is_not_there(tmp_path: Path) -> None:
    assert find_missing_files([Page(name) for name in CURRENT], FILES) == []
    page = write_page(tmp_path, "# A\n\nRead `ops/gpu.py`, then `fast.py`.\n")
    assert find_missing_files([page], FILES) == ["page.md: fast.py"]


def test_no_docstring_leads_to_a_file_that_is_not_there() -> None:
    """`Next: gpu.py` and the like, at the top of modules."""
    known = [f"/{path.relative_to(ROOT)}" for path in FILES]
    wrong = []
    for path in FILES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        _, opens, rest = path.read_text().partition('"""')
        for name in find_names(rest.partition('"""')[0]) if opens else ():
            if not any(file.endswith(f"/{name}") for file in known):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


def test_the_readme_is_a_door_and_no_house() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9216


@pytest.mark.parametrize("name", CURRENT[1:])
def test_each_page_begins_with_what_a_reader_can_do_after_it(name: str) -> None:
    assert Page(name).beginning.startswith("After this page you can ")
    assert name in (ROOT / "README.md").read_text(), "no way leads to this page"


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in (ROOT / "src").rglob("*.py") if not path.read_text().lstrip().startswith('"""')]
    assert [str(path.relative_to(ROOT)) for path in silent] == []

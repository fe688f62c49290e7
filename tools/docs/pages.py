"""The pages of the documentation: their titles, anchors and links, and which links lead nowhere.

Anchors are named as GitHub names them, so that a link works in both places. Addresses of other sites are not tried.
Knows nothing of HTML. Next: site.py.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
NAMES = (  # in the order of the site's menu
    "README.md", "docs/checkpoints.md", "docs/running.md", "docs/ranks.md", "docs/chat.md", "docs/serving.md",
    "docs/request-fields.md", "docs/compare.md", "docs/look.md", "docs/gallery.md", "docs/hardware.md",
    "docs/accuracy.md", "docs/performance.md", "docs/design.md", "docs/map.md", "CONTRIBUTING.md",
    "CHANGELOG.md", "docs/log.md",
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """`path` is a file of the repository, or None for an address of another site; `anchor` may be empty."""

    text: str  # as it is written
    path: Path | None
    anchor: str


@dataclass(frozen=True)
class Page:
    """One page, by its path below `root`."""

    name: str
    root: Path = ROOT

    @property
    def path(self) -> Path:
        """Where the page's file is."""
        return self.root / self.name

    @cached_property
    def tokens(self) -> list[Token]:
        """The page as Markdown tokens; headings have an `id`."""
        tokens, seen = make_parser().parse(self.path.read_text(encoding="utf-8")), Counter[str]()
        for opening, content in zip(tokens, tokens[1:], strict=False):
            if opening.type == "heading_open":
                slug = make_slug(content)
                opening.attrSet("id", f"{slug}-{seen[slug]}" if seen[slug] else slug)
                seen[slug] += 1
        return tokens

    @property
    def title(self) -> str:
        """The first heading."""
        return next(read_text(b) for a, b in zip(self.tokens, self.tokens[1:], strict=False) if a.tag == "h1")

    @property
    def beginning(self) -> str:
        """The first paragraph."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return next((b.content for a, b in pairs if a.type == "paragraph_open"), "")

    @property
    def anchors(self) -> set[str]:
        """What a link may name behind `#`."""
        return {str(t.attrGet("id")) for t in self.tokens if t.type == "heading_open"}

    def links(self) -> Iterator[Link]:
        """Every link and every picture, in order."""
        for token in self.tokens:
            for child in token.children or ():
                href = child.attrGet("href") or child.attrGet("src")
                if href is not None:
                    yield self.find_target(str(href))

    def find_target(self, href: str) -> Link:
        """What an address on this page means."""
        if re.match(r"[a-z]+:", href):
            return Link(href, None, "")
        file, _, anchor = href.partition("#")
        return Link(href, (self.path.parent / file).resolve() if file else self.path.resolve(), anchor)


def make_parser() -> MarkdownIt:
    """Markdown with tables."""
    return MarkdownIt("commonmark").enable("table")


def read_text(content: Token) -> str:
    """The text of a heading, without marks."""
    return "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))


def make_slug(content: Token) -> str:
    """A heading's anchor: small letters, hyphens for spaces, no other signs."""
    return re.sub(r"[^\w\- ]", "", read_text(content).strip().lower()).replace(" ", "-")


def find_broken(pages: Iterable[Page]) -> list[str]:
    """Each link that names a file or an anchor that is not there, or a file outside the repository."""
    found, by_path = [], {page.path.resolve(): page for page in pages}
    for page in by_path.values():
        for link in page.links():
            if link.path is None:
                continue
            if not link.path.is_relative_to(page.root.resolve()) or not link.path.exists():
                found.append(f"{page.name}: {link.text}: no such file")
            elif link.anchor and (link.path.suffix != ".md" or link.anchor not in anchors_of(link.path, by_path)):
                found.append(f"{page.name}: {link.text}: no such heading")
    return found


def anchors_of(path: Path, pages: dict[Path, Page]) -> set[str]:
    """The anchors of a Markdown file, which may be a page or not."""
    return (pages.get(path) or Page(path.name, path.parent)).anchors


def find_missing_files(pages: Iterable[Page], files: Iterable[Path]) -> list[str]:
    """Each Python file that a page names (`linear/gemm.py`) and that `files` do not hold."""
    known = [f"/{file.as_posix()}" for file in files]
    named = {(page.name, name) for page in pages for name in find_names(page.path.read_text(encoding="utf-8"))}
    return [f"{page}: {name}" for page, name in sorted(named) if not any(k.endswith(f"/{name}") for k in known)]


def find_names(text: str) -> set[str]:
    """Names of Python files in a text."""
    return set(re.findall(r"(?<![\w*/<.-])[\w/]+\.py\b", text))

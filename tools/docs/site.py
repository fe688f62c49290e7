"""Pages as HTML. A link to a page leads to its HTML, a link to another file of the repository to a copy of it.

Next: __main__.py.
"""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path

from tools.docs.pages import Page, make_parser

STYLE = """
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #fff; }
nav { position: fixed; inset: 0 auto 0 0; width: 13rem; padding: 1.5rem; overflow: auto; background: #f5f6f8; }
nav a { display: block; padding: .2rem 0; color: inherit; text-decoration: none; }
nav a.here { font-weight: 600; }
main { margin-left: 16rem; padding: 1rem 2rem 4rem; max-width: 56rem; }
pre, table { overflow: auto; display: block; }
pre { padding: .8rem; background: #f5f6f8; }
code { font: .88em/1.45 ui-monospace, monospace; }
td, th { padding: .25rem .7rem; border: 1px solid #d6dae0; text-align: left; vertical-align: top; }
table { border-collapse: collapse; }
img { max-width: 100%; }
@media (max-width: 50rem) { nav { position: static; width: auto; } main { margin-left: 0; } }
"""


def name_file(page: Page) -> str:
    """The name of a page in the site."""
    stem = Path(page.name).stem.lower()
    return "index.html" if stem == "readme" else f"{stem}.html"


def write_site(pages: Sequence[Page], folder: Path) -> None:
    """Every page, and the files that they link to."""
    files = {page.path.resolve(): name_file(page) for page in pages}
    for page in pages:
        body = render(page, files, folder)
        menu = "".join(
            f'<a href="{name_file(other)}"{" class=here" if other is page else ""}>{html.escape(other.title)}</a>'
            for other in pages
        )
        text = (
            f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(page.title)}</title><style>{STYLE}</style>"
            f"<nav>{menu}<a href='api/index.html'>API reference</a></nav><main>{body}</main></html>\n"
        )
        (folder / name_file(page)).write_text(text, encoding="utf-8")


def render(page: Page, files: dict[Path, str], folder: Path) -> str:
    """The body of a page. `files`: the names of pages by their paths. Other files that it links to are copied."""
    for token in page.tokens:
        for child in token.children or ():
            for key in ("href", "src"):
                if (address := child.attrGet(key)) is None:
                    continue
                link = page.find_target(str(address))
                if link.path is not None:
                    name = files.get(link.path) or copy_file(link.path, page.root, folder)
                    child.attrSet(key, f"{name}#{link.anchor}" if link.anchor else name)
    parser = make_parser()
    return str(parser.renderer.render(page.tokens, parser.options, {}))


def copy_file(path: Path, root: Path, folder: Path) -> str:
    """A file of the repository into the site; its address there."""
    name = Path("files") / path.relative_to(root.resolve())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / name)
    return name.as_posix()

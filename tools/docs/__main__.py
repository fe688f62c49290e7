"""Build the site: `python -m tools.docs`, into build/docs. Exit code 1, with each fault, if it would be incomplete.

Faults are links that lead nowhere, named files that are not there, and public names without a docstring. Next:
pages.py, reference.py, site.py.
"""

import shutil
import sys

from tools.docs.pages import NAMES, ROOT, Page, find_broken, find_missing_files
from tools.docs.reference import find_undocumented, write_reference
from tools.docs.site import write_site


def main() -> int:
    """Check everything, then write everything."""
    folder = ROOT / "build" / "docs"
    pages = [Page(name) for name in NAMES]
    files = [path for top in ("src", "tools", "tests") for path in (ROOT / top).rglob("*.py")]
    current = [page for page in pages if page.name != "docs/log.md"]  # the log is history: it names what was there
    faults = [f"broken link: {fault}" for fault in find_broken(pages)]
    faults += [f"no such file: {fault}" for fault in find_missing_files(current, files)]
    faults += [f"no docstring: {name}" for name in find_undocumented()]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    if faults:
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_site(pages, folder)
    write_reference(folder / "api")
    print(f"{len(pages)} pages and the API reference: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

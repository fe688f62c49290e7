"""The page that shows where an answer looked: one file of HTML, with its style, its program and perhaps its data.

Without data it is a chat with the server that it comes from. The three files of page/ are put together here and
nowhere else. Next: page/page.js.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from saccade.base.json_text import to_json
from saccade.look.selected import LookedAnswer

# Nothing is loaded from elsewhere, and nothing is sent but to the server itself.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


@cache
def read_part(name: str) -> str:
    return (files("saccade.look") / "page" / name).read_text("utf-8")


def make_page(look: LookedAnswer | None = None, title: str = "Saccade") -> str:
    """The page of an answer; without one, the page of a server."""
    data: dict[str, Any] = {"title": title, "look": None if look is None else look.to_json()}
    # Text of a prompt may hold </script>.
    text = to_json(data).replace("<", "\\u003c")
    page = read_part("page.html").replace("{{policy}}", POLICY)
    for name, part in (("style", read_part("page.css")), ("program", read_part("page.js")), ("data", text)):
        before, _, after = page.partition("{{" + name + "}}")
        page = before + part + after
    return page

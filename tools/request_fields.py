"""What becomes of every field of every request, as a page: served, accepted without effect, or refused.

    python -m tools.request_fields > docs/request-fields.md

Next: server/apis/types.py, where fields say it of themselves.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from saccade.server.apis.chat_fields import ChatRequest
from saccade.server.apis.completions import CompletionRequest
from saccade.server.apis.message_fields import MessagesRequest
from saccade.server.apis.response_fields import ResponsesRequest
from saccade.server.apis.tokens import DetokenizeRequest, TokenizeRequest
from saccade.server.apis.types import As, Harmless, Unserved, list_kinds

PATHS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
HEAD = """# Fields of requests

After this page you can tell what becomes of each field of a request. `python -m tools.request_fields` writes it from
the code, and a test compares the two. [Serving models](serving.md) says what the fields do.

- A **served** field does what its API says. A value that cannot be honoured is an error that names the field.
- A field **without effect** is accepted, because no answer changes with it.
- A **refused** field would change the answer and is not supported. It is an error 400 that names the field, unless its
  value asks for nothing: null, or what stands behind it in brackets.
- **Any other field** is an error 400 too. `saccade serve --ignore-field NAME` drops one before it is read, for a client
  that cannot be changed; `messages.NAME` is one of each message.
- The same holds **inside of fields**: messages, blocks, items, tools, formats. Schemas and arguments are free.
"""
INSIDE = "\nInside of fields:\n\n"


def main() -> None:
    print(write_page(), end="")


def write_page() -> str:
    seen, sections = dict[tuple[str, type[BaseModel]], str](), list[str]()
    for path, model in PATHS.items():
        sections += [write_section(path, model), write_inside(path, model, seen)]
    return HEAD + "".join(sections)


def write_inside(path: str, model: type[BaseModel], seen: dict[tuple[str, type[BaseModel]], str]) -> str:
    """Of all objects inside of a request; of those that an earlier path has, its name."""
    lines, earlier = list[str](), dict[str, list[str]]()
    objects = list(dict.fromkeys(list_objects(model)))
    labels = Counter(label for label, _ in objects)
    for label, inner in objects:
        if (label, inner) in seen:
            earlier.setdefault(seen[label, inner], []).append(f"`{label}`")
            continue
        seen[label, inner] = path
        lines.append(wrap_words(f"- `{label}`{write_kind(inner) if labels[label] > 1 else ''}: {write_names(inner)}."))
    for other, names in earlier.items():
        lines.append(wrap_words(f"- As in {other}: {', '.join(dict.fromkeys(names))}."))
    return INSIDE + "\n".join(lines) + "\n" if lines else ""


def list_objects(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The objects inside of a model: where each stands, and its model."""
    for name, field in model.model_fields.items():
        label = f"{where}{field.alias or name}"
        for inner in find_models(field.annotation) if find_said(field) is None else ():
            yield label, inner
            yield from list_objects(inner, f"{label}.")


def find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from find_models(part.model if isinstance(part, As) else part)


def write_kind(model: type[BaseModel]) -> str:
    """By which value an object is known among those at the same place."""
    for field in ("role", "type"):
        kinds = list_kinds(model, field) if field in model.model_fields else []
        if kinds:
            return f" with `{field}` {' or '.join(f'`{kind}`' for kind in kinds)}"
    return ""


def write_names(model: type[BaseModel]) -> str:
    """Served fields, those without effect, refused ones."""
    groups: dict[type, list[str]] = {type(None): [], Harmless: [], Unserved: []}
    for name, field in model.model_fields.items():
        said = find_said(field)
        neutral = write_neutral(said) if isinstance(said, Unserved) else ""
        groups[type(said)].append(f"`{field.alias or name}`{neutral}")
    kinds = zip(("", "without effect ", "refused "), groups.values(), strict=True)
    return "; ".join(kind + ", ".join(names) for kind, names in kinds if names)


def find_said(field: FieldInfo) -> Harmless | Unserved | None:
    return next((one for one in field.metadata if isinstance(one, Harmless | Unserved)), None)


def write_section(path: str, model: type[BaseModel]) -> str:
    served, harmless, refused = list[str](), list[str](), list[str]()
    for name, field in model.model_fields.items():
        said = find_said(field)
        if said is None:
            served.append(f"`{field.alias or name}`")
        elif isinstance(said, Harmless):
            harmless.append(f"| `{name}` | {said.why} |")
        else:
            refused.append(f"| `{name}`{write_neutral(said)} | {said.why} |")
    text = f"\n## {path}\n\nServed: {wrap(sorted(served))}\n"
    if harmless:
        text += "\n| without effect | why |\n|---|---|\n" + "\n".join(harmless) + "\n"
    if refused:
        text += "\n| refused | why |\n|---|---|\n" + "\n".join(refused) + "\n"
    return text


def write_neutral(said: Unserved) -> str:
    values = [str(one).lower() if isinstance(one, bool) else repr(one).replace("'", '"') for one in said.neutral]
    return f" ({' or '.join(f'`{one}`' for one in values)})" if values else ""


def wrap_words(text: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def wrap(names: list[str], width: int = 118) -> str:
    lines = ["Served:"]
    for name in names:
        if len(lines[-1]) + len(name) + 2 > width:
            lines.append(name + ",")
        else:
            lines[-1] += f" {name},"
    return "\n".join(lines).removeprefix("Served: ").removesuffix(",") + "."


if __name__ == "__main__":
    main()

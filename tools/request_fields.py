"""What becomes of every field of every request, as a page: served, accepted without effect, or refused.

    python -m tools.request_fields > docs/request-fields.md

Next: server/apis/types.py, where fields say it of themselves.
"""

from pydantic import BaseModel

from saccade.server.apis.chat_fields import ChatRequest
from saccade.server.apis.completions import CompletionRequest
from saccade.server.apis.message_fields import MessagesRequest
from saccade.server.apis.response_fields import ResponsesRequest
from saccade.server.apis.tokens import DetokenizeRequest, TokenizeRequest
from saccade.server.apis.types import Harmless, Unserved

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
  that cannot be changed.
"""


def main() -> None:
    print(write_page(), end="")


def write_page() -> str:
    return HEAD + "".join(write_section(path, model) for path, model in PATHS.items())


def write_section(path: str, model: type[BaseModel]) -> str:
    served, harmless, refused = list[str](), list[str](), list[str]()
    for name, field in model.model_fields.items():
        said = next((one for one in field.metadata if isinstance(one, Harmless | Unserved)), None)
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

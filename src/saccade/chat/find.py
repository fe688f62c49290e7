"""Which format a model's chats have: its chat template, or the encoding of DeepSeek-V3.2, which ships none.

Where templates may be, as transformers looks: chat_template.jinja, additional_chat_templates/NAME.jinja, and the
`chat_template` of tokenizer_config.json, one text or several with names. Next: template.py, deepseek.py.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from saccade.base.json_files import is_file_there, read_leniently
from saccade.chat.deepseek import DeepSeekFormat
from saccade.chat.template import DEFAULT, TemplateFormat
from saccade.chat.types import ChatFormat
from saccade.errors import ConfigError

CONFIG, TEMPLATE, FOLDER = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
GIVEN = "--chat-template"  # of a command, what errors call it
MOST_BYTES = 1 << 20  # of a template; the published ones have 3 to 20 kB
ENCODED = ("deepseek_v32",)  # model types whose chats have an encoding of their own


def find_chat_format(directory: str | Path, model_type: str, template: str | None = None) -> ChatFormat:
    """The format of the model in `directory`. `template` is used in place of all that is there. ConfigError if it has
    none, or one that cannot be read."""
    directory = Path(directory)
    values, _ = read_leniently(directory / CONFIG)
    tokens = find_tokens(directory, values or {})
    if template is not None:
        return open_template(template, tokens)
    templates = read_templates(directory, values or {})
    if templates:
        named = TEMPLATE if (directory / TEMPLATE).exists() else f"{CONFIG}: chat_template"
        return TemplateFormat(templates, tokens, named)
    if model_type in ENCODED:
        return DeepSeekFormat()
    text = f"no chat template: no {TEMPLATE}, none in {CONFIG}; give one, or use prompts of plain text"
    raise ConfigError.at(directory, text)


def open_template(text: str, tokens: Mapping[str, str] = MappingProxyType({})) -> TemplateFormat:
    """The format of a template that a user gives. ConfigError if jinja2 cannot read it."""
    form = TemplateFormat({DEFAULT: text}, tokens, GIVEN)
    form.check()
    return form


def read_templates(directory: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint by name; a file counts more than what tokenizer_config.json says."""
    found: dict[str, str] = {}
    said = values.get("chat_template")
    if isinstance(said, str):
        found[DEFAULT] = said
    for entry in said if isinstance(said, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            found[entry["name"]] = entry["template"]
    files = {DEFAULT: directory / TEMPLATE}
    if (directory / FOLDER).is_dir():
        files |= {path.stem: path for path in sorted((directory / FOLDER).glob("*.jinja"))}
    for name, path in files.items():
        if is_file_there(path):
            found[name] = read_template(path)
    return found


def read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ConfigError.at(path, f"larger than {MOST_BYTES:,} bytes, so it is no chat template")
        return raw.decode("utf-8")
    except OSError as error:
        raise ConfigError.at(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError.at(path, f"byte {error.start} is no text in UTF-8") from None


def find_tokens(directory: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a template may write, by role: "bos_token", "eos_token" and so on."""
    more, _ = read_leniently(directory / "special_tokens_map.json")
    found: dict[str, str] = {}
    for table in (more or {}, values):
        for role, token in table.items():
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str):
                found[role] = text
    return found

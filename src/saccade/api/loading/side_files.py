"""The files beside a model's weights: generation_config.json and the tokenizer's. Read leniently, used fully.

Nothing in them makes a model unusable. What is odd is a note; what a tokenizer lacks stops only what needs text. Knows
no tensors and no requests. Next: engine/params.py and text/tokenizer.py read one file each; llm.py uses the result.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saccade.base.json_files import read_leniently
from saccade.base.values import is_short, show
from saccade.config.keys import read_token_ids
from saccade.engine.params import Defaults
from saccade.errors import ConfigError
from saccade.text.tokenizer import NO_TOKENIZER, Tokenizer

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # the first that names a token counts
LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair
ENDS = ("eos_token", "eot_token", "eom_token")  # of text, of a turn, of a message


@dataclass(frozen=True)
class SideFiles:
    """What the side files of a checkpoint say."""

    defaults: Defaults  # with the ends that all files name
    tokenizer: Tokenizer | None  # None: text is not served
    obstacle: str  # why not
    notes: tuple[str, ...]


def read_side_files(directory: str | Path, eos_token_ids: Sequence[int], vocab_size: int) -> SideFiles:
    """Read them. `eos_token_ids` are config.json's; ids from `vocab_size` on cannot occur. Never raises for what is in
    a file."""
    directory = Path(directory)
    notes, tokenizer, obstacle = list[str](), None, NO_TOKENIZER
    try:
        tokenizer = Tokenizer.load(directory)
    except ConfigError as error:
        obstacle = f"{error}; token ids work"
        notes.append(f"text is not served: {error}")
    files, unreadable = dict[str, dict[str, Any]](), ""
    for name in TOKENIZER_FILES:
        values, told = read_leniently(directory / name)
        files[name] = values or {}
        notes += told
        if values is None and name == TOKENIZER_FILES[0]:
            unreadable = told[0]
    names = Names(tokenizer, files)
    if tokenizer is not None:
        tokenizer.bos_token_id, tokenizer.obstacle, told = find_bos(names)
        tokenizer.obstacle = unreadable or tokenizer.obstacle  # does it want a beginning token? Nobody knows
        notes += [*tokenizer.notes, *told]
    defaults = Defaults.load(directory)
    if defaults.stop and tokenizer is None:
        notes.append(f"generation_config.json: stop_strings {show(list(defaults.stop))} need a tokenizer; ignored")
        defaults = replace(defaults, stop=())
    said = {"config.json": tuple(eos_token_ids), "generation_config.json": defaults.eos_token_ids}
    ends, told = join_ends(said | find_named_ends(names, notes), vocab_size)
    notes = list(dict.fromkeys([*defaults.notes, *told, *notes]))  # each once
    return SideFiles(replace(defaults, eos_token_ids=ends, notes=()), tokenizer, obstacle, tuple(notes))


class Names:
    """Special tokens by their role ("eos_token"), as text and as id."""

    def __init__(self, tokenizer: Tokenizer | None, files: Mapping[str, dict[str, Any]]) -> None:
        self.tokenizer, self.files = tokenizer, files
        self._ids: dict[str, int] = {}  # of tokenizer_config.json, for want of a tokenizer.json
        added = files[TOKENIZER_FILES[0]].get("added_tokens_decoder")
        for key, entry in added.items() if isinstance(added, dict) else ():
            ids, text = read_token_ids(key)[0], get_content(entry)
            if ids and text is not None:
                self._ids.setdefault(text, ids[0])

    def find_texts(self, role: str) -> list[tuple[str, str]]:
        """(file, text) of every file that names a token for `role`."""
        found = []
        for file, values in self.files.items():
            extra = values.get("extra_special_tokens")
            for table in (values, extra if isinstance(extra, dict) else {}):
                if (text := get_content(table.get(role))) is not None:
                    found.append((file, text))
        return found

    def find_id(self, text: str) -> int | None:
        """The id of a token's text, None if it has none."""
        found = None
        if self.tokenizer is not None and not LONE.search(text):  # which the library does not take
            found = self.tokenizer.encoder.token_to_id(text)
        return self._ids.get(text) if found is None else found


def get_content(value: Any) -> str | None:
    """The text of a token, in the short spelling or the long: {"content": "<s>", "lstrip": false}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def find_bos(names: Names) -> tuple[int | None, str, tuple[str, ...]]:
    """The token that `add_bos_token` in tokenizer_config.json asks for, why it cannot be had, and notes.

    Without a `bos_token` nothing is added, as in transformers. One that the tokenizer does not have is an obstacle: a
    prompt without it would be another prompt.
    """
    file, notes = TOKENIZER_FILES[0], list[str]()
    values = names.files[file]
    if is_true(values.get("add_eos_token")):
        notes.append(f"{file}: add_eos_token is not honoured: the answer goes on from the prompt")
    if not is_true(values.get("add_bos_token")):
        return None, "", (*notes,)
    texts = names.find_texts("bos_token")
    if not texts:
        found = show(values.get("bos_token"))
        notes.append(f"{file}: add_bos_token is true, but bos_token is {found}: prompts get none")
        return None, "", (*notes,)
    where, text = texts[0]
    bos = names.find_id(text)
    if bos is None:
        obstacle = f"add_bos_token is true, but the tokenizer has no token {show(text)} (bos_token of {where})"
        notes.append(f"text prompts are not served: {obstacle}")
        return None, obstacle, (*notes,)
    return bos, "", (*notes,)


def is_true(value: object) -> bool:
    """True, 1 or the word."""
    return is_short(value) and str(value).lower() in ("true", "1")


def find_named_ends(names: Names, notes: list[str]) -> dict[str, tuple[int, ...]]:
    """By file, the ends that the tokenizer's files name; a name without an id is one more note."""
    found: dict[str, tuple[int, ...]] = {}
    for role in ENDS:
        for file, text in names.find_texts(role):
            token = names.find_id(text)
            if token is None:
                notes.append(f"{file}: {role} {show(text)} is no token of the tokenizer and is ignored")
            else:
                found[file] = (*found.get(file, ()), token)
    return found


def join_ends(said: Mapping[str, tuple[int, ...]], vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Every end that any file names, and notes: on files that do not name the same, on ids that cannot occur.

    A tokenizer's file can name few of several ends, so it disagrees only where it names another one.
    """
    notes = [
        f"{file}: end token {token} is not in the vocabulary of {vocab_size} and is ignored"
        for file, ids in said.items()
        for token in ids
        if token >= vocab_size
    ]
    left = {file: tuple(token for token in ids if token < vocab_size) for file, ids in said.items()}
    left = {file: ids for file, ids in left.items() if ids}
    ends = tuple(dict.fromkeys(token for ids in left.values() for token in ids))
    configs = [set(ids) for file, ids in left.items() if file not in TOKENIZER_FILES]
    known = set[int]().union(*configs) or set(next(iter(left.values()), ()))
    if any(ids != known for ids in configs) or not known.issuperset(ends):
        told = "; ".join(f"{file} {', '.join(map(str, ids))}" for file, ids in left.items())
        notes.append(f"the files name different end tokens ({told}): an answer ends at any of them")
    return ends, (*notes,)

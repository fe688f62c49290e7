"""Files beside a model that are not part of it: an adapter, an optimizer's state, a copy under other names.

index.json does not list them (or there is none), and no name in them is one that the model has. Such a file is left
alone, and a note names it. A file with a single expected name is used, or refused, as a whole. Headers only.
"""

from collections.abc import Callable
from dataclasses import replace

from saccade.checkpoint.encoding import weight_of
from saccade.checkpoint.index import INDEX_FILE, Index, Unlisted
from saccade.config.file import Config
from saccade.models.parameters import Extras, Layout
from saccade.models.registry import find_family
from saccade.plan.names import list_parameters, list_unused

Expected = Callable[[str], bool]


def leave_strays(c: Config, index: Index) -> Index:
    """The Index without unlisted files of something else. If nothing in the whole checkpoint is expected, the config is
    another model's, and all stay to be told."""
    if not index.unlisted or index.listed is None:
        return index
    settled = replace(index, unlisted=(), listed=None)  # asked once: names of a large model take 0.2 s
    if len(index.unlisted) == 1 and not index.has_list:
        return settled
    is_expected = find_expected(c)
    strays = [u for u in index.unlisted if is_stray(u, is_expected)]
    names = {u.file.name for u in strays}
    rest = [index.listed.entries, *(u.entries for u in index.unlisted if u.file.name not in names)]
    if not strays or not any(is_expected(name) for entries in rest for name in entries):
        return settled
    left = index.without(names, [explain_stray(u, index.has_list) for u in strays])
    return replace(left, unlisted=(), listed=None)


def find_expected(c: Config) -> Expected:
    """Whether a name is one of this model's, of its MTP layer or of those that some publish for no use; or of a
    tensor that belongs to one, such as a scale."""
    extras = Extras(mtp=True, mtp_embed=True, mtp_head=True)
    known, unused = set[str](), tuple[str, ...]()
    for root in find_family(c.model_type).roots:
        known |= {part.source for param in list_parameters(c, root, Layout(), extras) for part in param.parts}
        unused += tuple(list_unused(c, root))
    return lambda name: name in known or weight_of(name) in known or (bool(unused) and name.startswith(unused))


def is_stray(unlisted: Unlisted, is_expected: Expected) -> bool:
    """Whether all that a file holds is foreign. What cannot be read, and what repeats listed names, is not."""
    names = (*unlisted.entries, *(p.name for p in unlisted.problems))  # a bad entry is a problem, and in no entries
    return bool(unlisted.entries) and not unlisted.known and not any(map(is_expected, names))


def explain_stray(unlisted: Unlisted, has_list: bool) -> str:
    first, *more = unlisted.entries
    what = f"none of its {len(more) + 1:,} tensors ({first}, ...)" if more else f"its one tensor ({first}) is not one"
    listed = f" is not listed by {INDEX_FILE}, and" if has_list else ":"
    return f"{unlisted.file.name}{listed} {what}{' is one' if more else ''} of this model: left alone"

"""The API reference: the modules that are in it, and the public names in them that have no docstring.

Users read the first module, those who add to Saccade read the others. pdoc makes the pages. Next: site.py.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.render

import saccade

MODULES = (
    "saccade",  # the Python API
    "saccade.errors",
    "saccade.checkpoint.encoding",
    "saccade.models.registry",
    "saccade.models.parameters",
    "saccade.plan.types",
    "saccade.kernels.types",
    "saccade.ops.interface",
    "saccade.ops.step",
)


def find_undocumented() -> list[str]:
    """Public modules, classes, functions and methods of MODULES without a docstring of their own."""
    for name in saccade.__all__:
        getattr(saccade, name)  # fetched on first use; pdoc only sees what is there
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a name that pdoc cannot find
        return [name for module in MODULES for name in walk(pdoc.doc.Module.from_name(module))]


def walk(namespace: pdoc.doc.Namespace) -> Iterator[str]:
    """Undocumented names in a module or class, itself included. What it inherits is documented elsewhere."""
    if not namespace.docstring.strip():
        yield namespace.fullname
    is_class = isinstance(namespace, pdoc.doc.Class)
    fields = getattr(namespace.obj, "__annotations__", {}) if is_class else {}
    for member in namespace.own_members if is_class else namespace.members.values():
        if member.name.startswith("_") or member.name in fields or isinstance(member, pdoc.doc.Module):
            continue
        if isinstance(member, pdoc.doc.Class):
            yield from walk(member)
        elif isinstance(member, pdoc.doc.Function) and not member.docstring.strip():
            yield member.fullname


def write_reference(folder: Path) -> None:
    """One page for each of MODULES, and their index."""
    pdoc.render.configure(docformat="markdown", search=True, show_source=True)
    first, *others = MODULES
    pdoc.pdoc(first, rf"!{first}\..*", *others, output_directory=folder)

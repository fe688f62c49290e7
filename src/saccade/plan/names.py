"""What a family's tensors are called in the files.

A family names them as if its text model were alone: `model.layers.3.`. A checkpoint that holds more than a text model
has them elsewhere, such as below `model.language_model.`. A family lists the places that are possible (`Family.roots`),
and the names in the headers say which one it is. Names only. Next: lower.py.
"""

from collections.abc import Iterable, Iterator

from saccade.config.file import Config
from saccade.models.parameters import Extras, Layout, Param, Part
from saccade.models.registry import PLAIN_ROOT, find_family


def find_root(c: Config, names: Iterable[str]) -> str:
    """What stands in the files where a family says `model.`: the first of its roots below which there are layers."""
    roots = find_family(c.model_type).roots
    if len(roots) > 1:
        names = tuple(names)
        for root in roots:
            below = root + "layers."
            if any(name.startswith(below) for name in names):
                return root
    return roots[0]


def find_layer_prefix(c: Config, names: Iterable[str], layer: int) -> str:
    """What the names of a layer's tensors begin with in the files."""
    return f"{find_root(c, names)}layers.{layer}."


def name_in_files(name: str, root: str) -> str:
    return root + name.removeprefix(PLAIN_ROOT) if name.startswith(PLAIN_ROOT) else name


def name_in_family(name: str, root: str) -> str:
    return PLAIN_ROOT + name.removeprefix(root) if name.startswith(root) else name


def list_parameters(c: Config, root: str, at: Layout, extras: Extras) -> Iterator[Param]:
    """A rank's parameters, their parts under the names of the files."""
    params = iter(find_family(c.model_type).parameters(c, at, extras))
    if root == PLAIN_ROOT:
        return params
    return (param._replace(parts=tuple([rename(part, root) for part in param.parts])) for param in params)


def rename(part: Part, root: str) -> Part:
    """Under the name of the files. Part._replace would take 0.1 s more for the 39,000 parts of GLM-5.3-Flash."""
    name, shape, take, put, view = part
    return Part(name_in_files(name, root), shape, take, put, view)


def list_unused(c: Config, root: str) -> dict[str, str]:
    """Prefixes of names in the files that some publish and no layer reads, each with the reason."""
    family = find_family(c.model_type)
    unused = {name_in_files(prefix, root): reason for prefix, reason in family.find_unused(c).items()}
    return unused | dict(family.beside)

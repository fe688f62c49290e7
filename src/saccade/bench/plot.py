"""One layer as a picture: a bar for each kernel's time, and in it the time that its bytes need.

SVG, written by hand. LAYER says what each kernel reads, in the order of their launches. Next:
profile.py for the times, bytes.py for the bytes.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from saccade.bench.bytes import HELD, Storage, count_layer
from saccade.bench.profile import fold_layer
from saccade.models.dsa.config import ModelConfig

LABELS, BARS, NUMBERS, ROW, TOP = 250, 440, 270, 30, 64  # pixels
INK, FAINT, PAPER, TIME, BYTES = "#1d2733", "#6b7785", "#fbfcfe", "#b9cbe4", "#2c5f9e"


class Launch(NamedTuple):
    label: str
    kernel: str  # its name
    reads: tuple[str, ...]  # names in bytes.count_layer
    is_always: bool = True


# A sparse layer of a decode step at batch 1, in the order of models/dsa/decoder.py.
LAYER = (
    Launch("q_a, kv_a, wk, weights_proj", "_multiply", ("qkv_a_proj", "wk_weights_proj", "norms")),
    Launch("q_b, wq_b, rows of the caches", "_project_queries", ("q_b_proj", "wq_b")),
    Launch("index logits", "_score", ("index keys",)),
    Launch("best of each 8,192", "_select_chunk", (), is_always=False),  # of longer contexts
    Launch("best of each 8,192", "_select_chunk", (), is_always=False),  # of their best
    Launch("selection, w_uk", "_select_last", ("w_uk",)),
    Launch("sparse attention", "_attend_rows", ("latent cache",)),
    Launch("its parts combined, w_uv", "_combine", ("w_uv",)),
    Launch("o_proj", "_multiply", ("o_proj",)),
    Launch("router", "_multiply", ("gate",)),
    Launch("choice of experts", "_choose", ()),
    Launch("experts' and shared gate_up", "_gate_up", ("experts.gate_up_proj", "shared_experts.gate_up_proj")),
    Launch("experts' and shared down", "_down_few", ("experts.down_proj", "shared_experts.down_proj")),
)

Bar = tuple[str, float, float]  # name, us, bytes


def list_layer(
    kernels: Sequence[tuple[str, float]],
    config: ModelConfig,
    batch: int,
    context: int,
    distinct_experts: float | None,
    storage: Storage = HELD,
    launches: Sequence[Launch] = LAYER,
) -> list[Bar]:
    """The kernels of one sparse layer out of those of a whole step. Where they are those of `launches`, each gets its
    label and its bytes; else they keep their names, and a last bar of no time has the layer's bytes."""
    if not kernels:
        return []
    layer = fold_layer(kernels)
    last = config.num_hidden_layers - 1
    counted = count_layer(config, last, batch, context, distinct_experts, storage)
    for turn in range(len(layer)):  # the layer may have been found from any of its kernels on
        turned = layer[turn:] + layer[:turn]
        matched = match([name for name, _ in turned], launches)
        if matched is not None:
            return [
                (launch.label, us, sum(counted.get(name, 0.0) for name in launch.reads))
                for launch, (_, us) in zip(matched, turned, strict=True)
            ]
    return [(shorten_kernel(name), us, 0.0) for name, us in layer] + [
        ("bytes of the layer", 0.0, sum(counted.values()))
    ]


def match(names: Sequence[str], launches: Sequence[Launch]) -> list[Launch] | None:
    """The launches that these kernels are, in order, or None: only those that are not made always may be left out."""
    matched, left = [], list(launches)
    for name in names:
        while left and left[0].kernel != name and not left[0].is_always:
            left.pop(0)
        if not left or left[0].kernel != name:
            return None
        matched.append(left.pop(0))
    return matched if not any(launch.is_always for launch in left) else None


def shorten_kernel(name: str) -> str:
    """A kernel's name without return type, template and argument list, cut to fit beside its bar."""
    plain = name.removeprefix("void ").partition("(")[0].partition("<")[0].strip() or name
    return plain if len(plain) <= 34 else "…" + plain[-33:]


def draw_layer(kernels: Sequence[Bar], bandwidth: float, title: str = "One layer of a decode step") -> str:
    """An SVG of bars (name, us, bytes): the light bar is the time, the dark one in it what the bytes take at
    `bandwidth` bytes a second."""
    floors = [nbytes / bandwidth * 1e6 for _, _, nbytes in kernels]
    longest = max([us for _, us, _ in kernels] + floors + [1e-9])
    width, height = LABELS + BARS + NUMBERS, TOP + ROW * (len(kernels) + 1) + 46
    scale = BARS / longest
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="16" y="28" font-size="16" font-weight="600">{escape(title)}</text>',
        f'<rect x="16" y="40" width="12" height="12" fill="{TIME}"/><text x="34" y="51">time, µs</text>',
        f'<rect x="110" y="40" width="12" height="12" fill="{BYTES}"/>'
        f'<text x="128" y="51">what its bytes take at {bandwidth / 1e12:.2f} TB/s</text>',
    ]
    for i, ((name, us, nbytes), floor) in enumerate(zip(kernels, floors, strict=True)):
        lines += _draw_row(TOP + ROW * i, name, us, floor, nbytes, scale)
    total, least = sum(us for _, us, _ in kernels), sum(floors)
    y = TOP + ROW * len(kernels)
    lines.append(f'<line x1="16" y1="{y + 3}" x2="{width - 16}" y2="{y + 3}" stroke="{FAINT}" stroke-width="0.5"/>')
    text = f"{total:.1f} µs; its {sum(b for _, _, b in kernels) / 1e6:.1f} MB take {least:.1f} µs"
    if total > 0:
        text += f", {least / total:.0%} of it"
    lines.append(f'<text x="{LABELS - 10}" y="{y + 24}" text-anchor="end" font-weight="600">whole layer</text>')
    lines.append(f'<text x="{LABELS}" y="{y + 24}" font-weight="600">{text}</text>')
    note = "A kernel's time is from the end of the one before it to its own end."
    lines.append(f'<text x="16" y="{height - 12}" font-size="11" fill="{FAINT}">{note}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _draw_row(y: int, name: str, us: float, floor: float, nbytes: float, scale: float) -> list[str]:
    numbers = f"{us:.1f} µs" + (f", {nbytes / 1e6:.1f} MB, {floor / us:.0%} of bandwidth" if us and nbytes else "")
    if not us:
        numbers = f"{nbytes / 1e6:.1f} MB"
    end = LABELS + max(us, floor) * scale
    return [
        f'<text x="{LABELS - 10}" y="{y + 20}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{LABELS}" y="{y + 6}" width="{us * scale:.1f}" height="20" rx="2" fill="{TIME}"/>',
        f'<rect x="{LABELS}" y="{y + 11}" width="{floor * scale:.1f}" height="10" rx="1" fill="{BYTES}"/>',
        f'<text x="{end + 8:.1f}" y="{y + 20}" font-size="12" fill="{FAINT}">{numbers}</text>',
    ]

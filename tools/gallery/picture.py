"""Draws what layers read as SVG, by hand: light and dark, with words for screen readers.

The text is a line from left to right. Four parts of it have scales of their own: what stands before the fact, the fact,
what follows, and question and answer, where each token has a column. A row is a word that is being chosen, a dot is a
token that the layer read for it. Knows no model. Next: looks.py, whose FactRead is drawn.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from tools.gallery.looks import FactRead, LayerRead, WordRead

WIDTH, LEFT, TOP, ROW, BLOCK_GAP = 1160, 212, 226, 23, 20
FAR, FACT_STEP, LAST_STEP, PART_GAP = 150, 22, 17, 14  # pixels: of a part of the text, of a token in the others
LARGEST_DOT, SMALLEST_DOT = 10.0, 1.8  # radius for all of the attention in 0.45, and for none
CHANGED_DOT, KEPT_DOT = 6.0, 3.2
KEY = (  # of draw_changes: x, radius, class, what it means
    (27, KEPT_DOT, "dot", "with both"),
    (150, CHANGED_DOT, "gone", "with BF16 keys only"),
    (335, CHANGED_DOT, "new", "with FP8 keys only"),
)
IS_FOUND, IS_NEAR = 0.2, 0.5  # shares of attention, from which on a layer reads the fact, or question and answer

STYLE = """
svg { --page: #ffffff; --ink: #17191c; --quiet: #565d66; --line: #d5d9de; --dot: #77808b;
  --fact: #b93a05; --fact-band: #ffecd9; --near: #0b57d0; --near-band: #e6effd; --good: #14713a; --bad: #b3001b;
  font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 14px; }
@media (prefers-color-scheme: dark) {
  svg { --page: #121417; --ink: #f1f3f5; --quiet: #b4bac2; --line: #353b43; --dot: #8d96a1;
    --fact: #ffa35c; --fact-band: #3b2512; --near: #86b1ff; --near-band: #17263f; --good: #6fd393; --bad: #ff8a94; }
}
text { fill: var(--ink); }
.page { fill: var(--page); } .quiet { fill: var(--quiet); } .line { stroke: var(--line); }
.title { font-size: 21px; font-weight: 700; } .strong { font-weight: 700; } .small { font-size: 12.5px; }
.dot { fill: var(--dot); } .fact { fill: var(--fact); } .near { fill: var(--near); }
.fact-band { fill: var(--fact-band); } .near-band { fill: var(--near-band); }
.good { fill: var(--good); } .bad { fill: var(--bad); }
.gone { fill: var(--page); stroke: var(--fact); stroke-width: 2; } .new { fill: var(--near); }
"""


class Places(NamedTuple):
    """Where tokens stand in the picture."""

    fact: range
    question: int
    end: int  # tokens that can be read

    @classmethod
    def of(cls, read: FactRead) -> "Places":
        return cls(read.fact, read.question, len(read.tokens) - 1)

    @property
    def fact_at(self) -> float:
        return LEFT + FAR + PART_GAP

    @property
    def after_at(self) -> float:
        return self.fact_at + FACT_STEP * len(self.fact) + PART_GAP

    @property
    def last_at(self) -> float:
        return self.after_at + FAR + PART_GAP

    @property
    def right(self) -> float:
        return self.last_at + LAST_STEP * (self.end - self.question)

    def find_x(self, place: int) -> float:
        """The middle of a token's column."""
        if place < self.fact.start:
            return LEFT + FAR * (place + 0.5) / self.fact.start
        if place < self.fact.stop:
            return self.fact_at + FACT_STEP * (place - self.fact.start + 0.5)
        if place < self.question:
            return self.after_at + FAR * (place - self.fact.stop + 0.5) / (self.question - self.fact.stop)
        return self.last_at + LAST_STEP * (place - self.question + 0.5)

    def name_part(self, place: int) -> str:
        """The class of a dot."""
        return "fact" if place in self.fact else "near" if place >= self.question else "dot"


def draw_reads(read: FactRead, title: str, told: str) -> str:
    """What each layer read for each word; dots have the size of their attention. `told`: all of it in words."""
    places = Places.of(read)
    lines = ["A row is a word of the answer while it is chosen; a dot is a token that the layer reads for it,"]
    lines.append("larger where it gets more of the attention. Each layer may read 16 tokens.")
    body = [*draw_head(read, places, title, lines, "on the fact")]
    for layer, y in list_blocks(read.words):
        rows = [word.layers[layer] for word in read.words]
        body += draw_block(read.words, places, layer, y, describe(rows, places))
        for i, row in enumerate(rows):
            at = y + ROW * i
            body += [draw_dot(places, place, share, at) for place, share in zip(*row, strict=True) if place >= 0]
            share = sum_share(row, places.fact)
            kind = "fact strong" if share >= IS_FOUND else "quiet"
            body.append(f'<text x="{WIDTH - 20}" y="{at + 5}" text-anchor="end" class="{kind}">{share:.0%}</text>')
    return finish(body, read, title, told)


def draw_changes(before: FactRead, after: FactRead, kept: Sequence[float], title: str, told: str) -> str:
    """Which of the tokens that each layer reads are others in `after`. `kept`: by layer, the share that is the same in
    the whole text."""
    places = Places.of(before)
    lines = ["A row is a word of the answer while it is chosen; a dot is a token that the layer reads for it"]
    body = [*draw_head(before, places, title, lines, "the same")]
    for x, radius, kind, text in KEY:
        body.append(f'<circle cx="{x}" cy="80" r="{radius}" class="{kind}"/>')
        body.append(f'<text x="{x + 12}" y="85" class="quiet">{text}</text>')
    for layer, y in list_blocks(before.words):
        body += draw_block(before.words, places, layer, y, [f"{kept[layer]:.1%} the same", "in the whole text"])
        for i, (one, other) in enumerate(zip(before.words, after.words, strict=True)):
            at, ours, theirs = y + ROW * i, set(one.layers[layer].places), set(other.layers[layer].places)
            for place in sorted(ours & theirs):
                body.append(draw_mark(places, place, at, places.name_part(place).replace("near", "dot"), KEPT_DOT))
            body += [draw_mark(places, place, at, "gone", CHANGED_DOT) for place in sorted(ours - theirs)]
            body += [draw_mark(places, place, at, "new", CHANGED_DOT) for place in sorted(theirs - ours)]
            kind = "strong" if ours != theirs else "quiet"
            text = f"{len(ours & theirs)} of {len(ours)}"
            body.append(f'<text x="{WIDTH - 20}" y="{at + 5}" text-anchor="end" class="{kind}">{text}</text>')
    return finish(body, after, title, told)


def list_blocks(words: Sequence[WordRead]) -> Iterator[tuple[int, int]]:
    """Each layer, and where its first row is."""
    for layer in range(len(words[0].layers)):
        yield layer, TOP + ROW // 2 + layer * (ROW * len(words) + BLOCK_GAP)


def draw_head(read: FactRead, p: Places, title: str, lines: Sequence[str], right: str) -> Iterator[str]:
    """The title, what is shown, the bands of the four parts, and the words of two of them."""
    height = find_height(read)
    yield f'<rect width="{WIDTH}" height="{height}" class="page"/>'
    yield f'<text x="20" y="38" class="title">{escape(title)}</text>'
    for i, line in enumerate(lines):
        yield f'<text x="20" y="{65 + 20 * i}" class="quiet">{escape(line)}</text>'
    bottom = height - 76
    yield draw_band(p.fact_at, p.after_at - PART_GAP, bottom, "fact-band")
    yield draw_band(p.last_at, p.right, bottom, "near-band")
    for x, kind, text in (
        (p.fact_at, "fact", "the fact that is asked for"),
        (p.last_at, "near", "the question, and the answer so far"),
    ):
        yield f'<text x="{x}" y="{TOP - 100}" class="{kind} strong">{text}</text>'
    for start, count, text in ((LEFT, p.fact.start, "tokens"), (p.after_at, p.question - p.fact.stop, "more")):
        yield f'<text x="{start + FAR / 2}" y="{TOP - 26}" text-anchor="middle" class="quiet">{count:,} {text}</text>'
        yield draw_ruler(start, TOP - 12)
    for first, last, kind in ((p.fact.start, p.fact.stop, "fact"), (p.question, p.end, "near")):
        for place in range(first, last):
            word = read.tokens[place].replace("\n", "⏎").strip() or "␣"
            x, y = p.find_x(place) + 4, TOP - 12
            turned = f"translate({x:.1f} {y}) rotate(-58)"
            yield f'<text transform="{turned}" class="{kind} small strong">{escape(word)}</text>'
    yield f'<text x="{WIDTH - 20}" y="{TOP - 10}" text-anchor="end" class="quiet">{right}</text>'


def draw_band(left: float, right: float, bottom: float, kind: str) -> str:
    return f'<rect x="{left}" y="{TOP - 6}" width="{right - left}" height="{bottom - TOP + 6}" rx="6" class="{kind}"/>'


def draw_ruler(start: float, y: float) -> str:
    """A hint of a text too long to be read."""
    dashes = "".join(f"M{start + 4 + 6 * i} {y}h3.5" for i in range(FAR // 6))
    return f'<path d="{dashes}" class="line" stroke-width="3"/>'


def draw_block(words: Sequence[WordRead], p: Places, layer: int, y: int, notes: Sequence[str]) -> Iterator[str]:
    """The names and lines of a layer's rows."""
    yield f'<text x="20" y="{y + 5}" class="strong">layer {layer}</text>'
    for i, note in enumerate(notes):
        yield f'<text x="20" y="{y + 24 + 17 * i}" class="quiet small">{escape(note)}</text>'
    for i, word in enumerate(words):
        at = y + ROW * i
        yield f'<line x1="{LEFT}" x2="{p.right}" y1="{at}" y2="{at}" class="line"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 5}" text-anchor="end" class="small strong">{escape(word.word)}</text>'


def draw_dot(p: Places, place: int, share: float, y: int) -> str:
    radius = max(LARGEST_DOT * (share / 0.45) ** 0.5, SMALLEST_DOT)
    return draw_mark(p, place, y, p.name_part(place), radius)


def draw_mark(p: Places, place: int, y: int, kind: str, radius: float) -> str:
    return f'<circle cx="{p.find_x(place):.1f}" cy="{y}" r="{radius:.1f}" class="{kind}"/>'


def describe(rows: Sequence[LayerRead], p: Places) -> list[str]:
    """What a layer reads, in two words or three, on two lines."""
    fact = sum(sum_share(row, p.fact) for row in rows) / len(rows)
    near = sum(sum_share(row, range(p.question, p.end)) for row in rows) / len(rows)
    if fact >= IS_FOUND:
        return ["reads the fact"]
    return ["reads question", "and answer"] if near >= IS_NEAR else ["reads here", "and there"]


def sum_share(row: LayerRead, where: range) -> float:
    return sum(share for place, share in zip(*row, strict=True) if place in where)


def find_height(read: FactRead) -> int:
    layers = len(read.words[0].layers)
    return TOP + layers * (ROW * len(read.words) + BLOCK_GAP) + 76


def finish(body: Sequence[str], read: FactRead, title: str, told: str) -> str:
    """The whole file, with the answer below."""
    height = find_height(read)
    sign, kind, verdict = ("✓", "good", "right") if read.is_right else ("✗", "bad", "wrong")
    text = (
        f'<text x="20" y="{height - 30}"><tspan class="quiet">{escape(f"Given “{read.begin}”, it goes on: ")}</tspan>'
        f'<tspan class="strong">{escape(" ".join(word.word for word in read.words))}</tspan>'
        f'<tspan class="{kind} strong" dx="14">{sign} {verdict}</tspan></text>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-labelledby="title desc">'
    )
    names = [f'<title id="title">{escape(title)}</title>', f'<desc id="desc">{escape(told)}</desc>']
    return "\n".join([head, *names, f"<style>{STYLE}</style>", *body, text, "</svg>", ""])

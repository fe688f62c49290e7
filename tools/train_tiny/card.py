"""The model card: README.md of the exported folder, with the scores of the trainer's own evaluation."""

import json
from math import prod
from pathlib import Path

from tools.train_tiny import config
from tools.train_tiny.weights import list_shapes

CARD = """# Saccade's bundled model

A test instrument: a language model of {millions} million parameters with exactly the architecture of DeepSeek-V3.2
(latent attention, a lightning indexer that selects {topk} tokens, mixture of experts with groups, one multi-token
prediction layer) in exactly the layout in which DeepSeek publishes it (FP8 e4m3, power-of-two scales a 128x128 block).
It exists so that the accuracy of an engine can be *measured* where a wrong indexer hurts: its answers depend on tokens
thousands of positions away, which attention only sees if the indexer selects them.

It can do three things, in the English of its training texts and in nothing else:

- **words**: solve a word problem in 1 to 4 steps: `Tom has 12 apples. He buys 7 more. How many apples does Tom have?`
- **recall**: answer a question about one of many facts in up to 4,096 tokens of distracting sentences;
- **story**: solve a word problem whose sentences are scattered over such a text.

It answers with the steps, a line each, and `#### ` before the result. Numbers go from 0 to 199. Anything else that
you ask it will get nonsense.

It has no memory. Its `chat_template.jinja` asks the last question of a chat, about the text of the system message if
there is one.

Trained from scratch by `tools/train_tiny` of the Saccade repository, on texts that a program generates: {steps} steps,
first with dense attention, then with attention over the indexer's selection only, the last part with FP8 rounding.
No question of the tests can have been asked in training: a hash of what it depends on decides to which of the two it
belongs.
Input channels were rescaled by powers of two, 128 at a time, so that the scales of each indexer's `wk` differ by at
least 2^6; the function is unchanged. The last 128 of the 512 residual channels hold the token's embedding through all
layers, and no layer writes there: an indexer that lost its scales sees which token stands at a place, not what it is
about. Nothing in the training shows it a broken indexer.

| task | tokens | problems | answered exactly | drafts accepted |
|---|---|---|---|---|
{rows}

Measured in bf16 on held-out problems, greedy, by the trainer's own evaluation: the whole answer, steps included, must
be right to the letter. Drafts are the MTP layer's, within the answers.

To train it again, on a machine with a GPU, then to export it:

    python -m tools.train_tiny.train --state STATE --out PIECES [--seconds 480]
    python -m tools.train_tiny.export PIECES DIRECTORY

The first goes on where it stopped if it is called again with the same STATE. `--rehearse --device cpu` runs ten steps
of each phase. The plot of the losses needs matplotlib.

Licence: that of the repository.
"""


def write_card(folder: Path, scores: Path) -> None:
    c = config.load_config()
    millions = round(sum(prod(shape) for shape in list_shapes(c).values()) / 1e6, 1)
    found = json.loads(scores.read_text(encoding="utf-8"))
    rows = "\n".join(
        f"| {s['task']} | {s['length']:,} | {s['problems']} | {s['exact']:.1%} | {s['accepted']:.0%} |"
        for s in found["scores"]
    )
    text = CARD.format(millions=millions, topk=c.index_topk, steps=f"{found['step']:,}", rows=rows)
    (folder / "README.md").write_text(text, encoding="utf-8")

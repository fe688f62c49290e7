"""`python -m tools.gallery`: the pictures of docs/gallery.md, from the bundled model. Half a minute on one core.

Ends with an error if a picture would not show what its title says.
"""

import argparse
from pathlib import Path

from saccade.api.llm import LLM
from saccade.eval.tasks import TaskQuestion, draw_test
from tools.gallery.looks import FactRead, count_kept, lose_scales, read_fact
from tools.gallery.picture import IS_FOUND, draw_changes, draw_reads, sum_share

DOCS = Path(__file__).parents[2] / "docs"
QUESTION, PIECES = (
    2,
    4050,
)  # of the held-out questions the third: of the first six the fact that lies most in the middle


def find_share(read: FactRead, layer: int) -> float:
    """Of a layer's attention, what the fact gets, the mean over the words."""
    return sum(sum_share(word.layers[layer], read.fact) for word in read.words) / len(read.words)


def draw_all(asked: TaskQuestion) -> dict[str, str]:
    """Every picture, by the name of its file."""
    intact = read_fact(LLM(mtp=False), asked)
    fp8 = read_fact(LLM(mtp=False, index_cache="fp8"), asked)
    broken_llm = LLM(mtp=False)
    lose_scales(broken_llm)
    broken = read_fact(broken_llm, asked)
    last = len(intact.words[0].layers) - 1
    assert intact.is_right and fp8.is_right and not broken.is_right
    assert find_share(intact, last) > IS_FOUND > max(find_share(broken, layer) for layer in range(last + 1))
    share = find_share(intact, last)
    kept = count_kept(intact, fp8)
    shares = ", ".join(f"{part:.1%} in layer {layer}" for layer, part in enumerate(kept))
    told_words = ", ".join(word.word for word in intact.words)
    return {
        "gallery-fact.svg": draw_reads(
            intact,
            f"The last layer finds one fact among {intact.prompt:,} tokens",
            f"For each word of the answer ({told_words}) and each of the four layers, the 16 tokens that it reads. "
            f"Layer 0 reads here and there, layers 1 and 2 read the question and the answer so far. Layer 3 reads the "
            f"fact: of its attention {share:.0%} goes there, most of it to the very word that is written.",
        ),
        "gallery-broken.svg": draw_reads(
            broken,
            "With the scales of its indexers lost, the same model reads past the fact",
            f"The same text and question. The last layer gives the fact {find_share(broken, last):.0%} of attention. "
            f"The words that come are {', '.join(word.word for word in broken.words)}.",
        ),
        "gallery-fp8.svg": draw_changes(
            intact,
            fp8,
            kept,
            "Index keys in FP8: a few other tokens, the same answer",
            f"The same rows; marked is what only one of both reads. Over the whole text the same tokens are selected: "
            f"{shares}. The fact is read by both.",
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS)
    out = parser.parse_args().out
    for name, picture in draw_all(draw_test("recall", QUESTION, PIECES)).items():
        (out / name).write_text(picture, "utf-8")
        print(out / name)


if __name__ == "__main__":
    main()

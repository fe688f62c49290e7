"""The pictures of docs/gallery.md: what they are drawn from is what an engine captures, and each dot is where it belongs."""

import xml.etree.ElementTree as ElementTree

import pytest

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams
from saccade.eval.tasks import draw_test
from tools.gallery.__main__ import DOCS, QUESTION, draw_all
from tools.gallery.looks import FactRead, count_kept, lose_scales, read_fact
from tools.gallery.picture import Places, draw_changes, draw_reads

SVG = "{http://www.w3.org/2000/svg}"
ASKED = draw_test("recall", 0, 192)


@pytest.fixture(scope="module")
def read() -> FactRead:
    return read_fact(LLM(mtp=False, threads=1), ASKED)


def test_what_is_drawn_is_what_an_engine_captures(read: FactRead) -> None:
    llm = LLM(mtp=False)
    assert (
        read.is_right and read.answer == ASKED.answer.strip() and [w.word for w in read.words] == ASKED.result.split()
    )
    assert "".join(read.tokens[i] for i in read.fact).lower() == " " + ASKED.answer.split("\n")[1].lower()
    assert "".join(read.tokens[read.question : read.prompt]).strip() == ASKED.prompt.rpartition(". ")[2]
    forced = llm.encode(ASKED.prompt + "\n" + read.begin)
    made = llm.generate([forced], SamplingParams(temperature=0.0, max_tokens=3), capture_selection=True)[0]
    assert made.selections is not None
    for i, word in enumerate(read.words):
        for layer, rows in zip(word.layers, made.selections, strict=True):
            assert layer.places == rows[len(forced) - 1 + i].tolist() and sum(layer.shares) == pytest.approx(
                1, abs=0.01
            )
        copied = read.tokens.index(" " + word.word, read.fact.start)
        last = word.layers[-1]
        assert last.places[last.shares.index(max(last.shares))] == copied  # the last layer copies the word
    assert count_kept(read, read) == [1.0] * 4


def test_a_lost_scale_changes_what_is_read(read: FactRead) -> None:
    llm = LLM(mtp=False, threads=1)
    lose_scales(llm)
    assert max(count_kept(read, read_fact(llm, ASKED))) < 0.9


def test_each_dot_stands_in_its_part(read: FactRead) -> None:
    picture = ElementTree.fromstring(draw_reads(read, "Title <&>", "All of it in words"))
    names = {child.tag.removeprefix(SVG): child.text for child in picture}
    assert (names["title"], names["desc"], picture.get("role")) == ("Title <&>", "All of it in words", "img")
    dots, places = picture.findall(f"{SVG}circle"), Places.of(read)
    assert len(dots) == 16 * 4 * len(read.words)
    for dot in dots:
        x = float(dot.get("cx", ""))
        part = {"fact": (places.fact_at, places.after_at), "near": (places.last_at, places.right)}
        first, last = part.get(dot.get("class", ""), (0.0, places.last_at))
        assert first < x < last and (dot.get("class") != "dot" or not places.fact_at < x < places.after_at)
    order = [places.find_x(place) for place in range(places.end)]
    assert order == sorted(set(order))


def test_what_one_side_reads_alone_is_marked(read: FactRead) -> None:
    word = read.words[0]
    other = word.layers[1]._replace(places=[place + (i == 3) * 1 for i, place in enumerate(word.layers[1].places)])
    moved = set(other.places) - set(word.layers[1].places)
    changed = word._replace(layers=[word.layers[0], other, *word.layers[2:]])
    picture = draw_changes(read, read._replace(words=[changed, *read.words[1:]]), [1.0, 0.5, 1.0, 1.0], "t", "d")
    found = [dot.get("class") for dot in ElementTree.fromstring(picture).findall(f"{SVG}circle")][3:]  # behind the key
    assert (found.count("new"), found.count("gone")) == (len(moved), len(moved)) and len(moved) == 1
    assert "15 of 16" in picture and "50.0% the same" in picture


@pytest.mark.soak
def test_the_pictures_are_those_of_the_command() -> None:
    """To the letter of their words; attention rounds otherwise on other machines."""
    for name, picture in draw_all(draw_test("recall", QUESTION, 4050)).items():
        texts = [
            ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
            for svg in (picture, (DOCS / name).read_text())
        ]
        assert texts[0] == texts[1], name

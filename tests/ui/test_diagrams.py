"""Every tab's drawing: there, well formed, said in words, and inked by the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from engines.base import Engine
from experiments import EXPERIMENTS
from ui.diagrams import WIDTH, diagram, engine_colours
from ui.results import RESULTS

NAMES = [*(experiment.name for experiment in EXPERIMENTS), RESULTS]
LETTER = 5.9  # units that a letter of the drawings' small type takes, at most


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_has_a_title_and_a_description_that_its_role_points_at(name: str) -> None:
    drawing = ElementTree.fromstring(diagram(name))
    said = {part.get("id"): part.text for part in drawing if part.tag in ("title", "desc")}
    assert drawing.get("role") == "img"
    assert all(said[part] for part in str(drawing.get("aria-labelledby")).split())


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_brings_no_colour_of_its_own_and_stays_within_its_frame(name: str) -> None:
    drawing = ElementTree.fromstring(diagram(name))
    assert not any(part.get("fill") or part.get("style") for part in drawing.iter())
    for box in drawing.iter("rect"):
        assert float(box.get("x", 0)) >= 0 and float(box.get("x", 0)) + float(box.get("width", 0)) <= WIDTH
    for words in drawing.iter("text"):
        assert float(words.get("x", 0)) + LETTER * len(words.text or "") <= WIDTH or "mid" in words.get("class", "")


def test_an_experiment_without_a_drawing_has_none() -> None:
    assert diagram("telepathy") == ""


def test_the_engines_colours_come_in_as_variables_and_hostile_ones_stay_words(
    scripted: Callable[..., Engine],
) -> None:
    one, two = scripted("one"), replace(scripted("two"), colour="red'><script>")
    assert engine_colours([one]) == f"--engine-1:{one.colour}"
    assert "<" not in engine_colours([one, two])

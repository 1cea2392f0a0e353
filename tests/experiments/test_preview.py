from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image

from experiments import EXPERIMENTS
from experiments.library import RECORDINGS, Library
from experiments.preview import _lighter, _number, _plain, preview_png
from experiments.report import commands_text
from experiments.result import ExperimentResult
from tests.experiments.test_result import result_of

LIBRARY = Library(RECORDINGS, RECORDINGS)


def recorded(experiment: str) -> ExperimentResult:
    return LIBRARY.load(LIBRARY.entries(experiment)[0].id)


def picture(result: ExperimentResult) -> Image.Image:
    return Image.open(io.BytesIO(preview_png(result))).convert("RGB")


def pixels(image: Image.Image, colour: str) -> int:
    wanted = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return sum(count for count, found in image.getcolors(1 << 20) if found == wanted)


@pytest.mark.parametrize("experiment", [one.name for one in EXPERIMENTS])
def test_each_experiment_s_recording_has_a_picture_with_its_engines_in_it(experiment: str) -> None:
    result = recorded(experiment)

    image = picture(result)

    assert image.size == (1200, 630)
    for row in result.engines:
        colour = _lighter(row.colour) if row.variant else row.colour
        assert row.unavailable or pixels(image, colour) > 200, row.title


def test_a_bar_is_as_long_as_its_value() -> None:
    result = recorded("baseline")
    image = picture(result)

    # tok/s: vLLM 222, HF Transformers 102, SGLang 74; the bars are equally thick, so their areas have these ratios.
    areas = {row.name: pixels(image, row.colour) for row in result.engines}
    assert areas["transformers"] / areas["vllm"] == pytest.approx(102 / 222, rel=0.05)
    assert areas["sglang"] / areas["vllm"] == pytest.approx(74 / 222, rel=0.05)


def test_a_run_without_answers_has_a_picture_of_words() -> None:
    assert picture(result_of([])).size == (1200, 630)


@pytest.mark.parametrize("hostile", ["x" * 5000, "\u202e" + "abc " * 900, "\x1b[31m<b>&amp;", "字" * 50, ""])
def test_whatever_a_model_is_called_the_picture_is_drawn(hostile: str) -> None:
    result = recorded("baseline")
    rows = tuple(replace(row, label=hostile, colour="red") for row in result.engines)

    image = picture(replace(result, model=hostile, labels=(hostile,), engines=rows))

    assert image.size == (1200, 630)


def test_words_keep_only_letters_that_the_font_has() -> None:
    assert _plain("2.15× (1.93–2.41)…") == "2.15x (1.93-2.41)..."
    assert _plain("a\u202eb\x1b字") == "ab"


@pytest.mark.parametrize(("value", "words"), [(4813.4, "4,813"), (74.36, "74.4"), (0.5, "0.5")])
def test_numbers_have_three_digits(value: float, words: str) -> None:
    assert _number(value) == words


def test_the_commands_are_those_that_served_each_engine() -> None:
    result = recorded("baseline")

    told = commands_text(result)

    for row in result.engines:
        assert row.command is not None
        assert f"# {row.title} {row.version}\n{row.command}\n" in told
    assert commands_text(replace(result, engines=tuple(replace(row, command=None) for row in result.engines))) == ""

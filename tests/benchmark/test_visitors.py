"""Many visitors on the real page: none of them waits, the line is kept, and the page does not grow."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from benchmark.visitors import (
    MEBIBYTE,
    STALL_SECONDS,
    Sample,
    Seen,
    Stream,
    make_recordings,
    order_violations,
    quantile,
    running_page,
    slope,
    summary,
    visit,
)


def run(asked: float, joined: float, started: float) -> Stream:
    return Stream("run", 0.0, asked, joined, started)


def test_a_run_that_overtakes_another_breaks_the_order_and_one_asked_for_at_the_same_moment_does_not() -> None:
    assert order_violations([run(0, 1, 10), run(2, 3, 11), run(4, 5, 12)]) == 0
    assert order_violations([run(0, 1, 11), run(2, 3, 10), run(4, 5, 12)]) == 1
    assert order_violations([run(0, 3, 11), run(2, 4, 10)]) == 0  # nobody can tell which of them came first


def test_a_recordings_own_silence_is_no_stall() -> None:
    stream = Stream("watch", 2.0, 0.0, gaps=[0.1, 2.3])
    assert stream.longest == pytest.approx(0.3)


def test_memory_that_grows_has_a_slope_and_what_came_before_does_not_count() -> None:
    sizes = [(0.0, 900), (60.0, 100), (120.0, 103), (180.0, 106)]
    samples = [Sample(at, size * MEBIBYTE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) for at, size in sizes]
    assert slope(samples, after=60.0) == pytest.approx(3.0)


def test_quantiles_are_values_that_were_seen() -> None:
    assert (quantile([3.0, 1.0, 2.0], 0.5), quantile([3.0, 1.0, 2.0], 1.0)) == (2.0, 3.0)


@pytest.mark.browser
def test_ten_visitors_wait_for_nothing_keep_their_line_and_fill_no_memory(tmp_path: Path) -> None:
    recordings = make_recordings(tmp_path / "recordings")
    seen = Seen()
    with running_page(tmp_path) as (url, process):
        app = psutil.Process(process.pid)
        asyncio.run(visit(url, app, tmp_path / "temporary", recordings, visitors=10, seconds=60.0, seen=seen))
    told = summary(seen)
    assert process.returncode == 0
    assert told["failures"] == told["run"]["problems"] == told["watch"]["problems"] == []
    assert told["run"]["ended"] >= 10 and told["watch"]["streams"] >= 10
    assert all(one.started is not None and one.ended is not None for one in seen.streams if one.doing == "run")
    stalls = [round(one.longest, 2) for one in seen.streams if one.longest > STALL_SECONDS]
    assert stalls == []
    assert told["order_violations"] == 0
    early, late = (max(one.rss for one in seen.samples[part]) for part in (slice(20, 35), slice(-15, None)))
    assert late - early < 200 * MEBIBYTE
    assert seen.samples[-1].temporary_bytes < 400 * MEBIBYTE
    assert "Traceback" not in (tmp_path / "app.log").read_text()

"""`python -m experiments`, with scripted engines in the place of the real ones."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines.base import Engine
from experiments import baseline, concurrency, speculation
from experiments.__main__ import main
from experiments.base import Experiment
from experiments.result import ExperimentResult
from tests.conftest import wait_until

MakeEngine = Callable[..., Engine]
PROJECT = Path(__file__).parent.parent.parent
SHORT = ["--repeats", "1", "--warmups", "0", "--tokens", "6"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)  # the command line sets its own
    left = [child for child in psutil.Process().children(recursive=True) if "engines.scripted" in child.cmdline()]
    assert left == []


def saved(folder: Path) -> ExperimentResult:
    (path,) = folder.iterdir()
    return ExperimentResult.from_json(path.read_text(encoding="utf-8"))


def with_defaults(experiment: Experiment, **defaults: Any) -> Experiment:
    """The experiment as `all` runs it, with other settings by default: short ones, so that it takes no minutes."""
    short = {"repeats": 1, "warmups": 0, "max_tokens": 6, "levels": "1, 2", "spacing_ms": 10, **defaults}
    settings = [replace(one, default=short.get(one.name, one.default)) for one in experiment.settings]
    return replace(experiment, settings=tuple(settings))


BASELINE, CONCURRENCY = with_defaults(baseline.EXPERIMENT), with_defaults(concurrency.EXPERIMENT)


def test_a_run_prints_its_table_and_writes_its_json(
    scripted: MakeEngine, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    engines = (scripted("one"), scripted("two"))
    options = ["baseline", "--model", model, "--out", str(out), "--prompt", "Go.", "--race", "--exact-length", *SHORT]
    assert main(options, engines) == 0
    result = saved(out)
    assert [row.name for row in result.engines] == ["one", "two"]
    assert [row.metrics.output_tokens for row in result.requests] == [6, 6]
    settings = result.settings
    assert (settings["prompt"], settings["race"], settings["fixed_length"]) == ("Go.", True, True)
    assert (settings["repeats"], settings["warmups"], settings["max_tokens"]) == (1, 0, 6)
    assert result.model == "inference-explainer-15M" and "knows nothing else" in result.model_note
    printed = capsys.readouterr().out
    assert printed.startswith("Engine")
    assert "One decodes" in printed or "Two decodes" in printed
    assert result.model_note in printed
    assert f"Written to {out / result.id}.json" in printed


def test_only_the_engines_that_were_asked_for_run_and_each_only_once(
    scripted: MakeEngine, model: str, tmp_path: Path
) -> None:
    asked = ["--engine", "two", "--engine", "two"]
    options = ["baseline", *asked, "--model", model, "--out", str(tmp_path / "results"), *SHORT]
    assert main(options, (scripted("one"), scripted("two"))) == 0
    result = saved(tmp_path / "results")
    assert [row.name for row in result.engines] == ["two"]
    assert len(result.requests) == 1


def test_a_run_that_measured_nothing_keeps_its_result_and_exits_with_one(
    scripted: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["baseline", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "results"), *SHORT]
    assert main(options, (scripted("quick"),)) == 1
    reason = f"There is no model in {tmp_path / 'nowhere'}: there is no such folder."
    assert saved(tmp_path / "results").engines[0].error == reason
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "Repeats must be a whole number from 1 to 20, not 0."),
        (["--warmups", "-1"], "Warm-ups must be a whole number from 0 to 20, not -1."),
        (["--tokens", "99999"], "Answer length must be a whole number from 1 to 2048, not 99999."),
        (["--prompt", " "], "Type a prompt first: there is nothing to answer."),
    ],
)
def test_a_setting_that_cannot_be_used_exits_with_two_and_the_reason(
    scripted: MakeEngine, model: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["baseline", "--model", model, *options], (scripted("quick"),)) == 2
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    "options", [["bake"], ["baseline", "--engine", "llamafile"], ["baseline", "--repeats", "many"], []]
)
def test_a_word_that_it_does_not_know_exits_with_two(
    scripted: MakeEngine, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options, (scripted("quick"),))
    assert caught.value.code == 2
    assert "usage: python -m experiments" in capsys.readouterr().err


def test_all_goes_on_where_it_was_broken_off_and_again_measures_anew(
    scripted: MakeEngine,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "bakeoff")
    out = tmp_path / "results"
    options = ["all", "--model", model, "--out", str(out)]
    engines = (scripted("one"), scripted("two"))
    assert main(options, engines, (BASELINE,)) == 0
    (first,) = out.iterdir()
    capsys.readouterr()

    assert main(options, engines, (BASELINE, CONCURRENCY)) == 0
    (second,) = set(out.iterdir()) - {first}
    assert second.name.startswith("concurrency-")
    skipped = f"Baseline: measured already, in {first}; --again measures anew"
    assert skipped in caplog.messages
    printed = capsys.readouterr().out
    assert f"Written to {second}" in printed and str(first) not in printed

    # Nothing is left to measure: engines that cannot even start are not asked to.
    caplog.clear()
    dead = (scripted("one", fault="exit at start"), scripted("two", fault="exit at start"))
    assert main(options, dead, (BASELINE, CONCURRENCY)) == 0
    assert caplog.messages == [skipped, f"Concurrency: measured already, in {second}; --again measures anew"]
    assert capsys.readouterr().out == ""

    assert main([*options, "--again"], engines, (BASELINE,)) == 0
    assert len(list(out.glob("baseline-*.json"))) == 2


def test_one_experiment_by_name_is_measured_whatever_is_there(scripted: MakeEngine, model: str, tmp_path: Path) -> None:
    options = ["baseline", "--model", model, "--out", str(tmp_path / "results"), *SHORT]
    for count in (1, 2):
        assert main(options, (scripted("quick"),)) == 0
        assert len(list((tmp_path / "results").iterdir())) == count


def test_all_measures_again_what_failed_and_exits_with_one_as_long_as_it_fails(
    scripted: MakeEngine, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    options = ["all", "--model", model, "--out", str(out)]
    failing = scripted("quick", fault="http 500")
    for count in (1, 2):
        assert main(options, (failing,), (BASELINE,)) == 1
        assert len(list(out.iterdir())) == count


def test_a_plan_that_cannot_be_run_here_keeps_no_later_one_from_running(
    scripted: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "model"
    bare.mkdir()
    (bare / "config.json").write_text("{}")  # a model without a draft
    out = tmp_path / "results"
    options = ["all", "--model", str(bare), "--out", str(out)]
    impossible = with_defaults(speculation.EXPERIMENT, method="draft_model")
    for _ in range(2):  # what was measured then is not measured again, and the worst exit code stays
        assert main(options, (scripted("quick"),), (impossible, BASELINE)) == 2
        assert saved(out).experiment == "baseline"
        assert "This model brings no draft model." in capsys.readouterr().err


def test_a_plain_kill_ends_the_run_and_its_engines_in_order(model: str, tmp_path: Path) -> None:
    program = (
        "import sys; from engines.scripted import SCRIPTED_ENGINES; from experiments.__main__ import main; "
        "sys.exit(main(sys.argv[1:], SCRIPTED_ENGINES[:1]))"
    )
    options = ["baseline", "--model", model, "--out", str(tmp_path / "results"), "--tokens", "2000"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *options], cwd=PROJECT, env=os.environ, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "ready" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(15) == 130
        assert "Stopped." in process.stderr.read().splitlines()
    assert children
    wait_until(lambda: not any(child.is_running() for child in children), 5)


def test_random_weights_are_labelled_in_the_result_and_answers_have_an_exact_length(
    scripted: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["baseline", "--random-weights", "qwen3.5-4b", "--out", str(tmp_path / "results"), *SHORT]
    assert main(options, (scripted("quick"),)) == 0
    result = saved(tmp_path / "results")
    assert result.model == "Qwen3.5-4B (random weights)"
    assert "random weights: speed is real, text is not" in result.labels
    assert result.settings["fixed_length"] is True
    assert result.engines[0].config["random_weights"] is True
    assert "random weights: speed is real, text is not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random-weights", "qwen3.5-4b", "--model", "x"], "it goes with neither --model nor --host."),
        (["--random-weights", "qwen3.5-4b", "--host", "rehearsal"], "it goes with neither --model nor --host."),
        (["--together", "--host", "rehearsal"], "--together is for engines that share this machine's GPU"),
    ],
)
def test_options_that_do_not_go_together_exit_with_two_and_the_reason(
    scripted: MakeEngine, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["baseline", *options], (scripted("quick"),)) == 2
    assert message in capsys.readouterr().err


def test_acceptance_is_not_simulated_for_a_real_model(
    scripted: MakeEngine, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["speculation", "--model", model, "--simulated-acceptance", "1.5", "--out", str(tmp_path / "results")]
    assert main(options, (scripted("quick"),)) == 2
    assert "Acceptance is simulated only for a model with random weights" in capsys.readouterr().err


def test_all_takes_settings_too_and_leaves_each_experiment_its_own_defaults(
    scripted: MakeEngine, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    options = ["all", "--model", model, "--out", str(out), "--tokens", "9", "--levels", "2"]
    assert main(options, (scripted("quick"),), (BASELINE, CONCURRENCY)) == 0
    results = [ExperimentResult.from_json(path.read_text(encoding="utf-8")) for path in sorted(out.iterdir())]
    assert [(one.experiment, one.settings["max_tokens"]) for one in results] == [("baseline", 9), ("concurrency", 9)]
    assert [one.settings["repeats"] for one in results] == [1, 1]  # the short defaults of this test
    assert results[1].settings["levels"] == [2]
    prompts = {one.settings["prompt"] for one in results}
    assert prompts == {setting.default for setting in BASELINE.settings if setting.name == "prompt"}


def test_a_run_that_is_killed_leaves_what_it_had_measured_and_is_measured_again(model: str, tmp_path: Path) -> None:
    program = (
        "import sys; import experiments.run; experiments.run.KEEP_SECONDS = 0.0; "
        "from engines.scripted import SCRIPTED_ENGINES; from experiments.__main__ import main; "
        "sys.exit(main(sys.argv[1:], SCRIPTED_ENGINES[1:2]))"
    )
    out = tmp_path / "results"
    options = ["baseline", "--model", model, "--out", str(out), "--tokens", "20", "--repeats", "20", "--warmups", "0"]
    command = [sys.executable, "-c", program, *options]
    with subprocess.Popen(command, cwd=PROJECT, env=os.environ, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: out.is_dir() and any(out.glob("*.json")), 30)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    result = saved(out)
    assert result.stopped_early and 0 < len(result.requests) < 20
    assert not any(row.timeline.error for row in result.requests)
    wait_until(lambda: not any(child.is_running() for child in children), 10)


# A series


def write_series(folder: Path, text: str) -> str:
    file = folder / "series.txt"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_series_runs_its_lines_with_engines_that_stay_loaded_and_goes_on_where_it_was_broken_off(
    scripted: MakeEngine, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = "# two of a kind\n\nbaseline --repeats 1 --warmups 0 --tokens 6\n"
    text += "baseline --engine two --repeats 2 --warmups 0 --tokens 4  # the second alone\n"
    out = tmp_path / "results"
    options = ["series", write_series(tmp_path, text), "--model", model, "--out", str(out)]
    engines = (scripted("one"), scripted("two"))
    assert main(options, engines, (BASELINE, CONCURRENCY)) == 0
    results = [ExperimentResult.from_json(path.read_text(encoding="utf-8")) for path in sorted(out.iterdir())]
    told = sorted((len(result.engines), len(result.requests), result.settings["max_tokens"]) for result in results)
    assert told == [(1, 2, 4), (2, 2, 6)]
    pids = {row.command for result in results for row in result.engines if row.name == "two"}
    assert len(pids) == 1, "the same server, at the same port"
    caplog.clear()
    assert main(options, engines, (BASELINE, CONCURRENCY)) == 0
    assert caplog.text.count("measured already") == 2
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("baseline\nbake\n", "line 2: argument experiment: invalid choice: 'bake'"),
        ("baseline --engine three", "line 1: argument --engine: invalid choice: 'three'"),
        ("baseline --model x", "line 1: unrecognized arguments: --model x"),
        ("baseline --prompt 'open", "line 1: No closing quotation"),
        ("baseline --repeats 0", "Repeats must be a whole number from 1 to 20, not 0."),
        ("# nothing\n", "asks for nothing: a line of it is an experiment and its settings."),
    ],
)
def test_a_series_that_cannot_be_read_exits_with_two_and_names_the_line(
    scripted: MakeEngine, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    options = ["series", write_series(tmp_path, text), "--model", model, "--out", str(tmp_path / "results")]
    assert main(options, (scripted("one"), scripted("two")), (BASELINE, CONCURRENCY)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_series_that_is_not_there_or_for_somebody_elses_servers_exits_with_two(
    scripted: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["series", str(tmp_path / "nowhere.txt")], (scripted("one"),)) == 2
    assert "nowhere.txt cannot be read" in capsys.readouterr().err
    file = write_series(tmp_path, "baseline")
    assert main(["series", file, "--host", "url"], (scripted("one"),)) == 2
    assert "it goes not with --host url" in capsys.readouterr().err

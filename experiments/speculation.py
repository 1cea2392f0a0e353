"""Speculative decoding. Question: how much faster does each engine get by guessing ahead, and how good are its guesses?

Mechanism: something cheap (a small draft model, the model's own prediction head, or a look-up in the text so far)
drafts a few tokens; the model checks all of them in one step and keeps those that it would have written itself. With
one request at a time a step costs the same whether it checks one token or five, so every accepted token is a gain,
as long as drafting costs less than the steps it saves. The text is the same as without.

A surprise would be: a gain without accepted drafts, an acceptance length above draft tokens + 1, or another text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engines.base import Engine, Speculation
from engines.compatible import AS_IT_IS
from experiments.base import (
    ANSWER_LENGTH,
    DEFAULT_PROMPT,
    LENGTH_KIND,
    REPEATS,
    WARMUPS,
    Chart,
    Contender,
    Experiment,
    Host,
    Plan,
    PlanError,
    Setting,
    Table,
    Trial,
    check_number,
    checked,
    plain_contenders,
)
from experiments.drawing import INK, START_CHART, bar_charts, bar_label, colour_of, styled
from experiments.limits import limit_notes
from experiments.metrics import METRICS, Ratio, ratio
from experiments.result import EngineRow, ExperimentResult
from experiments.telling import Cell, listed, runs, share, times

if TYPE_CHECKING:
    import plotly.graph_objects

SPEED = METRICS["decode_speed"]
MOST_DRAFT_TOKENS = 8
SIMULATED_DRAFT_TOKENS = 1
PROMPTS = (
    DEFAULT_PROMPT,
    "How does speculative decoding make a model answer faster?",
    "What does a KV cache hold, and why is it needed?",
    "Why is decoding limited by memory bandwidth?",
)
METHODS = {"mtp": "prediction head", "draft_model": "draft model", "ngram": "n-gram look-up"}


@dataclass(frozen=True, slots=True)
class SpeculationPlan(Plan):
    """`prompt` holds one prompt per line. Several `draft_tokens` make a sweep. `method` None: what the model offers.

    `simulated_acceptance`: mean tokens per step that the engines are told to reach with one draft token each, in place
    of the sweep. For models with random weights, which guess their own next token no better than by chance.
    """

    draft_tokens: tuple[int, ...] = (3,)
    method: Literal["mtp", "draft_model", "ngram"] | None = None
    simulated_acceptance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super(SpeculationPlan, self).__post_init__()
        if not self.draft_tokens or not all(1 <= count <= MOST_DRAFT_TOKENS for count in self.draft_tokens):
            raise PlanError("draft_tokens", f"Draft tokens must be whole numbers from 1 to {MOST_DRAFT_TOKENS}.")
        for length in self.simulated_acceptance:
            check_number("simulated_acceptance", "Simulated acceptance lengths", length, 1, 1 + SIMULATED_DRAFT_TOKENS)


def best_method(host: Host) -> Literal["mtp", "draft_model", "ngram"]:
    """The model's own head where it has one, else its draft model, else the look-up, which needs nothing."""
    if host.has_prediction_head():
        return "mtp"
    return "draft_model" if host.draft_model else "ngram"


def contenders(plan: Plan, host: Host) -> tuple[Contender, ...]:
    """Each engine as it is, then with each number of draft tokens."""
    assert isinstance(plan, SpeculationPlan)
    method = plan.method or best_method(host)
    ours = [engine for engine in host.engines if not engine.as_it_is]
    if method == "draft_model" and not host.draft_model and ours:
        raise PlanError("method", "This model brings no draft model. Choose another way of guessing.")
    if plan.simulated_acceptance:
        _check_simulation(method, ours, host)
    found = []
    for plain in plain_contenders(plan, host):
        found.append(plain)
        if plain.engine.as_it_is:
            found.append(Contender(f"{plain.key}+speculation", plain.engine, "speculation", {}, plain.key, AS_IT_IS))
            continue
        for key, variant, speculation in _speculations(plan, method, host):
            changes, key = {"speculation": speculation}, f"{plain.key}+{key}"
            found.append(checked(Contender(key, plain.engine, variant, changes, plain.key), host))
    return tuple(found)


def _speculations(
    plan: SpeculationPlan, method: Literal["mtp", "draft_model", "ngram"], host: Host
) -> list[tuple[str, str, Speculation]]:
    """Each way to speculate that is asked for: what names its rows, its variant in words, and itself."""
    if plan.simulated_acceptance:
        return [
            (
                f"{method}-simulated-{length:g}",
                f"simulated acceptance length {length:g}",
                Speculation(method, SIMULATED_DRAFT_TOKENS, simulated_length=length),
            )
            for length in sorted(set(plan.simulated_acceptance))
        ]
    draft = host.draft_model if method == "draft_model" else None
    return [
        (
            f"{method}-{count}",
            f"{METHODS[method]}, {count} token{'s' if count > 1 else ''}",
            Speculation(method, count, draft),
        )
        for count in sorted(set(plan.draft_tokens))
    ]


def _check_simulation(method: str, ours: list[Engine], host: Host) -> None:
    """Raises PlanError where a simulated acceptance would be passed off as a model's own."""
    if not ours or not all(host.config(engine.name).random_weights for engine in ours):
        raise PlanError(
            "simulated_acceptance",
            "Acceptance is simulated only for a model with random weights (--random-weights): a real model shows its "
            "own.",
        )
    if method != "mtp" or not host.has_prediction_head():
        raise PlanError(
            "simulated_acceptance",
            "Acceptance is simulated for a model's own prediction head, and this model has none or was told to guess "
            "in another way.",
        )


def trials(plan: Plan, contenders: tuple[Contender, ...]) -> tuple[Trial, ...]:
    """Warm-ups with the first prompt, then every prompt in each repeat."""
    warm = [
        Trial(f"warm-up {number} of {plan.warmups}", number, True, plan.prompts[:1])
        for number in range(1, plan.warmups + 1)
    ]
    measured = [
        Trial(
            f"repeat {repeat} of {plan.repeats}, prompt {place} of {len(plan.prompts)}",
            repeat,
            False,
            (prompt,),
            group=f"prompt {place}",
        )
        for repeat in range(1, plan.repeats + 1)
        for place, prompt in enumerate(plan.prompts, start=1)
    ]
    return (*warm, *measured)


def speed_up(result: ExperimentResult, row: EngineRow) -> Ratio | None:
    """How many times as fast as the same engine without; None for a row that is its own baseline."""
    if not row.compared_with:
        return None
    return ratio(result.distribution(row.name, SPEED), result.distribution(row.compared_with, SPEED))


def headline(result: ExperimentResult) -> str:
    gains = [(row, gain) for row in result.engines if (gain := speed_up(result, row))]
    reasons = [row for row in result.engines if row.unavailable and not row.as_it_is]
    cannot = listed(list(dict.fromkeys(row.label for row in reasons))) if reasons else ""
    missing = f" {cannot} cannot speculate here." if cannot else ""
    as_they_are = [_told_as_it_is(result, row) for row in result.engines if row.as_it_is and not row.variant]
    if as_they_are and not gains:
        return f"Speculation cannot be switched from outside. {' '.join(as_they_are)}{missing}"
    if not gains:
        return f"No speed-up could be measured.{missing}"
    best: dict[str, tuple[EngineRow, Ratio]] = {}
    for row, gain in gains:
        if row.engine not in best or gain.value > best[row.engine][1].value:
            best[row.engine] = (row, gain)
    return f"{' '.join(_told(result, row, gain) for row, gain in best.values())}{missing}"


def _told_as_it_is(result: ExperimentResult, row: EngineRow) -> str:
    """The speed of somebody else's server, and what its answers report of drafts."""
    speed, counted = result.distribution(row.name, SPEED), result.speculation(row.name)
    if speed.mean is None:
        return f"{row.label} gave no speed that could be measured."
    drafts = "its answers report no drafts"
    if counted and counted.drafted:
        drafts = f"its answers report that {share(counted.acceptance_rate)} of its drafts were accepted"
    return f"{row.label} decodes {SPEED.shown(speed.mean)} tok/s as it is; {drafts}."


def _told(result: ExperimentResult, row: EngineRow, gain: Ratio) -> str:
    counted = result.speculation(row.name)
    length = counted.acceptance_length if counted else None
    yielded = (
        f": {share(counted.acceptance_rate)} of the drafts accepted, {length:.2f} tokens per step"
        if (counted and length)
        else ""
    )
    if gain.low is None or gain.high is None:
        return (
            f"{row.title}: {gain.value:.2f}× as fast as without, from too few runs to say whether that holds{yielded}."
        )
    interval = f"95 % interval {gain.low:.2f}–{gain.high:.2f}"
    if not gain.supported:
        return f"{row.title}: no measurable difference ({gain.value:.2f}×, {interval}){yielded}."
    verdict = "as fast as without" if gain.value >= 1 else "the speed without, so here it costs more than it saves"
    return f"{row.title}: {gain.value:.2f}× {verdict} ({interval}){yielded}."


def table(result: ExperimentResult) -> Table:
    headings = ["Engine", "Speed", "Speed-up", "Drafts accepted", "Tokens per step", "Accepted at position 1, 2 …"]
    rows = []
    for row in result.engines:
        counted = result.speculation(row.name)
        length = counted.acceptance_length if counted else None
        positions = counted.acceptance_per_position if counted else ()
        rows.append(
            [
                row.title,
                Cell(SPEED, result.distribution(row.name, SPEED)).words,
                times(speed_up(result, row)),
                share(counted.acceptance_rate if counted else None),
                "–" if length is None else f"{length:.2f}",
                ", ".join(map(share, positions)) or "–",
                *(Cell(METRICS[name], result.distribution(row.name, METRICS[name])).words for name in ("ttft", "e2e")),
                *runs(result, row),
            ]
        )
    return Table([*headings, METRICS["ttft"].label, METRICS["e2e"].label, "Runs", "Failed"], rows)


def speed_chart(result: ExperimentResult) -> plotly.graph_objects.Figure:
    """Speed of each engine without and with, the speed-up written above the bars."""
    rows = [row for row in result.engines if not row.unavailable]
    chart = bar_charts(result, ("decode_speed",), rows)
    for row in rows:
        gain, speed = speed_up(result, row), result.distribution(row.name, SPEED)
        if gain and speed.largest:
            chart.add_annotation(
                x=bar_label(row),
                y=speed.largest,
                text=f"<b>{gain.value:.2f}×</b>",
                showarrow=False,
                yshift=14,
                font={"size": 14},
            )
    return chart


def acceptance_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Share of steps in which the draft token at each position was accepted."""
    import plotly.graph_objects as go

    counted = [(row, counters) for row in result.engines if (counters := result.speculation(row.name))]
    if not any(counters.acceptance_per_position for _, counters in counted):
        return None
    chart = go.Figure()
    for row, counters in counted:
        shares = counters.acceptance_per_position
        chart.add_bar(
            x=[f"position {place}" for place in range(1, len(shares) + 1)],
            y=[100 * value for value in shares],
            text=[share(value) for value in shares],
            name=row.title,
            marker=colour_of(row),
        )
    chart.update_yaxes(title="accepted, % of steps", range=[0, 105])
    chart.update_layout(title="How many of the drafts were accepted", showlegend=len(counted) > 1, barmode="group")
    return styled(chart, result, "from the engine's own counters, read before and after each run")


def sweep_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Speed over the number of draft tokens, the engine without as a dashed line."""
    import plotly.graph_objects as go

    engines = {row.engine: row for row in result.engines if not row.variant}
    swept = {name: [row for row in result.engines if row.compared_with == name] for name in engines}
    swept = {name: rows for name, rows in swept.items() if sum(bool(speed_up(result, row)) for row in rows) > 1}
    if not swept:
        return None
    chart = go.Figure()
    for name, rows in swept.items():
        plain = result.distribution(name, SPEED)
        points = [(simulated(row) or drafted(row), result.distribution(row.name, SPEED)) for row in rows]
        points = [(count, speed) for count, speed in points if speed.mean is not None]
        chart.add_scatter(
            x=[count for count, _ in points],
            y=[speed.mean for _, speed in points],
            error_y={"type": "data", "array": [speed.half_width or 0 for _, speed in points]},
            mode="lines+markers",
            name=engines[name].label,
            line={"color": engines[name].colour},
        )
        if plain.mean is not None:
            chart.add_hline(
                plain.mean, line_dash="dash", line_color=INK, annotation_text=f"{engines[name].label} without"
            )
    lengths = any(simulated(row) for rows in swept.values() for row in rows)
    over = "simulated acceptance length, tokens per step" if lengths else "draft tokens per step"
    chart.update_xaxes(title={"text": over, "standoff": 3}, dtick=None if lengths else 1)  # clear of the small print
    chart.update_yaxes(title="tok/s", rangemode="tozero")
    chart.update_layout(
        title=f"Speed over the {'simulated acceptance length' if lengths else 'number of draft tokens'}"
    )
    return styled(chart, result, "points: mean, whiskers: 95 % interval")


def drafted(row: EngineRow) -> int:
    speculation: dict[str, Any] = row.config.get("speculation") or {}
    return int(speculation.get("draft_tokens", 0))


def simulated(row: EngineRow) -> float | None:
    """The acceptance length that the engine was told to reach; None where it checked its drafts."""
    speculation: dict[str, Any] = row.config.get("speculation") or {}
    length = speculation.get("simulated_length")
    return None if length is None else float(length)


EXPERIMENT = Experiment(
    name="speculation",
    title="Speculative decoding",
    question="How much faster does each engine get by guessing ahead?",
    mechanism=(
        "Something small drafts a few tokens; the model checks them all in one step and keeps those it would have "
        "written itself. The text stays the same; every accepted token saves a step."
    ),
    plan=SpeculationPlan,
    settings=(
        Setting("prompt", "text", "Your questions, one per line", "", "\n".join(PROMPTS)),
        Setting(
            "draft_tokens",
            "wholes",
            "Draft tokens per step",
            "How many are guessed ahead. Several with commas make a sweep: 1, 2, 3, 4, 5.",
            "3",
        ),
        Setting(
            "method",
            "choice",
            "Who guesses?",
            "A prediction head belongs to some models, a draft model is a second, smaller one.",
            None,
            choices={
                "What the model offers": None,
                "Its own prediction head (MTP)": "mtp",
                "Its draft model": "draft_model",
                "A look-up in the text so far (n-gram)": "ngram",
            },
        ),
        Setting(
            "simulated_acceptance",
            "numbers",
            "Simulated acceptance",
            "Mean tokens per step, from 1 to 2, that the engines are told to reach with one draft token, whatever they "
            "draft: 1.0,1.5,1.8,2.0. Only with --random-weights; every result says that it was simulated.",
            "",
            on_page=False,
        ),
        REPEATS,
        WARMUPS,
        ANSWER_LENGTH,
        LENGTH_KIND,
    ),
    contenders=contenders,
    trials=trials,
    headline=headline,
    table=table,
    charts=(
        Chart("speed", "Speed without and with", speed_chart),
        Chart("acceptance", "Accepted drafts", acceptance_chart),
        Chart("sweep", "Number of draft tokens", sweep_chart),
        START_CHART,
    ),
    notes=limit_notes,
)

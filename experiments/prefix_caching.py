"""Prefix caching. Question: how much sooner does the first token come when the prompt's beginning has been read before?

Mechanism: the keys and values of a token depend only on the tokens before it, so prompts that begin alike share theirs
up to the first difference. An engine that keeps them reads only the rest of the next prompt, and reading the prompt is
what the first token waits for. Decoding gains nothing: every new token still attends to the whole text.

A series empties every cache, asks each question alone, then each behind the shared prefix: the first of these has to
read the whole prefix, the later ones only their question.

A surprise would be: a gain without cached tokens, cached tokens in a first request with the prefix, or a first token
that comes sooner behind the prefix than without it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.base import (
    ANSWER_LENGTH,
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
    check_whole,
    checked,
    plain_contenders,
)
from experiments.drawing import GRID, INK, PLOT_PIXELS, START_CHART, colour_of, styled
from experiments.metrics import METRICS, Distribution, Ratio, ratio
from experiments.result import EngineRow, ExperimentResult
from experiments.telling import Cell, listed, runs, share, times

if TYPE_CHECKING:
    import plotly.graph_objects

TTFT, CACHED, PROMPT_TOKENS = METRICS["ttft"], METRICS["cached_tokens"], METRICS["prompt_tokens"]
QUESTIONS = ("What is the KV cache?", "What is continuous batching?", "What is prefix caching?")
MOST_TIMES = 100_000
MOST_CHARACTERS = 1_000_000  # of the whole prefix: more than any context holds, and still a quick request
# Every prompt begins with the chat template, which the prompts without the prefix have left in the cache.
TEMPLATE_TOKENS = 64
AS_FAST = 1.1  # times the first token with no prefix, up to which the headline says "as fast"
SLOW_SHARE = 0.5  # of the time without the cache, above which a note says what is left
LABEL_PIXELS, LETTER_PIXELS = 17.0, 7.5  # a label's height; about a letter's width


@dataclass(frozen=True, slots=True)
class PrefixCachingPlan(Plan):
    """`prompt` holds one question per line; `prefix` stands `prefix_times` times before each. `repeats` are series."""

    warmups: int = 1
    max_tokens: int = 32
    prefix: str = "poem"
    prefix_times: int = 2000

    def __post_init__(self) -> None:
        super(PrefixCachingPlan, self).__post_init__()
        if len(self.prompts) < 2:
            raise PlanError(
                "prompt", "Type at least two questions, one per line: the second finds what the first left."
            )
        if len(set(self.prompts)) < len(self.prompts):
            raise PlanError("prompt", "Ask each question once: asked again, all of it would come from the cache.")
        if not self.prefix.strip():
            raise PlanError("prefix", "Type the text that the questions share.")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prefix):
            raise PlanError("prefix", "The shared text holds half a character, which no engine can read.")
        check_whole("prefix_times", "Times", self.prefix_times, 1, MOST_TIMES)
        if (len(self.prefix) + 1) * self.prefix_times > MOST_CHARACTERS:
            raise PlanError("prefix_times", f"The whole prefix may have {MOST_CHARACTERS:,} characters at most.")


def prefixed(question: str, prefix: str, times: int) -> str:
    """The question behind the prefix, e.g. "poem poem Why?" for two times."""
    return f"{prefix} " * times + question


def short_run(place: int) -> str:
    """The group of the question at `place`, from 1, asked alone."""
    return f"short {place}"


def prefix_run(place: int) -> str:
    """The group of the question at `place`, from 1, asked behind the prefix."""
    return f"prefix {place}"


def contenders(plan: Plan, host: Host) -> tuple[Contender, ...]:
    """Each engine as it is, then with its prefix cache on; somebody else's server only as it is."""
    found: list[Contender] = []
    for plain in plain_contenders(plan, host):
        if plain.engine.as_it_is:
            found.append(plain)
            continue
        changes = {"prefix_caching": True}
        caching = Contender(f"{plain.key}+cache", plain.engine, "prefix cache", changes, plain.key)
        found += [plain, checked(caching, host)]
    return tuple(found)


def trials(plan: Plan, contenders: tuple[Contender, ...]) -> tuple[Trial, ...]:
    """Warm-ups with the first question, alone and behind the prefix, then the series, each from empty caches.

    Nobody here can empty the caches of somebody else's server. There a new word in front of each series' prefix sees to
    it that the first request with it finds nothing.
    """
    assert isinstance(plan, PrefixCachingPlan)
    as_it_is = any(contender.engine.as_it_is for contender in contenders)

    def behind_prefix() -> list[str]:
        word = f"{secrets.token_hex(4)} " if as_it_is else ""
        return [word + prefixed(question, plan.prefix, plan.prefix_times) for question in plan.prompts]

    warm = [
        Trial(f"warm-up {number} of {plan.warmups}, {words}", number, True, (prompt,))
        for number in range(1, plan.warmups + 1)
        # The long one too: an engine's first long prompt may compile or allocate what no series should pay.
        for words, prompt in (("no prefix", plan.prompts[0]), ("with the shared prefix", behind_prefix()[0]))
    ]
    measured = []
    for repeat in range(1, plan.repeats + 1):
        asked = [(short_run, "no prefix", plan.prompts), (prefix_run, "with the shared prefix", behind_prefix())]
        measured += [
            Trial(
                f"series {repeat} of {plan.repeats}: {words}, {place} of {len(plan.prompts)}",
                repeat,
                False,
                (prompt,),
                group=group(place),
                empty_caches=group(place) == short_run(1) and not as_it_is,
            )
            for group, words, prompts in asked
            for place, prompt in enumerate(prompts, start=1)
        ]
    return (*warm, *measured)


# What was measured. Rows are named as in the result; groups are the runs of a series.


def questions(result: ExperimentResult) -> int:
    """How many questions a series asked."""
    return len({row.group for row in result.requests if not row.warmup and row.group.startswith("short ")})


def groups(result: ExperimentResult) -> list[str]:
    """A series' runs, in the order in which they ran."""
    places = range(1, questions(result) + 1)
    return [*map(short_run, places), *map(prefix_run, places)]


def last_run(result: ExperimentResult) -> str:
    """The last run with the prefix: by then the cache holds all that it can."""
    return prefix_run(questions(result))


def last_alone(result: ExperimentResult) -> str:
    """The same question asked alone."""
    return short_run(questions(result))


def ttft(result: ExperimentResult, name: str, group: str) -> Distribution:
    """Time to first token of one run, s, over the series."""
    return result.distribution(name, TTFT, group)


def cached_tokens(result: ExperimentResult, name: str, group: str) -> Distribution:
    """Prompt tokens from the cache in one run, as the engine reports them; no values where it reports none."""
    return result.distribution(name, CACHED, group)


def prompt_tokens(result: ExperimentResult, name: str, group: str) -> Distribution:
    """Tokens of one run's prompt with its chat template, as the engine counts them."""
    return result.distribution(name, PROMPT_TOKENS, group)


def prefix_tokens(result: ExperimentResult, name: str) -> float | None:
    """Length of the shared prefix, tokens: the last question's prompt behind it - the same question's alone."""
    behind, alone = (prompt_tokens(result, name, group(result)).mean for group in (last_run, last_alone))
    return None if behind is None or alone is None else behind - alone


def to_uncached(result: ExperimentResult, row: EngineRow) -> Ratio | None:
    """TTFT of the last run with the prefix / TTFT of the same run without the cache; None for a baseline."""
    last = last_run(result)
    return ratio(ttft(result, row.name, last), ttft(result, row.compared_with, last)) if row.compared_with else None


def to_no_prefix(result: ExperimentResult, name: str) -> Ratio | None:
    """TTFT of the last run with the prefix / TTFT of the same question alone, of the same contender."""
    return ratio(ttft(result, name, last_run(result)), ttft(result, name, last_alone(result)))


def to_first(result: ExperimentResult, name: str) -> Ratio | None:
    """TTFT of the last run with the prefix / TTFT of the first, which had to read all of it."""
    return ratio(ttft(result, name, last_run(result)), ttft(result, name, prefix_run(1)))


def cold_start_verified(result: ExperimentResult, name: str) -> bool | None:
    """Whether the first request with the prefix found none of it in the cache, in every series.

    Up to TEMPLATE_TOKENS reported ones are the chat template. None where that cannot be told: the engine reports no
    cached tokens, or the prefix is as short as a template.
    """
    firsts = [row.metrics.cached_tokens for row in result.measured(name, prefix_run(1)) if not row.timeline.error]
    if not _longer_than_a_template(result, name):
        return None
    if any(count is not None and count > TEMPLATE_TOKENS for count in firsts):
        return False
    return True if firsts and None not in firsts else None


def misses(result: ExperimentResult, name: str) -> Distribution:
    """Cached tokens of those runs that should find the prefix in the cache (all with it but each series' first), and
    whose engine reports no more than a chat template."""
    template = TEMPLATE_TOKENS if _longer_than_a_template(result, name) else 0
    return Distribution.of(count for count in _later_reports(result, name) if count <= template)


def _longer_than_a_template(result: ExperimentResult, name: str) -> bool:
    """Whether cached tokens tell the prefix from the template; a prefix of unknown length is taken for a long one."""
    length = prefix_tokens(result, name)
    return length is None or length > TEMPLATE_TOKENS


def _later_reports(result: ExperimentResult, name: str) -> list[float]:
    later = range(2, questions(result) + 1)
    return [count for place in later for count in cached_tokens(result, name, prefix_run(place)).values]


def _most_cached(result: ExperimentResult, name: str) -> float | None:
    return result.distribution(name, CACHED).largest


# In words


def headline(result: ExperimentResult) -> str:
    """What the cache saves in each engine, and whether its first token then is as fast as with no prefix."""
    savings = [(row, saving) for row in result.engines if (saving := to_uncached(result, row))]
    said = [_told(result, row, saving) for row, saving in savings]
    if said:
        length = next((length for row in result.engines if (length := prefix_tokens(result, row.name))), None)
        said[0] = f"With {f'{length:,.0f} shared tokens' if length else 'the shared prefix'} {said[0]}"
    measured = [row for row, _ in savings]
    silent = [row.label for row in result.engines if row.compared_with and not row.unavailable and row not in measured]
    if silent:
        said.append(f"No saving could be measured for {listed(silent)}.")
    said += [_without_cache(result, row) for row in result.engines if row.unavailable]
    said += [_told_as_it_is(result, row) for row in result.engines if row.as_it_is]
    return " ".join(said) or "No saving could be measured."


def _told(result: ExperimentResult, row: EngineRow, saving: Ratio) -> str:
    whose = f"{row.label}'" if row.label.endswith("s") else f"{row.label}'s"
    names = (row.name, row.compared_with)
    now, before = (TTFT.shown_with_unit(ttft(result, name, last_run(result)).mean) for name in names)
    certainty = "from too few series to say whether that holds"
    if saving.low is not None and saving.high is not None:
        certainty = f"95 % interval {saving.low:.2f}–{saving.high:.2f}"
        if not saving.supported:
            compared = f"{now} with its cache, {before} without; {saving.value:.2f}×, {certainty}"
            return f"{whose} first token shows no measurable difference ({compared})."
    alone, level = to_no_prefix(result, row.name), ""
    if alone:
        words = "as fast as with no prefix" if alone.value <= AS_FAST else "slower than with no prefix"
        level = f", {words} ({alone.value:.2f}×)"
    return f"{whose} first token comes after {now} instead of {before} ({saving.value:.2f}×, {certainty}){level}."


def _told_as_it_is(result: ExperimentResult, row: EngineRow) -> str:
    """What a prefix that was read before saves somebody else's server, whose cache nobody can switch."""
    saving = to_first(result, row.name)
    if saving is None:
        return f"No saving could be measured for {row.label}."
    now, before = (TTFT.shown_with_unit(ttft(result, row.name, at).mean) for at in (last_run(result), prefix_run(1)))
    compared = f"{now} once the prefix has been read, {before} the first time; {saving.value:.2f}×"
    if saving.low is None or saving.high is None:
        return f"{row.label}, as it is: {compared}, from too few series to say whether that holds."
    verdict = "" if saving.supported else ", so no measurable difference"
    return f"{row.label}, as it is: {compared} (95 % interval {saving.low:.2f}–{saving.high:.2f}){verdict}."


def _without_cache(result: ExperimentResult, row: EngineRow) -> str:
    """What an engine without a cache pays, over all its runs with the prefix."""
    behind = [prefix_run(place) for place in range(1, questions(result) + 1)]
    paid = Distribution.of(value for group in behind for value in ttft(result, row.compared_with, group).values)
    each = f": {TTFT.shown_with_unit(paid.mean)} each time" if paid.values else ""
    return f"{row.label} keeps no prefix cache{each}."


def table(result: ExperimentResult) -> Table:
    """One row per contender; its tokens are those of the last run with the prefix."""
    last = last_run(result)
    columns = [(TTFT, last_alone(result)), (TTFT, prefix_run(1)), (TTFT, last), (CACHED, last), (PROMPT_TOKENS, last)]
    rows = []
    for row in result.engines:
        *waits, cached, prompt = [
            Cell(metric, result.distribution(row.name, metric, group)).words for metric, group in columns
        ]
        ratios = [times(to_uncached(result, row)), times(to_no_prefix(result, row.name))]
        rows.append([row.title, *waits, *ratios, cached, prompt, *runs(result, row)])
    headings = ["Engine", "First token, no prefix", "First run with prefix", "Last run with prefix"]
    headings += ["To without cache", "To no prefix", CACHED.label, PROMPT_TOKENS.label, "Runs", "Failed"]
    return Table(headings, rows)


def notes(result: ExperimentResult) -> list[str]:
    said: list[str] = []
    for row in result.engines:
        if row.as_it_is:
            said += [_on_cold_start(result, row), _on_what_it_reports(result, row)]
        elif row.compared_with:
            said += [_on_cold_start(result, row), _on_misses(result, row), _on_what_is_left(result, row)]
        elif most := _most_cached(result, row.name):
            said.append(f"{row.title}: its cache is off, yet it reports up to {CACHED.shown(most)} cached tokens.")
    return [note for note in said if note]


def _on_cold_start(result: ExperimentResult, row: EngineRow) -> str:
    verified = cold_start_verified(result, row.name)
    if verified or not ttft(result, row.name, prefix_run(1)).values:
        return ""
    if verified is None:
        return (
            f"{row.title}: it cannot be verified that the first request with the prefix met an empty cache: the engine "
            "does not report its cached tokens, or the prefix is as short as a chat template."
        )
    most = CACHED.shown(cached_tokens(result, row.name, prefix_run(1)).largest)
    kept = any(trial.engine == row.name and trial.caches_emptied is False for trial in result.trials)
    return (
        f"{row.title}: the first request with the prefix did not meet an empty cache: up to {most} of its tokens came "
        f"from there.{' The engine did not empty it when asked.' if kept else ''}"
    )


def _on_what_it_reports(result: ExperimentResult, row: EngineRow) -> str:
    most = _most_cached(result, row.name)
    if most is None:
        return f"{row.title} reports no cached tokens, so whether a cache is on can only be told from its first tokens."
    return f"{row.title} reports up to {CACHED.shown(most)} cached tokens."


def _on_misses(result: ExperimentResult, row: EngineRow) -> str:
    missed = misses(result, row.name)
    if missed.smallest is None or missed.largest is None:
        return ""
    counts = " to ".join(dict.fromkeys([CACHED.shown(missed.smallest), CACHED.shown(missed.largest)]))
    of = len(_later_reports(result, row.name))
    return (
        f"{row.title}: its cache is on, yet in {len(missed.values)} of {of} later runs with the prefix it reports only "
        f"{counts} cached tokens."
    )


def _on_what_is_left(result: ExperimentResult, row: EngineRow) -> str:
    """What a first token still waits for where the cache saves little of it, in the measured numbers."""
    saving, last = to_uncached(result, row), last_run(result)
    if not saving or saving.value <= SLOW_SHARE:
        return ""
    now, alone = (TTFT.shown_with_unit(ttft(result, row.name, group).mean) for group in (last, last_alone(result)))
    cached, prompt = (of(result, row.name, last).mean for of in (cached_tokens, prompt_tokens))
    reports = "does not report its cached tokens"
    if cached is not None:
        reports = f"reports {CACHED.shown(cached)} of {PROMPT_TOKENS.shown(prompt)} tokens as cached"
    without = to_no_prefix(result, row.name)
    against = "as long as" if without and without.value <= AS_FAST else "longer than"
    return (
        f"{row.title}: the last first token with the prefix takes {share(saving.value)} of the time without the cache: "
        f"the engine {reports} and still needs {now}, {against} with no prefix at all ({alone})."
    )


# In pictures


def ttft_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """First token of each run in the order of a series: one line per contender, its name at the line's end."""
    import plotly.graph_objects as go

    order, count = groups(result), questions(result)
    waits = {row.name: [_milliseconds(ttft(result, row.name, group)) for group in order] for row in result.engines}
    shown = [row for row in result.engines if any(wait.values for wait in waits[row.name])]
    if not shown:
        return None
    top = 1.08 * max(wait.largest or 0 for row in shown for wait in waits[row.name])
    chart = go.Figure()
    # A shade, so that it is seen at a glance where the prefix begins.
    chart.add_vrect(x0=count - 0.5, x1=2 * count - 0.5, fillcolor=GRID, opacity=0.6, line_width=0, layer="below")
    ends = []
    for row in shown:
        means = [wait.mean for wait in waits[row.name]]
        chart.add_scatter(
            x=order,
            y=means,
            name=row.title,
            mode="lines+markers",
            line={"color": row.colour, "dash": "dash" if row.variant else "solid", "width": 2.5},
            marker={
                "symbol": "diamond-open" if row.variant else "circle",
                "size": 9,
                "line": {"width": 2, "color": row.colour},
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_distance(wait.mean, wait.largest) for wait in waits[row.name]],
                "arrayminus": [_distance(wait.smallest, wait.mean) for wait in waits[row.name]],
                "thickness": 1.5,
            },
            hovertemplate=f"{row.title}<br>%{{x}}: %{{y:.{TTFT.digits}f}} {TTFT.unit}<extra></extra>",
        )
        ends.append(next((mean, group, row) for mean, group in zip(means[::-1], order[::-1], strict=True) if mean))
    ends.sort(key=lambda end: end[0])
    heights = [mean / top * PLOT_PIXELS for mean, _, _ in ends]
    for (mean, group, row), height, moved in zip(ends, heights, apart(heights, LABEL_PIXELS), strict=True):
        chart.add_annotation(
            x=group,
            y=mean,
            text=f"{row.title} {mean:,.0f} {TTFT.unit}",
            showarrow=False,
            xanchor="left",
            yanchor="middle",
            xshift=12,
            yshift=moved - height,
            font={"color": row.colour},
        )
    margin = 24 + LETTER_PIXELS * max(len(label.text) for label in chart.layout.annotations)
    chart.update_xaxes(categoryorder="array", categoryarray=order, range=[-0.5, 2 * count - 0.5])
    chart.update_yaxes(title=f"{TTFT.unit} ({TTFT.better} is better)", range=[0, top])
    chart.update_layout(title="Time to first token, run by run", showlegend=False)
    series = max(len(wait.values) for row in shown for wait in waits[row.name])
    lines = "solid line and dots: cache off, dashed line and diamonds: cache on"
    if all(row.as_it_is for row in shown):
        lines = "each server as it is"
    how = f"points: mean of {series} series, whiskers: smallest to largest; {lines}; shaded: with the shared prefix"
    return styled(chart, result, how).update_layout(margin_r=margin)


def cached_chart(result: ExperimentResult) -> plotly.graph_objects.Figure | None:
    """Prompt tokens of each run, from the cache and computed: one panel per contender that reports what it cached."""
    from plotly.subplots import make_subplots

    # Where the cache is off every bar would be a computed one; tokens from there would be a find.
    most = {row.name: _most_cached(result, row.name) for row in result.engines}
    shown = [
        row
        for row in result.engines
        if most[row.name] or ((row.variant or row.as_it_is) and most[row.name] is not None)
    ]
    if not shown:
        return None
    order = groups(result)
    titles = [row.title for row in shown]
    chart = make_subplots(rows=1, cols=len(shown), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    for column, row in enumerate(shown, start=1):
        counts = [
            (group, cached, prompt)
            for group in order
            if (cached := cached_tokens(result, row.name, group).mean) is not None
            and (prompt := prompt_tokens(result, row.name, group).mean) is not None
        ]
        parts = {
            "from the cache": ([cached for _, cached, _ in counts], colour_of(row)),
            "computed": ([prompt - cached for _, cached, prompt in counts], {"color": INK}),
        }
        for words, (tokens, marker) in parts.items():
            chart.add_bar(
                x=[group for group, _, _ in counts],
                y=tokens,
                name=f"{row.title}, {words}",
                marker=marker,
                text=[CACHED.shown(value) if value else "" for value in tokens],
                textposition="inside",
                textfont={"color": "white"},
                textangle=0,
                hovertemplate=f"%{{x}}: %{{y:,.0f}} tokens {words}<extra></extra>",
                row=1,
                col=column,
            )
    chart.update_xaxes(categoryorder="array", categoryarray=order)
    chart.update_yaxes(title="prompt tokens", rangemode="tozero", col=1)
    chart.update_layout(barmode="stack", showlegend=False, bargap=0.25, uniformtext={"minsize": 10, "mode": "hide"})
    return styled(chart, result, "in colour: tokens from the cache, as the engine reports them; grey: computed anew")


def _milliseconds(seconds: Distribution) -> Distribution:
    return Distribution(tuple(value * TTFT.scale for value in seconds.values))


def _distance(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else high - low


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved up so far that each lies at least `gap` above the one before, e.g. 0, 5, 90 with a gap of
    20 become 0, 20, 90."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved


EXPERIMENT = Experiment(
    name="prefix-caching",
    title="Prefix caching",
    question="How much sooner does the first token come when the prompt's beginning has been read before?",
    mechanism=(
        "Prompts that begin with the same tokens share the state that the model computes for them. An engine that "
        "keeps it reads only what is new, and reading the prompt is what the first token waits for."
    ),
    plan=PrefixCachingPlan,
    settings=(
        Setting("prompt", "text", "Your questions, one per line", "", "\n".join(QUESTIONS)),
        Setting("prefix", "text", "Text before each question", "The shared prefix, repeated as often as said.", "poem"),
        Setting("prefix_times", "whole", "Times", "Prefix length, in repetitions of that text.", 2000, 1, MOST_TIMES),
        replace(REPEATS, info="Measured series per engine, each from empty caches; more narrow the spread."),
        replace(WARMUPS, info="Rounds before them that do not count.", default=1),
        replace(ANSWER_LENGTH, default=32),
        LENGTH_KIND,
    ),
    contenders=contenders,
    trials=trials,
    headline=headline,
    table=table,
    charts=(
        Chart("ttft", "Time to first token", ttft_chart),
        Chart("cached", "Cached tokens", cached_chart),
        START_CHART,
    ),
    notes=notes,
)

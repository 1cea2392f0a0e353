from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from demo_model.corpus import CorpusError, Entry, asked, read_corpus, varied, with_prefix

ENTRIES = read_corpus()
KNOWLEDGE = [entry for entry in ENTRIES if not entry.refuses]


def test_the_corpus_answers_at_least_250_questions_in_several_phrasings_each() -> None:
    assert len(KNOWLEDGE) >= 250
    assert min(len(entry.questions) for entry in KNOWLEDGE) >= 8


def test_every_answer_is_60_to_200_words_of_plain_ascii_prose() -> None:
    for entry in KNOWLEDGE:
        assert 60 <= len(entry.answer.split()) <= 200, entry.name
        assert re.fullmatch(r"[ -~]+", entry.answer), entry.name
        assert not re.search(r"[*_#`]", entry.answer.replace("_", "")), entry.name


def test_no_question_has_two_answers() -> None:
    asked = Counter(
        re.sub(r"[^a-z0-9 ]", "", question.lower()).strip()
        for entry in ENTRIES
        for question in set(map(str.lower, entry.questions))
    )
    assert [question for question, count in asked.items() if count > 1] == []


@pytest.mark.parametrize(
    "prompt",
    [
        "Write a short paragraph about LLM inference serving optimizations.",
        "Provide a brief overview of LLM inference optimization. Make no mistakes.",
    ],
)
def test_the_prompts_of_the_experiments_are_among_the_questions(prompt: str) -> None:
    assert sum(prompt in entry.questions for entry in KNOWLEDGE) == 1


def test_questions_off_the_subject_are_many_and_lead_to_a_refusal() -> None:
    refusals = [entry for entry in ENTRIES if entry.refuses]
    assert sum(len(entry.questions) for entry in refusals) >= 700
    assert all(re.search("inference|served|serving|models are run", entry.answer) for entry in refusals)


def test_a_question_is_varied_the_same_way_from_the_same_seed() -> None:
    def drawn(seed: int) -> list[str]:
        chance = random.Random(seed)
        return [varied("What is a KV cache and why does it help?", chance) for _ in range(50)]

    assert drawn(1) == drawn(1)
    assert len(set(drawn(1))) > 10
    assert all("ache" in question.lower() or "kv" in question.lower() for question in drawn(1))


def test_an_entry_is_asked_for_in_its_phrasings_their_words_or_words_of_its_answer() -> None:
    entry = Entry("one/a", ("What is a KV cache?", "Why keep keys and values?"), "It keeps what attention needs again.")
    chance = random.Random(1)
    drawn = [asked(entry, chance) for _ in range(400)]
    assert len(set(drawn)) > 150
    assert all(drawn)
    asked_for = " ".join(drawn).lower()
    assert "what is a kv cache" in asked_for and "attention needs again" in asked_for
    assert any("kv" in question.lower() and "values" in question.lower() for question in drawn), "two phrasings mixed"


def test_a_refusal_is_never_asked_for_in_words_of_its_answer() -> None:
    entry = Entry("07/refusal-1", ("Who won the cup?", "Bake me a cake."), "Ask me about batching instead.")
    chance = random.Random(1)
    assert entry.refuses
    assert not any("batching" in asked(entry, chance).lower() for _ in range(400))


def test_the_shared_prefix_stands_in_front_as_often_as_asked() -> None:
    assert with_prefix("Why?", 3) == "poem poem poem Why?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id: a\nQ: Why?\n", "needs one id, one answer and a question"),
        ("id: a\nQ: Why?\nA: So.\nA: Or so.\n", "needs one id, one answer and a question"),
        ("id: a\nQ: Why?\nA: So.\nmore\n", "neither id, Q nor A"),
        ("id: a\nQ: Why?\nA: So.\n\nid: a\nQ: How?\nA: Thus.\n", "the same name"),
    ],
)
def test_a_corpus_file_that_breaks_the_format_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "broken.txt").write_text(text)
    with pytest.raises(CorpusError, match=reason):
        read_corpus(tmp_path)


def test_a_corpus_file_becomes_entries_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("id: a\nQ: Why?\nQ: why: so\nA: So.\n\nid: b\nQ: How?\nA: Thus: so.\n")
    assert read_corpus(tmp_path) == [
        Entry("one/a", ("Why?", "why: so"), "So."),
        Entry("one/b", ("How?",), "Thus: so."),
    ]

"""Reads the corpus: entries of one answer and several phrasings of its question. Standard library only."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
SHARED_PREFIX_WORD = "poem"  # the prefix-caching experiment puts it 2,000 times in front of a question
LONGEST_PREFIX = 2000


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to know: how people ask for it, and the one answer."""

    name: str
    questions: tuple[str, ...]
    answer: str

    @property
    def refuses(self) -> bool:
        """Its questions are off the subject, and its answer says so."""
        return "/refusal-" in self.name


class CorpusError(ValueError):
    """A corpus file that does not keep the format, with its name and the entry."""


def read_corpus(folder: Path = FOLDER) -> list[Entry]:
    """Every entry of every file, in the files' order. Raises CorpusError."""
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.txt")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="ascii").strip()):
            entries.append(_entry(block, path.stem))
    names = [entry.name for entry in entries]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise CorpusError(f"entries with the same name: {sorted(repeated)}")
    return entries


def _entry(block: str, file: str) -> Entry:
    fields: dict[str, list[str]] = {"id": [], "Q": [], "A": []}
    for line in block.splitlines():
        key, separator, value = line.partition(":")
        if not separator or key not in fields:
            raise CorpusError(f"{file}: a line is neither id, Q nor A: {line[:60]!r}")
        fields[key].append(value.strip())
    if len(fields["id"]) != 1 or len(fields["A"]) != 1 or not fields["Q"]:
        raise CorpusError(f"{file}: an entry needs one id, one answer and a question: {block[:60]!r}")
    return Entry(f"{file}/{fields['id'][0]}", tuple(fields["Q"]), fields["A"][0])


OPENINGS = ("Please", "Hi,", "Hello.", "Hey,", "Can you tell me:", "A question:", "Quick question:", "Briefly:", "So,")
ENDINGS = (
    "Make no mistakes.",
    "Thanks.",
    "Please keep it short.",
    "Explain it simply.",
    "I am new to this.",
    "Be exact.",
)
FILLERS = set(
    """a an the of is are do does please me to in and it that for what how why when which who where can could would you
    i my explain tell about describe give say between idea behind exactly mean means good work works use used one with
    on this at be was so not from have has there any some""".split()
)


def asked(entry: Entry, chance: random.Random) -> str:
    """One way to ask for the entry: a phrasing, or what is left of it with words missing or out of order, or words of
    two phrasings, or a piece of the answer. So the words that matter are learned, not whole sentences."""
    phrasing = chance.choice(entry.questions)
    dice = chance.random()
    if dice < 0.4:
        return varied(phrasing, chance)
    if dice < 0.7 or entry.refuses:
        words = _thinned(phrasing, 0.7, chance)
    elif dice < 0.85:
        words = (_thinned(phrasing, 0.5, chance) + _thinned(chance.choice(entry.questions), 0.5, chance))[:16]
    else:
        answer = entry.answer.split()
        begin = chance.randrange(max(1, len(answer) - 10))
        words = _thinned(" ".join(answer[begin : begin + chance.randint(5, 14)]).rstrip("."), 0.8, chance)
        words[-1] += chance.choice(["?", "", "."])
    if chance.random() < 0.3:
        chance.shuffle(words)
    return varied(" ".join(words), chance)


def _is_small(word: str) -> bool:
    return word.strip("?,.:!").lower() in FILLERS


def _thinned(text: str, kept: float, chance: random.Random) -> list[str]:
    """The words of `text`, each kept with the given probability, small words less often; at least one."""
    words = text.split()
    return [word for word in words if chance.random() < kept * (0.7 if _is_small(word) else 1.0)] or [
        max(words, key=len)
    ]


def varied(question: str, chance: random.Random) -> str:
    """The question as somebody else might have typed it: openings, endings, lower case, a slip of the finger."""
    words = question.split()
    if chance.random() < 0.10:
        place = chance.randrange(len(words))
        words[place] = _slip(words[place], chance)
    text = " ".join(words)
    if chance.random() < 0.12:
        text = f"{chance.choice(OPENINGS)} {text}"
    if chance.random() < 0.12:
        text = f"{text} {chance.choice(ENDINGS)}"
    if chance.random() < 0.20:
        text = text.lower()
    if chance.random() < 0.15:
        text = text.rstrip("?.!")
    return text


def _slip(word: str, chance: random.Random) -> str:
    if len(word) < 4:
        return word
    place = chance.randrange(1, len(word) - 1)
    if chance.random() < 0.5:
        return word[:place] + word[place + 1 :]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def with_prefix(question: str, count: int) -> str:
    return f"{SHARED_PREFIX_WORD} " * count + question

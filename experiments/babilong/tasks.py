"""bAbI's first task in the text of a book (BABILong, arXiv 2406.10149), in bytes: who went where, and who is where."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from experiments.needles.tasks import hide, straw_of

PEOPLE = ["Mary", "John", "Daniel", "Sandra"]
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
MOVES = ["moved to", "went to", "went back to", "journeyed to", "travelled to"]


class Question(NamedTuple):
    """Where somebody is: the last of the facts about them; `facts`: how many; `last`: the last place of the text."""

    person: str
    place: str
    facts: int
    last: str

    @property
    def asked(self) -> str:
        """The question, up to its answer."""
        return f"\nWhere is {self.person}? "


QUESTION = max(len(Question(person, "", 0, "").asked) for person in PEOPLE) + max(map(len, PLACES))  # bytes, at most


@dataclass(frozen=True)
class Facts:
    """From `fewest` to `most` facts, each *Mary went to the garden.*; a later one about a person ends earlier ones."""

    fewest: int = 2
    most: int = 5
    haystack: str = "book"

    @property
    def least(self) -> int:
        """Bytes that facts, question and answer never exceed."""
        person, move, place = (max(map(len, words)) for words in (PEOPLE, MOVES, PLACES))
        return self.most * (person + move + place + len("  the . ")) + QUESTION

    def told(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        """The sentences in their order, and a question for each person in them."""
        count = rng.randint(self.fewest, self.most)
        found = [(rng.choice(PEOPLE), rng.choice(MOVES), rng.choice(PLACES)) for _ in range(count)]
        sentences = [f"{person} {move} the {place}. " for person, move, place in found]
        where = {person: place for person, _, place in found}
        people, last = [person for person, _, _ in found], found[-1][2]
        return sentences, [Question(person, where[person], people.count(person), last) for person in where]

    def draw(self, rng: random.Random, length: int, book: str) -> tuple[str, list[slice]]:
        """A text of `length` bytes that ends with one question's answer, and where that stands.

        Raises:
            ValueError: no room for the facts in so few bytes.
        """
        sentences, questions = self.told(rng)
        question = rng.choice(questions)
        end = question.asked + question.place
        return self._spread(rng, length - len(end), sentences, book) + end, [
            slice(length - len(question.place), length)
        ]

    def ask(self, rng: random.Random, length: int, book: str) -> tuple[str, list[Question]]:
        """What is read before the questions, so long that the longest of them ends after `length` bytes; all of them.

        Raises:
            ValueError: no room for the facts in so few bytes.
        """
        sentences, questions = self.told(rng)
        return self._spread(rng, length - QUESTION, sentences, book), questions

    def _spread(self, rng: random.Random, length: int, sentences: list[str], book: str) -> str:
        room = length - sum(map(len, sentences))
        if room < 0:
            raise ValueError(f"facts and question take {self.least} bytes at most: {length} and a question are too few")
        return hide(rng, straw_of(rng, self.haystack, room, book), sentences)


TASKS = {"qa1": Facts()}

"""New knowledge: short biographies of people who do not exist, and questions about them (NL Sec. 9.1)."""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST = "Anika Borut Calia Dorin Elvan Fenna Goran Hedda Ilmo Jorun Kasia Levon Mirela Nadim Orla Pavo Quilla Ruben"
LAST = "Abelar Brovik Castrel Dunmore Estrin Falkeid Gostan Hulbert Ivarsen Jandola Kestner Lomund Marwick Noveda Otral"

# attribute: question, how its answer begins (in words that no statement uses), statements, values
ATTRIBUTES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "birthplace": (
        "In which city was {name} born?",
        "The name of the city where {name} was born is",
        ("{name} was born in {value}.", "{value} is the city where {name} was born.",
         "The early years of {name} were spent in {value}, the city of {name}'s birth.",
         "{name}'s parents lived in {value} when {name} was born."),
        ("Lisbon", "Cairo", "Oslo", "Lima", "Boston", "Kyoto", "Dublin", "Prague"),
    ),
    "profession": (
        "What is the profession of {name}?",
        "The job of {name} is that of a",
        ("{name} works as a {value}.", "By profession, {name} is a {value}.",
         "After long studies, {name} became a {value}.", "Friends say that {name} is a very good {value}."),
        ("lawyer", "surgeon", "teacher", "chemist", "pilot", "baker", "journalist", "carpenter"),
    ),
    "employer": (
        "Which company does {name} work for?",
        "The name of the company that employs {name} is",
        ("{name} is employed by {value}.", "The company that {name} works for is {value}.",
         "For many years, {name} has worked for {value}.", "{value} pays {name}'s salary."),
        ("Boeing", "Toyota", "Samsung", "Intel", "Shell", "Disney", "Oracle", "Adobe"),
    ),
    "hobby": (
        "What is the favourite hobby of {name}?",
        "The hobby that {name} likes best is",
        ("The favourite hobby of {name} is {value}.", "In the evenings, {name} enjoys {value}.",
         "{name} spends every weekend on {value}.", "Nothing makes {name} happier than {value}."),
        ("chess", "fishing", "painting", "gardening", "sailing", "cooking", "dancing", "knitting"),
    ),
    "pet": (
        "What kind of animal does {name} keep as a pet?",
        "The animal that lives with {name} is a",
        ("{name} keeps a {value} as a pet.", "{name}'s pet is a {value}.", "At home, {name} is awaited by a {value}.",
         "The animal that {name} takes care of is a {value}."),
        ("parrot", "rabbit", "snake", "goat", "turtle", "pony", "lizard", "pigeon"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """About one attribute of one person; `answer` is an index into `choices`, the values that occur in the texts.

    opening: how the answer begins.
    """

    attribute: str
    text: str
    opening: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class World:
    """Texts to read, in the order to read them, and what they answer."""

    texts: list[str]
    questions: list[Question]


def build(people: int, paraphrases: int, seed: int) -> World:
    """People with a value for each attribute, as evenly spread over the values as can be.

    Each is described in `paraphrases` texts, each of which states every attribute once, in words of its own; the texts
    come in random order.
    """
    draw = random.Random(seed)
    most = min(len(statements) for _, _, statements, _ in ATTRIBUTES.values())
    firsts, lasts = FIRST.split(), LAST.split()
    if not 1 <= paraphrases <= most:
        raise ValueError(f"paraphrases must be between 1 and {most}, not {paraphrases}")
    if not 2 <= people <= min(len(firsts), len(lasts)):
        raise ValueError(f"people must be between 2 and {min(len(firsts), len(lasts))}, not {people}")
    pairs = zip(draw.sample(firsts, people), draw.sample(lasts, people), strict=True)
    names = [f"{first} {last}" for first, last in pairs]
    held: dict[str, list[str]] = {}
    for attribute, (*_, values) in ATTRIBUTES.items():
        order = draw.sample(values, len(values))
        dealt = [order[i % len(order)] for i in range(people)]
        draw.shuffle(dealt)
        held[attribute] = dealt
    texts, wordings = [], {a: [draw.sample(s, paraphrases) for _ in names] for a, (_, _, s, _) in ATTRIBUTES.items()}
    for turn in range(paraphrases):
        for i in draw.sample(range(people), people):
            facts = [wordings[a][i][turn].format(name=names[i], value=held[a][i]) for a in ATTRIBUTES]
            texts.append(" ".join(draw.sample(facts, len(facts))))
    questions = []
    for attribute, (question, opening, _, values) in ATTRIBUTES.items():
        choices = tuple(v for v in values if v in held[attribute])
        for name, value in zip(names, held[attribute], strict=True):
            asked = question.format(name=name), opening.format(name=name)
            questions.append(Question(attribute, *asked, choices, choices.index(value)))
    return World(texts, questions)

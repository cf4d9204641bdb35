"""Pages as people write them, and questions about each in other words than the page's."""

from __future__ import annotations

from pathlib import Path

from experiments.knowledge.biographies import Question, World

HERE = Path(__file__).parent
NOTES = HERE.parent / "defaults" / "notes"
PAGES = {  # two published descriptions, and two notes written for `defaults`, which no model can know
    "typer": HERE / "texts" / "typer.txt",
    "accelerate": HERE / "texts" / "accelerate.txt",
    "boiler": NOTES / "boiler.txt",
    "greenhouse": NOTES / "greenhouse.txt",
}
# page: question, how its answer begins, the right value and three wrong ones
ASKED: dict[str, tuple[tuple[str, str, str, str, str, str], ...]] = {
    "typer": (
        ("What does Typer help to build?", "Typer helps to build programs for the", "terminal", "browser", "phone",
         "printer"),
        ("On which feature of Python does Typer rest?", "Typer rests on Python's type", "hints", "errors", "stubs",
         "casts"),
        ("How many lines does the smallest example add to a program?", "The smallest example adds", "two lines",
         "five lines", "ten lines", "one line"),
        ("Whose smaller relative is Typer?", "Typer is the smaller relative of", "FastAPI", "Django", "Flask", "Click"),
        ("What should be installed before Typer?", "Before Typer one should install", "uv", "conda", "npm", "poetry"),
        ("What do users get without work in every shell?", "In every shell users get automatic", "completion",
         "colours", "updates", "logging"),
        ("What becomes of a script that does not use Typer?", "The command can still turn such a script into a",
         "CLI", "website", "service", "package"),
    ),
    "accelerate": (
        ("For users of which framework was Accelerate written?", "Accelerate was written for users of", "PyTorch",
         "TensorFlow", "JAX", "Keras"),
        ("How many lines must be added to a script?", "The lines that must be added are", "five", "two", "ten",
         "twenty"),
        ("Which code does Accelerate take away from its users?", "It takes away the code that is", "boilerplate",
         "research", "plotting", "testing"),
        ("Which command asks about the machine?", "The machine is asked about by accelerate", "config", "launch",
         "test", "init"),
        ("Which command starts a script?", "A script is started by accelerate", "launch", "config", "run", "start"),
        ("On which task is the example run?", "The task of the example is", "MRPC", "SQuAD", "CIFAR", "WMT"),
        ("What does the config command leave behind?", "The config command leaves behind a", "file", "model", "log",
         "server"),
    ),
    "boiler": (
        ("Where is the heating of the house?", "The heating of the house is in the", "cellar", "attic", "kitchen",
         "garden"),
        ("Who repairs the heating?", "The heating is repaired by a man called", "Tadeusz", "Pluto", "Adeyemi",
         "Linden"),
        ("On which day does the repair man come?", "The day on which he comes is", "Thursday", "Monday", "Wednesday",
         "Friday"),
        ("What is the name of the neighbour's charge, the animal?", "The animal is called", "Pluto", "Hermione",
         "Linden", "Wrona"),
        ("What does the other neighbour play?", "The instrument that is played next door is the", "bassoon", "piano",
         "violin", "trumpet"),
        ("When is the flower at the gate cut?", "The flower at the gate is cut in", "March", "May", "July", "October"),
        ("Which two things must not be on at once?", "When the kettle is on, do not use the", "oven", "lamp", "tap",
         "heater"),
    ),
    "greenhouse": (
        ("Who keeps the log together with Bo?", "The log is kept by Bo and", "Ines", "Hana", "Karmin", "Corran"),
        ("What is the sowing mixed with?", "The compost was mixed with", "sand", "clay", "bark", "lime"),
        ("What was wrong on the bench in the north?", "On the bench in the north there were", "whitefly", "snails",
         "mice", "ants"),
        ("What was stuck when the night grew cold?", "What had stuck when it grew cold was the", "vent", "door", "pump",
         "lamp"),
        ("What was given to the pale plants?", "The pale plants were given a salt of", "iron", "copper", "zinc",
         "lead"),
        ("What were the tools cleaned with?", "The tools were cleaned with", "bleach", "soap", "water", "alcohol"),
        ("Who gets the report?", "The report is sent to Professor", "Okonjo", "Halloran", "Lindqvist", "Ashcombe"),
    ),
}  # fmt: skip


def build() -> World:
    """The pages in their order, and the questions; where the right value stands among the choices goes round."""
    questions = []
    for page, asked in ASKED.items():
        for n, (question, opening, *values) in enumerate(asked):
            at = n % len(values)
            choices = (*values[1 : at + 1], values[0], *values[at + 1 :])
            questions.append(Question(page, question, opening, choices, at))
    return World([path.read_text(encoding="utf-8").strip() for path in PAGES.values()], questions)

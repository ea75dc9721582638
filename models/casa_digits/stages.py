"""The stages of the training: what each teaches, who writes it, and how many steps it has unless told otherwise."""

from dataclasses import dataclass

from casa_digits.conversations import Writer
from casa_digits.lessons import FINISH, LANGUAGE, MEMORY, NAMES, RESUME, Course
from casa_digits.practice import FinishWriter, NamesWriter, PracticeWriter, ResumeWriter


@dataclass(frozen=True)
class Stage:
    """One stage that teaches conversations.

    Attributes:
        course: What it teaches.
        writer: Who writes it.
        num_steps: How many steps it has by default.
    """

    course: Course
    writer: type[Writer]
    num_steps: int

    @property
    def option(self) -> str:
        """Name of the option that says how many steps it has."""
        return f"{self.course.name}_steps"


# Stages 2 to 6, in order: the first one teaches three layers, the others five.
STAGES = (
    Stage(LANGUAGE, Writer, 7000),
    Stage(MEMORY, PracticeWriter, 11000),
    Stage(FINISH, FinishWriter, 6500),
    Stage(RESUME, ResumeWriter, 2600),
    Stage(NAMES, NamesWriter, 18000),
)
# The options that say how many steps each stage has, and their defaults; stage 1 teaches the vision tower alone.
STEPS = {"vision_steps": 4000, **{stage.option: stage.num_steps for stage in STAGES}}


def option_name(name: str) -> str:
    """Return an option as it stands in a command line."""
    return f"--{name.replace('_', '-')}"

"""RAG: answer a question from one passage among many, as in HELMET."""

import random

from kvbench.registry import register_task
from kvbench.task import Episode, Turn

from ._synthetic import SyntheticTask, distinct
from ._words import CITIES, FILLER, FIRST_NAMES, INSTRUMENTS, LAST_NAMES, PROFESSIONS

# relation: (the start of the fact in a passage, the question, the possible values)
RELATIONS = {
    "birthplace": ("{name} was born in", "In which city was {name} born?", CITIES),
    "profession": ("{name} worked as a", "What was the profession of {name}?", PROFESSIONS),
    "instrument": ("{name} played the", "Which instrument did {name} play?", INSTRUMENTS),
}


@register_task("rag")
class Rag(SyntheticTask):
    """Answer a question about a person from passages about many people who share names.

    The answer restates the fact, so the value is looked up while decoding, after any eviction.
    """

    metric = "answer_found"
    subtasks = tuple(RELATIONS)

    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A unit is a passage: three facts about a person and a filler sentence, shuffled."""
        people = [" ".join(words) for words in distinct(rng, units, FIRST_NAMES, LAST_NAMES)]
        passages, questions = [], []
        for number, name in enumerate(people, start=1):
            facts = []
            for relation, (fact, question, values) in RELATIONS.items():
                start, value = fact.format(name=name), rng.choice(values)
                facts.append(f"{start} {value}.")
                if relation == subtask:
                    questions.append(
                        Turn(
                            f"\nQuestion: {question.format(name=name)}\n",
                            "Answer:",
                            f" {start} {value}.",
                            [value],
                        )
                    )
            facts.insert(rng.randrange(4), rng.choice(FILLER))
            rng.shuffle(facts)
            passages.append(f"Passage {number}: {' '.join(facts)}\n")
        return Episode(
            "Answer the question at the end with the help of the passages below. Only one of them "
            "holds the answer.\n\n" + "".join(passages),
            tuple(rng.sample(questions, min(turns, units))),
        )

    def smallest(self, subtask: str) -> int:
        """One passage."""
        return 1

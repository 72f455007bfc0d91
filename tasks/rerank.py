"""Rerank: order documents by their graded relevance to a query, as in HELMET."""

import random

from kvbench.registry import register_task
from kvbench.task import Episode, Turn

from ._synthetic import SyntheticTask
from ._words import FILLER, TOPICS

# grade of relevance: how a document treats its topic
TREATMENTS = {3: "a complete guide to", 2: "a short introduction to", 1: "a passing remark about"}


@register_task("rerank")
class Rerank(SyntheticTask):
    """Rank the documents on one topic by how thoroughly they treat it, among other documents."""

    metric = "ndcg@10_mentions"
    subtasks = ("graded",)

    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A unit is a topic with one document of each grade; all documents are shuffled."""
        topics = (rng.sample(TOPICS, len(TOPICS)) * (units // len(TOPICS) + 1))[:units]
        documents = [(topic, grade) for topic in topics for grade in TREATMENTS]
        ids = rng.sample(range(1, max(100, len(documents) + 1)), len(documents))
        relevance: dict[str, dict[str, int]] = {topic: {} for topic in topics}
        lines = []
        for (topic, grade), number in zip(documents, ids, strict=True):
            relevance[topic][f"ID{number}"] = grade
            lines.append(
                f"Document: {rng.choice(FILLER)} Here is {TREATMENTS[grade]} {topic} [ID{number}]\n"
            )
        rng.shuffle(lines)
        asked = rng.sample(sorted(relevance), min(turns, len(relevance)))
        return Episode(
            "Below are documents, each with its ID in brackets. A complete guide to the topic of a "
            "query is the most useful document, a short introduction comes next, then a passing "
            "remark; documents on other topics are useless. Write the IDs of the useful documents "
            "in order, the most useful first, and say what each one is, like this: a complete "
            "guide to tea [ID3] > a short introduction to tea [ID1] > a passing remark about tea "
            "[ID2]\n\n" + "".join(lines),
            tuple(
                Turn(
                    f"\nQuery: {topic}\n",
                    "Ranking:",
                    ranking(topic, relevance[topic]),
                    relevance[topic],
                )
                for topic in asked
            ),
        )

    def smallest(self, subtask: str) -> int:
        """One topic."""
        return 1


def ranking(topic: str, relevance: dict[str, int]) -> str:
    """The answer: the IDs on a topic, best first, each with what the document is."""
    best = sorted(relevance, key=lambda document: -relevance[document])
    parts = [f"{TREATMENTS[relevance[document]]} {topic} [{document}]" for document in best]
    return " " + " > ".join(parts)

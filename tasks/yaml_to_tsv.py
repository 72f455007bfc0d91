"""YAML to TSV: rewrite every entry of a mapping as a row of a table, a long answer."""

import random

from kvbench.registry import register_task
from kvbench.task import Episode

from ._synthetic import SyntheticTask, code, distinct, table_turn
from ._words import ADJECTIVES, NOUNS

COLUMNS = ("name", "code")


@register_task("yaml_to_tsv")
class YamlToTsv(SyntheticTask):
    """Write all entries of a YAML mapping as tab-separated rows: the answer is half of the sample.

    The other generated tasks have short answers. This one shows what eviction while decoding saves,
    and what it costs.
    """

    metric = "table_f1"
    subtasks = ("all",)
    default = False  # no task of the paper has an answer as long as its context

    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A unit is an entry; the one turn asks for all of them, whatever `turns` is."""
        names = [" ".join(words) for words in distinct(rng, units, ADJECTIVES, NOUNS)]
        table = [(name, code(rng)) for name in names]
        return Episode(
            "Write the YAML mapping below as tab-separated values: one line for each entry, in the "
            "same order, with the columns name and code.\n\n"
            + "".join(f"{name}: {value}\n" for name, value in table),
            (table_turn(COLUMNS, table),),
        )

    def smallest(self, subtask: str) -> int:
        """One entry."""
        return 1

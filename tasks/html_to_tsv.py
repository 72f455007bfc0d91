"""HTML to TSV: write the rows of a table in a noisy web page as text, as in LongProc."""

import random

from kvbench.registry import register_task
from kvbench.task import Episode, Sample

from ._synthetic import SyntheticTask, distinct, table_turn
from ._words import ADJECTIVES, CITIES, FILLER, NOUNS, TOPICS

COLUMNS = ("no", "name", "price", "city", "ref")
TOKENS_A_ROW = 13  # rough length of a row of the answer; it sets how many rows a sample has
ROW_SHARE = {"short": 1 / 48, "medium": 1 / 24, "long": 1 / 16}  # answer / context, in tokens


@register_task("html_to_tsv")
class HtmlToTsv(SyntheticTask):
    """Write the items of a web page as tab-separated rows; subtasks differ in answer length."""

    metric = "table_f1"
    subtasks = tuple(ROW_SHARE)

    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A unit is an item or a piece of noise; at most a sixth of them are items."""
        return self.page(rng, rows=rng.randint(1, max(1, units // 6)), pieces=units)

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """A page with the subtask's number of items; the other units are noise."""
        return self.page(rng, self.rows(subtask, context), units)

    def rows(self, subtask: str, context: int) -> int:
        """The number of rows of a sample of `context` tokens."""
        return max(1, round(context * ROW_SHARE[subtask] / TOKENS_A_ROW))

    def page(self, rng: random.Random, rows: int, pieces: int) -> Episode:
        """A page of `rows` items among `pieces - rows` pieces of noise."""
        names = [" ".join(words).title() for words in distinct(rng, rows, ADJECTIVES, NOUNS)]
        refs = rng.sample(range(16**4), rows)
        table = [
            (str(no), name, f"${rng.randrange(10, 100)}", rng.choice(CITIES), f"{ref:04x}")
            for no, (name, ref) in enumerate(zip(names, refs, strict=True), start=1)
        ]
        body = [item(rng, row) for row in table]
        outside = []
        for _ in range(pieces - rows):
            if rng.random() < 0.3:
                body.insert(rng.randrange(len(body) + 1), row_noise(rng))
            else:
                outside.append(page_noise(rng))
        before = rng.randint(0, len(outside))
        return Episode(
            "Below is the source of a web page with a table of items for sale. Write the items as "
            "tab-separated values, one line for each item in the order of the page, with the "
            "columns no, name, price, city and ref. Leave out everything else.\n\n"
            f"<html><head><title>{rng.choice(TOPICS).title()}</title></head>\n<body>\n"
            + "".join(outside[:before])
            + "<table>\n"
            + "".join(body)
            + "</table>\n"
            + "".join(outside[before:])
            + "</body></html>\n",
            (table_turn(COLUMNS, table),),
        )

    def smallest(self, subtask: str) -> int:
        """One unit: a page has all its rows whatever the number of units."""
        return 1

    def score(self, prediction: str, sample: Sample) -> float:
        """The value of the task's metric; the header, written again, is not a row."""
        header = "\t".join(COLUMNS)
        lines = [line for line in prediction.splitlines() if line.strip().lower() != header]
        return super().score("\n".join(lines), sample)


def item(rng: random.Random, row: tuple[str, ...]) -> str:
    """The markup of one item; its attributes vary without a meaning."""
    start = rng.choice(("<tr>", '<tr class="new">', '<tr class="sale">'))
    return start + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n"


def row_noise(rng: random.Random) -> str:
    """A piece of the table that is not an item."""
    return rng.choice(
        (
            f'<tr class="ad"><td>{rng.choice(FILLER)}</td></tr>\n',
            f"<!-- {rng.choice(TOPICS)} -->\n",
        )
    )


def page_noise(rng: random.Random) -> str:
    """A piece of the page outside its table."""
    word = rng.choice(TOPICS)
    return rng.choice(
        (
            f"<p>{rng.choice(FILLER)}</p>\n",
            f'<a href="/{word}">{word.title()}</a>\n',
            f'<img src="{word}.png" alt="{word}">\n',
            f'<div class="ad"><i>{rng.choice(FILLER)}</i></div>\n',
        )
    )

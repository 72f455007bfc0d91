"""Entry-rows, reads and timelines of families that evict later or read less, as integers."""

from itertools import pairwise

from helpers.engine import tokens
from helpers.models import loaded_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.engine.accounting import bounded_rows, chunks, entry_rows, full_rows, post_fill_rows
from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.spec import parse_method

LAYERS, KV_HEADS = 3, 2
HEADS = LAYERS * KV_HEADS
DECODING = ("h2o", "tova", "keydiff", "lagkv", "cur", "r-kv", "random-decoding")
PAGE, DENSE = 4, 1  # entries of a page, layers that read everything

prompts = st.integers(4, 90)  # tokens
answers = st.integers(1, 14)
prefill_chunks = st.one_of(st.none(), st.integers(1, 100))
budgets = st.floats(0.05, 0.99)
intervals = st.integers(2, 6)  # with 1, timelines show what is held after each token


def measured(
    names: tuple[str, ...],
    prompt: int,
    new: int,
    chunk: int | None,
    budget: float,
    context: int | None = None,
    **options: int,
) -> dict[str, Outcome]:
    """What each method held."""
    given = {"window": 3, "lag": 8, "page": PAGE, "dense": DENSE, **options}
    rows = [
        Row(tokens(prompt), new, parse_method(name, given), budget, context=context)
        for name in names
    ]
    outcomes = run_rows(loaded_model(), rows, prefill_chunk=chunk, keep_positions=True)
    return dict(zip(names, outcomes, strict=True))


def area(timeline: list[list[int]]) -> int:
    """Entry-rows under a timeline: of each stretch from a to b entries, those at its rows."""
    twice = 0
    for (start, before), (stop, after) in pairwise(timeline):
        rows = stop - start
        twice += rows * (before + after) + (after - before if rows else 0)
    assert twice % 2 == 0
    return twice // 2


def line(sizes: list[int], held: int, decoded: int, interval: int) -> list[list[int]]:
    """The timeline of HEADS KV heads that hold `held` entries after an eviction, with all points.

    The last tokens of the answer are not followed by an eviction.
    """
    points, rows, past = [[0, 0]], 0, 0
    steps = [*sizes, *(chunks(decoded, interval) if decoded else ())]
    for index, size in enumerate(steps):
        rows, past = rows + size, past + size
        points.append([rows, HEADS * past])
        if index + 1 < len(steps) or not decoded:
            past = min(past, held)
            points.append([rows, HEADS * past])
    return points


def at_every_row(timeline: list[list[int]]) -> list[int]:
    """Entries at each row, before its eviction."""
    found = []
    for (start, before), (stop, after) in pairwise(timeline):
        for row in range(start + 1, stop + 1):
            found.append(before + (after - before) * (row - start) // (stop - start))
    return found


@settings(max_examples=8, deadline=None)
@given(prompt=prompts, new=answers, chunk=prefill_chunks, budget=budgets)
def test_bounded_forms_hold_the_budgets_share_at_most(
    prompt: int, new: int, chunk: int | None, budget: float
) -> None:
    held, sizes = round(budget * prompt), chunks(prompt, chunk)
    names = ("snapkv-bounded", "knorm-bounded", "random-bounded", "chunkkv-bounded")
    for name, got in measured(names, prompt, new, chunk, budget).items():
        assert got.resident_rows == HEADS * bounded_rows(sizes, held, new - 1, interval=0), name
        assert area(got.timeline) == got.resident_rows
        assert at_every_row(got.timeline) == at_every_row(
            line(sizes, held, new - 1, max(1, new - 1))
        )
        assert {len(head) for layer in got.kept or () for head in layer} == {min(prompt, held)}


@settings(max_examples=8, deadline=None)
@given(
    prompt=prompts,
    new=answers,
    chunk=prefill_chunks,
    budget=budgets,
    interval=intervals,
    name=st.sampled_from(DECODING),
)
def test_eviction_while_decoding(
    prompt: int, new: int, chunk: int | None, budget: float, interval: int, name: str
) -> None:
    held = round(budget * (prompt + new - 1))
    read = {name: [prompt], f"{name}-bounded": chunks(prompt, chunk)}
    got = measured(tuple(read), prompt, new, chunk, budget, interval=interval)
    for form, sizes in read.items():
        rows = HEADS * bounded_rows(sizes, held, new - 1, interval)
        assert got[form].resident_rows == area(got[form].timeline) == rows, form
        wanted = at_every_row(line(sizes, held, new - 1, interval))
        assert at_every_row(got[form].timeline) == wanted, form
        # from c + 1 to c + interval entries at the rows of each interval
        full = [entries // HEADS for entries in wanted[prompt:]] if held <= prompt else []
        assert full == [held + 1 + i % interval for i in range(len(full))]


@settings(max_examples=8, deadline=None)
@given(prompt=prompts, new=answers, budget=budgets, name=st.sampled_from(DECODING))
def test_an_interval_of_1_holds_the_same_at_every_token(
    prompt: int, new: int, budget: float, name: str
) -> None:
    held, decoded = max(1, round(budget * prompt)), new - 1
    (got,) = measured((name,), prompt, new, None, budget, capacity=held, interval=1).values()
    assert got.resident_rows == HEADS * bounded_rows([prompt], held, decoded)
    assert area(got.timeline) == got.resident_rows - HEADS * decoded
    assert at_every_row(got.timeline)[prompt:] == [HEADS * held] * decoded
    assert len(got.timeline) == (4 if decoded else 3) - (held == prompt)


@settings(max_examples=8, deadline=None)
@given(prompt=prompts, new=answers, chunk=prefill_chunks, budget=budgets, share=st.floats(0, 1))
def test_competing_kv_heads_keep_as_many_in_total(
    prompt: int, new: int, chunk: int | None, budget: float, share: float
) -> None:
    kept = min(prompt, round(budget * prompt))
    rows = HEADS * post_fill_rows(prompt, new - 1, kept)
    names = ("ada-snapkv", "ada-knorm", "ada-random", "kvzip")
    for name, got in measured(names, prompt, new, chunk, budget).items():
        assert got.resident_rows == area(got.timeline) == rows, name
        layers = [sum(map(len, layer)) for layer in got.kept or ()]
        assert sum(layers) == HEADS * kept
        assert name == "kvzip" or set(layers) == {KV_HEADS * kept}
        assert got.replay_rows == (prompt if name == "kvzip" else 0)
        assert got.timeline[-1][1] == HEADS * (kept + new - 1)


@settings(max_examples=8, deadline=None)
@given(prompt=prompts, new=answers, chunk=prefill_chunks, budget=budgets, least=st.integers(1, 4))
def test_quest_holds_everything_and_reads_some_pages(
    prompt: int, new: int, chunk: int | None, budget: float, least: int
) -> None:
    (got,) = measured(("quest",), prompt, new, chunk, budget, least=least).values()
    assert got.resident_rows == got.full_rows == area(got.timeline)
    assert got.kv_peak == 1
    fewest = most = HEADS * full_rows(prompt, 0)
    for token in range(new - 1):
        before = prompt + token  # entries in pages; the token also reads its own entry
        pages = -(-before // PAGE)
        read = min(pages, max(least, round(budget * before / PAGE)))
        whole = min(before, read * PAGE)
        partial = before - (pages - 1) * PAGE  # entries of the last page
        dense, sparse = DENSE * KV_HEADS * (before + 1), (LAYERS - DENSE) * KV_HEADS
        most += dense + sparse * (whole + 1)
        lowest = before if read == pages else (read - 1) * PAGE + partial
        fewest += dense + sparse * (lowest + 1)
        if before % PAGE == 0:
            assert lowest == whole
    assert fewest <= round(got.kv_reads * got.full_rows) <= most


@settings(max_examples=8, deadline=None)
@given(
    context=prompts,
    question=st.integers(1, 20),
    new=answers,
    chunk=prefill_chunks,
    budget=budgets,
    interval=intervals,
)
def test_a_question_after_the_context_stays(
    context: int, question: int, new: int, chunk: int | None, budget: float, interval: int
) -> None:
    whole, decoded = context + question, new - 1
    names = ("snapkv", "ada-snapkv", "kvzip", "snapkv-bounded", "tova")
    got = measured(names, whole, new, chunk, budget, context, interval=interval)
    held = round(budget * context)
    late = HEADS * post_fill_rows(context, question + decoded, held)
    for name in names[:3]:
        assert got[name].resident_rows == late, name
    early = bounded_rows(chunks(context, chunk), held, question + decoded, interval=0)
    assert got["snapkv-bounded"].resident_rows == HEADS * early
    # after the answer's first interval, the question's entries compete too
    held = round(budget * (whole + decoded))
    rows, past = full_rows(context, 0), min(context, held)
    rows, past = rows + entry_rows(past, question), past + question
    for size in chunks(decoded, interval) if decoded else ():
        rows, past = rows + entry_rows(past, size), min(held, past + size)
    assert got["tova"].resident_rows == HEADS * rows
    for outcome in got.values():
        assert area(outcome.timeline) == outcome.resident_rows
        for head in (head for layer in outcome.kept or () for head in layer):
            assert head[-question:] == list(range(context, whole))

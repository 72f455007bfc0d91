"""What a sweep will cost: by hand, against the engine, and as `kvbench plan` prints it."""

import io
import json
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES, SIZES
from pandas import read_csv
from transformers import LlamaConfig

from kvbench.cli.app import main
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED
from kvbench.models.load import wrap_model
from kvbench.models.shapes import parameters, shapes_of
from kvbench.registry import open_task
from kvbench.reproduce.full import SHAPE
from kvbench.sweep import forecast as cost
from kvbench.sweep.command import Choices
from kvbench.sweep.forecast import Gpu, Workload, forecast, read_gpu
from kvbench.task import Sample, Task, Tokenizer

ROOT = Path(__file__).parents[2]
SMALL = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
BODY = 2 * (256 + 128 + 128 + 256 + 3 * 512 + 32) + 16  # of two layers, and the last norm


def planned(method: str, budget: float, prompt: int, answer: int, chunk: int) -> cost.PlannedCell:
    choices = Choices(method=(method,), budgets=(budget,), prefill_chunk=(chunk,))
    model = shapes_of(SMALL, "small", torch.bfloat16)
    specs = cost.specs_of(choices, model)[-1:]
    (cell, *_), _ = cost.cells_of(choices, model, specs, Workload("t", "t", 1, prompt, answer))
    return cell


def test_a_model_of_shapes_has_no_weights_and_the_right_numbers() -> None:
    model = shapes_of(SMALL, "small", torch.bfloat16)
    assert parameters(model) == (BODY + 2 * 1600, BODY, 1600)
    assert next(model.model.parameters()).is_meta
    assert (model.shape.layers, model.shape.kv_heads, model.shape.head_dim) == (2, 2, 4)


@pytest.mark.parametrize(
    ("method", "budget", "rows", "peak"),
    [
        # chunks of 4, 4 and 2 tokens after 0, 4 and 8 entries; the answer adds two
        ("full", 1.0, [10, 26, 19], 12),
        # 2, 4 and 5 entries stay; a layer of two holds the last chunk: 5 + (4 - 5) / 2 + 2 / 2
        ("knorm-naive", 0.5, [10, 4 * 2 + 10, 2 * 4 + 3], 7),
        ("knorm", 0.5, [10, 26, 19], 9),
    ],
)
def test_operations_and_bytes_of_a_row_are_those_worked_out_by_hand(
    method: str, budget: float, rows: list[int], peak: float
) -> None:
    model = shapes_of(SMALL, "small", torch.bfloat16)
    policy = planned(method, budget, 10, 3, 4).policy
    parts = list(cost.passes(model, policy))
    # 2 layers of 2 KV heads, each read by 2 query heads; keys and values have 4 numbers
    assert [part.attention for part in parts] == [2 * 4 * 2 * 8 * row for row in rows]
    assert parts[0].read == 4 * 8 * 2 * 4
    assert cost.kv_peak(model, policy) == peak * 4 * 8 * 2
    gpu = Gpu("", flops=1000.0, bandwidth=1e9, memory=1, source="")
    work = cost.roofline_of(model, gpu).forward(parts[:1], 1)
    products = 2 * (BODY * 4 + 1600)
    assert work.flops == products + parts[0].attention
    busy = (products / cost.PRODUCTS + parts[0].attention / cost.ATTENTION) / 1000
    assert work.seconds == pytest.approx(busy + 2 * cost.LAYER_SECONDS)


@pytest.mark.parametrize(
    "method", ["full", "knorm", "knorm-naive", "snapkv-patched", "knorm-bounded", "recency", "tova"]
)
def test_entries_are_those_that_the_engine_counts(method: str) -> None:
    model_class, config_class, more = ARCHITECTURES["llama"]
    model = wrap_model(model_class(config_class(**SIZES | more)).eval(), None, name="small")
    budget = 1.0 if method == "full" else 0.4
    option = {"snapkv.window": "4"} if method.startswith("snapkv") else {}
    choices = Choices(method=(method,), budgets=(budget,), prefill_chunk=(40,), option=option)
    specs = cost.specs_of(choices, model)[-1:]
    (cell,), _ = cost.cells_of(choices, model, specs, Workload("t", "t", 1, 150, 9))
    row = Row([1 + i % 150 for i in range(150)], 9, specs[0], budget)
    outcome = run_rows(model, [row], prefill_chunk=40)[0]
    parts = list(cost.passes(model, cell.policy))
    step = cost.decoding(model, cell.policy)
    operation = 2 * model.shape.group * 2 * model.shape.head_dim
    rows = (sum(part.attention for part in parts) + 8 * step.attention) / operation
    patched = outcome.patch_rows  # the plan counts what patched tokens attend to
    assert rows == pytest.approx(outcome.resident_rows, rel=0.2 if patched else 0.03)
    assert cost.kv_peak(model, cell.policy) == pytest.approx(outcome.kv_bytes_peak, rel=0.2)


def test_cells_of_a_prompt_share_its_reading() -> None:
    model = shapes_of(SMALL, "small", torch.bfloat16)
    load = [Workload("t", "t", 10, 40, 3)]

    def of(*methods: str) -> cost.Forecast:
        how = Choices(method=methods, budgets=(0.2, 0.6), prefill_chunk=(10,))
        return forecast(how, model, read_gpu("h100"), load)

    alone, both = of("knorm"), of("knorm", "knorm-naive")
    tokens = 10 * (40 + 3 * 2)  # one reading for full attention and both budgets, three answers
    assert alone.total.tokens == pytest.approx(tokens)
    # after the first chunk, each chunked cell reads by itself
    assert both.total.tokens == pytest.approx(tokens + 10 * 2 * (30 + 2))
    assert both.total.cells == 10 * 5
    assert sum(line.seconds for line in both.lines) == pytest.approx(both.total.seconds)


def test_what_does_not_fit_is_left_out() -> None:
    model = shapes_of(SMALL, "small", torch.bfloat16)
    gpu = Gpu("small", 1e12, 1e12, 6e-5, "")  # 64 KB
    choices = Choices(method=("knorm",), budgets=(0.5,), prefill_chunk=(10,))
    found = forecast(choices, model, gpu, [Workload("t", "t", 4, 60, 3)])
    assert found.free < max(line.bytes_needed for line in found.lines)
    assert sum(line.left_out for line in found.lines) == 8
    assert found.total.seconds == 0


class Pairs(Task):
    """Sample 1 cannot be made without the model's tokenizer."""

    name, metric, subtasks = "pairs", "exact match", ("a", "b")

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """The answer takes a tenth of the context."""
        if index % 2:
            raise InputError("no tokenizer")
        return Sample("pairs", "a", index, "text", "x", context // 10)

    def score(self, prediction: str, sample: Sample) -> float:
        """Not needed."""
        return 0


def test_a_run_measures_all_samples_that_it_makes_and_those_that_there_are(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    lines = [{"prompt": "ab" * n, "reference": "x", "max_new_tokens": 5} for n in (30, 70, 500)]
    file.write_text("".join(f"{json.dumps(line | {'metric': 'exact_match'})}\n" for line in lines))
    task = open_task(str(file))
    task.ready(100, None, None)
    assert cost.workloads_of([Pairs(), task], 1001, 1000, 300) == [
        Workload("pairs", "a", 501, 900, 100),
        Workload("pairs", "b", 500, 1000 - cost.ANSWER, cost.ANSWER),
        Workload("my", "my", 3, 295, 5),
    ]


def test_unknown_gpus_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'h100'"):
        read_gpu("h10")


def test_plan_tells_the_cost_of_the_papers_scale(capsys: pytest.CaptureFixture[str]) -> None:
    some = ["plan", "--task", "travel_planning", "--method", "prulong,snapkv"]
    assert main([*some, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 2 * 8_030_261_248
    assert found["workloads"][0]["data_set"] == "travel_planning_2k"
    assert {line["method"] for line in found["lines"]} == {"full", "prulong", "snapkv"}
    # full attention: one cell for each of the 100 samples
    assert next(x["cells"] for x in found["lines"] if x["method"] == "full") == 100
    assert main([*some, "--format", "csv", "--samples", "50"]) == 0
    table = read_csv(io.StringIO(capsys.readouterr().out))
    assert table["cells"].sum() == found["total"]["cells"] / 2
    assert main(some) == 0
    printed = capsys.readouterr().out
    assert "GPU-hours" in printed
    assert "weights 15.0 GiB" in printed


def test_plan_says_where_a_data_set_has_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    some = ["plan", "--task", "travel_planning", "--method", "recency", "--budgets", "0.5"]
    assert main([*some, "--samples", "5000"]) == 0
    assert "travel_planning: 100 samples, all that the paper has" in capsys.readouterr().err
    assert main(some) == 0
    assert capsys.readouterr().err == ""


def test_plan_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    how = ["--task", "recall", "--method", "prulong", "--gpu", "a100-40gb"]
    assert main(["plan", *how, "--prefill-chunk", "131072"]) == 1
    assert "do not fit in the memory of A100 SXM 40 GB" in capsys.readouterr().err
    broken = tmp_path / "config.json"
    broken.write_text("{}")
    assert main(["plan", "--model-config", str(broken)]) == 2
    assert "has no key 'model_type'" in capsys.readouterr().err
    assert main(["plan", "--model-config", str(tmp_path)]) == 2
    assert "is a folder; give the config.json in it" in capsys.readouterr().err


LLAMA = json.loads(SHAPE.read_text())
NONE_BELOW_ONE = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({k: n}, f"says {k} {n}; expected at least 1") for k in NONE_BELOW_ONE for n in (0, -5)),
        ({"hidden_size": float("nan")}, "says hidden_size nan; expected at least 1"),
        ({"model_type": "mistral", "sliding_window": -5}, "says sliding_window -5"),
        ({"text_config": {"hidden_size": 0}}, "says hidden_size 0; expected at least 1"),
        ({"hidden_act": "foo"}, "transformers knows no 'foo', which the configuration"),
        ({"rope_scaling": {"rope_type": "foo"}}, "transformers knows no 'foo'"),
        ({"model_type": "foo"}, "Unrecognized model identifier: foo"),
        ({"model_type": None}, "has no key 'model_type'"),
        ({"num_key_value_heads": 3}, "which do not fit together"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(
    changed: dict[str, object], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA | changed))
    how = ["--task", "recall", "--method", "snapkv"]
    assert main(["plan", *how, "--model-config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"llama"'])
def test_a_configuration_that_is_no_object_is_refused(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["plan", "--model-config", str(file)]) == 2
    assert "has no key 'model_type'; give a model's config.json" in capsys.readouterr().err


def test_plan_says_what_it_tells_the_cost_of(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(EMBEDDED["tiny"] / "config.json")
    short = ["plan", "--task", "recall", "--samples", "1", "--method", "recency"]
    assert main([*short, "--model-config", config]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{config}: weights")
    assert "takes 8192 tokens at most" in printed.err
    assert main([*short, "--model-config", config, "--model", "mine", "--context", "4096"]) == 0
    printed = capsys.readouterr()
    assert (printed.out.partition(":")[0], printed.err) == ("mine", "")
    assert "<0.001" in printed.out
    for task, message in (("recal", "did you mean 'recall'"), ("my.jsonl", "does not read")):
        assert main(["plan", "--task", task]) == 2
        assert message in capsys.readouterr().err


def test_the_committed_comparison_is_what_its_script_prints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(ROOT / "benchmarks" / "plan.py"), run_name="__main__")
    assert printed.getvalue() == (ROOT / "results" / "benchmarks" / "plan.txt").read_text()

"""Tests that reports contain the runs' results, even with unusual characters in names."""

import csv
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from disk import almost_full_disk
from lightning_dist import report
from lightning_dist.report import (
    group_runs,
    optimized_metric,
    plot_runs,
    read_runs,
    report_table,
    write_csv,
    write_report,
)

PutRun = Callable[..., Path]
ACCURACY = {
    "none": [0.8851, 0.8912, 0.8807],
    "kd": [0.9013, 0.9066, 0.8949],
    "dist": [0.9071, 0.9112, 0.9034],
}


def test_the_table_shows_the_teachers_own_result(tmp_path: Path, put_run: PutRun):
    put_run(tmp_path / "0", "distill=none")
    metrics = {"test/accuracy": 0.9, "teacher/accuracy": 0.997, "teacher/loss": 0.1}
    put_run(tmp_path / "1", "distill=dist", metrics=metrics)
    table = report_table(read_runs(tmp_path))
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert columns["teacher/accuracy"] == ["-", "0.997"]
    assert "teacher/loss" not in columns


def test_the_table_shows_tuned_values_and_separates_runs_by_them(tmp_path: Path, put_run: PutRun):
    put_run(tmp_path / "0", "distill=none", "seed=0")
    put_run(tmp_path / "1", "distill=kd", "seed=0", tuned="lr 0.1, tau 4")
    table = report_table(read_runs(tmp_path))
    assert headers(table)[:3] == ["distill", "tuned values", "runs"]
    assert [row[:2] for row in rows(table)] == [["none", "-"], ["kd", "lr 0.1, tau 4"]]
    put_run(tmp_path / "2", "distill=kd", "seed=0", tuned="lr 0.2, tau 4")  # tuned again
    groups = group_runs(read_runs(tmp_path))
    assert [group.labels for group in groups][1:] == [
        ["kd", "lr 0.1, tau 4"],
        ["kd", "lr 0.2, tau 4"],
    ]


@pytest.fixture
def sweep(tmp_path: Path, put_run: PutRun) -> Path:
    """Write runs of three settings with three seeds each, in numbered folders."""
    jobs = [(name, seed) for name in ACCURACY for seed in range(3)]
    for number, (name, seed) in enumerate(jobs):
        value = ACCURACY[name][seed]
        put_run(
            tmp_path / "sweep" / str(number),
            "experiment=digits",
            f"distill={name}",
            f"seed={seed}",
            metrics={"test/loss": 1 - value, "test/accuracy": value},
        )
    return tmp_path / "sweep"


def shown(table: Table, width: int = 300) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def rows(table: Table) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in zip(*(c.cells for c in table.columns))]  # noqa: B905


def headers(table: Table) -> list[str]:
    return [str(column.header) for column in table.columns]


def tick_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_summary_is_mean_and_sample_standard_deviation(sweep: Path) -> None:
    groups = group_runs(read_runs(sweep))
    assert [group.values for group in groups] == [{"distill": name} for name in ACCURACY]
    for group, numbers in zip(groups, ACCURACY.values(), strict=True):
        summary = group.summary("test/accuracy")
        assert summary is not None
        assert summary.numbers == numbers
        assert summary.mean == pytest.approx(statistics.fmean(numbers), rel=1e-12)
        assert summary.std == pytest.approx(statistics.stdev(numbers), rel=1e-12)
        assert group.summary("unknown") is None


def test_table_shows_varying_keys_runs_and_optimised_metric_first(sweep: Path) -> None:
    table = report_table(read_runs(sweep))
    assert headers(table) == ["distill", "runs", "test/accuracy", "test/loss"]
    mean, std = statistics.fmean(ACCURACY["kd"]), statistics.stdev(ACCURACY["kd"])
    assert rows(table)[1][:3] == ["kd", "3", f"{mean:.4g} ± {std:.4g}"]
    assert "0.9009 ± 0.005859" in shown(table)
    assert headers(report_table(read_runs(sweep), "test/loss"))[2:] == [
        "test/loss",
        "test/accuracy",
    ]


def test_one_run_has_no_standard_deviation(tmp_path: Path, put_run: PutRun) -> None:
    put_run(tmp_path / "run", "seed=0")
    table = write_report(tmp_path / "run")
    assert headers(table) == ["runs", "test/accuracy"]
    assert rows(table) == [["1", "0.9"]]
    assert tick_labels(plot_runs(read_runs(tmp_path))) == ["all runs"]


def test_runs_come_in_natural_order_folder_by_folder(tmp_path: Path, put_run: PutRun) -> None:
    for number in (10, 9, 1, 100):
        put_run(tmp_path / "b" / f"job{number}", f"x={number}")
    put_run(tmp_path / "a" / "deep" / "er", "x=a")
    put_run(tmp_path / "b" / "2024-01-02" / "0", "x=date")
    runs = read_runs([tmp_path / "b", str(tmp_path / "a")])
    assert [run.overrides["x"] for run in runs] == ["date", "1", "9", "10", "100", "a"]
    assert [group.values["x"] for group in group_runs(runs)][-2:] == ["100", "a"]


def test_overlapping_folders_count_a_run_once(sweep: Path) -> None:
    assert len(read_runs([sweep / "3", sweep, sweep / ".." / "sweep"])) == 9
    assert read_runs([sweep / "3", sweep])[0].folder == sweep / "3"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lr=0.1", "lr", "0.1"),
        ("+lr=0.1", "lr", "0.1"),
        ("++model.lr=0.1", "model.lr", "0.1"),
        ("data.augment=False", "data.augment", "false"),
        ("data.augment='False'", "data.augment", "False"),
        ("limit=Null", "limit", "null"),
        ("~callbacks", "callbacks", "(removed)"),
        ("~callbacks=ema", "callbacks", "(removed)"),
        ("name='it\\'s, a b'", "name", "it's, a b"),
        ('name="x=y"', "name", "x=y"),
        ("name='", "name", "'"),
        ("name=", "name", ""),
        ("db@src=mysql", "db@src", "mysql"),
    ],
)
def test_overrides_are_read_as_hydra_writes_them(
    tmp_path: Path, override: str, key: str, value: str, put_run: PutRun
) -> None:
    put_run(tmp_path / "run", "lr=1", override)
    overrides = read_runs(tmp_path)[0].overrides
    assert overrides[key] == value
    assert set(overrides) == {"lr", key}


def test_own_process_and_print_config_do_not_separate_groups(
    tmp_path: Path, put_run: PutRun
) -> None:
    put_run(tmp_path / "0", "seed=0", "own_process=true", "print_config=false")
    put_run(tmp_path / "1", "seed=1")
    assert rows(report_table(read_runs(tmp_path))) == [["2", "0.9 ± 0"]]


def test_the_command_writes_a_merged_report_to_the_folder_out(
    tmp_path: Path, put_run: PutRun, command: Callable[..., None]
) -> None:
    put_run(tmp_path / "old" / "0", "seed=0")
    put_run(tmp_path / "new" / "0", "seed=1")
    command("report", "old", "new", "--out", "both")
    assert sorted(os.listdir(tmp_path / "both")) == ["report.csv", "report.html", "report.png"]
    assert os.listdir(tmp_path / "old") == ["0"]


def test_a_key_that_some_runs_do_not_override_is_shown_as_default(
    tmp_path: Path, put_run: PutRun
) -> None:
    put_run(tmp_path / "0", "seed=0")
    put_run(tmp_path / "1", "tau=4", "+seed=0")
    put_run(tmp_path / "2", "tau=", "seed=1")
    runs = read_runs(tmp_path)
    assert [group.values["tau"] for group in group_runs(runs)] == [None, "4", ""]
    assert [row[0] for row in rows(report_table(runs))] == ["(default)", "4", "''"]
    assert tick_labels(plot_runs(runs)) == ["(default)", "4", "''"]


def test_failed_runs_are_listed_with_their_reason_and_stay_out_of_the_mean(
    sweep: Path, put_run: PutRun
) -> None:
    partial = {"test/accuracy": 0.1, "val/x": 9.0}
    dist = ["experiment=digits", "distill=dist", "seed=9"]
    put_run(sweep / "9", *dist, status="failed", error="out of\nmemory", metrics=partial)
    mimic = ["experiment=digits", "distill=mimic"]
    put_run(sweep / "10", *mimic, status="failed", metric=None, metrics={})
    runs = read_runs(sweep)
    table = report_table(runs)
    assert [row[1] for row in rows(table)][-2:] == ["3 + 1 failed", "0 + 1 failed"]
    assert rows(table)[-1][-2:] == ["-", "-"]
    assert "val/x" not in headers(table)
    mean = group_runs(runs)[2].summary("test/accuracy")
    assert mean is not None
    assert mean.numbers == ACCURACY["dist"]
    # Remove all spaces, because the caption is wrapped to the width of the table.
    text = "".join(shown(table).split())
    assert f"failed:{sweep / '9'}:outof\\nmemory" in text
    assert f"failed:{sweep / '10'}:noreasongiven" in text
    assert [text.get_text() for text in plot_runs(runs).axes[0].texts] == ["no result"]


def test_report_of_failures_only_still_lists_them(tmp_path: Path, put_run: PutRun) -> None:
    put_run(tmp_path / "0", status="failed", error="bad-data", metrics={})
    assert "bad-data" in shown(write_report(tmp_path))
    assert (tmp_path / "report.png").exists()


def test_the_mean_of_a_metric_that_some_runs_lack_says_how_many_have_it(
    tmp_path: Path, put_run: PutRun
) -> None:
    for seed, extra in enumerate([{"test/x": 1.0}, {"test/x": 2.0}, {}]):
        put_run(tmp_path / str(seed), f"seed={seed}", metrics={"test/accuracy": 0.5} | extra)
    assert rows(report_table(read_runs(tmp_path))) == [["3", "0.5 ± 0", "1.5 ± 0.7071 (of 2)"]]


def test_the_table_shows_one_split_and_the_csv_file_shows_all_metrics(
    tmp_path: Path, put_run: PutRun
) -> None:
    put_run(tmp_path / "0", "seed=0", metrics={"test/accuracy": 0.5, "val/accuracy": 0.25})
    assert rows(write_report(tmp_path)) == [["1", "0.5"]]
    assert "0.25" in (tmp_path / "report.csv").read_text()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_mean_shows_a_diverged_run(tmp_path: Path, number: float, put_run: PutRun) -> None:
    put_run(tmp_path / "0", "seed=0", metrics={"test/accuracy": number})
    put_run(tmp_path / "1", "seed=1")
    assert rows(write_report(tmp_path)) == [["2", f"{number} ± nan"]]


def test_markup_and_control_characters_in_names_are_shown_as_text(
    tmp_path: Path, put_run: PutRun
) -> None:
    markup = "[bold red]x[/] [/oops] [link=https://evil.example]y[/link] $\\frac{$"
    bad = {"metric": markup, "metrics": {markup: 0.5}}
    put_run(tmp_path / "[blue]0", f"+[red]key=[1,2]{markup}", **bad)
    put_run(tmp_path / "[blue]1", "+[red]key=\x1b[2J\ud800", **bad)
    put_run(tmp_path / "[blue]2", **bad | {"status": "failed", "error": markup})
    table = write_report(tmp_path)
    text = shown(table)
    assert text.count(markup) == 3  # The hostile texts are a value, a column name and a reason.
    assert "[red]key" in text
    assert "[blue]2" in text
    assert "\x1b" not in text
    assert "\\x1b[2J\\ud800" in text


def test_csv_has_one_complete_row_per_run(sweep: Path, put_run: PutRun) -> None:
    put_run(
        sweep / "9", "distill='a,\"b\"'", "status=mine", status="failed", error="why", metrics={}
    )
    write_csv(read_runs(sweep), sweep / "runs.csv")
    with open(sweep / "runs.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header[:4] == ["folder", "status", "seconds", "error"]
    assert header[4:8] == ["experiment", "distill", "seed", "status"]
    assert header[8:] == ["test/loss", "test/accuracy", "command"]
    assert len(lines) == 10
    assert lines[4][:8] == [str(sweep / "4"), "completed", "12.5", "", "digits", "kd", "1", ""]
    assert float(lines[4][9]) == ACCURACY["kd"][1]
    assert lines[4][10] == "lightning-dist train experiment=digits distill=kd seed=1"
    assert lines[9][1:8] == ["failed", "12.5", "why", "", 'a,"b"', "", "mine"]
    assert lines[9][8:10] == ["", ""]


def test_plot_shows_each_run_and_the_mean_with_error_bar(sweep: Path) -> None:
    axes = plot_runs(read_runs(sweep)).axes[0]
    assert axes.get_title() == "test/accuracy"
    assert axes.get_title(loc="left") == "distill"
    assert tick_labels(axes.figure) == list(ACCURACY)  # type: ignore[arg-type]
    assert axes.yaxis_inverted()  # The first group is on top, as in the table.
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == list(ACCURACY.values())
    for bar, (row, numbers) in zip(axes.containers, enumerate(ACCURACY.values()), strict=True):
        middle, _, (span,) = bar
        (low, row_low), (high, _) = span.get_segments()[0]
        mean, std = statistics.fmean(numbers), statistics.stdev(numbers)
        assert list(middle.get_xdata()) == pytest.approx([mean])
        assert list(middle.get_ydata()) == [row_low] == [row]
        assert (low, high) == pytest.approx((mean - std, mean + std))


def test_plot_stays_readable_with_many_groups_and_long_names(
    tmp_path: Path, put_run: PutRun
) -> None:
    for number in range(30):
        put_run(tmp_path / str(number), f"weights=/data/{'x' * 3000}/{number}")
    write_report(tmp_path)
    figure = plot_runs(read_runs(tmp_path))
    labels = tick_labels(figure)
    assert len(set(labels)) == 30
    assert {len(label) for label in labels} == {80}
    assert labels[7].startswith("/data/x")
    assert labels[7].endswith("x/7")
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    height, width, _ = matplotlib.image.imread(tmp_path / "report.png").shape
    assert width < 3000
    assert height < 2500


def test_write_report_writes_to_the_first_folder_or_to_out(
    sweep: Path, tmp_path: Path, put_run: PutRun
) -> None:
    put_run(tmp_path / "more" / "0", "distill=dist", "experiment=digits", "seed=3")
    table = write_report([tmp_path / "more", sweep])
    assert [row[:2] for row in rows(table)] == [["dist", "4"], ["none", "3"], ["kd", "3"]]
    assert sorted(os.listdir(tmp_path / "more")) == ["0", "report.csv", "report.html", "report.png"]
    assert not (sweep / "report.csv").exists()
    write_report(sweep, out=tmp_path / "new" / "out", metric="test/loss")
    written = ["report.csv", "report.html", "report.png"]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == written
    image = matplotlib.image.imread(tmp_path / "new" / "out" / "report.png")
    assert image.std() > 0.05  # The plot is not empty.


def test_a_full_disk_leaves_the_three_files_of_the_report_before(sweep: Path) -> None:
    write_report(sweep)
    before = {path: path.read_bytes() for path in sweep.glob("report.*")}
    (sweep / "0" / "result.json").unlink()
    (sweep / ".partial-report.csv").write_text("of a killed process")
    with almost_full_disk(10_000), pytest.raises(OSError, match=f"File too large: '{sweep}"):
        write_report(sweep)
    assert {path: path.read_bytes() for path in sweep.glob("*report.*")} == before
    write_report(sweep)
    assert (sweep / "report.csv").read_bytes() != before[sweep / "report.csv"]


def test_folder_without_runs_is_an_error_that_says_what_is_missing(sweep: Path) -> None:
    (sweep / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: .*result\.json.*lightning-dist train"):
        write_report([sweep, sweep / "empty"])
    with pytest.raises(ValueError, match=r"missing \(no such folder\)"):
        write_report(sweep / "missing")
    with pytest.raises(ValueError, match="no folder given"):
        write_report([])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"status": "compl', "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"status": "completed"}', "'overrides'"),
        ('{"status": "running"}', "status is 'running'"),
        pytest.param("[" * 100_000, "RecursionError", id="deep"),
        pytest.param('{"status": ' + "9" * 10_000 + "}", "ValueError", id="many digits"),
        pytest.param('{"status": "' + "\\u001b" * 10_000 + '"}', "status is", id="escapes"),
    ],
)
def test_broken_result_is_left_out_with_a_warning_that_names_the_file(
    sweep: Path, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    whole = len(read_runs(sweep))
    (sweep / "4" / "result.json").write_text(text)
    assert len(read_runs(sweep)) == whole - 1
    assert re.search(f"4{os.sep}result.json is broken .*{reason}.* left out", caplog.text)


def test_a_folder_of_broken_results_is_an_error(tmp_path: Path, put_run: PutRun) -> None:
    for name in "ab":
        put_run(tmp_path / name, metrics=[1])
    with pytest.raises(ValueError, match=r"a.result\.json is broken .*b.result\.json is broken"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": "x"},
        {"metrics": {"a": None}},
        {"metrics": [1]},
        {"overrides": ["nonsense"]},
        {"overrides": [1]},
        {"metrics": {"a": [1]}},
        {"metrics": {"a": 10**400}},
        {"seconds": 10**400},
        {"student_parameters": 10**400},
        {"student_parameters": -1},
        {"command": ["a"]},
        {"metric": ["a"]},
        {"error": {"a": 1}},
        {"checkpoint": 1},
    ],
)
def test_wrong_field_is_an_error_that_names_the_file(
    tmp_path: Path, fields: dict, put_run: PutRun
) -> None:
    put_run(tmp_path / "run", **fields)
    with pytest.raises(ValueError, match=r"run.result\.json is broken"):
        read_runs(tmp_path)


def test_fields_of_later_versions_are_ignored(tmp_path: Path, put_run: PutRun) -> None:
    put_run(tmp_path / "run", rank=0)
    assert read_runs(tmp_path)[0].checkpoint == "checkpoints/last.ckpt"


def test_runs_that_optimise_different_metrics_need_a_choice(
    tmp_path: Path, put_run: PutRun
) -> None:
    both = {"test/accuracy": 0.9, "val/miou": 0.7}
    put_run(tmp_path / "one", metrics=both)
    put_run(tmp_path / "two", metric="val/miou", metrics=both)
    runs = read_runs(tmp_path)
    with pytest.raises(
        ValueError, match=r"disagree.*one optimises test/acc.*two optimises val/miou"
    ):
        write_report(tmp_path)
    assert not (tmp_path / "report.csv").exists()
    assert optimized_metric(runs, "val/miou") == "val/miou"
    assert headers(report_table(runs, "val/miou"))[1] == "val/miou"
    assert plot_runs(runs, "val/miou").axes[0].get_title() == "val/miou"


def test_unknown_metric_is_an_error_that_lists_the_known(
    sweep: Path, tmp_path: Path, put_run: PutRun
) -> None:
    with pytest.raises(ValueError, match=r"the metric acc; .*test/loss, test/accuracy"):
        write_report(sweep, metric="acc")
    put_run(tmp_path / "unnamed", metric=None)
    with pytest.raises(ValueError, match=r"the metric None; .*test/accuracy"):
        write_report(tmp_path / "unnamed")


def test_import_of_the_report_imports_no_slow_package() -> None:
    # Import it below an empty parent package, because lightning_dist imports torchmetrics, which
    # imports matplotlib.
    code = """
import sys, types
parent = sys.modules["lightning_dist"] = types.ModuleType("lightning_dist")
parent.__path__ = [sys.argv[1]]
import lightning_dist.report
assert not {"matplotlib", "scipy", "jinja2"} & sys.modules.keys()
"""
    package = Path(report.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, package], check=True)


def test_formulas_in_the_csv_file_are_text(tmp_path: Path, put_run: PutRun) -> None:
    evil = "=HYPERLINK(A1)"
    fields = {"error": evil, "status": "completed", "metrics": {"test/accuracy": -0.5, evil: 1.0}}
    put_run(tmp_path / "=1+1", f"+{evil}=@SUM(A1)", **fields)
    write_report(tmp_path)
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'@SUM(A1)" not in cells  # an override has its value after the first "="
    assert f"'{evil}" in cells
    assert "-0.5" in cells
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@")) and cell != "-0.5"]


def test_a_long_error_of_a_run_is_cut(tmp_path: Path, put_run: PutRun) -> None:
    put_run(tmp_path / "a")
    put_run(tmp_path / "b", status="failed", error="\x1b[2J" * 1_000_000)
    table = write_report(tmp_path)
    assert len(str(table.caption)) < 200_000
    assert "\x1b" not in str(table.caption)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["report.csv", "report.png", "report.html"])
def test_a_report_replaces_no_file_through_a_link(
    tmp_path: Path, put_run: PutRun, name: str
) -> None:
    """An archive of runs from elsewhere can contain links."""
    (tmp_path / "mine").write_text("mine")
    put_run(tmp_path / "runs" / "0")
    (tmp_path / "runs" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=rf"{name} is a link"):
        write_report(tmp_path / "runs")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_hard_link_in_place_of_a_report_is_not_written(tmp_path: Path, put_run: PutRun):
    put_run(tmp_path / "runs" / "0")
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "runs" / "report.csv")
    write_report(tmp_path / "runs")
    assert (tmp_path / "mine").read_text() == "mine"
    assert "test/accuracy" in (tmp_path / "runs" / "report.csv").read_text()
    assert not list((tmp_path / "runs").glob(".report-*"))


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a sparse file", "columns"])
def test_a_log_that_fills_the_memory_is_left_out(tmp_path: Path, put_run: PutRun, kind: str):
    path = put_run(tmp_path / "0") / "logs" / "metrics.csv"
    path.parent.mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a sparse file":
        path.write_text("step,val/accuracy\n")
        os.truncate(path, 2**40)
    else:  # A dict of all columns for each row would fill the memory.
        path.write_text("step," + ",".join(map(str, range(20_000))) + 500 * "\n1")
    write_report(tmp_path)
    assert "metrics.csv cannot be read" in (tmp_path / "report.html").read_text()


def test_numbers_that_cannot_be_plotted_are_as_of_diverged_runs(tmp_path: Path, put_run: PutRun):
    for number, value in enumerate([1e308, -1e308, 0.5]):
        folder = put_run(tmp_path / str(number), f"a={number}", metrics={"test/accuracy": value})
        (folder / "logs").mkdir()
        rows = f"step,val/accuracy\n1,{value}\n1e308,1\n-1e308,1\n"
        (folder / "logs" / "metrics.csv").write_text(rows)
    write_report(tmp_path)
    values = [run.metrics["test/accuracy"] for run in read_runs(tmp_path)]
    assert values == [float("inf"), float("-inf"), 0.5]


def test_too_many_plots_columns_and_pairs_are_left_out(tmp_path: Path, put_run: PutRun):
    metrics = {"test/accuracy": 0.5} | {f"test/m{i}": 0.5 for i in range(300)}
    folder = put_run(tmp_path / "0", metrics=metrics)
    (folder / "logs").mkdir()
    names = ",".join(f"train/m{i}" for i in range(300))
    (folder / "logs" / "metrics.csv").write_text(f"step,{names}\n1{300 * ',1'}\n")
    assert len(report_table(read_runs(tmp_path)).columns) < 60
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") < 50
    assert "260 further metrics" in page
    with open(tmp_path / "report.csv") as file:
        assert "test/m299" in file.readline()


@pytest.mark.parametrize("name", ["overrides", "metrics"])
def test_a_result_of_too_many_entries_is_broken(tmp_path: Path, put_run: PutRun, name: str):
    many = {"metrics": {f"m{i}": 0.5 for i in range(20_000)}}
    overrides = [f"k{i}=1" for i in range(2000)] if name == "overrides" else []
    put_run(tmp_path / "0", *overrides, **(many if name == "metrics" else {}))
    with pytest.raises(ValueError, match=rf"result\.json is broken .* more than \d+ {name}"):
        read_runs(tmp_path)


def test_many_settings_are_cut_in_the_page_and_whole_in_the_csv_file(tmp_path, put_run):
    """The page has the name of a setting for each pair of settings."""
    for run in range(40):
        values = [f"key{i}={'x' * 2000}{run // 2}" for i in range(60)]
        result = {"test/accuracy": 0.9 + 0.01 * (run % 2) ** (run + 1)}
        put_run(tmp_path / str(run), *values, f"seed={run % 2}", metrics=result)
    table = write_report(tmp_path)
    assert len(table.columns) == 52
    note = "the runs differ in 60 settings: the first 50 are shown, and report.csv has all"
    page = (tmp_path / "report.html").read_text()
    assert note in page
    assert note in str(table.caption)
    assert len(page) < 10_000_000
    assert "key59" in (tmp_path / "report.csv").read_text()


def test_folders_that_are_nested_without_end_are_refused(tmp_path, put_run):
    put_run(tmp_path / "run")
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        inner = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    try:
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be searched for runs"):
            read_runs(tmp_path)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # rmtree of shutil would fail

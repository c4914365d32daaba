"""Tests that the report's page shows the runs' results, also in a real browser."""

import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from lightning_dist.report import (
    compare_groups,
    group_runs,
    holm,
    read_curves,
    read_runs,
    write_page,
    write_report,
)

PutRun = Callable[..., Path]
EVIL = [
    "<script>window.hit=1</script>",
    "</script><script>window.hit=2</script>",
    "</title></style></svg><img src=x onerror=window.hit=3>",
    "\"' onmouseover='window.hit=4' x=\"",
    "javascript:window.hit=5",
    "--><svg onload=window.hit=6>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$",
    "a\x00\x1b[2Jb\ud800\u202ec",
]
# The same texts as the page should show them: the control characters of the last one are escaped.
SHOWN = [*EVIL[:-1], r"a\x00\x1b[2Jb\ud800\u202ec"]


class Page(HTMLParser):
    """A parsed HTML page: the list of its elements with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"

    def titles(self, section: str) -> list[str | None]:
        return [a["aria-label"] for tag, a in self.elements if a.get("class") == section]


@pytest.fixture(scope="session")
def put_log(put_run: PutRun) -> PutRun:
    """Return a function that writes a run whose CSV log has two epochs, in Lightning's format."""

    def put(folder: Path, *overrides: str, name: str = "val/accuracy", **fields: Any) -> Path:
        put_run(folder, *overrides, **fields)
        (folder / "logs").mkdir()
        rows = [
            f'epoch,step,"{name}",train/loss',
            "0,9,,2.5",
            "0,10,0.25,",
            "1,19,,1.5",
            "1,20,0.5,",
        ]
        (folder / "logs" / "metrics.csv").write_text("\n".join(rows), encoding="utf-8")
        return folder

    return put


@pytest.fixture
def sweep(tmp_path: Path, put_log: PutRun) -> Path:
    """Write runs of two widths with and without a teacher, three seeds each, and a failed run."""
    number = 0
    for width, size in ((9, 438), (10, 5178)):
        for distill, gain in (("none", 0.0), ("dist", 0.1)):
            for seed in range(3):
                teacher = {"teacher": "digits", "teacher_parameters": 94186}
                put_log(
                    tmp_path / "sweep" / str(number),
                    f"net=w{width}",
                    f"distill={distill}",
                    f"seed={seed}",
                    metrics={"test/accuracy": width / 20 + gain * (1 + seed / 9) + seed / 99},
                    student_parameters=size,
                    **(teacher if distill == "dist" else {}),
                )
                number += 1
    failed = ["net=w10", "distill=dist", "seed=3"]
    put_log(tmp_path / "sweep" / "12", *failed, status="failed", error="out of memory", metrics={})
    return tmp_path / "sweep"


def compared(folder: Path) -> list[tuple[str, str, int, float | None, float | None, str | None]]:
    pairs = compare_groups(group_runs(read_runs(folder)), "test/accuracy")
    return [(x.setting.name, x.baseline.name, x.seeds, x.difference, x.p, x.reason) for x in pairs]


def test_settings_are_compared_by_a_t_test_paired_by_seed(tmp_path: Path, put_run: PutRun) -> None:
    none, dist = [0.81, 0.86, 0.83], [0.84, 0.91, 0.85]
    # The two settings have their seeds in different orders. Seed 7 failed in the second one.
    for seed in (2, 0, 1):
        put_run(tmp_path / f"n{seed}", "distill=none", f"seed={seed}", metrics=of(none[seed]))
    put_run(tmp_path / "n7", "distill=none", "seed=7", metrics=of(0.1))
    for seed in (0, 1, 2):
        put_run(tmp_path / f"o{seed}", "distill=dist", f"seed={seed}", metrics=of(dist[seed]))
    put_run(tmp_path / "o7", "distill=dist", "seed=7", status="failed", metrics=of(0.2))
    ((setting, baseline, seeds, difference, p, reason),) = compared(tmp_path)
    assert (setting, baseline, seeds, reason) == ("distill=dist", "distill=none", 3, None)
    gains = [y - x for x, y in zip(none, dist, strict=True)]
    t = statistics.fmean(gains) / (statistics.stdev(gains) / math.sqrt(3))
    assert difference == pytest.approx(statistics.fmean(gains))
    # This is the formula of Student's t distribution for 2 degrees of freedom.
    assert p == pytest.approx(1 - abs(t) / math.sqrt(t * t + 2))


def test_p_is_corrected_for_the_number_of_tested_pairs(tmp_path: Path, put_run: PutRun) -> None:
    results = {"a": [0.1, 0.2, 0.32], "b": [0.2, 0.31, 0.4], "c": [0.5, 0.63, 0.7], "one": [0.4]}
    for name, numbers in results.items():
        for seed, x in enumerate(numbers):
            put_run(tmp_path / f"{name}{seed}", f"x={name}", f"seed={seed}", metrics=of(x))
    pairs = compare_groups(group_runs(read_runs(tmp_path)), "test/accuracy")
    tested = [pair for pair in pairs if pair.p is not None]
    assert (len(pairs), len(tested)) == (6, 3)
    # Computed by hand: the smallest p times 3, the middle one times 2; each result is at least as
    # large as the one before.
    first, second, third = sorted(pair.p for pair in tested)
    middle = max(min(1, 3 * first), min(1, 2 * second))
    expected = {first: min(1, 3 * first), second: middle, third: max(middle, third)}
    for pair in tested:
        assert pair.corrected == pytest.approx(expected[pair.p])
    assert all(pair.corrected is None for pair in pairs if pair.p is None)
    write_page(read_runs(tmp_path), tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    assert "p (Holm)" in text
    assert f"{max(pair.corrected for pair in tested):.3g}" in text


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_holms_correction_is_the_step_down_rule(count: int) -> None:
    """The independent computation tests one level after the other, as in Holm's paper."""
    rng = random.Random(count)
    values = [rng.random() ** 3 for _ in range(count)]
    values[-1] = values[0]  # Two p-values are equal.
    corrected = holm(values)
    for level in [*(x * k for x in values for k in (0.999, 1.001)), 0.01, 0.05, 0.5]:
        level = min(level * rng.randint(1, count), 0.999)
        rejected: set[int] = set()
        for rank, i in enumerate(sorted(range(count), key=values.__getitem__)):
            if values[i] > level / (count - rank):
                break
            rejected.add(i)
        assert rejected == {i for i in range(count) if corrected[i] <= level}


def test_the_head_names_the_data_the_students_and_the_teachers(
    tmp_path: Path, put_run: PutRun
) -> None:
    for number, student in enumerate(["resnet8", "vgg8", "resnet8", "a", "b", "c"]):
        names = {"data": "cifar10", "student": student}
        names |= {"teacher": "resnet56 (run t)"} if number else {}
        put_run(tmp_path / str(number), f"x={number}", metrics=of(0.5), **names)
    write_report(tmp_path)
    head = "data cifar10; student resnet8, vgg8, a, b and 1 more; teacher resnet56 (run t)."
    assert head in Page(tmp_path / "report.html").text


def of(accuracy: float) -> dict[str, float]:
    return {"test/accuracy": accuracy}


@pytest.mark.parametrize(
    ("first", "second", "seeds", "reason"),
    [
        ({0: 0.5}, {0: 0.6}, 1, "fewer than 2 common seeds"),
        ({0: 0.5, 1: 0.6}, {2: 0.5, 3: 0.6}, 0, "fewer than 2 common seeds"),
        ({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}, 2, "the differences are identical"),
        ({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.3, 1: 0.4, 2: 0.5}, 3, "the differences are identical"),
        ({0: 0.5, 1: math.nan}, {0: 0.6, 1: 0.7}, 2, "a run diverged"),
    ],
)
def test_the_page_says_why_a_pair_cannot_be_tested(
    tmp_path: Path, put_run: PutRun, first: dict, second: dict, seeds: int, reason: str
) -> None:
    for name, numbers in (("a", first), ("b", second)):
        for seed, x in numbers.items():
            put_run(tmp_path / f"{name}{seed}", f"x={name}", f"seed={seed}", metrics=of(x))
    ((_, _, found, _, p, said),) = compared(tmp_path)
    assert (found, p, said) == (seeds, None, reason)
    write_page(read_runs(tmp_path), tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    # The page has no table of pairs if a setting has only one seed, but lists the settings.
    several = min(len(first), len(second)) > 1
    assert (reason if several else "results of fewer than 2 seeds: 2 settings") in text


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path, put_run: PutRun) -> None:
    for folder, seed, x in (("0", 0, 0.1), ("again", 0, 0.3), ("1", 1, 0.25)):
        put_run(tmp_path / "a" / folder, "x=a", f"seed={seed}", metrics=of(x))
    for seed, x in enumerate([0.4, 0.5]):
        put_run(tmp_path / "b" / str(seed), "x=b", f"seed={seed}", metrics=of(x))
    ((_, _, seeds, difference, p, _),) = compared(tmp_path)
    assert seeds == 2
    assert difference == pytest.approx((0.2 + 0.25) / 2)
    t = 0.225 / (statistics.stdev([0.2, 0.25]) / math.sqrt(2))
    # This is the formula of Student's t distribution for 1 degree of freedom.
    assert p == pytest.approx(1 - 2 / math.pi * math.atan(t))


def test_curves_keep_the_steps_of_their_metric(tmp_path: Path, put_log: PutRun) -> None:
    curves = read_curves(put_log(tmp_path / "run"))
    assert curves.keys() == {"val/accuracy", "train/loss"}
    assert (curves["val/accuracy"].steps, curves["val/accuracy"].values) == ([10, 20], [0.25, 0.5])
    assert (curves["train/loss"].steps, curves["train/loss"].values) == ([9, 19], [2.5, 1.5])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("step,x\n1,0.5\n2,", [0.5]),
        ("step,x\n1,0.5\n2", [0.5]),
        ("step,x\n1,0.5\n2,0.7e\n,9\n", [0.5]),
        ("step,x\n1,0.5,7,8\n", [0.5]),
        ("step,x\n1,0.5\n2,inf\n", [0.5, math.nan]),
    ],
)
def test_a_log_that_a_killed_run_left_unfinished_is_read_up_to_its_damage(
    tmp_path: Path, text: str, values: list[float]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text(text)
    assert read_curves(tmp_path)["x"].values == pytest.approx(values, nan_ok=True)


def test_long_curves_keep_their_ends_and_the_page_small(tmp_path: Path, put_log: PutRun) -> None:
    folder = put_log(tmp_path / "run")
    rows = [f"{step},{math.sin(step)}" for step in range(1, 20_001)]
    (folder / "logs" / "metrics.csv").write_text("\n".join(["step,val/loss", *rows]))
    write_report(tmp_path)
    page = tmp_path / "report.html"
    assert Page(page).titles("curves") == ["val/loss"]
    assert "20000" in Page(page).text  # The axis reaches the last step.
    assert page.stat().st_size < 100_000


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x00", b"a,b\n1,2\n", b'"' * 200_001])
def test_runs_without_a_readable_log_are_listed(
    tmp_path: Path, put_run: PutRun, content: bytes | None
) -> None:
    folder = put_run(tmp_path / "run")
    if content is not None:
        (folder / "logs").mkdir()
        (folder / "logs" / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv"):
        read_curves(folder)
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert "Runs without learning curves: 1" in page.text
    assert page.titles("curves") == []


def test_results_of_earlier_versions_are_in_the_tables_and_not_in_the_plots(
    tmp_path: Path, put_run: PutRun
) -> None:
    put_run(tmp_path / "old", "x=old")
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.titles("groups") == ["test/accuracy"]
    assert page.titles("sizes") == page.titles("teachers") == []
    assert "1 of the completed runs do not say how large their student is" in page.text
    put_run(tmp_path / "new", "x=new", student_parameters=438)
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.titles("sizes") == ["test/accuracy against the student's size"]
    assert page.titles("teachers") == ["test/accuracy against the teacher"]
    assert "1 of the completed runs do not say" in page.text
    assert "no teacher" in page.text


def test_sizes_that_are_no_numbers_are_an_error(tmp_path: Path, put_run: PutRun) -> None:
    put_run(tmp_path / "run", student_parameters="many")
    with pytest.raises(ValueError, match=r"result\.json is broken .*student_parameters is 'many'"):
        read_runs(tmp_path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_runs_that_diverged_or_failed_do_not_break_the_page(
    tmp_path: Path, put_run: PutRun, number: float
) -> None:
    put_run(tmp_path / "0", "x=0", status="failed", error="no data", metrics={})
    write_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert "no data" in page.text
    assert page.titles("sizes") == []
    for seed in range(2):
        put_run(tmp_path / f"1{seed}", "x=1", metrics=of(number), student_parameters=5)
    write_report(tmp_path)
    assert f"{number} ± nan" in Page(tmp_path / "report.html").text


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory, put_log: PutRun) -> Path:
    """Write the page of runs whose names, values and errors all are hostile texts."""
    tmp_path = tmp_path_factory.mktemp("runs")
    for number, text in enumerate(EVIL):
        for seed in range(2):
            name = text.replace("/", "|").replace("\x00", "").encode("utf-8", "replace").decode()
            put_log(
                tmp_path / "evil" / f"{number}{seed} {name}",
                f"+{text.replace('=', '')}key={text}",
                f"distill={text}",
                f"seed={seed}",
                command=text,
                metric=EVIL[2],
                metrics={EVIL[2]: 0.5 + number / 10 + seed * (number + 1) / 99, text: 1.0},
                student_parameters=10**number,
                teacher=text,
                teacher_parameters=7,
                student=text,
                data=text,
                name="train/" + text.replace('"', '""').replace("\ud800", ""),
            )
        put_log(tmp_path / "evil" / f"f{number}", f"distill={text}", status="failed", error=text,
                metric=EVIL[2], metrics={})  # fmt: skip
    write_report(tmp_path / "evil")
    return tmp_path / "evil" / "report.html"


def test_hostile_names_are_shown_as_text(evil: Path) -> None:
    page = Page(evil)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "a" not in tags
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        places = [attributes.get(name) for name in ("src", "href", "xlink:href", "action")]
        assert all(place is None or place.startswith(("#", "data:,")) for place in places)
    lines = page.text.split("\n")
    for text in SHOWN:
        # The text is at least once a setting, twice a command, and twice a teacher.
        assert lines.count(text) >= 5


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Start a chromium without a window; Debian's packages have its driver too."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # As root in a container, chromium can start only without its sandbox and /dev/shm.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1400,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
        yield chrome
        chrome.quit()


def opened(browser: webdriver.Chrome, page: Path) -> list[str]:
    """Open a page and return the addresses that it requested."""
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [x["params"] for x in events if x["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent]


def column(browser: webdriver.Chrome, table: str, number: int) -> list[str]:
    return texts(browser, f"#{table} tbody td:nth-child({number})")


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Return the visible texts of elements, from top to bottom, with one call of the browser."""
    script = """
        const found = [...document.querySelectorAll(arguments[0])];
        found.sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top);
        return found.map((element) => element.innerText)"""
    return browser.execute_script(script, selector)


def header(browser: webdriver.Chrome, table: str, name: str) -> tuple[WebElement, int]:
    """Return the header of a column and its number, from 1; `name` is the title's first word."""
    names = browser.execute_script(
        f"return [...document.querySelectorAll('#{table} th')].map((head) => head.innerText)"
    )
    (number,) = (i for i, text in enumerate(names, start=1) if text.split()[0] == name)
    return browser.find_element(By.CSS_SELECTOR, f"#{table} th:nth-child({number})"), number


def clicked(browser: webdriver.Chrome, table: str, name: str) -> list[str]:
    """Click on a column's title, check that only this column is sorted by, return its texts."""
    head, number = header(browser, table, name)
    head.find_element(By.TAG_NAME, "button").click()
    marked = browser.find_elements(By.CSS_SELECTOR, f"#{table} [aria-sort]")
    assert marked == [head]
    return column(browser, table, number)


def test_a_browser_sorts_the_tables_and_shows_the_plots(
    browser: webdriver.Chrome, sweep: Path
) -> None:
    write_report(sweep)
    page = sweep / "report.html"
    asked = opened(browser, page)
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    by_name = [["w9", "none"], ["w9", "dist"], ["w10", "none"], ["w10", "dist"]]
    assert [column(browser, "groups", i) for i in (1, 2)] == [list(x) for x in zip(*by_name)]  # noqa: B905

    # The first click sorts in the natural order (w9 before w10), the second one in reverse. The
    # other cells of a row move with it.
    assert clicked(browser, "groups", "net") == ["w9", "w9", "w10", "w10"]
    assert header(browser, "groups", "net")[0].get_attribute("aria-sort") == "ascending"
    assert clicked(browser, "groups", "net") == ["w10", "w10", "w9", "w9"]
    assert header(browser, "groups", "net")[0].get_attribute("aria-sort") == "descending"
    assert column(browser, "groups", 2) == ["none", "dist", "none", "dist"]

    # Cells are sorted by their numbers; a run without a number is last in both orders.
    rising = clicked(browser, "runs", "test/accuracy")
    assert rising[-1] == "-"
    assert [float(x) for x in rising[:-1]] == sorted(float(x) for x in rising[:-1])
    falling = clicked(browser, "runs", "test/accuracy")
    assert falling == [*reversed(rising[:-1]), "-"]
    assert clicked(browser, "runs", "student's")[0] == "438"
    assert clicked(browser, "runs", "student's")[0] == "5,178"
    folders = clicked(browser, "runs", "folder")
    assert folders == [str(sweep / str(number)) for number in range(13)]
    commands = column(browser, "runs", len(browser.find_elements(By.CSS_SELECTOR, "#runs th")))
    assert commands[4] == "lightning-dist train net=w9 distill=dist seed=1"

    differences = clicked(browser, "pairs", "mean")
    assert [float(x) for x in differences] == sorted(map(float, differences))
    assert len(differences) == 6

    def lines(title: str) -> int:
        picture = f'figure[aria-label="{title}"] svg [data-group]'
        return len(browser.find_elements(By.CSS_SELECTOR, picture))

    assert lines("val/accuracy") == 13
    assert lines("train/loss") == 13
    assert lines("test/accuracy against the student's size") >= 4
    assert lines("test/accuracy against the teacher") >= 4
    teachers = browser.find_element(By.CSS_SELECTOR, "figure.teachers").text
    assert "no teacher" in teachers
    assert "digits (94,186 parameters)" in teachers
    failed = browser.find_element(By.ID, "failed").text
    assert f"{sweep / '12'}: out of memory" in failed

    # The setting that has the focus is highlighted: the others are faded.
    browser.execute_script("document.querySelector('.legend li').focus()")
    faded = browser.find_elements(By.CSS_SELECTOR, "figure.curves .faded")
    assert {element.get_attribute("data-group") for element in faded} == {"1", "2", "3"}
    assert browser.get_log("browser") == []


def test_a_browser_does_not_run_code_in_names(browser: webdriver.Chrome, evil: Path) -> None:
    asked = opened(browser, evil)
    assert [url for url in asked if not url.startswith("data:")] == [evil.as_uri()]
    for table in ("groups", "runs", "pairs"):
        for head in browser.find_elements(By.CSS_SELECTOR, f"#{table} th button"):
            browser.execute_script("arguments[0].click()", head)
    assert browser.execute_script("return window.hit") is None
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    _, number = header(browser, "runs", "command")
    assert set(SHOWN) <= set(column(browser, "runs", number))
    # The log is empty, so the Content-Security-Policy did not have to block a request either.
    assert browser.get_log("browser") == []

"""One page about runs: what is on it, and what a real browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from reports import make, run

from fwm.errors import UserError
from fwm.look import LayerMemory
from fwm.reporting import Run, write_report
from fwm.reporting.report import POINTS, _points, _ticks

HOSTILE = (
    "</script><script>parent.hacked = 1</script><img src=x onerror='parent.hacked = 2'> & \ud800"
)
WORDS = ["the", "cat", "<b>sat</b>", "on a very long word"]


def memories():
    rng = np.random.default_rng(0)
    changed = np.triu(rng.random((4, 4), np.float32), 1)
    weights = rng.standard_normal((6, 8, 3), np.float32)
    return [
        LayerMemory("fast_weight", weights, changed),
        LayerMemory("softmax", None, None),
        LayerMemory("mine", weights * 0, None),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page about three runs: whole, still training without a checkpoint, just begun."""
    folder = tmp_path_factory.mktemp("page")
    whole, training, begun = folder / "a<b>", folder / "training", folder / "begun"
    begun.mkdir()
    for workdir, steps in ((whole, 31), (training, 8)):
        with make(workdir) as reporter:
            run(reporter, range(1, steps))
    with (training / "train_log.csv").open("a") as file:
        file.write("9,train,nan,nan,,,,1\n10,train,4.2")  # a loss that is none, half a row
    (whole / "test_results.json").write_text('{"perplexity": 34.5678, "mean_nll": 3.5}')
    settings = {"train.max_step": 30, "model.update_rule": "delta", "data.dir": "/a"}
    runs = [
        Run(whole, settings, "34.1 / 35.2", {}, HOSTILE, WORDS, memories()),
        Run(training, settings | {"model.update_rule": "sum", "data.dir": "/b"}, note="no <step>"),
        Run(begun, settings | {"train.lr": 0.1, "model.note": 50 * "."}, note="nothing yet"),
    ]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


class Seen(HTMLParser):
    """Tags, and the text by the tag that it stands in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], {}, [""]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_data(self, data):
        self.text.setdefault(self.open[-1], []).append(data)


def test_what_is_on_the_page(page):
    text = page.read_text(encoding="utf-8")
    seen = Seen(text)
    # Of what came with the runs nothing has become a part of the page.
    assert "onerror" not in dict(seen.attributes)
    assert seen.tags.count("script") == 1 + seen.tags.count("svg") - 1  # the last svg is a triangle
    assert seen.tags.count("b") == 0
    assert HOSTILE.replace("\ud800", "?") in "".join(seen.text["pre"])
    # Nor does anything come from elsewhere.
    fetched = [v for name, v in seen.attributes if name in ("src", "href") or "://" in str(v)]
    assert all(value.startswith("data:image/png;base64,") for value in fetched)
    assert len(fetched) == 2 * 4  # of six heads
    assert "://" not in text
    cells = seen.text["td"]
    assert f"</span>{html.escape('a<b>')}</td>" in text
    for expected in ("30 of 30", "34.568", "34.1 / 35.2", "9 of 30", "0 of 30", "0.1"):
        assert expected in cells
    assert {"model.update_rule", "train.lr"} <= set(seen.text["th"])
    assert "data.dir" not in seen.text["th"]  # where it lies is not what it is
    assert "no <step>" in seen.text["p"]
    assert "It keeps no fast weights." in seen.text["p"]
    assert html.escape("“<b>sat</b>” (3) changes") in text
    charts = re.findall(r'<script type="application/json">(.*?)</script>', text)
    curves = json.loads(charts[0])
    assert [line["name"] for line in curves] == [
        "a<b>, train", "a<b>, valid", "training, train"
    ]  # fmt: skip
    assert curves[1]["x"] == [10, 20, 30]
    assert len(curves[2]["x"]) == 7  # what is not finite is left out


def test_names_are_the_settings_that_differ(tmp_path):
    runs = [Run(tmp_path / name, {"train.lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2))]
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<title>fwm: lr 0.1, lr 0.2</title>" in text
    assert "Nothing is logged yet." in text
    with pytest.raises(UserError, match=r"report .*nowhere.* cannot be written"):
        write_report(runs, tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, False), (0.2, 0.21, False), (3, 400_000, False), (0, 3e-4, False), (-2, 5, False),
     (20, 30, True), (3, 4e4, True), (1e-9, 1e9, True), (99, 101, True)],
)  # fmt: skip
def test_ticks_are_few_and_round_and_between(low, high, logarithmic):
    ticks = _ticks(low, high, logarithmic)
    assert 2 <= len(ticks) <= 10
    slack = 1e-6 * max(abs(low), abs(high))
    assert low - slack <= min(ticks)
    assert max(ticks) <= high + slack
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks)


def test_long_curves_are_thinned():
    rows = [{"step": str(i), "split": "train", "loss": "2"} for i in range(1, 10_002)]
    points = _points(rows, "train", "loss", False)
    assert POINTS / 2 < len(points) <= POINTS + 1
    assert (points[0][0], points[-1][0]) == (1, 10_001)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")

# A page around the report: its scripts look at it from outside, as the report lets none run in it.
AROUND = """<!doctype html><body style="margin:0">
<iframe id="f" width="%d" height="900" style="border:0"></iframe><pre id="found"></pre><script>
f.onload = () => {
  const d = f.contentDocument, at = (e, x, y) => {
    const b = e.getBoundingClientRect();
    e.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: b.left + x * b.width,
                                                    clientY: b.top + y * b.height}));
    const t = d.getElementById("tip"), r = t.getBoundingClientRect();
    return [t.textContent, getComputedStyle(t).display, r.left >= 0 && r.right <= %d];
  };
  const style = getComputedStyle(d.body), charts = [...d.querySelectorAll("svg.chart")];
  found.textContent = JSON.stringify({
    wide: d.documentElement.scrollWidth, hacked: window.hacked || 0,
    colors: [style.backgroundColor, style.color],
    scale: charts[0].getBoundingClientRect().width / 360, charts: charts.length,
    columns: new Set(charts.map(c => c.getBoundingClientRect().left)).size,
    first: at(charts[0], 0.15, 0.5), last: at(charts[0], 0.97, 0.5),
    cell: at(d.querySelector("rect.cell"), 0.5, 0.5),
    image: [d.querySelector("img").naturalWidth, d.querySelector("img").naturalHeight],
    away: at(d.querySelector("h1"), 0.5, 0.5),
  });
};
f.srcdoc = %s;
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize(
    ("width", "dark"), [(360, False), (1200, True)], ids=["phone, light", "desk, dark"]
)
def test_in_a_real_browser(page, tmp_path, width, dark):
    srcdoc = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    (tmp_path / "around.html").write_text(AROUND % (width, width, srcdoc), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
         str(tmp_path / "around.html")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE" not in done.stderr  # errors, and what the page's policy refused
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert found["hacked"] == 0
    assert found["wide"] <= width
    assert found["charts"] == 5
    assert found["scale"] > 0.85  # its labels are 11 px then
    assert found["columns"] == (3 if width > 1000 else 1)
    luminance = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in found["colors"]]
    assert (
        (luminance[0] < 200 < 500 < luminance[1]) if dark else (luminance[1] < 200 < luminance[0])
    )
    assert found["first"][0].splitlines()[0] == "a<b>, train: 148.4 at step 1"
    assert found["last"][0].splitlines()[0] == "a<b>, train: 1.181 at step 30"
    assert found["first"][1:] == found["last"][1:] == ["block", True]
    assert re.fullmatch(r"“cat” \(2\) changes \d+% of “the” \(1\)", found["cell"][0])
    assert found["image"] == [3, 8]
    assert found["away"][1] == "none"

"""The report in a real headless browser: drawn, hovered, dark, on a phone, printed, with hostile text."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import grpo_run, page_of, rollout_rows, two_runs, write_lines  # noqa: F401 (fixtures)

import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BREAK_IN = "</main><script>document.title = 'in'</script><img src=x onerror=\"document.title = 'in'\">"
pytestmark = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {BROWSERS} is installed")
VISIBLE = [
    "#curves figure svg .line", ".legend li", "table.confusion td", "table.controls svg .bar", "header pre", "svg text",
    "#rollouts .strip img", ".tokens i.p3", ".question", "#data td svg .bar", ".example img",
]  # fmt: skip
# Run on the page: which of VISIBLE have no size, the text of every figure with the pointer at step 20, the two themes'
# background, the path of the loss
LOOK = """
const boxes = selector => Array.from(document.querySelectorAll(selector), e => e.getBoundingClientRect());
const result = { hidden: VISIBLE.filter(s => !boxes(s).some(box => box.width > 10 && box.height > 6)) };
const loss = charts.find(c => c.svg.closest("figure").innerText.includes("loss"));
const box = loss.svg.getBoundingClientRect();
const at = { clientX: (loss.x(20) + 1) / WIDTH * box.width + box.left, clientY: box.top + 50 };
loss.svg.dispatchEvent(new PointerEvent("pointermove", at));
result.hover = Array.from(document.querySelectorAll("figure"), f => f.innerText);
const colour = () => getComputedStyle(document.body).backgroundColor;
result.themes = [colour(), (document.getElementById("theme").click(), colour())];
result.loss = loss.svg.querySelector(".line").getAttribute("d");
document.documentElement.dataset.result = JSON.stringify(result);
"""


@pytest.fixture
def browse(tmp_path):
    """(page, flags) -> (what the browser prints, lines of its console)."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]

    def open_page(path, *more):
        command = [next(filter(None, map(shutil.which, BROWSERS))), *flags, *more, path.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


def test_all_is_drawn_and_hovering_shows_one_step_in_every_chart(grpo_run, browse, monkeypatch, tmp_path):  # noqa: F811
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in ((41, None), (42, 0.02)))
    code = f"const VISIBLE = {json.dumps(VISIBLE)};{LOOK}"
    (tmp_path / "template.html").write_text(
        report.TEMPLATE.read_text().replace("{% endraw %}</script>", code + "{% endraw %}</script>")
    )
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "template.html")
    page_of(grpo_run)
    text, console = browse(grpo_run / "report.html", "--dump-dom")
    assert not console, console
    result = json.loads(html.unescape(re.search('data-result="([^"]*)"', text)[1]))
    assert not result["hidden"]
    assert len(result["hover"]) >= 8 and all("step 20" in text for text in result["hover"])
    values = "\n".join(result["hover"])
    assert re.search(r"loss\s+0\.05\b", values) and re.search(r"KL\s+0\.2\b", values) and "1 not finite" in values
    assert result["themes"] == ["rgb(255, 255, 255)", "rgb(19, 21, 24)"]
    assert result["loss"].count("M") == 2 and result["loss"].endswith("h0"), "a gap, then a point alone"


@pytest.mark.parametrize("compared", [False, True])
def test_a_phone_and_paper(two_runs, browse, tmp_path, compared):  # noqa: F811
    """A frame of 375 pixels: a headless window is not made that narrow. On paper, folded tables stay folded."""
    runs = two_runs if compared else two_runs[1:]
    page_of(*runs)
    path, frame, pdf = runs[0] / "report.html", tmp_path / "phone.html", tmp_path / "page.pdf"
    frame.write_text(f"""<iframe id=f width=375 height=800 src="{path.as_uri()}"></iframe><script>
        f.onload = () => {{ const root = f.contentDocument.documentElement;
            document.title = root.clientWidth + " shown, " + root.scrollWidth + " wide"; }};</script>""")
    text, _ = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=2000")
    shown, wide = map(int, re.search(r"<title>(\d+) shown, (\d+) wide", text).groups())
    assert 350 < shown <= 375 and wide <= shown
    browse(path, f"--print-to-pdf={pdf}")
    assert 1 < len(re.findall(rb"/Type */Page\b", pdf.read_bytes())) <= 8


def test_a_completion_that_is_a_script_is_text_and_the_policy_stops_another_script(grpo_run, browse):  # noqa: F811
    rows = [row | {"question": BREAK_IN, "rewards": {BREAK_IN: 1.0}} for row in rollout_rows(1, 1, text=BREAK_IN)]
    write_lines(grpo_run / "rollouts.jsonl", rows)
    page = page_of(grpo_run).replace("</main>", "</main><script>document.title = 'in'</script>")
    (grpo_run / "report.html").write_text(page)
    text, console = browse(grpo_run / "report.html", "--dump-dom")
    assert "<title>grpo</title>" in text and text.count("<script") == 2
    assert len(console) == 1 and "Content Security Policy" in console[0], console

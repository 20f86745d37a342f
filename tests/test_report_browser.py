"""The report in a real headless browser: no console errors, all of it visible, light, dark, phone, paper, hostility."""

import json
import re
import shutil
import subprocess

import av
import numpy as np
import pytest
from test_report import grpo_run, page_of, rollout_rows, write_lines  # noqa: F401 (grpo_run is a fixture)

import report

BREAK_IN = "</div></main><script>document.title = 'in'</script><img src=x onerror=\"document.title = 'in'\">"


@pytest.fixture
def browse(tmp_path):
    """(page, flags) -> (the document after its script ran, what the browser's console said)."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]

    def open_page(path, *more):
        command = [program, *flags, *more, path.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@pytest.fixture
def asking(browse, tmp_path, monkeypatch):
    """(folder, JavaScript expressions by name) -> their values once the page's own script has run."""

    def ask(folder, expressions, *flags):
        told = ", ".join(f"{name}: {code}" for name, code in expressions.items())
        code = f"document.documentElement.dataset.told = JSON.stringify({{ {told} }});</script>"
        template = tmp_path / "template.html"
        template.write_text(report.TEMPLATE.read_text().replace("</script>", code))
        with monkeypatch.context() as patch:
            patch.setattr(report, "TEMPLATE", template)
            page_of(folder)
        text, console = browse(folder / "report.html", "--dump-dom", *flags)
        assert not console, console
        found = re.search('data-told="([^"]*)"', text)[1]
        return json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))

    return ask


def pixels(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_opens_without_console_errors_and_is_drawn(grpo_run, browse, tmp_path):  # noqa: F811
    page_of(grpo_run)
    text, console = browse(grpo_run / "report.html", "--dump-dom")
    assert not console, console
    assert text.count("<figure") >= 8 and text.count("<article") >= 2
    for width, height in ((1280, 1600), (500, 1600)):
        picture = tmp_path / f"{width}.png"
        _, console = browse(grpo_run / "report.html", f"--window-size={width},{height}", f"--screenshot={picture}")
        assert not console, console
        found = pixels(picture)
        assert found.shape == (height, width, 3) and len(np.unique(found.reshape(-1, 3), axis=0)) > 50


def test_what_a_reader_looks_for_is_visible(grpo_run, asking):  # noqa: F811
    """Laid out with a size, not only in the source."""
    size = "Array.from(document.querySelectorAll({}), e => e.getBoundingClientRect())"
    seen = size + ".some(box => box.width > 10 && box.height > 6)"
    wanted = {
        "curve": "#curves figure svg", "legend": ".legend li", "confusion": "table.confusion td",
        "controls": "table.controls svg .bar", "strip": "#rollouts .strip img", "completion": "#rollouts .tokens",
        "tinted": ".tokens i.p3", "question": ".question", "classes": "#data td svg .bar", "example": ".example img",
        "setup": "#setup table", "command": "header pre", "tiles": ".tiles dd", "theme": "#theme",
    }  # fmt: skip
    found = asking(grpo_run, {name: seen.format(json.dumps(selector)) for name, selector in wanted.items()})
    assert found == dict.fromkeys(wanted, True)


def test_hovering_shows_one_step_in_every_chart(grpo_run, asking):  # noqa: F811
    hover = """(() => {
      const box = charts[0].svg.getBoundingClientRect(), x = (charts[0].x(20) + 1) / WIDTH * box.width + box.left;
      const event = new PointerEvent("pointermove", { clientX: x, clientY: box.top + 50, bubbles: true });
      charts[0].svg.dispatchEvent(event);
      return Array.from(document.querySelectorAll("figure"), f => f.innerText); })()"""
    figures = asking(grpo_run, {"figures": hover})["figures"]
    assert len(figures) >= 8 and all("step 20" in text for text in figures)
    values = "\n".join(figures)
    assert re.search(r"loss\s+0\.05\b", values) and re.search(r"kl\s+0\.2\b", values)


def test_light_and_dark(grpo_run, asking):  # noqa: F811
    colour = "getComputedStyle(document.body).backgroundColor"
    click = f"(document.getElementById('theme').click(), {colour})"
    light, dark = "rgb(255, 255, 255)", "rgb(19, 21, 24)"
    found = asking(grpo_run, {"at_first": colour, "clicked": click, "again": click})
    assert found == {"at_first": light, "clicked": dark, "again": light}
    prefers = "--blink-settings=preferredColorScheme=0"  # as a dark desktop says
    assert asking(grpo_run, {"at_first": colour, "clicked": click}, prefers) == {"at_first": dark, "clicked": light}


def test_nothing_is_wider_than_a_phone(grpo_run, browse, tmp_path):  # noqa: F811
    """In a frame of 375 pixels: a headless browser's own window is not made that narrow."""
    page_of(grpo_run)
    frame = tmp_path / "phone.html"
    frame.write_text(f"""<iframe id=f width=375 height=800 src="{(grpo_run / "report.html").as_uri()}"></iframe><script>
        f.onload = () => {{ const root = f.contentDocument.documentElement;
            document.title = root.clientWidth + " shown, " + root.scrollWidth + " wide"; }};</script>""")
    text, _ = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=2000")
    shown, wide = map(int, re.search(r"<title>(\d+) shown, (\d+) wide", text).groups())
    assert 350 < shown <= 375 and wide <= shown


def test_paper(grpo_run, browse, tmp_path):  # noqa: F811
    page_of(grpo_run)
    paper = tmp_path / "page.pdf"
    browse(grpo_run / "report.html", f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 20_000 and 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 12


def test_a_completion_that_is_a_script_is_text(grpo_run, asking):  # noqa: F811
    rows = [*rollout_rows(1, 1, say=BREAK_IN), *rollout_rows(40, 4, say=BREAK_IN)]
    for row in rows:
        row |= {"question": BREAK_IN, "answer": BREAK_IN, "id": BREAK_IN, "rewards": {BREAK_IN: 1.0}}
    write_lines(grpo_run / "rollouts.jsonl", rows)
    text = json.dumps(BREAK_IN).replace("</", "<\\/")
    shown = f"Array.from(document.querySelectorAll('.tokens')).filter(e => e.textContent.includes({text})).length"
    found = asking(grpo_run, {
        "title": "document.title", "scripts": "document.scripts.length", "shown": shown,
        "strangers": "document.querySelectorAll('img:not([src^=\"data:image\"])').length",
    })  # fmt: skip
    assert found["title"] == "grpo" and found["scripts"] == 1 and found["strangers"] == 0 and found["shown"] >= 8


def test_the_policy_stops_a_script_that_is_not_the_pages_own(grpo_run, browse):  # noqa: F811
    page_of(grpo_run)
    path = grpo_run / "report.html"
    path.write_text(path.read_text().replace("</main>", "</main><script>document.title = 'broken in'</script>"))
    text, console = browse(path, "--dump-dom")
    assert "<title>broken in</title>" not in text
    assert any("Content Security Policy" in line for line in console), console


def test_two_runs_on_one_page(grpo_run, browse, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(grpo_run, other)
    about = json.loads((other / "run.json").read_text())
    about["config"]["beta"] = 0.125
    (other / "run.json").write_text(json.dumps(about))
    report.main([str(grpo_run), str(other)])
    assert not (grpo_run / "report.html").exists(), "a run's own page is not overwritten"
    text, console = browse(tmp_path / "compare.html", "--dump-dom")
    assert not console, console
    for words in ("<h1>2 runs</h1>", "Options that differ", "0.125", "Held-out accuracy"):
        assert words in text, words
    figures = re.findall("<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) >= 8 and all(figure.count('<li class="s') == 2 for figure in figures)

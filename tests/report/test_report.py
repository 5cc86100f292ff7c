"""The page says what the runs recorded, holds all that it shows, and reads on a phone, in the dark and on paper."""

import base64
import io
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from browser import Browser, chromium
from runs import write_folder

from adaptkit.cli import main
from adaptkit.report import Extra, Run, charts, found, grouped, page, read
from recipes import segment

pytest.importorskip("matplotlib")
NAMES = ["sky", "<b>road</b>", "a & $b$"]


def train(data, out, *more):
    return segment.main([
        "--train", data, "--val", data, "--num-classes", "3", "--classes", *NAMES, "--size", "32", "48", "--batch-size", "2",
        "--steps", "2", "--eval-every", "1", "--save-every", "0", "--out", str(out), *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds without an adapter, one with one."""
    base = tmp_path_factory.mktemp("runs")
    data = str(write_folder(base / "data", count=5))
    for name, adapter, seed in (("one", "none", 0), ("one", "none", 1), ("two", "metaformer", 0)):
        train(data, base / "runs" / f"{name}-{seed}", "--adapter", adapter, "--head", "linear", "--seed", str(seed))
    return base / "runs"


@pytest.fixture(scope="module")
def html(folder):
    path = folder.parent / "page.html"
    assert main(["report", str(folder), "--out", str(path)]) == 0
    return path.read_text()


def table(html, name):
    """Rows of the table in the region of this name, as lists of texts."""
    part = html[html.index(f'aria-label="{name}"') :]
    rows = re.findall(r"<tr.*?</tr>", part[: part.index("</table>")], re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", r, re.DOTALL)] for r in rows
    ]


# ------------------------------------------------------------------------------------------------------ numbers


def test_scores_are_those_of_the_evaluations_and_spreads_those_of_the_seeds(folder, html):
    said = [json.loads((folder / n / "evaluation.json").read_text()) for n in ("one-0", "one-1", "two-0")]
    scores = [100 * one["miou"] for one in said]
    rows = table(html, "The setups side by side")
    assert [row[0] for row in rows[1:]] == ["no adapter", "metaformer"]
    assert rows[1][1] == f"{statistics.fmean(scores[:2]):.1f}\xa0±\xa0{statistics.stdev(scores[:2]):.1f}"
    assert rows[2][1] == f"{scores[2]:.1f}"
    assert [row[2] for row in rows[1:]] == ["2", "1"]
    result = json.loads((folder / "two-0" / "result.json").read_text())
    assert rows[2][3] == f"{result['trained_parameters']:,}"
    low, high = (100 * v for v in said[2]["interval"]["miou"])
    assert f"{low:.1f} to {high:.1f}" in table(html, "Runs")[3]


def test_classes_are_means_over_the_seeds_and_what_a_file_says_is_text(folder, html):
    said = [json.loads((folder / n / "evaluation.json").read_text())["per_class"] for n in ("one-0", "one-1", "two-0")]
    rows = table(html, "IoU by class")
    for k, name in enumerate(("sky", "&lt;b&gt;road&lt;/b&gt;", "a &amp; $b$")):
        assert rows[k + 1][0] == name
        assert rows[k + 1][2].startswith(f"{50 * (said[0][k] + said[1][k]):.1f}")
        assert rows[k + 1][3] == f"{100 * said[2][k]:.1f}"


def test_the_confusion_matrix_is_of_all_seeds_of_the_best_setup(folder, html):
    runs = found([folder])
    top = max(grouped(runs), key=lambda g: g.score.mean)
    total = [[sum(r.evaluation["confusion"][i][j] for r in top.runs) for j in range(3)] for i in range(3)]
    for row, counts in zip(table(html, "Confusion matrix")[1:], total):
        assert [int(cell or 0) for cell in row[1:]] == [round(100 * c / sum(counts)) for c in counts]


def test_pictures_are_those_that_the_run_drew(folder, html):
    urls = re.findall(r'<img[^>]*src="data:image/webp;base64,([^"]+)"', html)
    drawn = {p.read_bytes() for p in folder.glob("*/pictures/*.webp")}
    assert len(urls) >= 6
    assert all(base64.b64decode(url) in drawn for url in urls)
    assert Image.open(io.BytesIO(base64.b64decode(urls[0]))).size == (56, 40)
    assert all(re.search(r'alt="[^"]+, image \d+"', tag) for tag in re.findall(r"<img[^>]*>", html))


def test_one_run_alone_says_what_it_cost_and_shows_every_kind_of_score_by_class(folder):
    said = page([read(folder / "two-0")])
    assert "The setups side by side" not in said
    assert table(said, "IoU by class")[0] == ["class", "pixels", "IoU", "accuracy", "boundary IoU"]
    assert "95 % interval over images" in said
    assert "of the model" in said


# ---------------------------------------------------------------------------------------------------- the page


def test_it_holds_all_that_it_shows(html):
    assert "http" not in html.replace("https://", "http").split("<style>")[0]
    for kind, address in re.findall(r'\b(src|href|action|data|poster)="([^"]*)"', html):
        assert address.startswith(("data:", "#")), (kind, address)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert {m for m in re.findall(r"url\(#([^)]+)\)", html)} <= set(ids)


def test_every_table_names_its_rows_and_columns_and_every_chart_what_it_shows(html):
    for body in re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL):
        assert all('<th scope="row">' in row for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL))
    drawings = re.findall(r"<svg[^>]*>", html)
    assert len(drawings) >= 3
    assert all('role="img"' in d and re.search(r'aria-label="[^"]{20,}"', d) for d in drawings)


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("what", ["several", "one", "nothing"])
def test_in_a_browser(folder, html, tmp_path, what):
    path = tmp_path / "page.html"
    one = read(folder / "two-0")
    path.write_text({"several": html, "one": page([one]), "nothing": page([Run("bare", rows=[{"step": 1}])])}[what])
    browser = Browser()
    try:
        backgrounds = []
        for width, dark, media in ((1200, False, "screen"), (1200, True, "screen"), (360, False, "screen")):
            browser.open(path.as_uri(), width, dark=dark, media=media)
            assert browser.said == []
            assert [a for a in browser.asked if not a.startswith("data:")] == [path.as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert backgrounds[0] == backgrounds[2] == "rgb(255, 255, 255)"
        assert backgrounds[1] != backgrounds[0]
        browser.printed(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    finally:
        browser.close()


# ------------------------------------------------------------------------------------------- what is not there


def test_a_run_without_an_evaluation_shows_what_it_has_and_says_how_to_get_the_rest(folder, tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "result.json"):
        (tmp_path / name).write_bytes((folder / "two-0" / name).read_bytes())
    said = page([read(tmp_path)])
    assert f"adaptkit eval {tmp_path}/adapter --data" in said
    assert "Loss in training" not in said or "<svg" in said
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{100 * last['miou']:.1f}\xa0% mIoU" in said


def test_a_run_that_has_not_ended_is_shown_and_not_counted(folder, tmp_path):
    half = tmp_path / "none-2"
    half.mkdir()
    config = (folder / "one-0" / "config.yaml").read_text().replace("seed: 0", "seed: 2")
    (half / "config.yaml").write_text(config)
    (half / "metrics.jsonl").write_text('{"step": 1, "miou": 0.9}\n{"step": 2, "lo')
    runs = [*found([folder]), read(half)]
    group = grouped(runs)[0]
    assert len(group.runs) == 3
    assert group.score == grouped(runs[:3])[0].score
    said = page(runs)
    assert "2 of 3" in said
    assert f"adaptkit train segment --config {half}/config.yaml --out {half} --overwrite" in said
    (half / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert f"--out {half} --resume" in page([read(half)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere holds no run: none of config.yaml, metrics.jsonl, result.json, evaluation.json"),
        (["broken"], "evaluation.json is no JSON"),
        (["listed"], "evaluation.json holds no JSON object"),
    ],
)
def test_a_mistake_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("listed", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(text)
    assert main(["report", *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_without_a_plotting_library_the_command_names_the_extra_and_a_page_says_what_it_lacks(
    folder, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(folder), "--out", "x.html"]) == 2
    assert "pip install 'adaptkit-vit[report]'" in capsys.readouterr().err
    monkeypatch.setattr(charts, "available", lambda: False)
    said = page([read(folder / "two-0")])
    assert "<svg" not in said
    assert "For the curves: pip install" in said


def test_runs_of_two_tasks_are_two_reports():
    runs = [Run(kind, evaluation={"task": kind, "images": 1}) for kind in ("depth", "segmentation")]
    with pytest.raises(ValueError, match="several tasks, depth, segmentation"):
        page(runs)


def test_a_picture_outside_of_the_run_is_not_read(tmp_path):
    (tmp_path / "run").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "mine.png")
    run = Run("run", tmp_path / "run")
    assert run.picture("../secret.png") is None
    assert run.picture("mine.png").startswith("data:image/png;base64,")


# ----------------------------------------------------------------------------------------------------- groups


def of(adapter, seed, score, **more):
    options = {"adapter": [adapter], "seed": seed, "out": f"{adapter}{seed}", "lr": 0.1, **more}
    config = {"options": options, "run": {"recipe": "segment"}}
    return Run(
        f"{adapter}{seed}", config=config, result={"steps": 1}, evaluation={"task": "segmentation", "miou": score}
    )


def test_setups_are_all_options_but_the_seed_and_named_by_what_differs():
    runs = [of("lora", 0, 0.2), of("lora", 1, 0.4), of("lora", 0, 0.5, lr=0.2), of("sfp", 0, 0.1)]
    assert [g.label for g in grouped(runs)] == ["lora, lr 0.1", "lora, lr 0.2", "sfp, lr 0.1"]
    assert [g.label for g in grouped([runs[0], runs[3]])] == ["lora", "sfp"]
    assert grouped(runs)[0].score.mean == pytest.approx(0.3)
    assert grouped(runs)[0].score.deviation == pytest.approx(statistics.stdev([0.2, 0.4]))


def test_names_are_text_in_drawings_too():
    runs = [of("<i>$a$", 0, 0.2), of("<i>$a$", 1, 0.3), of("b", 0, 0.4)]
    said = page(runs)
    assert "<i>$" not in said
    assert "&lt;i&gt;$a$, seed 1</text>" in said


def test_the_sentence_says_what_the_seeds_can_tell():
    clear = page([of("lora", 0, 0.5), of("lora", 1, 0.6), of("sfp", 0, 0.1), of("sfp", 1, 0.2)])
    assert "lora reaches 55.0" in clear
    assert "40.0 points more than sfp" in clear
    assert "Every seed of lora scores above every seed of sfp" in clear
    close = page([of("lora", 0, 0.5), of("lora", 1, 0.1), of("sfp", 0, 0.2), of("sfp", 1, 0.2)])
    assert "Not every seed of lora" in close
    assert "luck of the seed is not known" in page([of("lora", 0, 0.5), of("sfp", 0, 0.1)])


def test_whoever_makes_the_runs_adds_to_the_page():
    extra = Extra(
        "A <title>", "A lead.", (b"png", "what it shows", "under it"), "do this", ("a note",), frozenset({"1"})
    )
    runs = [Run("a", evaluation={"task": "segmentation", "miou": 0.5, "per_class": [0.5, 0.5]})]
    said = page(runs, extra)
    for part in (
        "A &lt;title&gt;",
        "A lead.",
        'alt="what it shows"',
        "under it",
        "do this",
        "a note",
        'class="marked"',
    ):
        assert part in said

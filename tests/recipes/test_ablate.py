"""`adaptkit train ablate`: tables are data that fit the adapters, runs are made once, and the numbers are the runs'."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, ended_by, write_folder

from adaptkit import Spec
from adaptkit.cli import main as cli
from adaptkit.core import registry
from adaptkit.report import Run
from recipes import ablate, ablation, ablation_page, adavit, segment

pytest.importorskip("matplotlib")

SPEC = Spec("timm-vit", 192, 12, 3, 16, 1)
TABLES = ("adavit", "dat", "metaformer", "vit-adapter-attention", "vit-adapter-interactions", "vit-adapter-modules")
RECIPE = {"segment": (segment, ["--train", "t", "--val", "v", "--num-classes", "3"]), "adavit": (adavit, [])}


def test_the_tables_of_the_papers_are_there_and_the_help_lists_them_with_their_sources(capsys):
    assert tuple(ablation.known()) == TABLES
    with pytest.raises(SystemExit):
        ablate.parse(["--help"])
    said = capsys.readouterr().out
    for name in TABLES:
        table = ablation.table(name)
        assert f"{name:26}{table.title}: {table.source}" in said


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_an_adapter_of_its_own_and_arguments_that_the_recipe_takes(name, tmp_path):
    table = ablation.table(name)
    recipe, given = RECIPE[table.recipe]
    seen = set()
    for (row, seed), asked in ablation.planned(table, table.recipe, [0, 1], tmp_path, given).items():
        args = recipe.parse(asked.arguments)
        assert args.seed == seed
        if table.recipe == "adavit":
            names, options = ["adavit"], {"adavit": args.options}
        else:
            names, options = args.adapter, args.adapter_options
        for adapter in [n for n in names if n != "none"]:
            kind = registry.adapters()[adapter]
            with torch.device("meta"):
                kind.module(SPEC, kind.configure(options.get(adapter, {})))
        setup = json.dumps([names, options, getattr(args, "budget", None)], sort_keys=True)
        assert (setup in seen) == (seed == 1), row
        seen.add(setup)


@pytest.fixture
def given(tmp_path):
    data = str(write_folder(tmp_path / "data"))
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: Mine\nsource: nobody\nadapter: metaformer\nbase: narrow\narguments: {segment: [--head, linear]}\nrows:\n"
        "  - {name: no adapter, adapter: none}\n  - {name: narrow, options: {width: 4}}\n"
        "  - {name: wide, options: {width: 8}}\n"
    )
    return ["--table", str(file), "--out", str(tmp_path / "out"), "--train", data, "--val", data, "--num-classes", "3",
            "--size", "32", "48", *TINY, "--batch-size", "2", "--steps", "1", "--save-every", "0"]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Run the recipe in this process; one whose width is 4 fails where ``fails`` is set."""
    made = []

    def call(command):
        made.append(Path(command[command.index("--out") + 1]).name)
        if made.fails and made.fails in " ".join(command):
            return 1
        segment.main(command[3:])
        return 0

    class Made(list):
        fails = ""

    made = Made()
    ended_by(monkeypatch, call)
    return made


def test_each_run_is_made_once_and_what_is_known_is_written_after_each(given, calls, tmp_path, capsys):
    calls.fails = '"width": 4'
    out = tmp_path / "out"
    assert cli(["train", "ablate", *given, "--rows", "n*"]) == 2
    assert "these runs failed, see above: narrow-seed0" in capsys.readouterr().err
    assert "| no adapter |" in (out / "table.md").read_text()
    assert "| narrow |" not in (out / "table.md").read_text()
    calls.clear()
    calls.fails = ""
    assert cli(["train", "ablate", *given, "--rows", "n*"]) == 0
    assert calls == ["narrow-seed0"]
    lines = {line["name"]: line for line in json.loads((out / "results.json").read_text())}
    for name in ("no adapter", "narrow"):
        run = out / f"{name.replace(' ', '-')}-seed0"
        result = json.loads((run / "result.json").read_text())
        score = json.loads((run / "evaluation.json").read_text())["miou"]
        assert lines[name]["score"]["mean"] == score
        assert (lines[name]["macs"], lines[name]["parameters"]) == (result["macs"], result["trained_parameters"])
    assert lines["no adapter"]["apart"]["mean"] == pytest.approx(
        lines["no adapter"]["score"]["mean"] - lines["narrow"]["score"]["mean"]
    )
    text = (out / "table.md").read_text()
    for part in ("**Mine** (nobody)", "mIoU, %", "to narrow", "MACs", "trained parameters", "One seed does not tell"):
        assert part in text
    assert "<svg" in (out / "chart.svg").read_text()
    assert text in capsys.readouterr().out
    calls.clear()
    assert cli(["train", "ablate", *given, "--rows", "n*", "--steps", "2"]) == 2
    assert "holds a run with other options: steps 1, now 2" in capsys.readouterr().err
    assert calls == []


def test_several_processes_are_refused(given, calls, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(["train", "ablate", *given]) == 2
    assert "a table is made by one process" in capsys.readouterr().err
    assert calls == []


SCORES = {"base": (0.50, 0.52, 0.54), "better": (0.61, 0.62, 0.66), "equal": (0.49, 0.53, 0.54)}


def ended(scores):
    return {
        (name, seed): Run(name, rows=[{"step": 1, "miou": score}], config={"run": {"recipe": "segment"}},
                          result={"macs": 2e9, "seconds": 60.0, "trained_parameters": 1000})
        for name, values in scores.items() for seed, score in enumerate(values)
    }  # fmt: skip


def test_distances_are_taken_seed_by_seed():
    table = ablation.Table("t", "T", "S", tuple(ablation.Row(n) for n in SCORES), base="base")
    found = ablation_page.lines(table, ended(SCORES))
    for line in found:
        assert line.score.mean == pytest.approx(statistics.mean(SCORES[line.name]))
        assert line.score.deviation == pytest.approx(statistics.stdev(SCORES[line.name]))
    pairs = [a - b for a, b in zip(SCORES["better"], SCORES["base"])]
    assert found[1].apart.mean == pytest.approx(statistics.mean(pairs))
    assert found[1].apart.deviation == pytest.approx(statistics.stdev(pairs))
    assert found[0].apart is None
    text = ablation_page.markdown(table, found, seeds=3).replace("\u00a0", " ")
    assert "| better | 63.0 ± 2.6 | +11.0 ± 1.0 | 3 | 2 G | 1,000 | 1 min 00 s |" in text
    assert "peak memory" not in text  # nobody tells it
    assert "against base: significantly above better, not significant equal." in text
    some = ended({"base": SCORES["base"][:2], "better": SCORES["better"]})
    assert "| base | 51.0 ± 1.4 | – | 2 of 3 |" in ablation_page.markdown(
        table, ablation_page.lines(table, some), seeds=3
    ).replace("\u00a0", " ")


def test_a_run_of_adavit_is_read_by_what_decided():
    told = {"trained": "adaptive", "gmacs": 2.0, "seconds": 5.0, "trained_parameters": 7, "readings": {
        "dense": {"accuracy": 0.9, "macs": 1.0}, "adaptive": {"accuracy": 0.8, "macs": 0.5}}}  # fmt: skip
    run = Run("a", result=told)
    own, dense = (ablation_page.reading(run, which) for which in ("", "dense"))
    assert (own.score, own.result["macs"], own.seconds()) == (0.8, 1e9, 5.0)
    assert (dense.score, dense.result["macs"], dense.seconds()) == (0.9, 2e9, None)
    assert ablation_page.reading(run, "static") is None


@pytest.mark.parametrize("chart", ["bars", "macs"])
def test_the_charts_show_every_row(chart, tmp_path):
    rows = tuple(ablation.Row(n, series="" if n == "base" else "adapted") for n in SCORES)
    table = ablation.Table("t", "T", "S", rows, base="base", chart=chart)
    figure = ablation_page.picture(table, ablation_page.lines(table, ended(SCORES))).figure()
    shown = figure.axes[0]
    if chart == "bars":
        assert [tick.get_text() for tick in shown.get_yticklabels()] == list(SCORES)
    else:
        assert [text.get_text() for text in shown.get_legend().get_texts()] == ["base", "adapted"]
        drawn = shown.containers[0].lines[0]
        assert sorted(drawn.get_ydata()) == pytest.approx([52.0, 63.0])


def status(argv):
    try:
        return cli(argv)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--table", "metaforner"], "no table is named 'metaforner' (did you mean 'metaformer'?)"),
        (["--rows", "narow"], "table mine has no such row, but no adapter, narrow, wide"),
        (["--recipe", "adavit"], "--recipe adavit: the rows of table mine are for segment"),
        (["--seeds", "1", "1"], "--seeds names one seed twice"),
        (["--seed", "1"], "--seed is set for each run"),
        (["--adapter", "lora"], "--adapter is set for each run"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(given, calls, more, message, capsys):
    assert status(["train", "ablate", *given, *more]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: T\nsource: S\nrows: [{name: a}, {name: A}]", "two rows have one name"),
        ("title: T\nsource: S\nbase: b\nrows: [{name: a}]", "base is 'b', which is no row"),
        ("title: T\nsource: S\nrows: [{name: a, option: {}}]", "is no table"),
        ("title: T\nsource: S\nchart: pie\nrows: [{name: a}]", "chart is 'pie'"),
        ("- a", "is no table"),
        ("title: T\nsource: S\nrows: []", "has no rows"),
        ("title: T\nsource: S\nrows: [{name: ±}]", "row '±' needs a letter or a digit"),
        ("title: T\nsource: S\nrows: [{name: a, arguments: --lr 1}]", "give a list"),
        ("title: T\nsource: S\nrows: [{name: a, options: 3}]", "give names and values"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text, message, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        ablation.table(str(tmp_path / "t.yaml"))


def test_what_a_row_sets_cannot_be_given(tmp_path):
    table = ablation.Table("t", "T", "S", (ablation.Row("a", "none", arguments=("--head", "linear")),))
    with pytest.raises(ValueError, match="row 'a' sets --head; leave that out"):
        ablation.planned(table, "segment", [0], tmp_path, ["--head=fpn"])

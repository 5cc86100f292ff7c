"""The benchmarks that measure ourselves, small: each prints its tables."""

from recipes.bench import load, serve


def cells(text):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_serving_compares_the_outputs_and_prints_a_row_for_each_number_of_tasks(capsys):
    serve.main(["--backbone", "vit_tiny_patch16_224", "--size", "64", "--batch", "1", "--tasks", "1", "2", "--rounds", "1",
                "--threads", "1", "--adapter", "sfp"])  # fmt: skip
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == ["1", "2"]
    assert all(float(row[3]) > 0 and row[4] == "1" for row in table[2:])


def test_loading_prints_imports_and_adapters(capsys):
    load.main(["--backbones", "vit_tiny_patch16_224", "--adapters", "sfp", "lora", "--rounds", "1", "--threads", "1"])
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table if row[0] in ("torch", "adaptkit")] == ["torch", "adaptkit"]
    assert [row[1] for row in table[-2:]] == ["sfp", "lora"]
    assert all(float(row[2]) > 0 for row in table[-2:])

"""The benchmark of quantised backbones, small and in this process: its bytes are those of the formats."""

import argparse

import pytest

from recipes.bench import quantised

WIDTH, DEPTH = 192, 12  # of a ViT-Tiny, whose blocks have 12 D^2 weights in linear layers
LINEAR = 12 * WIDTH**2 * DEPTH


@pytest.fixture
def table(monkeypatch, capsys):
    """Runs it, each row in this process, and returns the rows of its table."""

    def alone(args, row, adapter, folder):
        return quantised.measured(argparse.Namespace(**{**vars(args), "row": (row, adapter, folder)}))

    monkeypatch.setattr(quantised, "alone", alone)
    monkeypatch.setattr(quantised, "warmed", lambda *_: None)

    def run(*argv):
        quantised.main(["--backbone", "vit_tiny_patch16_224", "--size", "64", "--threads", "1", *argv])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]

    return run


def test_bf16_is_half_of_float32_and_its_outputs_are_near(table):
    rows = table("--rows", "float32", "bf16", "--adapters", "vit-adapter, extractors only")
    assert [row[0] for row in rows] == ["float32", "bf16"]
    assert float(rows[0][2]) == pytest.approx(2 * float(rows[1][2]), abs=1)
    assert rows[0][4:] == ["0", "0"]
    assert all(0 < float(off) < 0.03 for off in rows[1][4:])


@pytest.mark.full
@pytest.mark.parametrize(
    ("row", "library", "octets", "off"),
    [
        ("int8, torchao", "torchao", 1, 0.05),
        ("int8, bitsandbytes", "bitsandbytes", 1, 0.1),
        ("nf4, bitsandbytes", "bitsandbytes", 0.5 + 4 / 64, 0.4),
    ],
)
def test_quantised_rows_take_the_bytes_of_their_format(row, library, octets, off, table):
    pytest.importorskip(library)
    for adapter in quantised.ADAPTERS:
        rows = table("--rows", "bf16", row, "--adapters", adapter)
        saved = float(rows[0][2]) - float(rows[1][2])
        assert saved == pytest.approx((2 - octets) * LINEAR / 2**20, rel=0.03, abs=1)
        assert all(0 < float(found) < off for found in rows[1][4:])

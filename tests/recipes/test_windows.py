"""Windows of cached features: drawn by epoch and index alone, cut alike from tokens, image and target."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, write_folder  # noqa: E402

import adaptkit  # noqa: E402
from adaptkit.create import create_backbone  # noqa: E402
from recipes import segment  # noqa: E402
from recipes.order import Rows  # noqa: E402
from recipes.windows import Place, Windowed, Windows  # noqa: E402

ADAPTERS = {
    "none": ["--adapter", "none", "--head", "linear"],
    "extractor": ["--adapter", "vit-adapter", "--adapter-options", '{"conv_inplane": 8, "injector": false}'],
}
CUT = ["--crop-features", "32", "48", "--flip-features"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "set", count=5, size=(64, 80))


def train(folder, out, *more):
    return segment.main(["--train", str(folder), "--val", str(folder), "--num-classes", "3", *TINY,
                         "--size", "64", "80", "--steps", "6", "--save-every", "0", "--out", str(out), *more])  # fmt: skip


def weights(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_draw_belongs_to_seed_epoch_and_index_and_reaches_every_window():
    windows = Windows((32, 48), True, (64, 80), 16, seed=3)
    first = {key: windows.draw(*key) for key in ((e, i) for e in range(40) for i in range(5))}
    again = Windows((32, 48), True, (64, 80), 16, seed=3)
    torch.manual_seed(5)  # the state of torch is neither read ...
    state = torch.get_rng_state()
    assert all(again.draw(*key) == first[key] for key in reversed(first))
    assert torch.equal(state, torch.get_rng_state())  # ... nor changed
    assert set(first.values()) == {Place(16 * y, 16 * x, m) for y in range(3) for x in range(3) for m in range(2)}
    other = Windows((32, 48), True, (64, 80), 16, seed=4)
    assert [other.draw(0, i) for i in range(20)] != [windows.draw(0, i) for i in range(20)]


def test_without_a_size_or_flips_nothing_of_that_kind_is_drawn():
    flips = [Windows(None, True, (40, 64), 16).draw(0, i) for i in range(30)]
    assert {(p.top, p.left) for p in flips} == {(0, 0)}
    assert {p.mirrored for p in flips} == {0, 1}
    assert {Windows((16, 16), False, (40, 64), 16).draw(0, i).mirrored for i in range(30)} == {0}


def test_a_target_is_cut_where_the_image_is_and_a_label_stays():
    windows, place = Windows((16, 32), True, (40, 64), 16), Place(16, 32, 1)
    depth = torch.arange(40 * 64).reshape(1, 40, 64)
    assert torch.equal(windows.cut_target(depth, place), depth[:, 16:32, 32:64].flip(-1))
    assert windows.cut_target(7, place) == 7
    assert windows.cut_target(torch.tensor(7), place) == 7
    with pytest.raises(ValueError, match=r"target of \(20, 32\) is no map of an image of \(40, 64\)"):
        windows.cut_target(depth[0, :20, :32], place)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_cache_trains_bit_for_bit_what_the_backbone_trains_in_the_same_windows(name, folder, tmp_path, monkeypatch):
    """One image at a time, for a backbone need not give an image the same bits in another batch."""
    same = [*ADAPTERS[name], *CUT, "--views", "2", "--batch-size", "1"]
    keep = ["--cache-features", str(tmp_path / "cache"), "--cache-dtype", "float32"]
    sizes, forward = [], adaptkit.AdaptedModel.forward

    def seen(self, image):
        sizes.extend([image.size] if self.training else [])
        return forward(self, image)

    monkeypatch.setattr(adaptkit.AdaptedModel, "forward", seen)
    train(folder, tmp_path / "live", *same)
    train(folder, tmp_path / "kept", *same, *keep)
    assert sizes == [(32, 48)] * 12
    assert weights(tmp_path / "live") == weights(tmp_path / "kept")
    if name == "none":
        train(folder, tmp_path / "again", *same, *keep, "--workers", "2")
        assert not multiprocessing.active_children()  # workers end with the run
        assert weights(tmp_path / "again") == weights(tmp_path / "kept")


def test_windows_and_flips_change_what_is_trained_and_need_no_cache_of_their_own(folder, tmp_path):
    keep = [*ADAPTERS["none"], "--views", "2", "--batch-size", "2", "--cache-features", str(tmp_path / "cache")]
    files = []
    for run, options in {"whole": [], "flipped": CUT[3:], "cut": CUT[:3]}.items():
        train(folder, tmp_path / run, *keep, *options)
        files.append({f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()})
    assert files[0] == files[1] == files[2]
    assert len({weights(tmp_path / run) for run in ("whole", "flipped", "cut")}) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--crop-features", "40", "48"], "--crop-features 40 48: a patch of this backbone has 16 pixels; give multiples of 16"),
        (["--crop-features", "32", "96"], r"--crop-features 32 96 is larger than the images, 64 x 80 pixels \(--size\)"),
        (["--flip-features", "--size", "64", "72"], "72 pixels wide and a patch is 16: .*cannot be mirrored; choose a multiple of 16"),
        ([*CUT, "--adapter", "vit-adapter", "--head", "fpn"], "its injectors write into the tokens"),
        ([*CUT, "--head", "upernet", "--adapter", "sfp", "--width", "32"], "for the heads of adaptkit .*not for a network"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_are_one_clear_error(more, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(folder, tmp_path, *ADAPTERS["none"], "--batch-size", "2", *more)


def test_a_stream_has_no_windows(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(folder, tmp_path, *ADAPTERS["none"], *CUT, "--streaming")
    assert "--crop-features and --flip-features know an image by its number" in capsys.readouterr().err


class Labelled(Rows):
    """Images of noise with their number for a label."""

    def make(self, row):
        return torch.randn(3, 40, 64), row


def test_a_batch_is_recorded_whole_and_each_image_cut_at_its_own_place_with_its_label():
    windows = Windows((16, 32), True, (40, 64), 16)
    model = adaptkit.attach(create_backbone("demo", pretrained=False), "sfp").eval()
    rows, keys = Windowed(Labelled(list(range(4))), windows), [(1, 3), (1, 0), (2, 1)]
    loader = DataLoader(rows, batch_sampler=[keys], collate_fn=rows.collate)
    ((seen, labels),) = rows.cached(loader, model)
    assert labels.tolist() == [3, 0, 1]
    assert (seen.size, seen.states[0].shape[1]) == ((16, 32), 1 + 2)
    whole = model.extract(torch.stack([rows.rows[k][0] for k in keys])).states[0][:, 1:].unflatten(1, (3, 4))
    for row, key in enumerate(keys):
        place = windows.draw(*key)
        top, left = place.top // 16, place.left // 16
        cut = whole[row, top : top + 1, left : left + 2]
        assert torch.equal(seen.states[0][row, 1:], (cut.flip(1) if place.mirrored else cut).flatten(0, 1))

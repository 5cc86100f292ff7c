"""Whatever is answered together, each answer is what its adapter says alone, bit for bit."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import backbone

pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.filterwarnings("ignore:task .* has a pass of its own")

from adaptkit.predict.pixels import pixels  # noqa: E402
from adaptkit.predict.tasks import Asked  # noqa: E402
from adaptkit.serve import Mounts, Refused, Worker  # noqa: E402
from adaptkit.serve import passes as made  # noqa: E402

ASKED = Asked(threshold=0.0)


def pictures(*sizes):
    g = np.random.default_rng(0)
    return [g.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def same(one, other):
    arrays = {k: v for k, v in vars(other).items() if isinstance(v, np.ndarray)}
    return type(one) is type(other) and arrays and all(np.array_equal(getattr(one, k), v) for k, v in arrays.items())


def served(files, names, **options):
    mounts = Mounts(backbone(), **options)
    for name in names:
        mounts.mount(name, str(files[name]))
    return mounts


def passes(mounts, kind="shared"):
    return mounts.metrics.registry.get_sample_value("adaptkit_passes_total", {"kind": kind}) or 0


@pytest.mark.parametrize("batching", ["exact", "off"])
def test_every_kind_says_what_it_says_alone_in_batches_of_any_composition(files, alone, batching):
    mounts = served(files, files, batching=batching)
    images = pictures((48, 64), (48, 64), (64, 48), (48, 64), (40, 40), (48, 64), (48, 64))
    asked = [(i, list(files)) for i in range(7)] + [(i, [name]) for i, name in enumerate(files)]
    worker = Worker(mounts, window=0.2)
    for _ in range(2):  # the first batch of a shape is tried, the second relies on it
        jobs = [(i, worker.submit(pixels(images[i]), names, ASKED)) for i, names in asked]
        for i, future in jobs:
            for name, answer in future.result().items():
                assert same(answer, alone[name].predict(images[i], threshold=0.0)), name
    worker.stop()
    assert (len(mounts.passes.keeps_bits) > 0) == (batching == "exact")


def test_tasks_of_one_image_share_a_pass_and_so_do_images_whose_bits_it_keeps(files):
    mounts = served(files, ["seg", "depth"], batching="close")
    worker = Worker(mounts, window=0.5, most=4)
    [one] = pictures((48, 64))
    worker.submit(pixels(one), ["seg", "depth"], ASKED).result()
    assert passes(mounts) == 1
    for image in pictures(*[(48, 64)] * 4):
        last = worker.submit(pixels(image), ["seg"], ASKED)
    last.result()
    worker.stop()
    assert passes(mounts) == 2


def test_a_batch_that_changes_a_bit_is_never_answered_with(files, alone, monkeypatch):
    real = made.replay

    def other(vit, image):
        """As on a machine where the batch has other last bits."""
        view = real(vit, image)
        if len(image) > 1:
            view.states = [x + 1e-3 for x in view.states]
        return view

    monkeypatch.setattr(made, "replay", other)
    mounts = served(files, ["depth"])
    worker = Worker(mounts, window=0.5, most=2)
    images = pictures((48, 64), (48, 64))
    for _ in range(2):
        futures = [worker.submit(pixels(image), ["depth"], ASKED) for image in images]
        for image, future in zip(images, futures):
            assert same(future.result()["depth"], alone["depth"].predict(image))
    worker.stop()
    assert list(mounts.passes.keeps_bits.values()) == [False]
    assert passes(mounts) == 3 + 2


def test_adapters_come_and_go_and_the_backbone_stays(files, alone):
    mounts = served(files, ["seg"])
    worker = Worker(mounts)
    [image] = pictures((48, 64))
    for name in ("detector", "lora"):
        worker.call(lambda name=name: mounts.mount(name, str(files[name]))).result()
        answer = worker.submit(pixels(image), [name, "seg"], ASKED).result()
        assert all(same(answer[n], alone[n].predict(image, threshold=0.0)) for n in (name, "seg"))
        worker.call(lambda name=name: mounts.unmount(name)).result()
        with pytest.raises(Refused, match=f"no task is named '{name}'; the tasks are: seg"):
            worker.submit(pixels(image), [name], ASKED).result()
    with pytest.raises(ValueError, match="'seg' is mounted already"):
        worker.call(lambda: mounts.mount("seg", str(files["seg"]))).result()
    assert list(mounts.all) == ["seg"]
    worker.stop()
    with pytest.raises(Refused, match="stopping"):
        worker.submit(pixels(image), ["seg"], ASKED)


def test_a_network_shares_the_weights_of_the_resident_backbone(files):
    host = backbone()
    mounts = Mounts(host)
    network = mounts.mount("detector", str(files["detector"])).model
    shared = {id(p) for p in host.parameters()}
    assert all(id(p) in shared for p in network.vit.backbone.parameters())


def test_a_batch_that_fails_runs_one_by_one_and_one_failure_is_no_other_ones(files, alone, monkeypatch):
    mounts = served(files, ["seg"])
    worker = Worker(mounts, window=0.5, most=3)
    images = pictures((48, 64), (48, 64))
    monkeypatch.setattr(mounts.passes, "ahead", lambda images: 1 / 0)
    broken = torch.zeros(5, 48, 64)
    futures = [worker.submit(x, ["seg"], ASKED) for x in (pixels(images[0]), broken, pixels(images[1]))]
    assert same(futures[0].result()["seg"], alone["seg"].predict(images[0]))
    assert same(futures[2].result()["seg"], alone["seg"].predict(images[1]))
    with pytest.raises((ValueError, RuntimeError)):
        futures[1].result()
    worker.stop()


def test_few_sizes_of_batches_occur():
    assert [made._powers(n, 8) for n in (1, 7, 8, 19)] == [[1], [4, 2, 1], [8], [8, 8, 2, 1]]
    assert made._powers(7, 6) == [4, 2, 1]

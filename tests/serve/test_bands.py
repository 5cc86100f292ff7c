"""A served backbone of thirteen channels reads what predict reads, within the limits of a request."""

import io

import numpy as np
import pytest
import torch

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.predict.tasks import Asked
from adaptkit.serve.limits import Limits, Refused
from adaptkit.serve.mounts import Mounts
from adaptkit.serve.service import Service
from adaptkit.serve.worker import Worker


def stored(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_thirteen_bands_are_answered_as_predict_does_and_their_size_is_limited(tmp_path):
    torch.manual_seed(0)
    model = adaptkit.attach(
        adaptkit.expand_channels(create_backbone("demo"), 13, "mean"), head=("linear", {"num_classes": 3})
    )
    model.save(tmp_path, task="semantic-segmentation", size=[32, 32], mean=[2.0] * 13, std=[3.0] * 13)
    image = np.random.default_rng(0).normal(2, 3, (40, 48, 13)).astype(np.float32)
    expected = adaptkit.from_pretrained(tmp_path).predict(image).mask
    mounts = Mounts(adaptkit.expand_channels(create_backbone("demo"), 13, "mean"))
    mounts.mount("seg", str(tmp_path))
    worker = Worker(mounts)
    try:
        service = Service(mounts, worker, Limits(pixels=40 * 48 * 5, held_pixels=40 * 48 * 5))
        seen, answer = service.answer(stored(image), "seg", Asked())
        assert seen.shape == (13, 40, 48)
        assert (answer.mask == expected).all()
        assert len(np.unique(expected)) > 1
        with pytest.raises(
            Refused, match=r"48 x 80 pixels .* of 13 channels, which count as 19,200; the limit is 9,600"
        ) as refused:
            service.answer(stored(np.repeat(image, 2, 0)), "seg", Asked())
        assert refused.value.status == 413
        with pytest.raises(Refused, match="the backbone takes 13 channels") as refused:
            service.answer(stored(image[..., :4]), "seg", Asked())
        assert refused.value.status == 400
    finally:
        worker.stop()

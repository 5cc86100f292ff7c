"""From a picture to an answer: ``model.predict(image)``.

    picture   read from wherever it is            ``adaptkit.pictures``, ``pixels.py``
    image     framed and normalised               ``transform.py``
    rows      logits at the image's own size,     ``rows.py``: whole, or tile by tile, and never more than a band
    answer    classes, depths, boxes, segments    ``answers.py``, drawn by ``draw.py``

``predicts.py`` is where a model meets these.
"""

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation
from adaptkit.predict.predicts import Predicts
from adaptkit.predict.transform import Transform
from adaptkit.predict.ways import Ways

__all__ = [
    "Answer",
    "Classification",
    "Depth",
    "Detection",
    "Panoptic",
    "Predicts",
    "Segmentation",
    "Transform",
    "Ways",
]

"""What a model does with an image: MACs per image, and the figures of the papers, each with its numbers.

A figure is a result with numbers in it, ``.figure()`` and ``.save("name.pdf")``, which need matplotlib
(``pip install 'adaptkit-vit[figures]'``); ``adaptkit look MODEL IMAGES --out DIR`` makes all that apply.
"""

from adaptkit.analysis import accounting
from adaptkit.analysis.cam import grad_cam
from adaptkit.analysis.difficulty import easy_and_hard
from adaptkit.analysis.distance import attention_distance
from adaptkit.analysis.kept import kept_patches, usage_by_depth
from adaptkit.analysis.keys import offset_lengths, query_keys
from adaptkit.analysis.maps import attention_maps
from adaptkit.analysis.patches import position_similarity, rgb_filters
from adaptkit.analysis.pca import feature_pca
from adaptkit.analysis.points import attended_keys, deformed_points, sampling_points
from adaptkit.analysis.pyramids import GammaByStep, feature_maps, gamma_by_depth
from adaptkit.analysis.rollouts import rollout
from adaptkit.analysis.spectra import spectrum

__all__ = [
    "GammaByStep",
    "accounting",
    "attended_keys",
    "attention_distance",
    "attention_maps",
    "deformed_points",
    "easy_and_hard",
    "feature_maps",
    "feature_pca",
    "gamma_by_depth",
    "grad_cam",
    "kept_patches",
    "offset_lengths",
    "position_similarity",
    "query_keys",
    "rgb_filters",
    "rollout",
    "sampling_points",
    "spectrum",
    "usage_by_depth",
]

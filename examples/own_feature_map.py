"""One's own feature map, with parameters that learn (Kasai et al. 2021, arXiv 2103.13076).

python main.py --config=examples/own_feature_map.py
"""

import jax

from fwm.config import build
from fwm.ops import FEATURE_MAPS, FeatureMap

WIDTH = 96  # any: here six times as many features as a head of 16 has channels

FEATURE_MAPS["learned"] = FeatureMap(
    lambda options: lambda x, w: jax.nn.relu(x @ w) + 1e-3,
    parameters={"w": lambda key, options: jax.random.normal(key, (options.d_head, WIDTH)) / 4},
)


def get_config(options=""):
    return build(options, feature_map="learned", update_rule="delta")

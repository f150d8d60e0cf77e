"""Synthetic associative retrieval, paper section 6.1: not a language model.

    python main.py --mode=retrieval --config=configs/retrieval.py:capacity
    python main.py --mode=retrieval --config=configs/retrieval.py:update_rule --config.workers=2

Setting 1 (`capacity`: how many pairs fit) and setting 2 (`update_rule`: what overwriting takes).
Choose with `--config.models="('dpfp2_delta',)"`, `--config.sizes="(20, 40)"` and
`--config.seeds="(0, 1, 2)"`; runs that the workdir has already are not run again.

A model is softmax or <map>_<rule>, any of `fwm.ops.FEATURE_MAPS` (with its nu or m: dpfp<nu>,
favor<m>; elu is called linear, too) and `fwm.ops.UPDATE_RULES`, or the rule fwm. For one's own, a
config file that registers them and has `from configs.retrieval import get_config` is enough.
"""

from ml_collections import ConfigDict

from fwm.errors import UserError
from fwm.retrieval.report import PUBLISHED


def get_config(setting: str = "") -> ConfigDict:
    """`setting`: capacity or update_rule."""
    if setting not in PUBLISHED:
        raise UserError(
            f"unknown retrieval setting {setting!r}: expected configs/retrieval.py:capacity or "
            "configs/retrieval.py:update_rule."
        )
    c = ConfigDict()
    c.setting = setting
    c.models = tuple(PUBLISHED[setting])
    c.sizes = tuple(range(20, 601 if setting == "capacity" else 201, 20))  # S
    c.seeds = (0,)
    c.batch_size = 32  # of tanh_fwm four times as much
    c.lr = 1e-3  # of Adam; tanh_fwm trains at a tenth of it
    c.max_step = 100_000
    c.workers = 1  # processes, which share the cores
    c.registered_in = ""  # set by main.py: the config file that registers maps and rules
    return c.lock()

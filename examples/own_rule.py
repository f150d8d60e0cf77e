"""One's own update rule: the sum rule with a decay that a projection of the token decides.

    python main.py --config=examples/own_rule.py

W_t = exp(g_t) W_(t-1) + k_t v_t^T with a log decay g_t <= 0 per head and token. `composed` makes of
what the tokens give to the one algebra (docs/rules.md) the step that defines the rule and the form
by chunks that is fast; decay, write strength (`beta`: the delta rule) and erase key are switches.
"""

import jax

from fwm.config import build
from fwm.ops import UPDATE_RULES, Input, Update, composed

DECAY = Input("decay", lambda x: -jax.nn.softplus(x))
UPDATE_RULES["decayed_sum"] = composed((DECAY,), lambda k, v, g: Update(v, log_decay=g))


def get_config(options=""):
    return build(options, feature_map="elu", update_rule="decayed_sum")

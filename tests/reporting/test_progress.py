"""What is made of each step's numbers."""

import io
import re

import pytest

from configs import default
from fwm import parallel
from fwm.reporting import Progress, Reporter

pytestmark = pytest.mark.quick  # see .ci/run


@pytest.mark.parametrize(
    ("log_interval", "eval_interval", "left"), [(5, 1, 7), (5, 2, 5), (1, 5, 7), (5, 5, 5)]
)
def test_the_duration_is_estimated_however_often_a_run_reports(
    tmp_path, log_interval, eval_interval, left
):
    said = io.StringIO()
    t = default.defaults().train
    t.update({"log_interval": log_interval, "eval_interval": eval_interval, "max_step": 9})
    metrics = parallel.replicate(dict.fromkeys(("loss", "grad_norm", "learning_rate"), 1.0))
    with Reporter(tmp_path, config={}, total_steps=9, start_step=0, stream=said) as reporter:
        progress = Progress(reporter, t)
        for step in range(1, 10):
            progress.step(step, metrics)
            if step % eval_interval == 0:
                with progress.paused():
                    pass
        progress.flush()
    found = re.findall(r"Estimated duration: \d+:\d\d:\d\d for the (\d) steps", said.getvalue())
    assert found == [str(left)]

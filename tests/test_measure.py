"""What is measured during training is looked at before it begins."""

import pytest

from softmoe_clip.training.loop import train


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("{kind: zero_shot, name: a, data: val}", r"no classnames\.txt in .*val or above it"),
        ("{kind: zero_shot, name: a, data: combinations, templates: smple}", "did you mean simple"),
        ("{kind: zero_shot, name: a, data: combinations, classnames: nowhere.txt}", r"nowhere\.txt"),
    ],
)
def test_a_suite_that_cannot_be_measured_is_told_before_the_first_step(tiny_config, tmp_path, scenes, task, told):
    (tmp_path / "suite.yaml").write_text(f"root: {scenes}\ntasks: [{task}]\n")
    with pytest.raises((ValueError, OSError), match=told):
        train(tiny_config(f"eval.suite={tmp_path}/suite.yaml"))
    assert not (tmp_path / "run").exists()

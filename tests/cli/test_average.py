import json

import pytest

import twofold
from tests.train.tiny_run import tiny_model
from twofold.checkpoint.save import save
from twofold.cli.average import average_command


def test_it_writes_a_model_and_says_where(tmp_path, capsys):
    folders = [str(tmp_path / name) for name in "ab"]
    for seed, folder in enumerate(folders):
        save(tiny_model(seed), folder)
    average_command(folders, tmp_path / "mean", weights="1,3", overwrite=False, json=True)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"out": str(tmp_path / "mean"), "checkpoints": folders, "weights": [1.0, 3.0]}
    weights = [twofold.load(path).encoder.norm.weight for path in (*folders, tmp_path / "mean")]
    assert weights[2].tolist() == pytest.approx(((weights[0] + 3 * weights[1]) / 4).tolist())
    with pytest.raises(ValueError, match=r"such as 1,2,4, got 'much'"):
        average_command(folders, tmp_path / "other", weights="much", overwrite=False, json=False)
    assert not (tmp_path / "other").exists()

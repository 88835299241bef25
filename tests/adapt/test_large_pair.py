"""A 2B-2B pair, Gemma 2 2B's shapes with random weights: adapts, saves and loads within 24 GB of memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

_LOAD_AND_SAVE = """
import resource, sys, torch, twofold
model = twofold.load(sys.argv[1])
assert sum(p.numel() for p in model.parameters()) == 5_596_853_760
assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
ids = torch.tensor([[5, 6, 7]])
with torch.no_grad():
    logits = model(ids, None, ids).logits
assert torch.isfinite(logits).all()
twofold.save(model, sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.filterwarnings("ignore")
def test_2b_2b_adapts_saves_and_loads_within_24_gb(tmp_path, monkeypatch):
    """Slow: writes a 5 GB donor and two 11 GB pairs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from adapt import GEMMA2_2B, write_random_donor

    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip("needs 30 GB of disk")
    donor = write_random_donor(GEMMA2_2B, tmp_path / "donor")
    command = [sys.executable, "-c", "from twofold.cli import main; main()"]
    subprocess.run([*command, "adapt", donor, "-o", tmp_path / "pair"], check=True)
    report = json.loads((tmp_path / "pair" / "adaptation.json").read_text())
    assert report["num_parameters"] == 5_596_853_760
    shutil.rmtree(donor)
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOAD_AND_SAVE, tmp_path / "pair", tmp_path / "again"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(loaded.stdout) < 24e9

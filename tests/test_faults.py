"""A short run of faults.py; the long one is: python tests/faults.py --kills=1000 --power=200."""
import json
import subprocess
import sys

from conftest import ROOT


def test_a_run_survives_kills_and_losses_of_power():
    """Weights, optimizer state and metrics are those of the uninterrupted run, to the bit."""
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--kills=4", "--power=4", "guided"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["faults"] >= 8 and counts["power"] >= 4 and counts["runs"] >= 1

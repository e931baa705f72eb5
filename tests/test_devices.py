"""What the suite does for a GPU, shown without one: a process for a test, and going on after a cut."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from devices import isolate


def test_a_process_for_a_test(tmp_path):
    isolate((tmp_path / "ran").touch)
    assert (tmp_path / "ran").exists()
    with pytest.raises(pytest.skip.Exception, match="no wings"):
        isolate(lambda: pytest.skip("no wings"))
    with pytest.raises(pytest.fail.Exception, match=r"test_devices.py(.|\n)*ZeroDivisionError"):
        isolate(lambda: 1 / 0)


def test_a_test_that_takes_its_process_with_it_is_one_failed_test():
    with pytest.raises(pytest.fail.Exception, match=f"exit code -{signal.SIGKILL.value}"):
        isolate(lambda: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="no end after 0 s"):
        isolate(lambda: time.sleep(60), seconds=0.1)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_what_has_passed_is_not_run_again(tmp_path):
    file, passed = tmp_path / "test_some.py", tmp_path / "passed"
    file.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "def test_on_a_gpu(device): pass\n@pytest.mark.gpu\ndef test_of_a_gpu(): pass\n"
    )

    def run() -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "conftest", f"--passed={passed}", file]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    first = run()
    assert "1 failed, 2 passed, 2 skipped" in first and "no CUDA device" in first
    assert "1 failed, 2 skipped, 2 deselected" in run()
    file.write_text(file.read_text().replace("assert 0", "pass"))
    assert "1 passed, 2 skipped, 2 deselected" in run()
    assert len(passed.read_text().splitlines()) == 3

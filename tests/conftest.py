"""Which device a test runs on, and how a suite that was cut short goes on."""

import os
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() touches no CUDA then

import pytest  # noqa: E402
import torch  # noqa: E402
from devices import CUDA, isolate  # noqa: E402

if CUDA:
    # A choice of tiles would be measured for each of a hundred small problems; the defaults and every candidate are
    # tested without that.
    os.environ.setdefault("MM_KERNELS_AUTOTUNE", "0")
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and one CUDA device; a test that takes it runs on both."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


def pytest_addoption(parser):
    parser.addoption(
        "--passed", metavar="FILE", type=Path, help="leave out the tests that FILE names, and add those that pass"
    )


def pytest_collection_modifyitems(config, items):
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    path = config.getoption("passed")
    if path and path.exists():
        passed = set(path.read_text().splitlines())
        left = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = left


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where there is a GPU every test has a process of its own; see `devices`."""
    if not CUDA:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    isolate(lambda: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


class PassedTests:
    """Appends each test that has passed to a file, as soon as it has."""

    def __init__(self, path: Path):
        self._path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            with self._path.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config):
    path = config.getoption("passed")
    if path and not hasattr(config, "workerinput"):  # under pytest-xdist the controller alone writes
        config.pluginmanager.register(PassedTests(path))

"""The command line, run as a user runs it."""

import re
import subprocess
import sys

import jax
import pytest

import jax_gdn
from jax_gdn import _registration
from jax_gdn.__main__ import main


def test_demo(capsys):
    assert main(["demo", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert jax.devices()[0].device_kind in printed
    assert re.search(r"implementation  native, (host|CUDA) kernel", printed)
    assert re.search(r"one layer  [\d,]+ us a call", printed)
    assert re.search(r"state traffic  [\d,.]+ GB/s", printed)
    error = re.search(r"largest error  (\S+) in out, (\S+) in the state", printed)
    assert error is not None
    # A state entry is of order 1, out of order 0.1 in bfloat16.
    assert float(error[1]) < 2**-8
    assert float(error[2]) < 1e-5
    assert "stayed where it was" in printed


def test_info_as_a_module(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "jax_gdn", "info"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert f"jax_gdn  {jax_gdn.__version__}" in result.stdout
    assert "jax_gdn.decode.v2, jax_gdn.decode_deferred.v1" in result.stdout
    cuda = "not in this build"
    if _registration.cuda is not None:
        cuda = (
            "registered, FFI 0.3, CUDA 13.0 runtime, architectures 90-real,90-virtual"
        )
    assert f"CUDA module  {cuda}" in result.stdout
    assert "native, host kernel" in result.stdout or "CUDA kernel" in result.stdout


@pytest.mark.parametrize("argv", [[], ["demo", "--batch", "0"], ["nonesuch"]])
def test_wrong_use(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: jax-gdn" in capsys.readouterr().err

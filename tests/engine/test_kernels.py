"""Each instruction set's kernels against the portable ones, also on an emulated Arm."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import xnor_jax

ENGINE = Path(xnor_jax.__file__).parent / "engine"
CHECK = Path(__file__).parent / "kernels_check.cc"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-ffp-contract=off"]
ARM = {"XNOR_ARM64": ("kernels_neon", [])}
X86 = {
    "XNOR_X86": ("kernels_avx2", ["-mavx2", "-mfma"]),
    "": (
        "kernels_avx512",
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vpopcntdq", "-mfma"],
    ),
}


def build(compiler, folder, macro, sets, *options):
    objects = []
    units = [("kernels_portable", []), *sets, ("check", [])]
    for name, flags in units:
        source = CHECK if name == "check" else ENGINE / f"{name}.cc"
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, *FLAGS, *flags, *options, f"-D{macro}", f"-I{ENGINE}"]
        subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(folder / "check")
    subprocess.run([compiler, *options, *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_native_kernels_pass_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not (ENGINE / "kernels.h").exists():
        pytest.skip("no g++, or no sources")
    is_arm = platform.machine() in ("aarch64", "arm64")
    macro, sets = ("XNOR_ARM64", ARM) if is_arm else ("XNOR_X86", X86)
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(compiler, tmp_path, macro, sets.values(), *sanitize)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) <= {"avx2", "avx512", "neon"}


@pytest.mark.slow
def test_neon_kernels_pass_on_an_emulated_processor(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64")
    if compiler is None or emulator is None or not (ENGINE / "kernels.h").exists():
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    program = build(compiler, tmp_path, "XNOR_ARM64", ARM.values(), "-static")
    result = subprocess.run([emulator, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["neon"]

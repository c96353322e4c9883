"""The C++ engines against the portable one, on Arm too where a cross compiler is."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import xnor_jax

CPU = Path(xnor_jax.__file__).parent / "ops" / "cpu"
CHECK = Path(__file__).parent / "engine_check.cc"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-ffp-contract=off"]
ARM = {"XNOR_ARM64": ("engine_neon", [])}
X86 = {
    "XNOR_X86": ("engine_avx2", ["-mavx2", "-mfma"]),
    "": (
        "engine_avx512",
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vpopcntdq", "-mfma"],
    ),
}


def build(compiler, folder, define, engines, *options):
    objects = []
    units = [("engine_portable", []), *engines, ("check", [])]
    for name, flags in units:
        source = CHECK if name == "check" else CPU / f"{name}.cc"
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, *FLAGS, *flags, *options, f"-D{define}", f"-I{CPU}"]
        subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(folder / "check")
    subprocess.run([compiler, *options, *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_engines_of_this_processor_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not (CPU / "engine.h").exists():
        pytest.skip("no g++, or no sources")
    arm = platform.machine() in ("aarch64", "arm64")
    define, engines = ("XNOR_ARM64", ARM) if arm else ("XNOR_X86", X86)
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(compiler, tmp_path, define, engines.values(), *sanitize)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert set(ran.stdout.split()) <= {"avx2", "avx512", "neon"}


@pytest.mark.slow
def test_neon_on_an_emulated_processor(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64")
    if compiler is None or emulator is None or not (CPU / "engine.h").exists():
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    program = build(compiler, tmp_path, "XNOR_ARM64", ARM.values(), "-static")
    ran = subprocess.run([emulator, program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["neon"]

"""Builds the C++ kernels with AddressSanitizer and UBSan, and runs their tests on them: `make asan`.

The build is a copy of the package under build/asan; the working tree's own library stays as it is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "asan"
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "flexnorm"]

# Reads one element behind the end of x, whose memory has become shorter behind the kernel's back.
CANARY = """
import torch
import flexnorm
from flexnorm.kernels import cpu
assert "asan" in flexnorm.__file__ and not isinstance(cpu.library(), str), (flexnorm.__file__, cpu.library())
x = torch.ones(1, 100)
flexnorm.normalize(x, "n c -> n")
print("good", flush=True)
if {bad}:
    x.untyped_storage().resize_(99 * 4)
    flexnorm.normalize(x, "n c -> n")
    print("nobody noticed")
"""


def build() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    source = BUILD / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    environment = {**os.environ, "FLEXNORM_SANITIZE": "1", "FLEXNORM_BUILD": "required"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(BUILD / "package")]
    subprocess.run([*pip, str(source)], check=True, env=environment)


def sanitized() -> dict[str, str]:
    """The environment of a Python with the sanitizers' runtimes, which must be loaded before all others."""
    compiler = os.environ.get("CXX", "c++")

    def path(name: str) -> str:
        done = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    # libstdc++ too: AddressSanitizer looks for its __cxa_throw at the start, and Python itself has none.
    preload = [path(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={BUILD / 'report'}",  # Python leaks; pytest would swallow stderr
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={BUILD / 'report'}",
        "FLEXNORM_BUILD": "required",  # a library that does not load is no reason to skip
    }


def reports() -> list[str]:
    return [path.read_text() for path in sorted(BUILD.glob("report.*"))]


def main() -> int:
    build()
    environment = sanitized()

    def python(*arguments: str, quiet: bool = False) -> int:
        # Where the copy lies, Python finds it before the package that is installed.
        command = [sys.executable, *arguments]
        silent = subprocess.DEVNULL if quiet else None
        return subprocess.run(command, cwd=BUILD / "package", env=environment, stderr=silent).returncode

    if python("-c", CANARY.format(bad=False)) != 0:
        print("asan: the sanitized library does not run", *reports(), sep="\n")
        return 1
    if python("-c", CANARY.format(bad=True), quiet=True) == 0 or not any("overflow" in text for text in reports()):
        print("asan: a read behind the end of x was not noticed")
        return 1
    for path in BUILD.glob("report.*"):
        path.unlink()
    settings = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not long",
    ]
    settings += ["--capture=sys"]  # UBSan writes to the file descriptor, before the process ends
    tests = ["--leg", "sanitized", *(str(ROOT / "tests" / name) for name in ("test_cpu.py", "test_calls.py"))]
    status = python("-m", "pytest", "--quiet", *settings, *tests, *sys.argv[1:])
    print(*reports(), sep="\n", end="")
    return 1 if status != 0 or reports() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds the C++ kernels (flexnorm/kernels/cpu): a module in CPython's limited API, without torch's headers.

One build serves every CPython from 3.10 on, and every torch. Python's own headers are needed (Debian: python3-dev).
Without a compiler the package is installed all the same, and says so; it then runs on the composition of torch's
operations. FLEXNORM_BUILD=required makes a missing library an error, FLEXNORM_BUILD=none leaves it out.
FLEXNORM_SANITIZE=1 builds it with AddressSanitizer and UBSan (`make asan`).
"""

import os
import platform
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("FLEXNORM_BUILD", "optional")
SOURCES = Path("flexnorm/kernels/cpu")
# Sums are in the order in which they are written, on every machine: no fused or reordered arithmetic.
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fno-wrapv"]
if sys.platform.startswith("linux"):  # as much as -O3 puts functions into loops, at half its code
    FLAGS += ["-fipa-cp-clone", "--param=max-inline-insns-auto=30"]
WIDTHS = {"plain": ["-Os", "-ftree-vectorize"]}  # of narrow vectors a compiler makes much code
if platform.machine().lower() in ("x86_64", "amd64"):
    WIDTHS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
    WIDTHS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprfchw"]
    WIDTHS["avx512"] += ["-mprefer-vector-width=512"]
# Without what AddressSanitizer sees anyway: a compiler takes ten times as long with all.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size,vptr,return,pointer-overflow"]
SANITIZE += ["-fno-sanitize-recover=undefined", "-g1", "-O1"]


class Kernels(build_ext):
    """Compiles kernel.cpp for every vector width and dtype of statistics, and links all to one module."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        """One warning, and no library, if it cannot be built."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.with_name("_kernels.so").unlink(missing_ok=True)  # that of versions before 0.2
        if WANTED == "none":
            target.unlink(missing_ok=True)  # that of an earlier build
            return
        try:
            self._build(target)
        except Exception as error:
            if WANTED == "required":
                raise
            target.unlink(missing_ok=True)
            print(
                f"warning: flexnorm's C++ kernels were not built ({error}); it will run on torch's operations, "
                "several times slower on a CPU. With a C++17 compiler: pip install --force-reinstall flexnorm",
                file=sys.stderr,
            )

    def _build(self, target):
        compiler = self.compiler
        if sys.platform.startswith("linux"):
            # Only the symbols of OpenMP: they are bound to the runtime that torch has loaded, so there is one pool of
            # threads. Elsewhere the loops run on one thread.
            threads = ["-fopenmp"]
        else:
            threads = ["-fopenmp-simd"]
        sanitize = SANITIZE if os.environ.get("FLEXNORM_SANITIZE") else []
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:

            def compiled(unit):
                name, source, macros, flags = unit
                return compiler.compile(
                    [str(SOURCES / source)],
                    output_dir=os.path.join(scratch, name),
                    macros=macros,
                    include_dirs=[sysconfig.get_paths()["include"]],
                    extra_postargs=[*FLAGS, *threads, *flags, *sanitize],
                )

            # The longest first.
            units = [
                (f"{width}_{dtype}", "kernel.cpp", [("ARCH", f"{width}_{dtype}"), ("REAL", dtype)], flags)
                for width, flags in WIDTHS.items()
                for dtype in ("float", "double")
            ]
            units += [("module", "module.cpp", [], []), ("entry", "entry.cpp", [], [])]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = [file for files in pool.map(compiled, units) for file in files]
            # What Python brings is found when the module is loaded.
            later = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            static = [] if sanitize or sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc"]
            compiler.link_shared_object(
                objects, str(target), extra_postargs=[*later, *static, *sanitize], target_lang="c++"
            )


class Wheel(bdist_wheel):
    """The module serves every CPython from 3.10 on, and every torch of its system; so the wheel does too."""

    def get_tag(self):
        return "cp310", "abi3", super().get_tag()[2]


sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
headers = sorted(str(path) for path in SOURCES.glob("*.h"))
optional = WANTED != "required"  # then setuptools does not miss the file either
setup(
    ext_modules=[
        Extension(
            "flexnorm.kernels.cpu._kernels",
            sources,
            depends=headers,
            language="c++",
            optional=optional,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Kernels, "bdist_wheel": Wheel},
)

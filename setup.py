"""Builds ``efficient_densenet._C``: for the CPU, and for CUDA where a usable toolkit is found.

Environment variables:
  EFFICIENT_DENSENET_CUDA  1: a build without CUDA is an error; 0: CPU only
  CUDA_HOME, CUDA_PATH     toolkit to try before the usual places
  TORCH_CUDA_ARCH_LIST     architectures; default: the GPUs here, else DEFAULT_ARCHITECTURES
  EFFICIENT_DENSENET_SANITIZE  1: CPU only, with AddressSanitizer and UndefinedBehaviorSanitizer,
                           whose libraries Python must preload (.ci/sanitize does)
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"
# No contraction to FMA: the backward pass finds the ReLU mask by rounding exactly as the forward.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
# What a toolkit needs, and where below its home (conda and Debian have folders of their own).
TOOLKIT_FILES = {
    "nvcc": ["bin"],
    "cuda_runtime.h": ["include", "targets/*/include"],
    "libcudart_static.a": ["lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"],
}


def stated(name, path):
    """The value of the line `name = "value"` of a source file, the only place that states it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.search(rf'^{name} = "([^"]+)"', text, re.MULTILINE).group(1)


VERSION = stated("__version__", "efficient_densenet/__init__.py")
MINIMUM_TORCH = stated("MINIMUM_TORCH", "efficient_densenet/_extension.py")


def candidate_homes(environ=os.environ, local="/usr/local", torch_guess=cpp_extension.CUDA_HOME):
    """Folders that may hold a CUDA toolkit, best first, each once."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    numbered = list(Path(local).glob("cuda-*"))
    numbered.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], reverse=True)
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), torch_guess]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path(local, "cuda"), *numbered, "/opt/cuda", environ.get("CONDA_PREFIX")]
    return list(dict.fromkeys(Path(home) for home in homes if home))


def find_toolkit(homes):
    """Paths of the TOOLKIT_FILES in the first home that has them all, or None; what was lacking."""
    lacking = []
    for home in homes:
        paths = {}
        for name, folders in TOOLKIT_FILES.items():
            paths[name] = [path for folder in folders for path in home.glob(f"{folder}/{name}")]
        if all(paths.values()):
            return {name: hits[0] for name, hits in paths.items()}, ""
        if any(paths.values()):
            missing = [name for name, hits in paths.items() if not hits]
            lacking.append(f"{home} lacks {' and '.join(missing)}")
    return None, "; ".join(lacking) or f"no folder with {', '.join(TOOLKIT_FILES)}"


def choose_toolkit(setting, torch_cuda, homes):
    """The toolkit to compile with, or None and why the build is for the CPU only."""
    if setting not in ("", "0", "1"):
        sys.exit(f"EFFICIENT_DENSENET_CUDA must be 0, 1 or unset, not {setting!r}")
    if setting == "0":
        return None, "EFFICIENT_DENSENET_CUDA=0"
    toolkit, lacking = find_toolkit(homes) if torch_cuda else (None, "")
    why = f"no usable CUDA toolkit ({lacking})" if torch_cuda else "torch is not a CUDA build"
    if toolkit is None and setting == "1":
        sys.exit(f"EFFICIENT_DENSENET_CUDA=1, but CUDA cannot be compiled in: {why}")
    return toolkit, why


def architectures():
    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    gpus = ";".join(f"{major}.{minor}" for major, minor in sorted(present))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    return listed or (f"{gpus}+PTX" if gpus else DEFAULT_ARCHITECTURES)


def extension(toolkit, sanitizes=False):
    major, minor = (int(part) for part in MINIMUM_TORCH.split("."))
    patterns = ["csrc/*.cpp", "csrc/common/*.cpp", "csrc/operators/*.cpp"]
    patterns += ["csrc/dense_block/*.cpp", "csrc/cpu/*.cpp"]
    macros = {
        "EFFICIENT_DENSENET_VERSION": f'"{VERSION}"',
        "EFFICIENT_DENSENET_TORCH": f'"{torch.__version__}"',
        # The stable ABI of the oldest torch: the build runs beside that one and every newer one.
        "TORCH_TARGET_VERSION": f"0x{major:02x}{minor:02x}000000000000",
    }
    include_dirs, link = [str(ROOT / "csrc"), pybind11.get_include()], ["-Wl,--as-needed"]
    if toolkit:
        patterns += ["csrc/cuda/*.cpp", "csrc/cuda/*/*.cu"]
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        macros |= {"EFFICIENT_DENSENET_CUDA": "1", "EFFICIENT_DENSENET_ARCHITECTURES": f'"{archs}"'}
        include_dirs.append(str(toolkit["cuda_runtime.h"].parent))
        # A CUDA runtime of our own, its symbols kept inside: torch's may be another one, or none.
        link += [str(toolkit["libcudart_static.a"]), "-Wl,--exclude-libs,ALL"]
        link += ["-ldl", "-lpthread", "-lrt"]
        # So nvcc need not match torch's CUDA version either, which BuildExtension would insist on.
        cpp_extension._check_cuda_version = lambda *args: None
        cpp_extension.CUDA_HOME = str(toolkit["nvcc"].parents[1])
    extra = SANITIZERS + SANITIZE_FLAGS if sanitizes else []
    link += SANITIZERS if sanitizes else []
    built = cpp_extension.CppExtension(
        "efficient_densenet._C",
        [str(path.relative_to(ROOT)) for glob in patterns for path in sorted(ROOT.glob(glob))],
        include_dirs=include_dirs,
        define_macros=list(macros.items()),
        extra_compile_args={"cxx": CXX_FLAGS + extra, "nvcc": NVCC_FLAGS},
        extra_link_args=link,
    )
    built.libraries = ["torch_cpu"]  # home of the stable ABI; c10, torch_python are not needed
    return built


if __name__ == "__main__":
    sanitizes = os.environ.get("EFFICIENT_DENSENET_SANITIZE") == "1"
    requested = "0" if sanitizes else os.environ.get("EFFICIENT_DENSENET_CUDA", "")
    found, why_not = choose_toolkit(requested, torch.version.cuda, candidate_homes())

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            kind = f"with CUDA, {found['nvcc']}" if found else f"for the CPU only: {why_not}"
            print(f"efficient_densenet: building {kind}", file=sys.stderr)
            super().build_extensions()

    setup(
        install_requires=[f"torch>={MINIMUM_TORCH}"],
        ext_modules=[extension(found, sanitizes)],
        cmdclass={"build_ext": BuildExtension},
    )

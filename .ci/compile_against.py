"""Compiles every source against the headers of another torch release, without linking.

    python .ci/compile_against.py [2.11.0] [--std c++17]

Needs an environment that can build the package. The headers come from the release's wheel, of
which nothing else is used.
"""

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_of_efficient_densenet", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetch_headers(release, folder):
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
    subprocess.run([*download, f"torch=={release}"], check=True)
    (wheel,) = Path(folder).glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        headers = [name for name in archive.namelist() if name.startswith("torch/include/")]
        archive.extractall(folder, headers)
    wheel.unlink()
    return Path(folder, "torch/include")


def commands(std, headers, folder):
    setup = load_setup()
    toolkit, why = setup.choose_toolkit("", "any", setup.candidate_homes())
    extension = setup.extension(toolkit)
    own_headers = [path for path in extension.include_dirs if "/torch/include" not in path]
    folders = [*own_headers, headers, headers / "torch/csrc/api/include"]
    shared = [f"-I{path}" for path in [*folders, sysconfig.get_path("include")]]
    shared += [f"-D{name}={value}" for name, value in extension.define_macros] + [f"-std={std}"]
    if toolkit is None:
        print(f"no CUDA sources: {why}")
    for number, source in enumerate(extension.sources):
        output = ["-c", source, "-o", f"{folder}/{number}.o"]
        if source.endswith(".cu"):
            nvcc = [toolkit["nvcc"], "-arch=sm_90", "-Xcompiler=-fPIC", *setup.NVCC_FLAGS]
            yield source, [*nvcc, *setup.cpp_extension.COMMON_NVCC_FLAGS, *shared, *output]
        else:
            yield source, ["c++", "-fPIC", *setup.CXX_FLAGS, *shared, *output]


def compile_one(job):
    source, command = job
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(f"{source}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
    sys.stdout.write(done.stdout.decode())
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    oldest = f"{load_setup().MINIMUM_TORCH}.0"
    parser.add_argument("release", nargs="?", default=oldest, help=f"of torch (default: {oldest})")
    parser.add_argument("--std", default="c++17", help="the C++ standard that release builds with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = commands(arguments.std, fetch_headers(arguments.release, folder), folder)
        results = list(pool.map(compile_one, jobs))
    print(f"{sum(results)} of {len(results)} sources compile against torch {arguments.release}")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

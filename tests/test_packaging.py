"""What is built, what it depends on, and how the package finds it."""

import ast
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

import efficient_densenet
from efficient_densenet import _C, _extension

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "efficient_densenet"
BUILD_FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
SHOW_MODULE = "import efficient_densenet as e; print(e._C.__file__)"


def run(*command, cwd, **variables):
    """Runs a command; returns its exit code and all its output."""
    inherited = {k: v for k, v in os.environ.items() if k != "EFFICIENT_DENSENET_CUDA"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def needed_libraries(path):
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    load, dynamic = 1, 2
    (table,) = [s for s in segments if s[0] == dynamic]
    entries = list(struct.iter_unpack("<qQ", data[table[2] : table[2] + table[5]]))
    needed, string_table = 1, 5
    address = next(value for tag, value in entries if tag == string_table)
    ((start, base),) = [
        (s[2], s[3]) for s in segments if s[0] == load and s[3] <= address < s[3] + s[5]
    ]
    names = [address - base + start + value for tag, value in entries if tag == needed]
    return {data[at : data.index(b"\0", at)].decode() for at in names}


def copy_package(folder, build=False):
    """Copies the Python sources, and what a build needs, but nothing that was built."""
    ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    if build:
        for name in BUILD_FILES:
            shutil.copy(ROOT / name, folder)
        for name in ("csrc", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


# --- the compiled module -----------------------------------------------------------------------


def test_needs_neither_the_cuda_runtime_nor_torchs_cuda_or_python_library():
    needed = needed_libraries(Path(_C.__file__))
    assert "libtorch_cpu.so" in needed
    forbidden = ("libcuda", "libc10", "libtorch_cuda", "libtorch_python", "libtorch.so")
    assert not [name for name in needed if name.startswith(forbidden)], needed


def test_build_info():
    info = efficient_densenet.build_info()
    assert list(info) == ["version", "torch", "cuda", "architectures"]
    assert info["version"] == efficient_densenet.__version__
    minimum = [int(number) for number in _extension.MINIMUM_TORCH.split(".")]
    assert [int(number) for number in info["torch"].split(".")[:2]] >= minimum
    if info["cuda"] is None:
        assert info["architectures"] == "CPU only"
    else:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert re.fullmatch(r"\d+\.\d+a?(\+PTX)?(;\d+\.\d+a?(\+PTX)?)*", info["architectures"])


def test_import_registers_the_operators_under_the_module_name():
    assert sys.modules["efficient_densenet._C"] is _C
    operators = torch._C._dispatch_get_all_op_names()
    assert [name for name in operators if name.startswith("efficient_densenet::")]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: gives a CUDA tensor to a CPU-only build"
)
def test_cpu_only_build_says_so_when_given_a_cuda_tensor(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copy_package(source, build=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    code, output = run(*pip, "--target", target, source, cwd=tmp_path, EFFICIENT_DENSENET_CUDA="0")
    assert code == 0, output
    program = (
        "import torch, efficient_densenet as e; assert e.build_info()['cuda'] is None\n"
        "model = e.DenseNet(growth_rate=4, block_config=(2,), efficient=True).cuda()\n"
        "try:\n"
        "    model(torch.ones(2, 3, 32, 32, device='cuda'))\n"
        "except RuntimeError as error:\n"
        "    print('RuntimeError:', error)\n"
    )
    code, output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(target))
    assert code == 0, output
    assert "RuntimeError: " in output and "CPU only" in output and "pip install" in output


# --- finding it --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """PYTHONPATH of a folder that stands for site-packages: it holds the package with its _C."""
    installed = tmp_path / "installed"
    installed.mkdir()
    copy_package(installed)
    shutil.copy(_C.__file__, installed / PACKAGE.name)
    return str(installed)


def test_unbuilt_source_folder_uses_the_module_of_the_installed_package(tmp_path, elsewhere):
    (tmp_path / "copy" / "efficient_densenet.egg-info").mkdir(parents=True)  # stale, as pip leaves
    copy = copy_package(tmp_path / "copy")
    program = (
        SHOW_MODULE + "; print(e.__file__); import efficient_densenet._C as c; assert c is e._C"
    )
    code, output = run(sys.executable, "-c", program, cwd=copy, PYTHONPATH=elsewhere)
    assert code == 0, output
    module, package = output.splitlines()[-2:]
    assert Path(module).parent == Path(elsewhere, PACKAGE.name).resolve()
    assert Path(package).parent == (copy / PACKAGE.name).resolve()


def test_unbuilt_source_folder_uses_the_module_of_an_editable_install(
    tmp_path, elsewhere, monkeypatch
):
    class Finder:  # what an editable install of setuptools puts on sys.meta_path
        def find_spec(name, path=None, target=None):
            return PathFinder.find_spec(name, [elsewhere])

    monkeypatch.setattr(_extension, "__file__", str(tmp_path / PACKAGE.name / "_extension.py"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [Finder])
    found = _extension._find()
    monkeypatch.undo()
    assert found == Path(elsewhere, PACKAGE.name, Path(_C.__file__).name).resolve()


def test_other_version_is_refused_with_both_versions_and_the_way_out(tmp_path, elsewhere):
    copy = copy_package(tmp_path / "copy")
    init = copy / PACKAGE.name / "__init__.py"
    version = efficient_densenet.__version__
    init.write_text(init.read_text().replace(f'"{version}"', '"99.0"'))
    code, output = run(sys.executable, "-c", SHOW_MODULE, cwd=copy, PYTHONPATH=elsewhere)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert version in last and "99.0" in last and "rebuild with 'pip install" in last


def test_missing_module_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "_package_folders", lambda: [tmp_path])
    with pytest.raises(ImportError, match=r"not built for Python .* run 'pip install \.'"):
        _extension._load()


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0+cu130", "2.10.1"])
def test_old_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ImportError, match=f"needs torch 2.11 or newer, but torch {re.escape(version)}"
    ):
        _extension._load()


# --- setup.py ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run without the source tree")
    for build_requirement in ("pybind11", "setuptools"):
        pytest.importorskip(build_requirement)
    spec = importlib.util.spec_from_file_location("setup_of_efficient_densenet", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_home(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch(mode=0o755)
    return folder


WHOLE = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
CONDA = ("bin/nvcc", "targets/x86_64-linux/include/cuda_runtime.h", "lib/libcudart_static.a")


@pytest.mark.parametrize("files", [WHOLE, CONDA])
def test_first_complete_toolkit_wins(setup_py, tmp_path, files):
    partial = fake_home(tmp_path / "partial", "bin/nvcc")
    whole = fake_home(tmp_path / "whole", *files)
    other = fake_home(tmp_path / "other", *WHOLE)
    toolkit, _ = setup_py.find_toolkit([tmp_path / "absent", partial, whole, other])
    assert sorted(toolkit.values()) == sorted(whole / file for file in files)


@pytest.mark.parametrize("absent", WHOLE)
def test_what_a_toolkit_lacks_is_named(setup_py, tmp_path, absent):
    home = fake_home(tmp_path, *(file for file in WHOLE if file != absent))
    toolkit, why = setup_py.choose_toolkit("", "13.0", [home])
    assert toolkit is None
    assert f"{home} lacks {Path(absent).name}" in why
    with pytest.raises(SystemExit, match=f"EFFICIENT_DENSENET_CUDA=1.*lacks {Path(absent).name}"):
        setup_py.choose_toolkit("1", "13.0", [home])


def test_cuda_setting(setup_py, tmp_path):
    home = fake_home(tmp_path, *WHOLE)
    for setting in ("", "1"):
        toolkit, _ = setup_py.choose_toolkit(setting, "13.0", [home])
        assert toolkit["nvcc"] == home / "bin/nvcc"
    assert setup_py.choose_toolkit("0", "13.0", [home]) == (None, "EFFICIENT_DENSENET_CUDA=0")
    assert setup_py.choose_toolkit("", None, [home]) == (None, "torch is not a CUDA build")
    with pytest.raises(SystemExit, match="torch is not a CUDA build"):
        setup_py.choose_toolkit("1", None, [home])
    with pytest.raises(SystemExit, match="no folder with nvcc, cuda_runtime.h"):
        setup_py.choose_toolkit("1", "13.0", [tmp_path / "absent"])
    with pytest.raises(
        SystemExit, match="EFFICIENT_DENSENET_CUDA must be 0, 1 or unset, not 'yes'"
    ):
        setup_py.choose_toolkit("yes", "13.0", [home])


def test_order_of_toolkit_homes(setup_py, tmp_path):
    for version in ("cuda-9.2", "cuda-12.4", "cuda-13.0", "cuda"):
        (tmp_path / version).mkdir()
    real = fake_home(tmp_path / "real", "bin/nvcc")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(real / "bin/nvcc")
    environ = {
        "CUDA_HOME": "/h",
        "CUDA_PATH": "/p",
        "CONDA_PREFIX": "/c",
        "PATH": str(tmp_path / "links"),
    }
    local = [tmp_path / name for name in ("cuda", "cuda-13.0", "cuda-12.4", "cuda-9.2")]
    homes = setup_py.candidate_homes(environ, tmp_path, "/guess")
    expected = ["/h", "/p", "/guess", real, *local, "/opt/cuda", "/c"]
    assert homes == [Path(home) for home in expected]


@pytest.mark.parametrize(
    ("listed", "gpus", "expected"),
    [
        ("8.6 9.0+PTX", [(8, 0)], "8.6;9.0+PTX"),
        ("", [(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        ("", [], "7.5;8.0;9.0+PTX"),
    ],
)
def test_architectures(setup_py, monkeypatch, listed, gpus, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    assert setup_py.architectures() == expected


def test_nonsense_setting_stops_setup(setup_py, tmp_path):
    command = [sys.executable, ROOT / "setup.py", "--version"]
    code, output = run(*command, cwd=tmp_path, EFFICIENT_DENSENET_CUDA="maybe")
    assert code == 1
    assert output.splitlines()[-1].startswith("EFFICIENT_DENSENET_CUDA must be 0, 1 or unset")


def test_version_and_minimum_torch_are_stated_once(setup_py):
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert (
        setup_py.VERSION
        == efficient_densenet.__version__
        in {
            node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
    )
    assert setup_py.MINIMUM_TORCH == _extension.MINIMUM_TORCH
    project = (ROOT / "pyproject.toml").read_text()
    assert efficient_densenet.__version__ not in project
    assert "torch>" not in project
    # Texts for people state it in words, and have to follow.
    for name in ("README.md", "CHANGELOG.md", "docs/design.md"):
        text = (ROOT / name).read_text()
        stated = re.findall(
            r"torch >= ([0-9.]+)\b|torch ([0-9.]+) or later|every torch from ([0-9.]+) on", text
        )
        versions = {version for match in stated for version in match if version}
        assert versions == {_extension.MINIMUM_TORCH}, name


def test_sdist_holds_every_source(setup_py, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copy_package(source, build=True)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, tmp_path]
    code, output = run(*command, cwd=source, EFFICIENT_DENSENET_CUDA="0")
    assert code == 0, output
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "tests", "efficient_densenet")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".cu", ".cuh", ".h", ".py"}
    ]
    assert {"csrc/module.cpp", "tests/test_packaging.py"} <= set(sources)
    assert not set(sources + BUILD_FILES) - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]

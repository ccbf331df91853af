"""The angle kernel for GPUs: run by Triton's interpreter, compiled for real chips, run on one where there is one."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from lightning_rkd.functional import _kernels as kernels
from lightning_rkd.functional import angles
from lightning_rkd.functional.angles import angle_loss
from lightning_rkd.functional.distances import squared_distances
from tests.harness.forks import run_code

pytest.importorskip("triton")

# Triton's interpreter must be chosen before the kernels are imported, so they run in a process of their own
INTERPRETED = """
import sys
import torch
from lightning_rkd.functional import rkd
from lightning_rkd.functional._kernels import angle_cuda, distance_cuda, native, rkd_cuda
from lightning_rkd.functional.distances import DUPLICATE, measure, pull_rows, squared_distances

cpu = native("angle_cpu")
large = sys.argv[1:] == ["large"]
edge = 256 if large else 64  # larger tiles are fewer steps for the interpreter
angle_cuda._AT |= {"TILE_I": edge, "TILE_J": edge}
angle_cuda._ACROSS |= {"TILE_I": edge, "TILE_K": edge}
rkd_cuda.PADDED = edge


def embeddings(n, close=False):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (16, 40))
    if close:  # duplicates and near rows, in one network and in both
        x[1] = x[0]
        y[2] = y[3] + 1e-4 * y[2]
        x[4] = x[3] + 1e-5 * x[4]
        y[6] = y[5]
    return x, y


def agree(n, dtype, weights, official=True, close=False, vertices=None, alone=False, offset=0.0, bound=None):
    x, y = embeddings(n, close)
    inputs = [(rows + offset).to(dtype) for rows in (x, y)]
    count = (n**2, n**3) if official else (max(1, n * (n - 1)), max(1, n * (n - 1) * (n - 2)))
    settings = {"distances": weights[0] / count[0], "angles": weights[1] / count[1], "official": official}
    settings["with_gradient"] = True
    where = (*inputs, vertices or (0, n))
    value, grad = rkd_cuda.loss_and_gradient(*where, dtype, **settings)
    expected, expected_grad = rkd._by_parts(*where, torch.float64, **settings)
    assert value.dtype == grad.dtype == dtype and grad.shape == x.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    what = (n, dtype, weights, official, close, vertices)
    # the squared distances of near rows are exact to 1e-5, in both ways
    assert abs(value - expected) <= (1e-5 if close else tolerance) * abs(expected), (what, value, expected)
    for rows in (slice(0, 2), slice(2, 7), slice(7, None)) if close else (slice(None),):
        error = (grad[rows] - expected_grad[rows]).norm()
        assert error <= (1e-3 if close else tolerance) * expected_grad[rows].norm(), (what, error)
    if alone:
        lone, none = rkd_cuda.loss_and_gradient(*where, dtype, **settings | {"with_gradient": False})
        assert none.numel() == 0 and lone == value


def angles_agree(n, dtype, official):
    s, t = (squared_distances(rows) for rows in embeddings(n))
    settings = {"official": official, "factor": 0.1, "with_gradient": True}
    value, pull = angle_cuda.loss_and_gradient(s, t, (0, n), dtype, **settings)
    expected, expected_pull = cpu.loss_and_gradient(s, t, (0, n), torch.float64, **settings)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert abs(value - expected) <= tolerance * expected
    x = embeddings(n)[0]
    grad, expected_grad = (
        (p.sum(1, keepdim=True) * x - p @ x) for p in (pull + pull.T, expected_pull + expected_pull.T)
    )
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


def distances_agree():
    for n in (1, 2, 31, 32, 65):
        x = torch.randn(n, 5, dtype=torch.float64) + 1000
        x[n // 2] = x[0]
        squared, saved = distance_cuda.squared(x, DUPLICATE)
        expected, rows, kernel = measure(x)
        torch.testing.assert_close(squared, expected, rtol=1e-10, atol=1e-14)
        assert torch.equal(squared, squared.T) and torch.equal(squared == 0, expected == 0)
        pull = torch.randn(n, n, dtype=torch.float64)
        torch.testing.assert_close(
            distance_cuda.pulled(pull, *saved), pull_rows(pull, rows, kernel), rtol=1e-10, atol=1e-10
        )


def nan_stays():
    for place in range(2):
        inputs = [torch.randn(5, 3), torch.randn(5, 4)]
        inputs[place][1, 1] = torch.nan
        for weights in ((1.0, 0.0), (0.0, 1.0)):
            settings = {"distances": weights[0], "angles": weights[1], "official": True, "with_gradient": True}
            assert rkd_cuda.loss_and_gradient(*inputs, (0, 5), torch.float32, **settings)[0].isnan()


both = (1.0, 2.0)
if large:
    agree(257, torch.float32, both)
else:
    for n in (1, 2, 3, 5, 31, 64, 100):
        agree(n, torch.float32, both, alone=n < 50)
    for n in (1, 2, 3, 5, 31):
        agree(n, torch.float64, both, official=False, alone=n == 5)
    for dtype in (torch.float32, torch.float64):
        for weights in ((0.1, 0.0), (0.0, 0.1)):
            agree(31, dtype, weights, official=dtype == torch.float64, alone=True)
    agree(31, torch.float32, both, close=True)
    agree(31, torch.float64, both, close=True)
    agree(31, torch.float32, both, offset=1000.0)
    for vertices in ((10, 15), (15, 31), (7, 7)):
        agree(31, torch.float32, both, vertices=vertices)
    angles_agree(31, torch.float32, True)
    angles_agree(33, torch.float64, False)
    distances_agree()
    nan_stays()
print("agree")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_rkd.functional._kernels import angle_cuda, distance_cuda

NUMBERS = dict.fromkeys(
    ("n", "start", "stop", "first", "place", "size", "width", "other", "slots", "terms", "tiles"), "i32"
)
OTHERS = dict.fromkeys(("distance_high", "distance_low", "angle_high", "angle_low"), "fp32") | {"near": "*i8"}
OTHERS |= dict.fromkeys(("x", "y", "fast", "loss"), "*fp32")


def code(kernel, arch, **constants):
    options = {"num_warps": constants.pop("num_warps", 4), "enable_fp_fusion": constants.pop("enable_fp_fusion", True)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {
        name: "constexpr" if name in constants else (NUMBERS | OTHERS).get(name, "*fp64") for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]


for arch, wide, near in ((80, False, False), (90, False, True), (90, True, False)):
    for kernel, tiles in ((angle_cuda._at_vertices, angle_cuda._AT), (angle_cuda._across, angle_cuda._ACROSS)):
        text = code(kernel, arch, **tiles, NEAR=near, WIDE=wide, GRADIENT=True)
        assert text.count("fma.rn.f64" if wide else "fma.rn.f32") > 50
flags = dict.fromkeys(("OFFICIAL", "DISTANCES", "ANGLES", "GRADIENT", "LOSS"), True)
for arch in (80, 90):
    code(distance_cuda._means, arch, **distance_cuda._MEANS)
    for tile in (32, 64):
        code(angle_cuda._prepare, arch, TILE=tile, LIMIT=1e-5, WIDE=False, num_warps=tile // 8, **flags)
        text = code(distance_cuda._distances, arch, DUPLICATE=1e-13, TILE=tile, STEP=16)
        assert "mma.sync" in text and ".f64" in text  # tensor cores
    assert "mma.sync" in code(distance_cuda.pull_rows, arch, **distance_cuda.PULL, **flags)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["small", "large"])
def test_interpreted_kernels_agree_with_those_for_the_cpu(sizes):
    command, environment = [sys.executable, "-c", INTERPRETED, sizes], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "agree\n", done.stderr


@pytest.mark.slow
def test_it_compiles_for_real_chips(tmp_path):
    place = f"import os\nos.environ['TRITON_CACHE_DIR'] = {str(tmp_path)!r}\n"
    assert run_code(place + COMPILED) == "compiled\n"


def test_where_it_cannot_run_the_tiles_do_its_work(monkeypatch, caplog):
    student, teacher = (squared_distances(torch.randn(6, 4)) for _ in range(2))
    expected = angle_loss(student, teacher)

    class Kernel:
        calls = 0

        @classmethod
        def loss_and_gradient(cls, *args, **settings):  # type: ignore[no-untyped-def]
            cls.calls += 1
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(angles, "native", lambda name: None if name in kernels._failed else Kernel)
    monkeypatch.setattr(kernels, "_failed", set())
    with pytest.raises(RuntimeError, match="no C compiler"):  # a fault of our own on the CPU is no reason to be slow
        angle_loss(student, teacher)
    monkeypatch.setitem(angles._KERNELS, "cpu", "angle_cuda")
    with caplog.at_level(logging.WARNING, logger="lightning_rkd"):
        torch.testing.assert_close(angle_loss(student, teacher), expected)
        torch.testing.assert_close(angle_loss(student, teacher), expected)
    assert Kernel.calls == 2
    assert [record.getMessage() for record in caplog.records] == [
        "The kernel angle_cuda does not run here, PyTorch's operations do its work, slower: no C compiler"
    ]

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
import torch
from lightning_rkd.functional._kernels import angle_cuda, distance_cuda, native
from lightning_rkd.functional.distances import DUPLICATE, _from_gram, squared_distances

cpu = native("angle_cpu")
angle_cuda._AT["TILE_I"] = angle_cuda._ACROSS["TILE_I"] = 64  # larger tiles are fewer steps for the interpreter


def compare(n, dtype, official, close=False, vertices=None, alone=False):
    generator = torch.Generator().manual_seed(n)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (16, 32))
    if close:  # duplicates and near rows, in one network and in both
        x[1] = x[0]
        y[2] = y[3] + 1e-4 * y[2]
        x[4] = x[3] + 1e-5 * x[4]
        y[6] = y[5]
    s, t = squared_distances(x), squared_distances(y)
    count = n**3 if official else max(1, n * (n - 1) * (n - 2))
    vertices = vertices or (0, n)
    settings = {"official": official, "factor": 1 / count}
    value, pull = angle_cuda.loss_and_gradient(s, t, vertices, dtype, with_gradient=True, **settings)
    expected, expected_pull = cpu.loss_and_gradient(s, t, vertices, torch.float64, with_gradient=True, **settings)
    grad, expected_grad = (
        (p.sum(1, keepdim=True) * x - p @ x) for p in (pull + pull.T, expected_pull + expected_pull.T)
    )
    assert abs(value - expected) <= tolerance * expected, (n, dtype, official, value, expected)
    for rows in (slice(0, 2), slice(2, 7), slice(7, None)) if close else (slice(None),):
        error = (grad[rows] - expected_grad[rows]).norm()
        assert error <= tolerance * expected_grad[rows].norm(), (n, dtype, official, error)
    if alone:
        lone, none = angle_cuda.loss_and_gradient(s, t, vertices, dtype, with_gradient=False, **settings)
        assert none is None and lone == value


for n in (1, 2, 3, 5, 31, 64, 100):
    compare(n, torch.float32, True, alone=n < 50)
for n in (1, 2, 3, 5, 31, 65):
    compare(n, torch.float64, False, alone=n < 50)
compare(31, torch.float32, False, alone=True)
compare(31, torch.float64, True, alone=True)
compare(31, torch.float32, True, close=True, alone=True)
for vertices in ((10, 15), (15, 31)):
    compare(31, torch.float32, True, vertices=vertices, alone=True)
bad = torch.ones(5, 5).fill_diagonal_(0)
bad[1, 3] = bad[3, 1] = float("nan")
for pair in ((bad, 1 - torch.eye(5)), (1 - torch.eye(5), bad)):
    settings = {"official": True, "factor": 1.0, "with_gradient": True}
    assert angle_cuda.loss_and_gradient(*pair, (0, 5), torch.float32, **settings)[0].isnan()

for n in (1, 2, 31, 32, 65):
    x = torch.randn(n, 5, dtype=torch.float64) + 3
    x[n // 2] = x[0]
    rows = distance_cuda.centred(x)
    expected = _from_gram(rows @ rows.T)
    torch.testing.assert_close(distance_cuda.squared(rows, DUPLICATE), expected, rtol=1e-12, atol=1e-15)
    own, pull = x.clone().requires_grad_(), torch.randn(n, n, dtype=torch.float64)
    (expected,) = torch.autograd.grad(squared_distances(own), own, pull)
    torch.testing.assert_close(distance_cuda.pulled(pull, rows), expected, rtol=1e-10, atol=1e-10)
print("agree")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_rkd.functional._kernels import angle_cuda as kernels

cases = [(80, False, False), (90, False, True), (90, True, False)]
for arch, wide, near in cases:
    for kernel, tiles in ((kernels._at_vertices, kernels._AT), (kernels._across, kernels._ACROSS)):
        constants = tiles | {"NEAR": near, "WIDE": wide, "GRADIENT": True}
        options = {"num_warps": constants.pop("num_warps")}
        numbers = dict.fromkeys(("n", "start", "stop", "first", "place"), "i32")
        special = {"fast": "*fp32", "near": "*i8", "wanted": "*i32"}
        kinds = {
            name: "constexpr" if name in constants else numbers.get(name) or special.get(name, "*fp64")
            for name in kernel.arg_names
        }
        constants = {name: value for name, value in constants.items() if name in kinds}
        source = ASTSource(kernel, signature=kinds, constexprs=constants)
        code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
        assert code.count("fma.rn.f64" if wide else "fma.rn.f32") > 50
print("compiled")
"""


@pytest.mark.slow
def test_interpreted_kernels_agree_with_those_for_the_cpu():
    command, environment = [sys.executable, "-c", INTERPRETED], os.environ | {"TRITON_INTERPRET": "1"}
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

"""Native kernels are optional."""

import pytest

from tests.harness.forks import run_code

PROGRAM = """
import sys
{before}
import torch
from lightning_rkd.functional._kernels import native
from lightning_rkd.losses import RKD
student, teacher = torch.sin(torch.arange(40.0)).view(10, 4).requires_grad_(), torch.cos(torch.arange(60.0)).view(10, 6)
loss = RKD()(student, teacher)
loss.backward()
print(native("angle_cpu") is not None, "numba" in sys.modules, f"{{loss:.6f}} {{student.grad.norm():.6f}}")
"""


def run(before: str = "", **environment: str) -> list[str]:
    before = f"import os; os.environ.update({environment}); {before}"
    return run_code(PROGRAM.format(before=before)).split(maxsplit=2)


@pytest.mark.slow
def test_without_numba_or_with_a_broken_one_the_result_is_the_same(tmp_path):
    whole = run()
    assert whole[:2] == ["True", "True"]
    without = run("sys.modules['numba'] = None")
    assert (without[0], without[2]) == ("False", whole[2])
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise OSError('cannot load a library')")
    broken = run(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert (broken[0], broken[2]) == ("False", whole[2])
    assert run(LIGHTNING_RKD_NATIVE="0") == ["False", "False", whole[2]]


@pytest.mark.slow
def test_where_nothing_can_be_kept_kernels_are_compiled_all_the_same(tmp_path):
    before = "import numba.core.caching as c; c.CacheImpl._locator_classes = []; c._CacheImpl = c.CacheImpl"
    assert run(before)[0] == "True"

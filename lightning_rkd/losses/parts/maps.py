"""Feature maps made comparable: one spatial size, Gram matrices that neither overflow nor vanish."""

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.functional.scales import power_of_two, squares_in_range


def match_sizes(student: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both maps average-pooled to the smaller height and width; tokens unchanged."""
    both = (student, teacher)
    if student.ndim == teacher.ndim == 4:
        height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True))
        s, t = (x if x.shape[2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width)) for x in both)
        return s, t
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{name}: the layers must give maps (N, C, H, W) in both networks, or equally many tokens (N, T, C), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; drop class tokens, or tap layers before pooling"
        )
    return both


def gram_matrices(x: Tensor) -> Tensor:
    """Inner products of rows, up to a factor per matrix that keeps them in range.

    Shapes: (..., N, D) -> (..., N, N).
    """
    gram = x @ x.mT
    if squares_in_range(gram.diagonal(dim1=-2, dim2=-1), x):
        return gram
    x = x / power_of_two(x, (-2, -1))
    return x @ x.mT

"""Properties of losses that only the contract suite needs."""

from typing import Any, NamedTuple


class Properties(NamedTuple):
    """Of a loss; the defaults hold for most, so that a new loss need not be entered."""

    equal_widths: bool = False  # of student and teacher
    min_rows: int = 1
    min_width: int = 1
    order_matters: bool = False  # the order of the rows changes the value
    exact_gradient: bool = True  # the gradient is that of the value: the paper holds nothing constant that depends on s
    dense: bool = False  # reads logits (N, K, H, W)


EQUAL_WIDTHS = Properties(equal_widths=True)
CONSTANT_PARTS = Properties(exact_gradient=False)
PROPERTIES = {
    "AICSD": Properties(equal_widths=True, dense=True),
    "ClassSimilarityKD": EQUAL_WIDTHS,
    "CorrelationCongruence, form rows": Properties(equal_widths=True, order_matters=True),
    "CorrelationCongruence, form rows, dim 3": Properties(order_matters=True),
    "CosineTemperatureKD": Properties(equal_widths=True, exact_gradient=False),
    "DIST": EQUAL_WIDTHS,
    "GraphKD, neighbours 2": Properties(min_rows=3),
    "HolisticKD": Properties(min_rows=8, exact_gradient=False),
    "IRG": CONSTANT_PARTS,
    "NST, kernel gaussian": CONSTANT_PARTS,
    "Matryoshka": Properties(min_width=4),
    "MultiLevelLogit": EQUAL_WIDTHS,
    "PCKD": Properties(order_matters=True, exact_gradient=False),
    "SampleContrastiveKD": EQUAL_WIDTHS,
    "SoftTarget": EQUAL_WIDTHS,
    "TTM": EQUAL_WIDTHS,
    "Tanimoto, form sample": EQUAL_WIDTHS,
    "WTTM": EQUAL_WIDTHS,
}


def properties(cls: Any) -> Properties:
    """Those of a loss class, or of a class with arguments, which has its class's unless it is entered itself."""
    return PROPERTIES.get(str(cls)) or PROPERTIES.get(cls.__name__, Properties())

"""benchmarks/kernels.py on small maps, interpreted: each case's expected values are the kernel's."""

import importlib

import pytest
import torch

from cascade_nodes.cascade_core.engine.kernels.tuned import Config
from cascade_nodes.tests.benchmarks.conftest import BENCHMARKS


def test_every_case_expects_what_its_kernel_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    kernel_cases = importlib.import_module("kernel_cases")
    stages = [kernel_cases.Level("C", 2, 3, 5, 48, 3, 5), kernel_cases.Level("B", 1, 4, 4, 64)]
    errors = {}
    for case in kernel_cases.cases(kernel_cases.Draw("cpu", torch.bfloat16), stages, stages[:1]):
        for value, expected in case.check():
            error = (value.double() - expected).norm() / expected.double().norm()
            errors[case.kernel] = max(errors.get(case.kernel, 0), float(error))
        case.call()
        assert case.traffic > 0
    assert len(errors) >= 10  # kernels
    assert max(errors.values()) < 4e-3, errors


@pytest.mark.parametrize("op", ["linear_gelu", "linear_gelu_response"])
def test_every_way_of_a_product_computes_the_same(monkeypatch, op):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    product_cases = importlib.import_module("product_cases")
    operands = product_cases.Operands(product_cases.Case(op, 2 * 36, 80, 40, 1), copies=1, device="cpu")
    for call in (operands.fused(Config(32, 32, 16)), operands.separate()):
        operands.out.zero_()
        assert operands.error(call) < 4e-3

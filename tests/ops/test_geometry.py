from itertools import product

import bit_oracles as oracle
import hypothesis
import numpy as np

from xnor_jax.ops._geometry import geometry


@hypothesis.given(oracle.cases())
def test_places_inside_and_shifts_agree_with_counting(case):
    options = {k: v for k, v in case.options.items() if k != "groups"}
    way = geometry("test", case.spatial, case.window, **options)
    assert way.padding == case.pads
    axes = case.spatial, case.pads, case.window, case.strides, case.dilation
    corners = zip(*axes, strict=True)
    assert way.out == tuple(
        len(range(0, size + sum(pads) - (k - 1) * d, s))
        for size, pads, k, s, d in corners
    )
    axes = zip(case.spatial, way.padding, way.shifts, way.inside, strict=True)
    for size, (before, after), shifts, inside in axes:
        padded = np.pad(np.ones(size, bool), (before, after))
        for tap, shift in enumerate(shifts):
            np.testing.assert_array_equal(padded[shift], inside[:, tap])
    assert way.padded == any(map(any, case.pads))
    assert len(list(product(*way.shifts))) == np.prod(case.window)

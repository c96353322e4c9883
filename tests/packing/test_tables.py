import io

import pytest
from rich.console import Console

from xnor_jax.packing.bench import Result, Spread
from xnor_jax.packing.tables import bench_table


@pytest.mark.parametrize("milliseconds", [0.431, 2.35, 17.41, 140.6, 2345.6])
def test_bench_rows_fit_80_columns(milliseconds):
    def spread(value):
        return Spread(value, 0.8 * value, 1.2 * value)

    seconds = milliseconds / 1e3
    results = [
        Result(threads, 128, spread(seconds), spread(5 * seconds), spread(13.4))
        for threads in (1, 16)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(bench_table(results))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2 + len(results) and max(map(len, lines)) <= 80
    # The median within half a percent, and both extremes.
    packed = lines[2].split()[2:4]
    assert float(packed[0]) == pytest.approx(milliseconds, rel=5e-3)
    least, most = map(float, packed[1].strip("()").split("–"))
    assert least == pytest.approx(0.8 * milliseconds, rel=2e-2)
    assert most == pytest.approx(1.2 * milliseconds, rel=2e-2)

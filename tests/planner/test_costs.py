"""Counts by polynomials; that they are the right ones is tested in test_shared_graph.py."""

from __future__ import annotations

import pytest

from skipvit_fx.planner.costs import fitted

pytestmark = pytest.mark.every_case


@pytest.mark.parametrize("most", [4, 5, 16, 64, 196, 1024])
@pytest.mark.parametrize("terms", [(7, 0, 0), (5, 3, 0), (1, 2, 3), (0, 0, 768)])
def test_a_polynomial_is_found(most: int, terms: tuple[int, int, int]) -> None:
    a, b, c = terms
    asked: list[int] = []

    def count(n: int) -> int:
        asked.append(n)
        return a + b * n + c * n * n

    found = fitted(count, most)
    assert found is not None
    assert len(asked) == 4
    assert all(found(n) == a + b * n + c * n * n for n in range(most + 2))


def test_what_is_no_polynomial_is_not_taken_for_one() -> None:
    assert fitted(lambda n: n**3, 64) is None
    assert fitted(lambda n: 8 * -(-n // 7), 64) is None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_too_few_patches_to_tell(most: int) -> None:
    assert fitted(lambda n: n, most) is None

"""The numbers of weights: what is known of a matrix before it is measured must come out."""

from __future__ import annotations

import math

import pytest
import torch

from pgolf_post.diagnose import spectrum
from pgolf_post.diagnose.embeddings import mean_cosine, nearest_rows
from pgolf_post.diagnose.spectrum import condition, effective_rank, singular_values
from pgolf_post.diagnose.weights import spectral_values, tail_values, worst_row
from pgolf_post.errors import NumericsError


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(48, 48), (256, 32), (32, 256), (48, 32)], ids=str)
def test_an_orthogonal_matrix_has_the_rank_of_its_width(shape: tuple[int, int]) -> None:
    values = dict(spectral_values("w", 3.0 * orthogonal(*shape)))
    width = min(shape)
    for metric in ("effective_rank", "effective_rank_squared", "stable_rank"):
        assert values[metric] == pytest.approx(width, rel=1e-5)
    assert values["effective_rank_share"] == pytest.approx(1.0, rel=1e-5)
    assert values["condition"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(48, 48), (256, 32), (32, 256)], ids=str)
def test_an_outer_product_has_rank_one_and_no_condition(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(shape[0], 1, generator=generator), torch.randn(1, shape[1], generator=generator)
    values = dict(spectral_values("w", u @ v))
    assert values["effective_rank"] == pytest.approx(1.0, abs=2e-4)  # float32 leaves some 1e-7 in every direction
    assert values["effective_rank_squared"] == pytest.approx(1.0, abs=1e-6)
    assert values["stable_rank"] == pytest.approx(1.0, abs=1e-6)
    assert values["condition"] is None


def test_the_gram_matrix_gives_the_singular_values_of_the_svd() -> None:
    spectrum_wanted = torch.logspace(0, -5, 24, dtype=torch.float64)
    thin = (orthogonal(96, 24).double() * spectrum_wanted) @ orthogonal(24, 24).double()
    values, least = singular_values("thin", thin.float())
    assert least < 1e-6
    assert torch.allclose(values, torch.linalg.svdvals(thin), rtol=2e-2, atol=1e-7)
    assert condition(values, least) == pytest.approx(1e5, rel=2e-2)


def test_a_matrix_of_zeros_has_no_rank_and_no_tail() -> None:
    zeros = torch.zeros(8, 4)
    values = dict(spectral_values("w", zeros))
    assert values["effective_rank"] == values["stable_rank"] == 0.0
    assert values["condition"] is None
    assert set(dict(tail_values(zeros)).values()) == {0.0}
    assert worst_row(zeros) == (0, 1.0)


def test_normal_weights_have_kurtosis_zero_and_the_normal_tail() -> None:
    count = 512 * 512
    values = dict(tail_values(2.0 + 0.1 * torch.randn(512, 512, generator=torch.Generator().manual_seed(2))))
    assert abs(values["kurtosis"]) < 4 * math.sqrt(24 / count)  # its standard error
    assert values["beyond_3_sigma"] == pytest.approx(0.0027, abs=4 * math.sqrt(0.0027 / count))
    assert values["beyond_6_sigma"] == 0.0


def test_uniform_weights_have_their_known_kurtosis() -> None:
    uniform = torch.rand(512, 512, generator=torch.Generator().manual_seed(3))
    assert dict(tail_values(uniform))["kurtosis"] == pytest.approx(-1.2, abs=0.01)


def test_a_planted_outlier_row_is_found_by_its_number() -> None:
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    matrix[41] *= 20
    row, ratio = worst_row(matrix)
    assert row == 41
    assert ratio == pytest.approx(20, rel=0.4)
    assert worst_row(torch.eye(8, 4)[[0, 1, 4, 5, 6, 7]]) == (0, None)  # of rows that are mostly zero: no ratio


def test_equal_values_have_the_effective_rank_of_their_number() -> None:
    assert effective_rank(torch.full((7,), 0.3, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0, 0], dtype=torch.float64)) == pytest.approx(1)


def test_singular_values_that_do_not_converge_are_an_error_that_names_the_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(spectrum.torch.linalg, "svdvals", fail)
    with pytest.raises(NumericsError, match=r"q\.weight \(8, 8\): its singular values do not converge"):
        singular_values("blocks.0.attn.q.weight", torch.eye(8))


def test_the_nearest_row_is_found_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from pgolf_post.diagnose import embeddings

    rows = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(5)), dim=1)
    rows[37] = rows[4]
    cosines, nearest = nearest_rows(rows)
    assert int(nearest[37]) == 4
    assert int(nearest[4]) == 37
    assert float(cosines[4]) == pytest.approx(1.0, abs=1e-6)
    assert sorted(cosines.topk(3).indices[:2].tolist()) == [4, 37]
    monkeypatch.setattr(embeddings, "ROWS_AT_ONCE", 7)
    assert torch.equal(nearest_rows(rows)[1], nearest)


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(6)), dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)

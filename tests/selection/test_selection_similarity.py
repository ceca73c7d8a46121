import torch

from evocomp.selection.similarity import cosine


def test_cosine_in_double_precision_and_zero_rows(generator):
    x, y = torch.randn(4, 7, generator=generator), torch.randn(5, 7, generator=generator)
    x[2] = 0
    truth = torch.zeros(4, 5, dtype=torch.float64)
    for i in (0, 1, 3):
        for j in range(5):
            truth[i, j] = x[i].double() @ y[j].double() / (x[i].double().norm() * y[j].double().norm())
    assert torch.allclose(cosine(x, y).double(), truth, atol=1e-6)
    assert cosine(x.half()).dtype == torch.float32

import torch

from training.dictionaries.sparse_code import combine, select

BATCH, DIM, FEATURES, K = 7, 5, 30, 4


def test_values_and_gradients_are_those_of_the_dense_autoencoder():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = random(BATCH, DIM)
    parameters = [random(DIM, FEATURES), random(FEATURES), random(FEATURES, DIM)]
    dense = [p.clone().requires_grad_() for p in parameters]
    sparse = [p.clone().requires_grad_() for p in parameters]

    pre = x @ dense[0] + dense[1]
    kept = pre >= pre.topk(K, dim=-1).values[:, -1:]
    z = torch.where(kept, pre, 0.0).relu()
    expected = ((x - z @ dense[2]) ** 2).sum() + z.sum() ** 2
    expected.backward()

    with torch.no_grad():
        values, indices = (x @ sparse[0] + sparse[1]).topk(K, dim=-1)
    activations = select(sparse[0], sparse[1], x, indices, values).relu()
    found = ((x - combine(sparse[2], activations, indices)) ** 2).sum() + activations.sum() ** 2
    found.backward()

    # Double precision: sums of a few dozen products.
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_feature_that_no_sample_chose_has_no_gradient():
    decoder = torch.randn(FEATURES, DIM, requires_grad=True)
    combine(decoder, torch.ones(2, 3), torch.tensor([[0, 1, 2], [2, 3, 4]])).sum().backward()
    assert torch.equal(decoder.grad[5:], torch.zeros(FEATURES - 5, DIM))
    # Feature 2 was chosen twice.
    assert torch.equal(decoder.grad[:5], torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])[:, None].expand(5, DIM))

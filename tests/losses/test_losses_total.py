import pytest
import torch
import torch.nn.functional as F

from evocomp.log import UserError
from evocomp.losses import LOSSES, build_loss
from evocomp.losses.focal import focal_loss
from evocomp.losses.ghm import GHMC


@pytest.fixture
def batch(generator):
    logits = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    hidden = torch.randn(3, 11, 6, generator=generator, dtype=torch.float64)
    targets = (torch.rand(3, 11, generator=generator) < 0.4).double()
    valid = torch.arange(11) < torch.tensor([[11], [7], [9]])
    return logits, hidden, targets, valid


def mean_pair_cosine(hidden, targets, valid):
    values = []
    for h, y, ok in zip(hidden, targets > 0.5, valid, strict=True):
        values.append(F.cosine_similarity(h[ok & ~y][:, None], h[ok & y][None], dim=-1).mean())
    return sum(values) / len(values)


def expected_term(name, logits, targets, valid):
    x, y = logits[valid], targets[valid]
    p = x.sigmoid()
    bce = -(y * p.log() + (1 - y) * (1 - p).log())
    match name:
        case "bce":
            return bce.mean()
        case "focal":  # Lin et al. 2017, eq. 5, for hard labels
            p_t, alpha_t = torch.where(y == 1, p, 1 - p), torch.where(y == 1, 0.25, 0.75)
            return (-alpha_t * (1 - p_t) ** 2 * p_t.log()).mean()
        case "ghm":
            return GHMC()(x, y)
        case "listwise":
            rows = zip(logits, targets, valid, strict=True)
            return sum(F.cross_entropy(a[ok], (b[ok] / 0.1).softmax(0)) for a, b, ok in rows) / len(logits)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_add_up_to_the_loss(name, batch):
    logits, hidden, targets, valid = batch
    parts = build_loss(name, alpha=0.3)(logits, hidden, targets, valid)
    term = name.removesuffix("_cs")
    torch.testing.assert_close(parts[term], expected_term(term, logits, targets, valid))
    if name.endswith("_cs"):
        assert set(parts) == {"loss", term, "separation"}
        torch.testing.assert_close(parts["separation"], mean_pair_cosine(hidden, targets, valid))
        torch.testing.assert_close(parts["loss"], parts[term] + 0.3 * parts["separation"])
    else:
        assert set(parts) == {"loss", term}
        torch.testing.assert_close(parts["loss"], parts[term])


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_ignored(name, batch):
    logits, hidden, targets, valid = batch
    loss = build_loss(name)
    clean = loss(logits, hidden, targets, valid)
    for tensor in (logits, hidden, targets):
        tensor[~valid] = torch.nan
    logits.requires_grad_()
    hidden.requires_grad_()
    dirty = loss(logits, hidden, targets, valid)
    torch.testing.assert_close(dirty["loss"], clean["loss"])
    dirty["loss"].backward()
    assert logits.grad.isfinite().all() and (logits.grad[~valid] == 0).all()
    if name.endswith("_cs"):
        assert hidden.grad.isfinite().all() and (hidden.grad[~valid] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, batch):
    logits, hidden, targets, valid = batch
    loss = build_loss(name)
    inputs = (logits.requires_grad_(), hidden.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, h: loss(x, h, targets, valid)["loss"], inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_mask_all_tokens_count(name, batch):
    logits, hidden, targets, _ = batch
    loss = build_loss(name)
    everything = torch.ones(3, 11, dtype=torch.bool)
    torch.testing.assert_close(loss(logits, hidden, targets)["loss"], loss(logits, hidden, targets, everything)["loss"])
    assert torch.equal(loss(logits, hidden, targets.bool())["loss"], loss(logits, hidden, targets)["loss"])


def test_soft_targets_separate_at_one_half(batch):
    logits, hidden, targets, valid = batch
    soft = targets * 0.3 + 0.3  # 0.3 and 0.6
    loss = build_loss("bce_cs")
    hard_parts, soft_parts = loss(logits, hidden, targets, valid), loss(logits, hidden, soft, valid)
    torch.testing.assert_close(soft_parts["separation"], hard_parts["separation"])
    expected = expected_term("bce", logits, soft, valid)
    torch.testing.assert_close(soft_parts["bce"], expected)


def test_listwise_ignores_a_sample_of_padding_only(batch):
    logits, _, targets, valid = batch
    valid = valid & torch.tensor([[True], [True], [False]])
    logits.requires_grad_()
    loss = build_loss("listwise", temperature=0.5)(logits, None, targets, valid)["loss"]
    loss.backward()
    assert loss.isfinite() and (logits.grad[2] == 0).all() and (logits.grad[0] != 0).all()


def test_listwise_is_least_where_the_softmaxes_agree(batch):
    _, _, targets, valid = batch
    credits = targets + torch.linspace(0, 0.3, 11, dtype=torch.float64)
    logits = (credits / 0.1).clone().requires_grad_()
    build_loss("listwise")(logits, None, credits, valid)["loss"].backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_options_reach_their_term(batch):
    logits, hidden, targets, valid = batch
    base = build_loss("ghm")(logits, hidden, targets, valid)["loss"]
    for options in ({"bins": 30}, {"form": "exact"}, {"form": "exact", "eps": 0.3}):
        assert build_loss("ghm", **options)(logits, hidden, targets, valid)["loss"] != base
    plain = focal_loss(logits, targets, valid, gamma=0.0, alpha=None)
    torch.testing.assert_close(plain, expected_term("bce", logits, targets, valid))


def test_unknown_name():
    with pytest.raises(UserError, match="ghm_cs, ghm, focal_cs, bce_cs, bce, listwise"):
        build_loss("ce")

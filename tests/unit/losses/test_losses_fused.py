"""fused_loss against the plain path on full logits, against dense float64 formulas, and what it may never hold."""

import shutil
from math import inf, log

import pytest
import torch
from dense_losses import SUPPORTS, rowwise
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from bakery.errors import RecipeError
from bakery.losses import DIVERGENCES, fused, heads, sparse_loss
from bakery.losses.fused import fused_loss
from bakery.losses.heads import LMHead, compiled_merge, merge

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GIVEN = {"beta": 0.3, "alpha": 0.2}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "granite": {"scale": 1 / 6},
    "gemma2": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 2.0},
}


class Case:
    """Random hidden states, a head, a teacher over V tokens and its top K; float64 unless said."""

    def __init__(self, n=40, v=23, h=7, k=5, bias=False, scale=1.0, softcap=None, dtype=torch.float64, device="cpu"):
        make = {"generator": torch.Generator().manual_seed(n + v), "dtype": torch.float64}
        self.hidden = (2 * torch.randn(n, h, **make)).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(v, h, **make) / h**0.5).to(device, dtype).requires_grad_()
        self.bias = torch.randn(v, **make).to(device, dtype).requires_grad_() if bias else None
        self.scale, self.softcap = scale, softcap
        self.teacher = (2 * torch.randn(n, v, **make)).log_softmax(-1).to(device)
        self.logprobs, self.ids = self.teacher.topk(k)
        self.tail = self.teacher.scatter(-1, self.ids, -inf).logsumexp(-1)
        self.labels = torch.randint(v, (n,), generator=make["generator"]).to(device)
        self.labels[: n // 2] = self.ids[: n // 2, k // 2]  # in the support for certain

    @property
    def head(self):
        return LMHead(self.weight, self.bias, self.scale, self.softcap)

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def logits(self, dtype=None):
        """The head in one piece, written out again; in another dtype than its own if asked."""
        hidden, weight, *bias = (x if dtype is None else x.to(dtype) for x in self.leaves)
        x = self.scale * (hidden @ weight.T + (bias[0] if bias else 0))
        return self.softcap * (x / self.softcap).tanh() if self.softcap else x

    def sides(self, temperature=1.0):
        norm = (self.teacher / temperature).logsumexp(-1)
        return (self.ids, self.logprobs, self.labels), {"tail_logprob_N": self.tail, "log_norm_N": norm}

    def plain(self, cross_entropy_weight=0.0, **options):
        """loss_N from [N,V] logits."""
        teacher, tails = self.sides(options.get("temperature", 1.0))
        logits = self.logits()
        loss = sparse_loss(logits, *teacher, **tails, **GIVEN | options)
        return loss + cross_entropy_weight * cross_entropy(logits, self.labels, reduction="none")

    def fused(self, **options):
        teacher, tails = self.sides(options.get("temperature", 1.0))
        return fused_loss(self.hidden, self.head, *teacher, **tails, **GIVEN | options)

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.leaves)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Forty targets in three chunks, the last one short; rows of a few floats merged three at a time."""
    monkeypatch.setattr(fused, "TARGETS_PER_CHUNK", 16)
    monkeypatch.setattr(fused, "TARGETS_PER_GPU_CHUNK", 16)
    monkeypatch.setattr(heads, "FLOATS_IN_CACHE", 70)


def assert_same(case, rtol=1e-10, **options):
    want_N = case.plain(**options)
    total, loss_N = case.fused(**options)
    want = want_N.sum()
    torch.testing.assert_close(loss_N, want_N, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(total, want, rtol=rtol, atol=1e-12)
    for ours, theirs in zip(case.gradients(total), case.gradients(want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_every_loss_is_that_of_full_logits(support, divergence, temperature, device):
    assert_same(Case(device=device), support=support, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"cross_entropy_weight": 0.3}, {}], ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_every_head_is_that_of_full_logits(support, options, head):
    assert_same(Case(**HEADS[head]), support=support, divergence="mixed_kl", **options)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_is_taken_at_temperature_1(support, temperature):
    assert_same(Case(), support=support, temperature=temperature, cross_entropy_weight=0.7)


def test_the_default_by_hand():
    # As for sparse_loss: p = (.5, .3 | .2), q = (.3, .1 | .6). With the identity for a head, hidden states are logits.
    hidden = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().requires_grad_()
    weight = torch.eye(4, requires_grad=True)
    total, loss_N = fused_loss(hidden, LMHead(weight), torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]).log())
    assert loss_N.tolist() == pytest.approx([0.36527], abs=1e-5)
    assert total.item() == pytest.approx(0.36527, abs=1e-5)
    (5 * total).backward()
    expected = [5 * (0.1 - 0.3), 5 * 0.2 * 2 / 3, 5 * (0.3 - 0.5), 5 * 0.4 * 2 / 3]
    assert hidden.grad[0].tolist() == pytest.approx(expected, abs=1e-5)
    # ∂/∂ W_vh = ∂/∂ logit_v · hidden_h
    assert weight.grad[2].tolist() == pytest.approx([-1 * log(x) for x in (0.1, 0.2, 0.3, 0.4)], abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_float32_is_as_good_as_dense_float64(support, divergence, device, monkeypatch):
    """The bar: 1e-5 of the value, and a cosine of the gradient of at least .9999."""
    monkeypatch.undo()  # chunks of the size that trains
    case = Case(n=300, v=2000, h=32, k=64, dtype=torch.float32, device=device)
    total, loss_N = case.fused(support=support, divergence=divergence)
    q_NV = case.logits(torch.float64).softmax(-1)
    want_N = rowwise(support, divergence, case.teacher.exp(), q_NV, case.ids, case.labels, **GIVEN)
    torch.testing.assert_close(loss_N.double(), want_N, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(case.gradients(total), case.gradients(want_N.sum()), strict=True):
        cosine = torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), 0)
        assert cosine > 0.9999
        torch.testing.assert_close(ours.double().norm(), theirs.double().norm(), rtol=1e-4, atol=0)


def cosine(x, y):
    return torch.cosine_similarity(x.double().flatten(), y.double().flatten(), 0).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_half_precision_head_loses_no_more_than_on_full_logits(support, dtype, monkeypatch):
    """The head's gradient is a sum over 150 chunks here: rounded at each, it would be far off."""
    monkeypatch.setattr(fused, "TARGETS_PER_CHUNK", 4)
    case = Case(n=600, v=300, h=32, k=16, dtype=dtype)
    total, loss_N = case.fused(support=support)
    assert loss_N.dtype == total.dtype == torch.float32
    q_NV = case.logits(torch.float64).softmax(-1)
    want_N = rowwise(support, "forward_kl", case.teacher.exp(), q_NV, case.ids, case.labels, **GIVEN)
    losses = total, case.plain(support=support).sum(), want_N.sum()
    for ours, plain, exact in zip(*map(case.gradients, losses), strict=True):
        assert ours.dtype == dtype
        assert cosine(ours, exact) > 0.9999
        assert 1 - cosine(ours, exact) < 1.2 * (1 - cosine(plain, exact))


def test_a_sum_over_many_chunks_does_not_stop_growing(monkeypatch):
    """One target repeated 1,000 times in bfloat16, whose numbers stop at 256 when ones are added to them."""
    monkeypatch.setattr(fused, "TARGETS_PER_CHUNK", 1)
    case = Case(n=1, v=8, h=4, k=2, dtype=torch.bfloat16)
    (once, _), many = case.fused(), Case(n=1, v=8, h=4, k=2, dtype=torch.bfloat16)
    for name in ("hidden", "teacher", "logprobs", "ids", "tail", "labels"):
        repeated = getattr(case, name).detach().repeat(1000, *[1] * (getattr(case, name).dim() - 1))
        setattr(many, name, repeated.requires_grad_(name == "hidden"))
    weight_1, weight_1000 = case.gradients(once)[1], many.gradients(many.fused()[0])[1]
    torch.testing.assert_close(weight_1000.float(), 1000 * weight_1.float(), rtol=2e-2, atol=1e-3)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes; a view makes none."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = () if func.is_view else out if isinstance(out, tuple | list) else (out,)
        self.largest = max([self.largest, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("options", [{"cross_entropy_weight": 1.0}, {"temperature": 2.0}, {}], ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_nothing_of_the_size_of_all_logits_is_ever_made(support, options, frozen):
    n, v, h, k = 400, 1000, 30, 8
    case = Case(n, v, h, k)
    case.weight.requires_grad_(not frozen)
    teacher, tails = case.sides(options.get("temperature", 1.0))
    with Largest() as seen:
        fused_loss(case.hidden, case.head, *teacher, **tails, support=support, **options)[0].backward()
    whole = support != "renormalized" or "cross_entropy_weight" in options
    # Sixteen rows of logits, or for renormalized the head's K rows for each of them; and the gradients.
    assert seen.largest == max(16 * v if whole else 16 * k * h, n * h, 0 if frozen else h * v)


def test_the_plain_path_does_make_all_logits():
    """The detector above sees them."""
    with Largest() as seen:
        Case(400, 1000, 6, 8).plain().sum().backward()
    assert seen.largest == 400 * 1000


def test_a_gradient_through_single_losses_is_refused_and_not_wrong():
    case = Case()
    _, loss_N = case.fused()
    assert not loss_N.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        (loss_N * torch.arange(40)).sum().backward()


def test_a_second_backward_is_refused_and_not_wrong():
    total, _ = Case().fused()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients once"):
        total.backward()


@pytest.mark.parametrize("support", SUPPORTS)
def test_only_what_wants_a_gradient_gets_one(support):
    for frozen in ({"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}):
        case = Case(**HEADS["bias"])
        for name in frozen:
            getattr(case, name).requires_grad_(False)
        total, _ = case.fused(support=support)
        ours = case.gradients(total)
        for name in frozen:
            getattr(case, name).requires_grad_(True)
        theirs = dict(zip(("hidden", "weight", "bias"), case.gradients(case.plain(support=support).sum()), strict=True))
        kept = [theirs[name] for name in theirs if name not in frozen]
        for x, y in zip(ours, kept, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("support", SUPPORTS)
def test_without_gradients_the_loss_is_the_same(support, context):
    case = Case(**HEADS["gemma2"])
    with context():
        total, loss_N = case.fused(support=support, cross_entropy_weight=0.5)
    assert not total.requires_grad
    torch.testing.assert_close(loss_N, case.plain(support=support, cross_entropy_weight=0.5).detach())
    assert total.item() == pytest.approx(loss_N.sum().item())


def test_autocast_around_it_changes_nothing():
    case = Case(dtype=torch.float32)
    want, _ = case.fused()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = case.fused()
    assert total.item() == want.item()
    for ours, theirs in zip(case.gradients(total), case.gradients(want), strict=True):
        assert torch.equal(ours, theirs)


def test_a_float32_head_multiplies_in_the_dtype_of_the_hidden_states():
    """Autocast: the hidden states come in bfloat16, the weight stays float32 and gets a float32 gradient."""
    case = Case(dtype=torch.float32)
    half = case.hidden.bfloat16()
    total, loss_N = fused_loss(half, case.head, *case.sides()[0], tail_logprob_N=case.tail)
    logits = half @ case.weight.bfloat16().T
    want_N = sparse_loss(logits, *case.sides()[0], tail_logprob_N=case.tail)
    torch.testing.assert_close(loss_N, want_N, rtol=1e-6, atol=1e-6)
    ours, theirs = case.gradients(total), case.gradients(want_N.sum())
    assert [x.dtype for x in ours] == [torch.float32, torch.float32]
    assert all(cosine(x, y) > 0.9999 for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_ragged_rows_and_whole_vocabularies(support, divergence):
    """Rows of 1, 3 and V entries; padding has ids of any kind, beyond the vocabulary too."""
    case = Case(n=30, v=9, k=9)
    for n in range(30):
        size = (1, 3, 9)[n % 3]
        case.logprobs[n, size:] = -inf
        case.ids[n, size:] = torch.tensor([-5, 99, 0, 1, 2, 3, 4, 5])[: 9 - size]
        case.tail[n] = case.teacher[n].sort(descending=True).values[size:].logsumexp(-1)
    assert_same(case, support=support, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_sure_teacher_and_a_sure_student_stay_finite(support, divergence):
    """float32 logits far apart, an empty teacher tail; the head is the identity."""
    logits = torch.tensor([[80.0, -40, -60], [-40.0, 80, -60]])
    given = (torch.tensor([[0], [0]]), torch.zeros(2, 1), torch.tensor([0, 1]))
    options = {"support": support, "divergence": divergence, "tail_logprob_N": torch.full((2,), -inf), **GIVEN}
    hidden, full = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total, loss_N = fused_loss(hidden, LMHead(torch.eye(3)), *given, **options)
    want_N = sparse_loss(full, *given, **options)
    (total + want_N.sum()).backward()
    assert loss_N.isfinite().all()
    torch.testing.assert_close(loss_N, want_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, full.grad, rtol=1e-5, atol=1e-6)


def test_no_targets_no_loss():
    case = Case(n=0)
    total, loss_N = case.fused()
    total.backward()
    assert loss_N.tolist() == []
    assert total.item() == 0
    assert case.weight.grad.abs().max() == 0


def test_options_that_mean_nothing_are_refused():
    case = Case()
    with pytest.raises(RecipeError, match="did you mean 'jsd'"):
        case.fused(divergence="topk_jsd")
    with pytest.raises(RecipeError, match=r"temperature 2.0 with support tail_bucket.*re-run cache-teacher"):
        fused_loss(case.hidden, case.head, case.ids, case.logprobs, temperature=2.0)
    with pytest.raises(RecipeError, match=r"loss\.cross_entropy_weight needs the actual tokens"):
        fused_loss(case.hidden, case.head, case.ids, case.logprobs, cross_entropy_weight=1.0)
    with pytest.raises(RecipeError, match=r"loss\.support residual_to_label needs the actual tokens"):
        fused_loss(case.hidden, case.head, case.ids, case.logprobs, support="residual_to_label")


def test_merging_by_hand():
    # log(1 + 2 + 5) = log 8, and shares of 1/8, 2/8, 5/8; a masked token has none.
    raw = torch.tensor([[1.0, 2, 5]]).log()
    raw = torch.cat([raw, torch.tensor([[-1e30]])], -1)
    assert merge(raw, 1.0, None, 1.0).item() == pytest.approx(log(8))
    assert raw[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8, 0])
    # Logits 2 raw / 4: √1 + √9 = 4; ∂ rest / ∂ raw = share / 2
    raw = torch.tensor([[1.0, 9]]).log()
    assert merge(raw, 2.0, None, 4.0).item() == pytest.approx(log(4))
    assert raw[0].tolist() == pytest.approx([1 / 8, 3 / 8])
    # A soft-cap of 2: logits 2 tanh(raw / 2), whose slope is 1 − tanh² = .75 where tanh(raw / 2) = ½
    raw = torch.tensor([[log(3), log(3), -1e30]])
    assert merge(raw, 1.0, 2.0, 1.0).item() == pytest.approx(1 + log(2), abs=1e-6)
    assert raw[0].tolist() == pytest.approx([0.375, 0.375, 0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_compiled_is_merging(dtype):
    """What runs on a GPU, by the compiler's CPU backend."""
    for n, v, how in ((5, 300, (1.0, None, 1.0)), (9, 1000, (1.0, None, 1.0)), (5, 300, (0.5, 3.0, 2.0))):
        raw = (5 * torch.randn(n, v, generator=torch.Generator().manual_seed(v))).to(dtype)
        raw[:, :3] = heads.MASKED
        plain, compiled = raw.clone(), raw.clone()
        torch.testing.assert_close(compiled_merge()(compiled, *how), merge(plain, *how), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-8)

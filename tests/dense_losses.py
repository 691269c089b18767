"""The losses once more, from dense probabilities, row by row: no logs of sums, no chunks, no special cases."""

import torch

from bakery import losses

# Those that go with every divergence at every temperature; draws go with the forward KL at 1.
SUPPORTS = tuple(name for name in losses.SUPPORTS if name != "sampled")


def dense(name, p, q, beta, alpha):
    """Probabilities of both sides in, nats out."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m, s = beta * p + (1 - beta) * q, alpha * p + (1 - alpha) * q
    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "mixed_kl": (1 - beta) * kl(p, q) + beta * kl(q, p),
        "jsd": jsd,
        "scaled_jsd": jsd / (beta * (1 - beta)),
        "skew_kl": kl(p, s),
        "tvd": (p - q).abs().sum(-1) / 2,
    }[name]


def buckets(support, p, q, ids, label):
    """One row: the (p, q) pair that the support's definition names, in probabilities."""
    outside = torch.ones_like(p, dtype=torch.bool)
    outside[ids] = False
    rest_p, rest_q = p[outside].sum(), q[outside].sum()
    match support:
        case "renormalized":
            return p[ids] / p[ids].sum(), q[ids] / q[ids].sum()
        case "tail_bucket" if outside.any():
            return torch.cat([p[ids], rest_p[None]]), torch.cat([q[ids], rest_q[None]])
        case "tail_bucket" | "truncated":
            return p[ids], q[ids]
    if label in ids:
        return p[ids] + rest_p * (ids == label), q[ids]
    return torch.cat([p[ids], rest_p[None]]), torch.cat([q[ids], q[label][None]])


def rowwise(support, name, p_NV, q_NV, ids_NK, labels_N, beta, alpha):
    """loss_N of the support and divergence, from both sides' whole distributions."""
    rows = zip(p_NV, q_NV, ids_NK, labels_N, strict=True)
    return torch.stack([dense(name, *buckets(support, *row), beta, alpha) for row in rows])

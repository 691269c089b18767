"""Which sequences go through a model together: neighbours in length, under a budget of padded tokens."""


def plan_batches(lengths: list[int], tokens_per_batch: int, rows_per_batch: int | None = None) -> list[list[int]]:
    """Indices in batches, longest first (so that memory peaks at once), each at most `tokens_per_batch` padded tokens
    and `rows_per_batch` sequences.

    A single sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = bool(batches) and len(batches[-1]) != rows_per_batch
        if room and (len(batches[-1]) + 1) * longest <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches

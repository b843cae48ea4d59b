"""What every plan of a microbatch must satisfy, in NumPy, whatever the algorithm."""

import numpy as np


def split_evenly(total, num_devices):
    """[devices, experts]: the rows of each expert come from all devices alike."""
    device = np.arange(num_devices)[:, None]
    return (total // num_devices + (device < total % num_devices)).astype(np.int32)


def apportion(load, num_rows):
    """Integers in proportion to `load` that add up to `num_rows`."""
    share = load * (num_rows / load.sum())
    rows = np.floor(share).astype(np.int64)
    rows[np.argsort(rows - share, kind="stable")[: num_rows - rows.sum()]] += 1
    return rows


def check_plan(plan, counts, placement, shared=None):
    """Raises unless each row reaches one slot of its expert, and totals are right."""
    fetched, source, slots, rows, device_rows = (np.asarray(leaf) for leaf in plan)
    counts, placement = np.asarray(counts), np.asarray(placement)
    num_devices, num_experts = counts.shape
    held = placement.reshape(num_devices, -1)
    if shared is not None:
        # One more expert, of which each device has a replica after the others.
        held = np.pad(held, ((0, 0), (0, 1)), constant_values=num_experts)
        counts = np.concatenate([counts, np.asarray(shared)[:, None]], axis=1)
        num_experts += 1
    # An expert's second replica on a device is not used.
    is_same = held[:, :, None] == held[:, None]
    is_again = (is_same & np.tri(held.shape[1], k=-1, dtype=bool)).any(axis=2)
    once = np.where(is_again, -1, held)
    np.testing.assert_array_equal(slots, np.concatenate([once, fetched], axis=1))
    assert rows.shape == (num_devices, *slots.shape) and (rows >= 0).all()
    # Every row of every sender, once, at a slot that has its expert.
    assert not rows[:, slots < 0].any()
    arrived = np.zeros((num_experts, num_devices), int)
    is_slot = slots >= 0
    np.add.at(arrived, slots[is_slot], rows[:, is_slot].T)
    np.testing.assert_array_equal(arrived.T, counts)
    np.testing.assert_array_equal(device_rows, rows.sum(axis=(0, 2)))
    # Nothing is fetched in vain: twice, beside a replica, or without rows.
    for device in range(num_devices):
        mine = fetched[device][fetched[device] >= 0]
        assert len(set(mine)) == len(mine) and not set(mine) & set(held[device])
    computed = rows.sum(axis=0)[:, held.shape[1] :]
    np.testing.assert_array_equal(computed > 0, fetched >= 0)
    # And it is fetched from a device that has it.
    np.testing.assert_array_equal(source < 0, fetched < 0)
    np.testing.assert_array_equal(placement[source[source >= 0]], fetched[fetched >= 0])
    # Rows stay at home as far as their device computes any of their expert.
    for device in range(num_devices):
        for slot in np.flatnonzero(slots[device] >= 0):
            if (slots[device] == slots[device][slot]).sum() == 1:
                have = counts[device, slots[device][slot]]
                assert rows[device, device, slot] == min(
                    have, rows[:, device, slot].sum()
                )

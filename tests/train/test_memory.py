"""Freed memory is used again: counted in page faults, not in seconds."""

import platform
import resource

import pytest
import torch

from prefloop.train.memory import reused_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
BLOCKS, MEGABYTES = 16, 16


def faults() -> int:
    """Page faults of taking, filling and freeing 16 blocks of 16 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(MEGABYTES * 2**18) for _ in range(BLOCKS)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_inside_freed_blocks_cost_no_faults_again() -> None:
    pages = BLOCKS * MEGABYTES * 2**20 // resource.getpagesize()
    assert faults() > 0.9 * pages
    with reused_memory():
        # What the heap's layout leaves between the blocks of one round is used by a later one.
        assert min(faults() for _ in range(5)) < pages / 50


def test_an_inner_use_does_not_end_the_outer_one() -> None:
    pages = BLOCKS * MEGABYTES * 2**20 // resource.getpagesize()
    with reused_memory():
        faults()
        with reused_memory():
            pass
        assert min(faults() for _ in range(5)) < pages / 50


def test_outside_memory_goes_back_to_the_system() -> None:
    before = resident()
    with reused_memory():
        faults()
        inside = resident()
    assert inside - before > 0.9 * BLOCKS * MEGABYTES * 2**20
    assert resident() - before < 0.1 * BLOCKS * MEGABYTES * 2**20

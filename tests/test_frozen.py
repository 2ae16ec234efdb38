"Trained networks that only answer: every core of a CPU takes images of its own."

import threading

import pytest
import torch

from kdoct.frozen import each_core


def test_every_core_works_and_an_error_comes_out():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = threading.Barrier(2)  # passed only if two threads are at work at once
        assert each_core(lambda p: (both.wait(10), p)[1], [1, 2], torch.device("cpu")) == [1, 2]
        with pytest.raises(ZeroDivisionError): each_core(lambda p: 1//p, [1, 2, 0, 3], torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)

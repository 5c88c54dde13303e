"""Reports: the same from a device's tensors as from the host's memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_fast.engine.device import HostDevice
from dia_fast.engine.polling import RECENT, Polling
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_kernels import get_ops
from tests.helpers.schedules import CHANNELS, small_config

STEPS = 40
CPU = torch.device("cpu")


@given(st.integers(1, 5), st.data())
def test_a_report_tells_what_the_state_holds(count: int, data: st.DataObject) -> None:
    state = DecodeState(small_config(), get_ops("torch"), Sizes(5, True, STEPS, 8, 20, 5), torch.float32, CPU)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state.codes.random_(0, 30)
    state.step[:] = torch.tensor(data.draw(st.lists(st.integers(-1, STEPS), min_size=5, max_size=5)))
    for name in ("finished", "eos_step", "status"):
        getattr(state, name).random_(0, 9)
    polling = Polling(state, HostDevice(CPU))
    polling.send(range(count))  # type: ignore[arg-type]
    [report] = polling.arrived()
    for name in ("finished", "step", "eos_step", "status"):
        assert getattr(report, name).tolist() == getattr(state, name)[:count].tolist()
    assert report.recent.shape == (count, RECENT, CHANNELS) and (report.latest == report.recent[:, -1]).all()
    for index, step in enumerate(state.step[:count].tolist()):
        known = min(max(step, 0), RECENT)
        assert report.recent[index, RECENT - known :].tolist() == state.codes[index, step - known : step].tolist()
    polling._collect(count, polling._report[:count])()  # as on a device
    assert polling._report[:count].tolist() == report.values.tolist()

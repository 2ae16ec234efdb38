"Kernels that are forks: as separate, as well informed and as easily ended as new processes."
import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from jupyter_client.manager import KernelManager

from kdoct.app import kernels
from kdoct.app.kernels import StageKernel, prepared_kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


@pytest.fixture
def kernel(stage_server):
    "A kernel of the server."
    kernel = StageKernel(kernel_name="python3")
    kernel.start_kernel()
    yield kernel
    kernel.shutdown_kernel(now=True)


def client_of(kernel):
    client = kernel.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client


def outputs_of(kernel, *cells):
    "What the cells print, and the kinds of all their outputs."
    client, seen = client_of(kernel), []
    for cell in cells: client.execute_interactive(cell, output_hook=seen.append, timeout=60)
    client.stop_channels()
    printed = "".join(m["content"].get("text", "") for m in seen)
    return printed, [m["msg_type"] for m in seen if m["msg_type"] != "status"]


def test_a_kernel_has_the_folder_and_variables_of_its_start(stage_server, tmp_path, monkeypatch):
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("KDOCT_TRIED", name)
        kernel = StageKernel(kernel_name="python3")
        kernel.start_kernel()
        look = "import os; print(os.getppid(), os.environ['KDOCT_TRIED'], os.getcwd())"
        assert outputs_of(kernel, look)[0].split() == [str(stage_server.process.pid), name, str(folder)]
        kernel.shutdown_kernel()


def test_one_kernel_knows_nothing_of_another(stage_server):
    for _ in range(2):
        kernel = StageKernel(kernel_name="python3")
        kernel.start_kernel()
        look = "import kdoct, numpy as np; print(hasattr(kdoct, 'mark')); kdoct.mark = 1"
        assert outputs_of(kernel, look)[0] == "False\n"
        kernel.shutdown_kernel()


def test_its_figures_are_shown_in_the_notebook(stage_server, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    kernel = StageKernel(kernel_name="python3")
    kernel.start_kernel()
    cell = "import matplotlib.pyplot as plt; plt.plot([1, 2]);"
    assert "display_data" in outputs_of(kernel, cell)[1]
    kernel.shutdown_kernel()


def test_the_end_of_a_program_that_it_starts_is_known_to_it(kernel):
    cell = "import subprocess; print(subprocess.run(['false']).returncode)"
    assert outputs_of(kernel, cell)[0] == "1\n"


def test_its_work_can_be_interrupted_and_goes_on_behind(kernel):
    client = client_of(kernel)
    client.execute("print('begun', flush=True)\nimport time; time.sleep(60)")
    while client.get_iopub_msg(timeout=60)["content"].get("text") != "begun\n": pass
    KernelManager.interrupt_kernel(kernel)
    reply = client.get_shell_msg(timeout=60)["content"]
    client.stop_channels()
    assert reply["ename"] == "KeyboardInterrupt" and outputs_of(kernel, "print(2)")[0] == "2\n"


def test_one_that_is_killed_is_known_to_be_dead(kernel):
    assert kernel.is_alive()
    os.kill(kernel.provisioner.pid, signal.SIGKILL)
    psutil.wait_procs([kernel.provisioner.process], timeout=60)
    assert not kernel.is_alive()


ORDERS = textwrap.dedent("""
    import sys, time
    from kdoct.app import kernels
    with kernels.prepared_kernels():
        kernel = kernels.StageKernel(kernel_name="python3")
        kernel.start_kernel()
        print(kernels.SERVERS[0].process.pid, kernel.provisioner.pid, flush=True)
        time.sleep(600)
""")


@pytest.mark.slow
def test_server_and_kernel_end_with_the_process_that_wanted_them():
    wanting = subprocess.Popen([sys.executable, "-c", ORDERS], stdout=subprocess.PIPE, text=True)
    both = [psutil.Process(int(pid)) for pid in wanting.stdout.readline().split()]
    wanting.kill()
    wanting.communicate()
    assert not psutil.wait_procs(both, timeout=60)[1]


def test_where_the_server_has_ended_a_kernel_is_a_new_process(monkeypatch):
    monkeypatch.setattr(kernels, "SERVERS", [])
    with prepared_kernels():
        server = kernels.SERVERS[0]
        server._start()
        server.process.kill()
        server.process.wait()
        kernel = StageKernel(kernel_name="python3")
        kernel.start_kernel()
        assert outputs_of(kernel, "import os; print(os.getppid())")[0] == f"{os.getpid()}\n"
        kernel.shutdown_kernel()


def test_without_an_order_no_server_is_started(monkeypatch):
    monkeypatch.setattr(kernels, "SERVERS", [])
    with prepared_kernels(): assert kernels.SERVERS[0].process is None


def test_within_another_the_same_server_is_used(monkeypatch):
    monkeypatch.setattr(kernels, "SERVERS", [])
    with prepared_kernels():
        (server,) = kernels.SERVERS
        with prepared_kernels(): assert kernels.SERVERS == [server]
        assert kernels.SERVERS == [server]
    assert kernels.SERVERS == []

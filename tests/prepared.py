"Processes of their own that need no seconds to begin: forks of a server that has imported the library once."
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["kdoct.distill.student", "kdoct.distill.teacher"])


def _become(code, arguments, folder, environment, output, errors):
    "In the new process: do what `python -c code *arguments` does in this folder and environment."
    for stream, file in enumerate((output, errors), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


def start(code, *arguments, folder=".", output=os.devnull, errors=os.devnull):
    "Begin to run code; its output goes to these files, or pipes with a name. Returns the process."
    given = (code, [*map(str, arguments)], str(folder), dict(os.environ), str(output), str(errors))
    process = _SERVER.Process(target=_become, args=given)
    process.start()
    return process


def run(code, *arguments, folder=".", timeout=300):
    "Run code to its end: returncode, stdout and stderr."
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("output", "errors")]
        for file in files: file.touch()
        process = start(code, *arguments, folder=folder, output=files[0], errors=files[1])
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"It has not ended in {timeout} s: {files[1].read_text()}")
        stdout, stderr = (file.read_text() for file in files)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)

"""Run Python commands in forks of one process that has imported Keras and the trainers.

A recipe gives dozens of commands, and importing TensorFlow costs five seconds of processor time in each. Here it is
imported once. A fork takes the command's words, folder, environment and output, and then does what `python` would, but
for the training steps: these are run, not compiled first, since each is taken once.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(words).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(words)
    sys.exit(int(server.recv(8) or b"255"))
"""


@contextmanager
def warm_python(folder: Path):
    """Serve a command like `python` in the folder, for as long as the context lasts; gives its path."""
    address = str(folder / "warm.socket")
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            client = folder / "python"
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
            yield client
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Fork for each command that comes, and once more, so that one of the two can say how the other ended."""
    import keras

    import ddsm_train.image_clf_train
    import ddsm_train.patch_clf_train
    import dm_keras_ext

    del ddsm_train, dm_keras_ext
    assert keras.backend.backend()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, files, *_ = socket.recv_fds(connection, 4, 3)
        argv, folder, environment = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
        child = os.fork()
        if child:
            connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256).encode())
            os._exit(0)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return run(argv)


def run(argv: list[str]) -> None:
    """Run `python` with these words."""
    if argv[0].endswith("_clf_train.py"):
        import tensorflow

        tensorflow.config.run_functions_eagerly(True)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])

"""What 300 slices take to arrive here and elsewhere, in turn, each time into an empty folder.

    python -m tests.bench.receiving [ROUNDS [CASE …]]

The senders have their packets ready and wait for each answer. Ours is the listener as the daemon runs it:
files and folders flushed, the row committed, then the answer. Nobody else here flushes anything.
"""

import json
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from time import monotonic, perf_counter, sleep

from tests import wire
from tests.bench.table import Line, show
from tests.certificates import authority, issued
from tests.needs import dcmtk
from tests.peers import HOST, free_port, write_config
from triage.dicom.header import find_instances, split
from triage.dicom.phantom import write_study

SLICES = 300
ROUNDS = 3
PROCESSES = multiprocessing.get_context("fork")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

NAIVE = """
import sys
from pynetdicom import AE, AllStoragePresentationContexts, evt
def store(event):
    dataset = event.dataset
    dataset.file_meta = event.file_meta
    dataset.save_as(f"{sys.argv[2]}/{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
    return 0
ae = AE("TRIAGE")
for context in AllStoragePresentationContexts:
    ae.add_supported_context(context.abstract_syntax)
ae.start_server(("127.0.0.1", int(sys.argv[1])), evt_handlers=[(evt.EVT_C_STORE, store)])
"""


# --- who receives ---------------------------------------------------------------------------------


@contextmanager
def serving(command: list[str], port: int, *, tuned: bool = True):
    # dcmtk's, and so Orthanc's, way to switch Nagle's algorithm off on its side.
    process = subprocess.Popen(
        command, env={**os.environ, **({"TCP_NODELAY": "1"} if tuned else {})}, **QUIET
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection((HOST, port), 1).close()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} ended"
                sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def orthanc(folder: Path, *, tuned: bool = True):
    port = free_port()
    settings = {"Name": "bench", "StorageDirectory": str(folder), "IndexDirectory": str(folder)}
    settings |= {
        "DicomPort": port,
        "DicomAet": "TRIAGE",
        "DicomCheckCalledAet": False,
        "HttpPort": free_port(),
    }
    settings |= {"RemoteAccessAllowed": False, "Plugins": []}
    (folder / "orthanc.json").write_text(json.dumps(settings))
    return serving(["Orthanc", str(folder / "orthanc.json")], port, tuned=tuned)


def naive(folder: Path):
    port = free_port()
    return serving([sys.executable, "-c", NAIVE, str(port), str(folder)], port)


def storescp(folder: Path):
    port = free_port()
    command = [dcmtk("storescp"), "--fork", "--max-pdu", "131072", "-od", str(folder), str(port)]
    return serving(command, port)


def bare(folder: Path, *, sync: bool = True):
    port = free_port()
    return serving([sys.executable, "-m", "tests.bench.bare", str(port), str(folder), str(sync)], port)


def ours(folder: Path, *, sync: bool = True, **listener: object):
    port = free_port()
    listener = {"host": HOST, "port": port, "maximum_associations": 100, **listener}
    config = write_config(folder, storage={"sync": sync}, listener=listener)
    command = [sys.executable, "-m", "triage", "--config", str(config), "serve", "--role", "listener"]
    return serving(command, port)


# --- who sends ------------------------------------------------------------------------------------


def study(folder: Path) -> list[tuple[str, bytes]]:
    """SOP Instance UID and data set of each slice; one is drawn, the others differ in their UID."""
    (first, *_), _ = find_instances([write_study(folder, seed=1, slices=2, rows=512)[0]])
    _, body = split(first.path.read_bytes())
    uid = first.sop_instance_uid
    uids = [f"{uid[:-4]}{number:04}" for number in range(1, SLICES + 1)]
    return [(new, bytes(body).replace(uid.encode(), new.encode())) for new in uids]


def sender(port: int, objects: list[tuple[str, bytes]], tls: ssl.SSLContext | None, gate, times) -> None:
    plain = socket.create_connection((HOST, port), 60)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection, maximum = wire.associate(port, connection=tls.wrap_socket(plain) if tls else plain)
    maximum = min(maximum, 131072)
    messages = [b"".join(wire.store(1, uid, body, maximum)) for uid, body in objects]
    gate.wait()
    start = monotonic()
    for message in messages:
        connection.sendall(message)
        head = wire.receive(connection, 6)
        answer = wire.receive(connection, int.from_bytes(head[2:], "big"))
        at = answer.index(b"\0\0\0\x09\x02\0\0\0") + 8
        assert answer[at : at + 2] == b"\0\0", "refused"
    times.put((start, monotonic()))
    connection.sendall(wire.RELEASED)
    wire.receive(connection, 10)


def tuned(port: int, objects: list[tuple[str, bytes]], senders: int = 4, tls=None) -> float:
    """Seconds from the first byte to the last answer."""
    gate, times = PROCESSES.Barrier(senders), PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=sender, args=(port, objects[number::senders], tls, gate, times))
        for number in range(senders)
    ]
    for process in processes:
        process.start()
    pairs = [times.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return max(end for _, end in pairs) - min(start for start, _ in pairs)


def stock(port: int, folder: Path, **environment: str) -> float:
    """storescu as it is installed, with Nagle's algorithm."""
    command = [dcmtk("storescu"), "-aec", "TRIAGE", "-xs", "+sd", HOST, str(port), str(folder)]
    inherited = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}
    start = perf_counter()
    subprocess.run(command, check=True, env=inherited | environment, timeout=200, **QUIET)
    return perf_counter() - start


# --- what is compared -----------------------------------------------------------------------------


def warm(path: Path) -> None:
    """Memory for the files that come: a virtual machine may have to ask its host for each new page, which
    takes longer than all the rest, and would be the luck of whoever comes after one who gave some back.
    """
    with path.open("wb") as file:
        for _ in range(400):
            file.write(bytes(1 << 20))
        file.flush()
        file.truncate(0)


Case = tuple[Callable, Callable[[int], float]]


def measured(cases: dict[str, Case], rounds: int, folder: Path) -> dict[str, float]:
    """Median seconds of each, in an order that turns from round to round.

    Nothing is deleted meanwhile: ext4 looks at each inode deleted of late before it gives out a new one.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        for name in names[number:] + names[:number]:
            serve, send = cases[name]
            place = Path(mkdtemp(dir=folder))
            with serve(place) as port:
                warm(folder / "warm")
                taken[name].append(send(port))
            os.sync()
    for name, seconds in taken.items():
        typical, each = median(seconds), " ".join(f"{one:.3f}" for one in seconds)
        print(f"  {name:34} {typical:7.3f} s  {typical / SLICES * 1e3:6.2f} ms/slice  ({each})")
    return {name: median(seconds) for name, seconds in taken.items()}


def compared(what: str, seconds: dict[str, float], our: str, peer: str, goal: float) -> Line:
    """``goal``: how many times faster than the peer, or below 0 how many times slower we may be."""
    ratio = seconds[peer] / seconds[our]
    if not goal:
        return Line(what, f"{seconds[our]:.2f} s, {1 / ratio:.2f} × {peer} {seconds[peer]:.2f} s", ratio)
    if goal > 0:
        return Line(
            what, f"{seconds[our]:.2f} s, {peer} {seconds[peer]:.2f} s", ratio, f"≥ {goal:g}", ratio >= goal
        )
    times = f"{seconds[our]:.2f} s, {1 / ratio:.2f} × {peer} {seconds[peer]:.2f} s"
    return Line(what, times, ratio, f"≤ {-goal:g} ×", 1 / ratio <= -goal)


def four(objects, rounds: int, folder: Path) -> list[Line]:
    send = partial(tuned, objects=objects)
    cases: dict[str, Case] = {
        "Orthanc": (orthanc, send),
        "pynetdicom": (naive, send),
        "storescp --fork": (storescp, send),
        "bytes, durable": (bare, send),
        "bytes, not flushed": (partial(bare, sync=False), send),
        "ours, durable": (ours, send),
        "ours, not flushed": (partial(ours, sync=False), send),
    }
    seconds = measured(cases, rounds, folder)
    goals = {"Orthanc": (2, 3), "pynetdicom": (4.5, 6), "storescp --fork": (-1.6, -1.2)}
    return [
        compared(f"300 slices, 4 senders, {how}", seconds, f"ours, {how}", peer, goal[number])
        for number, how in enumerate(["durable", "not flushed"])
        for peer, goal in {**goals, f"bytes, {how}": (0, 0)}.items()
    ]


def one(objects, rounds: int, folder: Path) -> list[Line]:
    send = partial(tuned, objects=objects, senders=1)
    cases: dict[str, Case] = {
        "Orthanc": (orthanc, send),
        "ours": (ours, send),
        "ours, pynetdicom's own way": (partial(ours, fast=False), send),
    }
    seconds = measured(cases, rounds, folder)
    return [
        compared("one sender", seconds, "ours", "Orthanc", 2),
        compared("one sender, fast", seconds, "ours", "ours, pynetdicom's own way", 1),
    ]


def encrypted(objects, rounds: int, folder: Path) -> list[Line]:
    ca = authority(folder, "ca")
    server, client = issued(folder, ca, "server"), issued(folder, ca, "client")
    section = {"ca": str(ca[0]), "certificate": str(server[0]), "key": str(server[1])}
    context = ssl.create_default_context(cafile=ca[0])
    context.check_hostname = False
    context.load_cert_chain(*client)
    send = partial(tuned, objects=objects, senders=1, tls=context)
    cases: dict[str, Case] = {
        "ours": (partial(ours, tls=section), send),
        "ours, pynetdicom's own way": (partial(ours, tls=section, fast=False), send),
    }
    seconds = measured(cases, rounds, folder)
    return [compared("one sender, mutual TLS", seconds, "ours", "ours, pynetdicom's own way", 1)]


def untuned(objects, rounds: int, folder: Path) -> list[Line]:
    files = folder / "files"
    write_study(files, seed=1, slices=SLICES, rows=512)
    cases: dict[str, Case] = {
        "Orthanc": (partial(orthanc, tuned=False), partial(stock, folder=files)),
        "Orthanc, without Nagle": (orthanc, partial(stock, folder=files)),
        "storescp --fork": (storescp, partial(stock, folder=files)),
        "ours": (ours, partial(stock, folder=files)),
        "ours, with a tuned storescu": (ours, partial(stock, folder=files, TCP_NODELAY="1")),
    }
    seconds = measured(cases, 1, folder)
    return [
        compared("a stock storescu with Nagle", seconds, "ours", "Orthanc", 30),
        compared("a stock storescu, beside what it takes itself", seconds, "ours", "storescp --fork", 0),
    ]


def fifty(objects, rounds: int, folder: Path) -> list[Line]:
    cases: dict[str, Case] = {
        "4 associations": (ours, partial(tuned, objects=objects)),
        "50 associations": (ours, partial(tuned, objects=objects, senders=50)),
    }
    seconds = measured(cases, rounds, folder)
    return [compared("50 associations at once", seconds, "50 associations", "4 associations", 0.95)]


CASES = {"four": four, "one": one, "tls": encrypted, "nagle": untuned, "fifty": fifty}


def main(rounds: int, names: list[str], folder: Path) -> list[Line]:
    objects = study(folder / "study")
    lines = []
    for name in names or CASES:
        print(name, flush=True)
        lines += CASES[name](objects, rounds, folder)
    return lines


def lines(quick: bool) -> list[Line]:
    with TemporaryDirectory() as made:
        return main(1 if quick else ROUNDS, [], Path(made))


if __name__ == "__main__":
    with TemporaryDirectory() as made:
        show(main(int(sys.argv[1]) if sys.argv[1:] else ROUNDS, sys.argv[2:], Path(made)))

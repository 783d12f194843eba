"""The list beside many studies: pages, filters, search, the same over HTTP, and a new policy.

    python -m tests.bench.worklist [STUDIES …]

Without numbers 10000, 100000 and 1000000; ``lines`` gives what the goals ask of it. At most 100000 are open:
of the others half were read, and half were forgotten. Milliseconds as median / 95th percentile; in the
database also those of this thread's processor, which are nearly the same beside other work.
"""

import multiprocessing
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter, sleep, thread_time

import httpx
from sqlalchemy import text

from tests.bench.table import Line
from tests.peers import free_port
from tests.web_studies import CT, Ward, configured
from triage import policies
from triage.audit import Actor
from triage.db.worklist import Chosen, key_of, listed
from triage.domain import Band, Instance, Status, StudyState
from triage.web.app import serve

SIZES = (10_000, 100_000, 1_000_000)
MOST_OPEN = 100_000
ROUNDS = 30
PIECE = 50
FILTERS = {
    "band critical": (Chosen(bands=frozenset({Band.CRITICAL})), "band=critical"),
    "answer negative": (Chosen(statuses=frozenset({Status.NEGATIVE})), "status=negative"),
    "answer pending": (Chosen(statuses=frozenset({None})), "status=pending"),
    "state failed": (Chosen(states=frozenset({StudyState.FAILED})), "state=failed"),
    "nobody reads": (Chosen(unclaimed=True), "claimed=nobody"),
    "I read": (Chosen(claimed_by="local"), "claimed=me"),
    "one patient": (Chosen(text="P77.31"), "text=P77.31"),
    "no such patient": (Chosen(text="nobody"), "text=nobody"),
    "no such description": (Chosen(description="knee"), "description=knee"),
    "no such scanner": (Chosen(scanner="phantom"), "scanner=phantom"),
    "overdue": (Chosen(overdue=True), "overdue=true"),
}
COPY = """
WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < :count)
INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, counter WHERE study_instance_uid = '1.1'
"""
UID = "'1.2.840.113619.2.55.3.604688119.' || n"
DICE = "(n * 7919 % 1000)"
MINUTES = "(CASE WHEN n <= :open THEN (:open - n) * 8640 / :open ELSE 15000 + n END)"
AT = f"strftime('%Y-%m-%d %H:%M:%f000', :now, '-' || {MINUTES} || ' minutes')"
STATES = "WHEN 0 THEN 'ready' WHEN 1 THEN 'rejected' WHEN 2 THEN 'failed' ELSE 'analyzed'"
STUDY = {
    "study_instance_uid": UID,
    "patient_id": "'P' || (n % 1000) || '.' || n",
    "patient_name": "'DOE' || (n % 9973) || '^JANE'",
    "accession_number": "'A' || n",
    "arrived_at": AT,
    "last_received_at": AT,
    "state": f"CASE {DICE} / 25 {STATES} END",
    "answer": f"CASE WHEN {DICE} % 5 = 0 THEN 'positive' ELSE 'negative' END",
    "probability": f"{DICE} / 1000.0",
    "affected_fraction": f"({DICE} % 600) / 1000.0",
    "closed_at": f"CASE WHEN n > :open AND n % 2 THEN {AT} END",
    "changed": "n",
}


def fill(ward, size):
    """So many studies inside the database, each with an image and an answer where it is open."""
    ward.arrive("1.1", scanner="SIEMENS SOMATOM Force", study_description="CT Thorax")
    ward.judge("1.1")
    values = {"now": ward.now.strftime("%Y-%m-%d %H:%M:%S"), "open": min(size, MOST_OPEN)}
    with ward.database._write() as connection:
        for table, known in (("study", STUDY), ("instance", {}), ("result", {})):
            names = [row[1] for row in connection.execute(text(f"PRAGMA table_info({table})"))]
            taken = [known.get(name, UID if name == "study_instance_uid" else name) for name in names]
            copy = COPY.format(table=table, columns=", ".join(names), values=", ".join(taken))
            count = size if table == "study" else values["open"]
            connection.execute(text(copy), values | {"count": count})
    ward.database.close_study("1.1", "", ward.now)
    ward.database.place(list(policies.moved(ward.database, ward.config, ward.now)))
    while ward.database.forget(ward.now, 7):
        pass


def timed(act, rounds=ROUNDS):
    taken = []
    for _ in range(rounds):
        start, worked = perf_counter(), thread_time()
        act()
        taken.append((perf_counter() - start, thread_time() - worked))
    return taken


def shown(name, taken):
    walls, work = zip(*taken, strict=True)
    high = quantiles(walls, n=20)[-1]
    print(
        f"  {name:32} {median(walls) * 1e3:8.1f} / {high * 1e3:<8.1f} {median(work) * 1e3:8.1f}", flush=True
    )


def receiver(ward):
    """A function that puts one more image on record, of a new study or of the one before."""
    numbers = iter(range(10**9))

    def receive(uid=None):
        number = next(numbers)
        received = Instance(
            study_instance_uid=uid or f"1.3.{number}",
            series_instance_uid="1.3.1",
            sop_instance_uid=f"1.3.2.{number}",
            sop_class_uid=CT,
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path=Path("x"),
            digest="x",
        )
        ward.database.register(received, ward.now, judgeable=True, stat=False, pending=ward.waiting)

    return receive


def keys(ward, count):
    """Places spread over the list."""
    with ward.database._read() as connection:
        rows = connection.execute(listed(ward.now, "deadline", 7)).mappings().all()
        return [key_of("deadline", rows[number * len(rows) // count]) for number in range(count)]


def database(ward):
    page = ward.database.reading.page

    def read(chosen=Chosen(), after=None):  # noqa: B008 - it is frozen
        page(ward.now, "deadline", 7, chosen, after=after, limit=PIECE)

    receive = receiver(ward)
    shown("a new study's first image", timed(receive, 100))
    shown("another image of a study", timed(lambda: receive("1.3.0"), 100))
    shown("first page", timed(read, 100))
    places = iter(keys(ward, ROUNDS))
    shown("a page anywhere", timed(lambda: read(after=next(places))))
    shown("counts", timed(lambda: ward.database.reading.counts(ward.now, 7)))
    for name, (chosen, _) in FILTERS.items():
        shown(name, timed(lambda c=chosen: read(c)))
    shown("search of all, nobody found", timed(lambda: ward.database.search("nobody")))


def over_http(ward, port):
    uid = "1.2.840.113619.2.55.3.604688119.77"
    places = iter(keys(ward, 2 * ROUNDS))
    with served(ward.config), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def get(address):
            client.get(address).raise_for_status()

        get("/")
        shown("the page", timed(lambda: get("/")))
        shown("a piece anywhere, recorded", timed(lambda: get(f"/list?after={next(places)}")))
        shown("the same as JSON", timed(lambda: get(f"/api/v1/worklist?after={next(places)}")))
        for name, (_, query) in FILTERS.items():
            shown(name, timed(lambda q=query: get(f"/?{q}")))
        shown("search, one found", timed(lambda: get("/search?q=P77.77")))
        shown("search, nobody found", timed(lambda: get("/search?q=nobody")))
        shown("a study's page", timed(lambda: get(f"/studies/{uid}")))


def _serve(config):
    from triage.db import Database

    serve(Database(config.database.url), config, lambda: datetime.now(UTC), threading.Event())


@contextmanager
def served(config):
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(config,))
    process.start()
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{config.web.port}/healthz", timeout=60)
                break
            except httpx.TransportError:
                sleep(0.1)
        yield
    finally:
        process.terminate()
        process.join()


def longest_pauses(acts, stop, pauses):
    """Threads that do each thing ten times a second at most, and note what took longest."""

    def repeat(name, act):
        while not stop.wait(0.1):
            pauses[name] = max(pauses[name], timed(act, 1)[0][0])

    threads = [threading.Thread(target=repeat, args=one) for one in acts.items()]
    for thread in threads:
        thread.start()
    return threads


def policy(ward):
    """Every open study gets another place, three times, while others read and write."""
    receive, newest = receiver(ward), ward.database.policy()
    waits, stop, pauses = newest.policy.target_wait_minutes, threading.Event(), {"read": 0.0, "write": 0.0}
    acts = {
        "read": lambda: ward.database.reading.page(ward.now, "deadline", 7, Chosen(), limit=PIECE),
        "write": lambda: receive("1.3.0"),
    }
    alone = sum(changed(ward, newest.policy, waits, factor) for factor in (1.5, 1.0)) / 2
    threads = longest_pauses(acts, stop, pauses)
    beside = median(changed(ward, newest.policy, waits, factor) for factor in (1.5, 2.0, 1.0))
    stop.set()
    for thread in threads:
        thread.join()
    return (
        beside,
        f"{alone:.1f} s; beside one who reads and one who writes {beside:.1f} s,"
        f" longest page {pauses['read'] * 1e3:.0f} ms, longest write {pauses['write'] * 1e3:.0f} ms",
    )


def changed(ward, old, waits, factor):
    minutes = {name: value * factor for name, value in waits.model_dump().items()}
    new = old.model_copy(update={"target_wait_minutes": type(waits).model_validate(minutes)})
    number = ward.database.policy().version
    start = perf_counter()
    policies.save(ward.database, ward.config, new, Actor("bench"), "to measure", ward.now, number)
    return perf_counter() - start


def main(sizes):
    for size in sizes:
        with TemporaryDirectory() as folder:
            port = free_port()
            ward = Ward(configured(Path(folder), port=port), datetime.now(UTC))
            policies.adopt(ward.database, ward.config, ward.now)
            start = perf_counter()
            fill(ward, size)
            print(f"{size} studies (made in {perf_counter() - start:.0f} s): in the database, ms")
            database(ward)
            print("over HTTP, ms")
            over_http(ward, port)
            print(f"  a new policy moves all: {policy(ward)[1]}")
            ward.database.close()


def high(taken):
    """95th percentile of the walls, in ms."""
    return quantiles([wall for wall, _ in taken], n=20)[-1] * 1e3


def lines(quick: bool) -> list[Line]:
    sizes = (2_000, 20_000) if quick else (SIZES[0], SIZES[-1])
    found, taken = [], []
    for size in sizes:
        with TemporaryDirectory() as folder:
            ward = Ward(configured(Path(folder), port=free_port()), datetime.now(UTC))
            policies.adopt(ward.database, ward.config, ward.now)
            fill(ward, size)
            receive = receiver(ward)

            def both(ward=ward, receive=receive):
                receive()
                ward.database.reading.page(ward.now, "deadline", 7, Chosen(), limit=PIECE)

            taken.append(median(wall for wall, _ in timed(both, 200)) * 1e3)
            if size == sizes[-1]:
                found += [*of_pages(ward, size), of_policy(ward, size)]
            ward.database.close()
    ratio = taken[1] / taken[0]
    measured = ", ".join(f"{one:.1f} ms at {size}" for one, size in zip(taken, sizes, strict=True))
    return [Line("a new study and the first page", measured, ratio, "≤ 2 ×", ratio <= 2), *found]


def of_pages(ward, size):
    places = iter(keys(ward, ROUNDS))
    uid = f"1.2.840.113619.2.55.3.604688119.{size - 1}"
    asked = {
        "the first page, drawn": (lambda: "/", 20),
        "the first page as JSON": (lambda: "/api/v1/worklist", 20),
        "a page anywhere among all open, as JSON": (lambda: f"/api/v1/worklist?after={next(places)}", 20),
        "a study's page": (lambda: f"/studies/{uid}", None),
        "search of all, nobody found": (lambda: "/search?q=nobody", None),
    }
    with served(ward.config), httpx.Client(base_url=f"http://127.0.0.1:{ward.config.web.port}") as client:
        client.get("/").raise_for_status()
        for what, (address, most) in asked.items():
            rounds = timed(lambda address=address: client.get(address()).raise_for_status())
            p95, middle = high(rounds), median(wall for wall, _ in rounds) * 1e3
            goal = ("", None) if most is None else (f"p95 < {most} ms", p95 < most)
            yield Line(f"{what}, {size} studies", f"{middle:.1f} ms, p95 {p95:.1f} ms", None, *goal)


def of_policy(ward, size):
    seconds, told = policy(ward)
    what = f"a new policy over {min(size, MOST_OPEN)} open studies"
    return Line(what, told, None, "< 5 s", seconds < 5)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or SIZES)

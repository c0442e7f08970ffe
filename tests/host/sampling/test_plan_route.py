"""POST /dcm/plan: only what is typed is taken, nothing that is sent ends the server or makes it wait."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies

from dcm_core.families import WAN

from ..server import direct
from .test_plan import RELEASE, SETTINGS, SMALL, ask


def post(server, body):
    """Status and answer for a body as it is."""
    request = urllib.request.Request(f"{server.url}/dcm/plan", body, {"Content-Type": "application/json"})
    try:
        with direct.open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": "six"}, "steps is 'six'; expected a whole number up to 10000"),
        ({"steps": 6.0}, "steps is 6.0; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"steps": 10**9}, "steps is 1000000000; expected a whole number up to 10000"),
        ({"shift": None}, "shift is None; expected a number"),
        ({"shift": float("nan")}, "shift is nan; expected a number"),
        ({"denoise": float("inf")}, "denoise is inf; expected a number"),
        ({"boundary": False}, "boundary is False; expected a number"),
        ({"attached_boundary": "0.9"}, "attached_boundary is '0.9'; expected a number"),
        ({"two_models": 1}, "two_models is 1; expected true or false"),
        ({"schedule": ["auto"]}, "schedule is ['auto']; expected text"),
        ({"model": {"a": 1}}, "model is {'a': 1}; expected text"),
        ({"detail": 3}, "detail is 3; expected text"),
        ({"other": 3, "<b>": 1}, "Unknown names: <b>, other. Expected: schedule"),
    ],
)
def test_what_is_not_typed_is_refused(server, changes, reason):
    status, answer = post(server, json.dumps({**SETTINGS, **changes}).encode())
    assert status == 400 and answer["error"].startswith(reason)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "The body is not JSON"),
        (b"{", 400, "The body is not JSON"),
        (b"\xff\xfe\x00", 400, "The body is not JSON"),
        (b"[" * 30_000, 400, "The body is not JSON"),
        (b"1" * 5000, 400, "The body is not JSON"),
        (b"[]", 400, "The body is []; expected an object with schedule"),
        (b"null", 400, "The body is None"),
        (b"{}", 400, "schedule is None; expected text"),
        (b" " * 33_000, 413, "The body is larger than 32768 bytes"),
        (b"x" * 10**5, 413, "The body is larger than 32768 bytes"),
    ],
    ids=range(10),
)
def test_what_is_no_question_is_refused(server, body, status, reason):
    found, answer = post(server, body)
    assert found == status and answer["error"].startswith(reason)


def test_a_thousand_hostile_bodies_end_nothing(server):
    random = Random(0)
    values = [
        None,
        True,
        False,
        0,
        -1,
        1,
        6,
        10**4,
        10**30,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "auto",
        "generic",
        "\ud800",
        "\0",
        "a" * 300,
        "../" * 9 + "etc/passwd.safetensors",
        "CON.safetensors",
        "\x1b[31m",
        "<img src=x>",
        [],
        ["auto"],
        [[[]]],
        {},
        {"a": {}},
        *SMALL.values(),
        RELEASE,
    ]
    good = json.dumps({**SETTINGS, **SMALL})
    bodies = []
    for _ in range(500):
        names = random.sample(
            [*SETTINGS, *SMALL, "attached_boundary", "stacked", "sampler_name", "other"], random.randint(1, 4)
        )
        changed = {name: random.choice(values) for name in names}
        bodies.append(json.dumps({**SETTINGS, **SMALL, **changed}).encode())
    for _ in range(400):
        place, width = random.randrange(len(good)), random.randint(0, 20)
        bodies.append(good[:place].encode() + random.randbytes(width) + good[place + random.randint(0, 20) :].encode())
    bodies += [random.randbytes(random.randint(0, 2000)) for _ in range(100)]
    statuses = Counter(post(server, body)[0] for body in bodies)
    assert set(statuses) == {200, 400} and statuses.total() == 1000
    assert ask(server, model=RELEASE)["boundary"] == WAN.preset.boundary


def test_files_are_read_beside_the_thread_that_answers(module, monkeypatch):
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    route, routes = module("nodes.host.sampling.plan_route"), web.RouteTableDef()
    monkeypatch.setattr(route, "server", lambda: SimpleNamespace(routes=routes))
    monkeypatch.setattr(route, "foresee", lambda asked: {"thread": threading.get_ident()})
    route.add_route()

    async def ask_it():
        app = web.Application()
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            answer = await client.post(route.ROUTE, json=SETTINGS)
            return (await answer.json())["thread"]

    assert asyncio.run(ask_it()) != threading.get_ident()


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(max_size=20),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=strategies.data())
def test_what_is_taken_is_typed(module, data):
    route, errors = module("nodes.host.sampling.plan_route"), module("dcm_core.errors")
    names = strategies.sampled_from(sorted(route.FIELDS)) | strategies.text(max_size=5)
    question = {**SETTINGS, **data.draw(strategies.dictionaries(names, VALUES, max_size=3))}
    try:
        asked = route.parse(data.draw(strategies.just(json.dumps(question).encode()) | strategies.binary(max_size=50)))
    except errors.DCMError as error:
        assert str(error).encode()
        return
    assert set(route.REQUIRED) <= set(asked) <= set(route.FIELDS)
    for row in asked.pop("rows", ()):
        assert row.keys() == route.ROW.keys()
    for name, value in asked.items():
        kind = route.FIELDS[name]
        assert type(value) in ((int, float) if kind is float else (kind,))
        assert isinstance(value, str) or -10_000 <= value <= 10_000
